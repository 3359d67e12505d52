"""The gateway on the box's one port: it holds requests while a preset starts, and can start the one they name."""
