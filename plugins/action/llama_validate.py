"""Check the data of every host of a group before any host is contacted. No connection is opened."""

from __future__ import annotations

from typing import Any

from ansible.plugins.action import ActionBase


class ActionModule(ActionBase):
    """`llama_validate: {group: llama_hosts}`."""

    TRANSFERS_FILES = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Placeholder until the checks are in."""
        return {"changed": False}
