"""Action plugin of the module llama_cpp_build: all builds of a host in one task, and their percent.

On a host where nothing is to be done it calls the module once. A build outlives the play that started it: the
next play finds its unit and follows it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleConnectionFailure  # type: ignore[import-untyped]
from ansible.module_utils.parsing.convert_bool import boolean  # type: ignore[import-untyped]
from ansible.plugins.action import ActionBase  # type: ignore[import-untyped]

# A connection that breaks and comes back within this time does not end the play; the build runs on anyway.
CONNECTION_PATIENCE_S = 120
RECONNECT_PAUSE_S = 5
# A line when the phase changed, when this many percent were added, or when nothing was said for so long.
SAY_EVERY_PERCENT = 5
SAY_EVERY_S = 30
# A unit that another play had started may fail; after a start of our own there is no second try.
MAX_STARTS = 2


def progress_line(build: str, commit: str, step: dict[str, Any]) -> str:
    """'llama.cpp upstream 3f2a1b0c9d8e: 42 % (120/285), 1 min 40 s' from one answer of the follow phase."""
    where = step.get("phase", "start")
    if percent(step) is not None:
        where = f"{percent(step)} % ({step['done']}/{step['total']})"
    return f"llama.cpp {build} {commit[:12]}: {where}, {duration(step.get('elapsed', 0))}"


def percent(step: dict[str, Any]) -> int | None:
    """Whole percent of the compile phase; None in the others."""
    return 100 * step["done"] // step["total"] if step.get("total") else None


def duration(seconds: float) -> str:
    """'40 s', '1 min 40 s', '1 h 5 min'."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


class Reporter:
    """Decides which of the many answers of a running build are worth a line."""

    def __init__(self) -> None:
        self._phase: str | None = None
        self._percent = 0
        self._at = 0.0

    def worth(self, step: dict[str, Any], now: float) -> bool:
        """Whether to print this step at this moment (seconds of a monotonic clock)."""
        done = percent(step) or 0
        if (
            step.get("phase") == self._phase
            and done < self._percent + SAY_EVERY_PERCENT
            and now < self._at + SAY_EVERY_S
        ):
            return False
        self._phase, self._percent, self._at = step.get("phase"), done, now
        return True


def unused_line(root: str, unused: list[dict[str, Any]], remove: bool) -> str:
    """What is said of builds that the data does not name and that stay."""
    names = ", ".join(f"{entry['build']} ({entry['bytes'] / 2**30:.1f} GiB)" for entry in unused)
    fix = (
        "a process still runs it: lmswitch off, then again"
        if remove
        else "llama_cpp_remove_unused: true removes it"
    )
    return f"{root}: llama_cpp_builds does not name {names}; {fix}"


def difference(
    plan: list[dict[str, Any]], removed: Sequence[str] = (), *, deferred: bool = False
) -> dict[str, str]:
    """What --diff shows: the current release of each build before and after, and what is removed.

    `deferred`: what is built does not become current.
    """

    def text(key: str) -> str:
        return "".join(f"{entry['build']}: {entry[key] or 'none'}\n" for entry in plan)

    after = [{**entry, "release": entry["release"] or f"{entry['commit']}-…"} for entry in plan]
    if deferred:
        after = [{**entry, "release": entry["current"] or entry["release"]} for entry in after]
    return {
        "before_header": "current llama.cpp releases",
        "after_header": "current llama.cpp releases",
        "before": text("current") + "".join(f"{name} (unused)\n" for name in removed),
        "after": "".join(f"{entry['build']}: {entry['release']}\n" for entry in after),
    }


def left_out(entry: dict[str, Any]) -> bool:
    """Whether a build is to be compared, and something beside the gateway runs it: it stays as it is."""
    to_compare = entry["current"] and (entry["current"] != entry["release"] or entry["still_served"])
    return bool(to_compare and entry["without_gateway"])


class StepFailed(Exception):
    """The module or a build failed; carries the result to hand back."""

    def __init__(self, result: dict[str, Any]) -> None:
        super().__init__(result.get("msg", ""))
        self.result = result


