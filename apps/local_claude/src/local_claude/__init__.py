"""Claude Code on a local model. Standard library only until a backend has to start a server of its own."""
