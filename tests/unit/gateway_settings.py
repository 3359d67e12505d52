"""Settings of the gateway for tests, which change what they are about."""

from __future__ import annotations

from llmbox.gateway.settings import Settings


def settings(**changed: object) -> Settings:
    """Settings that hold nothing up."""
    return Settings.model_validate(
        {
            "hold_timeout": 5.0,
            "commit_after": 5.0,
            "drain_timeout": 5.0,
            "switch_policy": "always",
            "min_dwell": 0.0,
            "default_preset": "",
            "model_names": {},
            "queue_limit": 10,
            "queue_limit_per_key": 10,
            "idle_unload": 0.0,
            "prefetch": True,
            "max_body": 100_000,
            "max_buffered": 1_000_000,
            "max_connections": 100,
            "request_timeout": 5.0,
            "shutdown_grace": 1.0,
            "networks": [],
            "keys_file": "/nowhere",
            "state_dir": "/nowhere",
            "audit_file": "/nowhere",
            "audit_max_size": 100_000,
            "audit_keep": 1,
            "audit_content": False,
            **changed,
        }
    )