class ActionModule(ActionBase):  # type: ignore[misc]
    """Runs the module's phases: probe; where something is to be done prepare, start, follow, activate.

    A task that names a phase has only that one run.
    """

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """The outcome for all builds; `changed` when a package, the tool, a release or a link changed."""
        super().run(tmp, task_vars)
        self._vars = task_vars or {}
        self._tool = ""
        try:
            if "phase" in self._task.args:
                return self._call(self._task.args["phase"])
            self._tool = self._read_tool()
            return self._converge()
        except StepFailed as failed:
            return failed.result

    def _converge(self) -> dict[str, Any]:
        probed = self._call("probe")
        remove = boolean(self._task.args.get("remove_unused", False))
        deferred = not boolean(self._task.args.get("activate", True))
        removing = [entry["build"] for entry in probed["unused"] if remove and not entry["in_use"]]
        staying = [entry for entry in probed["unused"] if entry["build"] not in removing]
        result = {
            "changed": probed["changed"],
            "builds": {entry["build"]: entry for entry in probed["plan"]},
            "installed": probed["missing_packages"],
            "unused": [entry["build"] for entry in staying],
            "removed": removing,
            "diff": difference(probed["plan"], removing, deferred=deferred),
        }
        if staying:
            self._display.warning(unused_line(self._task.args.get("root", ""), staying, remove))
        to_do = [
            entry
            for entry in probed["plan"]
            if entry["action"] != "none" and not (deferred and left_out(entry))  # llama_cpp_update tells it
        ]
        if self._task.check_mode:
            if probed["missing_packages"]:
                self._say(f"would install {', '.join(probed['missing_packages'])}")
            if removing:
                self._say(f"would remove {', '.join(removing)}")
            for entry in to_do:
                self._say(
                    f"would {entry['action']} {entry['build']} {entry['commit'][:12]}: {entry['reason']}"
                )
            return result
        if not probed["changed"]:
            return result
        if probed["missing_packages"]:
            self._install(probed["missing_packages"])
        self._call("prepare")
        if removing:  # before the free space is looked at
            self._say(f"removing {', '.join(removing)}, no longer in llama_cpp_builds")
            self._call("remove")
        for entry in to_do:
            if entry["action"] == "build":
                self._build(entry)
            self._call("activate", build=entry["build"])
        plan = self._call("probe")["plan"]
        after = {entry["build"]: entry["current"] for entry in plan}
        before = {entry["build"]: entry["current"] for entry in probed["plan"]}
        result["builds"] = {entry["build"]: entry for entry in plan}
        result["diff"] = difference(
            [{**entry, "current": before[entry["build"]]} for entry in plan], removing, deferred=deferred
        )
        result["replaced"] = {name: before[name] for name in after if after[name] != before[name]}
        return result

    def _build(self, entry: dict[str, Any]) -> None:
        """Start one build, or find it running, and follow it to its end."""
        name, commit = entry["build"], entry["commit"]
        reporter = Reporter()
        controller = os.getppid()
        for attempt in range(1, MAX_STARTS + 1):
            started = self._call("start", build=name)
            for unit in started.get("stopped", []):
                self._say(f"stopped {unit}: the inventory no longer asks for it")
            if started["found_running"]:
                self._say(f"llama.cpp {name} {commit[:12]}: following {started['unit']}, which runs already")
            while True:
                if os.getppid() != controller:  # a killed ansible-playbook leaves its workers
                    raise StepFailed({"failed": True, "msg": "the play was killed; the build goes on"})
                step = self._follow(name)
                if step["state"] != "running":
                    break
                if reporter.worth(step, time.monotonic()):
                    self._say(progress_line(name, commit, step))
                time.sleep(float(self._task.args.get("follow_interval", 3)))
            if step["state"] == "ready":
                self._say(f"llama.cpp {name} {commit[:12]}: built, {started['release']}")
                return
            if not started["found_running"] or attempt == MAX_STARTS:
                raise StepFailed(
                    {
                        "failed": True,
                        "msg": f"build {name} ({commit[:12]}) failed: {step['reason']};"
                        f" all of it: journalctl -u {started['unit']}",
                        "journal": step["journal"],
                    }
                )

    def _follow(self, build: str) -> dict[str, Any]:
        """One look at a build; waits a while for a host whose connection broke."""
        deadline = time.monotonic() + CONNECTION_PATIENCE_S
        while True:
            try:
                return self._call("follow", build=build)
            except AnsibleConnectionFailure:
                if time.monotonic() > deadline:
                    raise
                time.sleep(RECONNECT_PAUSE_S)
                self._connection.reset()

    def _install(self, packages: list[str]) -> None:
        self._say(f"installing {', '.join(packages)}")
        arguments = {
            "name": packages,
            "state": "present",
            "install_recommends": False,
            "update_cache": True,
        }
        self._checked(
            self._execute_module(
                module_name="ansible.builtin.apt", module_args=arguments, task_vars=self._vars
            )
        )

    def _call(self, phase: str, **more: Any) -> dict[str, Any]:
        """One phase on the host. Raises StepFailed with the module's own line."""
        arguments = {**self._task.args, "tool": self._tool, "phase": phase, **more}
        return self._checked(
            self._execute_module(module_name="llama_cpp_build", module_args=arguments, task_vars=self._vars)
        )

    def _checked(self, result: dict[str, Any]) -> dict[str, Any]:
        if result.get("failed") or result.get("unreachable"):
            raise StepFailed(result)
        return result

    def _read_tool(self) -> str:
        path = self._find_needle("files", "llama_build.py")
        return Path(path).read_text(encoding="utf-8")

    def _say(self, line: str) -> None:
        self._display.display(f"  [{self._vars.get('inventory_hostname', '')}] {line}")
