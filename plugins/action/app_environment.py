"""Action plugin of the module app_environment: the wheelhouse for the host, and its way there.

On a host where nothing is to be done it calls the module once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase  # type: ignore[import-untyped]

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.build_wheelhouse import SYSTEMS, App, BuildError, Target, cache_root, ensure


def target_of(facts: dict[str, Any]) -> Target:
    """What a host's facts ask for. Raises BuildError."""
    try:
        version, machine, system = facts["python"]["version"], facts["machine"], facts["system"]
    except KeyError:
        raise BuildError("the host's facts are not known; fix: gather_facts: true in the play") from None
    if system not in SYSTEMS:
        raise BuildError(f"the host is {system}; wheelhouses are made for {' and '.join(SYSTEMS)}")
    return Target(f"{version['major']}.{version['minor']}", machine, system)


class ActionModule(ActionBase):  # type: ignore[misc]
    """Compares; where something differs, and this is no dry run, ships the wheelhouse and installs it."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """The outcome, with `reason`: why the environment was not the wanted one."""
        super().run(tmp, task_vars)
        variables = task_vars or {}
        if self._task.args.get("state") == "absent":
            return self._call(variables)
        try:
            target = target_of(variables.get("ansible_facts") or {})
            wheelhouse = ensure(App(str(self._task.args.get("app"))), target, cache_root())
        except BuildError as error:
            return {"failed": True, "msg": str(error)}
        archive = wheelhouse.pop("archive")
        result = self._call(variables, wheelhouse=wheelhouse)
        if result.get("failed") or not result["reason"]:
            return result
        if self._task.check_mode:
            return {**result, "changed": True}
        folder = self._make_tmp_path()
        there = self._connection._shell.join_path(folder, "wheelhouse.tar")
        self._transfer_file(archive, there)
        self._fixup_perms2((folder, there))
        return self._call(variables, wheelhouse=wheelhouse, archive=there)

    def _call(self, variables: dict[str, Any], **more: Any) -> dict[str, Any]:
        result: dict[str, Any] = self._execute_module(
            module_name="app_environment", module_args={**self._task.args, **more}, task_vars=variables
        )
        return result
