"""The HTTP service: the Gemini-style envelope, the pole-text endpoint, jobs, health, metrics, keys."""
