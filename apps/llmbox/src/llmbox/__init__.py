"""What runs on the LLM box: `lmswitch`, systemd control, the llama-server client, the readiness wait."""
