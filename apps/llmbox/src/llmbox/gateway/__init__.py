"""The gateway on the box's one port: holds requests while a preset starts, can start the one they name."""
