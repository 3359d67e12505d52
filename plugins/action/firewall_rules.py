"""Action plugin of the module firewall_rules: rules are kept only when a new connection comes through."""

from __future__ import annotations

import time
from typing import Any

from ansible.errors import AnsibleConnectionFailure  # type: ignore[import-untyped]
from ansible.plugins.action import ActionBase  # type: ignore[import-untyped]

# How long the host may take to answer again once the former rules are back.
RETURN_PATIENCE_S = 20
RETRY_PAUSE_S = 2
# The module's own words for a connection that came, but after the former rules.
TOO_LATE = "too late, the former rules are back"


class ActionModule(ActionBase):  # type: ignore[misc]
    """Apply over the connection there is, confirm over a new one; else wait for the former rules."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """The result of the module; failed when no new connection came through."""
        super().run(tmp, task_vars)
        began = time.monotonic()
        applied = self._phase("apply", task_vars)
        if applied.get("failed") or not applied.pop("pending", False):
            return applied
        # Ends the shared connection: what comes next is a new one. The host compares the two.
        self._connection.reset()
        try:
            confirmed = self._phase("confirm", task_vars, applied_over=applied["connection"])
            if not confirmed.get("failed"):
                return applied
            reason = str(confirmed["msg"])
        except AnsibleConnectionFailure:
            reason = TOO_LATE
        if reason == TOO_LATE:
            source = applied["connection"].partition(" ")[0]
            reason = f"no new connection came through from {source}; fix: firewall_allow.ssh must let it in"
        return {
            **applied,
            "changed": False,
            "failed": True,
            "msg": f"{reason}; {self._gone_back(began, task_vars)}",
        }

    def _gone_back(self, began: float, task_vars: dict[str, Any] | None) -> str:
        """Wait until the host has its former rules again; what became of it in words."""
        # The attempt to confirm may have taken longer than the host's timer: it is looked at in any case.
        returned = began + float(self._task.args["confirm_timeout"])
        deadline = max(returned, time.monotonic()) + RETURN_PATIENCE_S
        while time.monotonic() < deadline:
            try:
                self._connection.reset()
                if not self._phase("look", task_vars)["pending"]:
                    return f"after {time.monotonic() - began:.0f} s the host has its former rules again"
            except AnsibleConnectionFailure:
                pass
            time.sleep(RETRY_PAUSE_S)
        return "the host does not answer, though its former rules should be back by now"

    def _phase(self, phase: str, task_vars: dict[str, Any] | None, applied_over: str = "") -> dict[str, Any]:
        arguments = {**self._task.args, "phase": phase, "applied_over": applied_over}
        result: dict[str, Any] = self._execute_module(
            module_name="firewall_rules", module_args=arguments, task_vars=task_vars
        )
        return result
