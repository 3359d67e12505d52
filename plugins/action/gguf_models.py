"""Action plugin of the module gguf_models: starts the download on the host and shows its percent while it
runs.
"""

from __future__ import annotations

import os
import time
from typing import Any

from ansible.errors import AnsibleConnectionFailure  # type: ignore[import-untyped]
from ansible.plugins.action import ActionBase  # type: ignore[import-untyped]

# A connection that breaks and comes back within this time does not end the play; the download runs on anyway.
CONNECTION_PATIENCE_S = 120
RECONNECT_PAUSE_S = 5


def progress_line(progress: dict[str, Any]) -> str:
    """'qwen3-coder-30b-q4_k_m.gguf: 42 % (7.8/18.6 GB), 85 MB/s, 2 min left' from what the download
    reports.
    """
    if not progress.get("total_bytes"):
        return "starting"
    done, total, rate = progress["done_bytes"], progress["total_bytes"], progress["bytes_per_s"]
    unit, divisor = ("GB", 1e9) if total >= 1e9 else ("MB", 1e6)
    name = (
        progress["file"]
        if progress["count"] == 1
        else f"{progress['file']} ({progress['index']} of {progress['count']})"
    )
    line = f"{name}: {100 * done // total} % ({done / divisor:.1f}/{total / divisor:.1f} {unit})"
    if progress["phase"] == "waiting":
        return f"{line}, connection lost, trying again"
    if rate <= 0:
        return f"{line}, {progress['phase']}"
    verb = "" if progress["phase"] == "downloading" else f" {progress['phase']}"
    return (
        f"{line}, {rate / 1e6:.{0 if rate >= 1e7 else 1}f} MB/s{verb}, {duration((total - done) / rate)} left"
    )


def duration(seconds: float) -> str:
    """'40 s', '12 min', '1.5 h'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class ActionModule(ActionBase):  # type: ignore[misc]
    """Runs the module's steps: begin once, then follow until the download has ended."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """The merged result of all steps; `changed` when any of them changed something."""
        super().run(tmp, task_vars)
        host = (task_vars or {}).get("inventory_hostname", "")
        result: dict[str, Any] = self._step("begin", task_vars)
        if result.get("changed"):
            self._display.display(f"  [{host}] {result['msg']}")
        shown = ""
        controller = os.getppid()
        while result.pop("running", False) and not result.get("failed"):
            if os.getppid() != controller:  # ansible-playbook was killed; its workers would go on following
                return {**result, "failed": True, "msg": "ansible-playbook is gone; the download goes on"}
            step = self._patiently_follow(task_vars)
            line = progress_line(step.pop("progress", {}))
            if step.get("running") and line != shown:
                shown = line
                self._display.display(f"  [{host}] {line}")
            changed = result.get("changed", False) or step.get("changed", False)
            result = {**result, **step, "changed": changed}
        return result

    def _step(self, step: str, task_vars: dict[str, Any] | None) -> dict[str, Any]:
        arguments = {**self._task.args, "step": step}
        result: dict[str, Any] = self._execute_module(
            module_name="gguf_models", module_args=arguments, task_vars=task_vars
        )
        return result

    def _patiently_follow(self, task_vars: dict[str, Any] | None) -> dict[str, Any]:
        deadline = time.monotonic() + CONNECTION_PATIENCE_S
        while True:
            try:
                return self._step("follow", task_vars)
            except AnsibleConnectionFailure:
                if time.monotonic() >= deadline:
                    raise
                self._connection.reset()
                time.sleep(RECONNECT_PAUSE_S)
