"""What was deployed on this box, and what has become of it since: `llmbox-drift`.

Standard library only, and nothing else of llmbox: scripts/verify_health.py sends this package to boxes whose
environment may be the very thing that changed.
"""
