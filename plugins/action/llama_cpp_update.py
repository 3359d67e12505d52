"""Compare the releases that were built beside the current ones, keep or reject each, and say why.

`builds` is what role llama_cpp registered, with `llama_cpp_activate: false`; `variables` those of
scripts/_shown.yml. The comparison runs on this machine, against the box's gateway; what comes of it is one
phase of the module llama_cpp_build on the box. The task fails when an old release stays.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase  # type: ignore[import-untyped]

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "apps/llama_common/src"))

from llama_common.plain import plain
from llama_common.problems import InventoryError

from scripts._ask_host import Unreachable
from scripts._compare import compare
from scripts._inventory import Host
from scripts._llm_box import LlmBox
from scripts._verdict import Verdict, judge

WATCH_S = 1.0
AGAIN = "with that put right run this playbook again"


class ActionModule(ActionBase):  # type: ignore[misc]
    """`llama_cpp_update: {builds: …, variables: …, root: …, user: …, keep_releases: …}`."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _VALID_ARGS = frozenset({"builds", "variables", "root", "user", "keep_releases"})

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """The verdict on each build that has a new release; failed when one of them is not kept."""
        super().run(tmp, task_vars)
        self._vars = task_vars or {}
        args = plain(self._task.args)
        builds = {
            name: entry
            for name, entry in args["builds"].items()
            if entry["current"] and (entry["current"] != entry["release"] or entry["still_served"])
        }
        result: dict[str, Any] = {"changed": False, "verdicts": {}}
        if not builds:
            self._say("nothing new: every build runs the release that the inventory asks for")
            return result
        new, owed, lines = dict[str, Any](), dict[str, Any](), list[str]()
        for name, entry in builds.items():
            if entry["without_gateway"]:  # the role has not built it either
                lines.append(f"{name}: {entry['current'][:12]} stays: {entry['without_gateway']}")
            elif entry["current"] != entry["release"]:
                new[name] = entry
            else:  # what a run left that died after it had made a release current, and before the restart
                owed[name] = entry
        if self._task.check_mode:
            self._foretell(new, owed)
            result["changed"] = bool(new or owed)
        else:
            lines += self._do(args, new, owed, result)
        if lines:
            result.update(failed=True, msg="; ".join(lines))
        return result

    def _foretell(self, new: Mapping[str, Any], owed: Mapping[str, Any]) -> None:
        for name, entry in owed.items():
            self._say(f"would restart what serves with {name}: {entry['still_served'][0][:12]} still does")
        for name, entry in new.items():
            asked, current = str(entry["release"] or entry["commit"]), str(entry["current"])
            self._say(f"would compare {name} {short(asked, current)} with {short(current, asked)}")

    def _do(
        self,
        args: Mapping[str, Any],
        new: Mapping[str, Any],
        owed: Mapping[str, Any],
        result: dict[str, Any],
    ) -> list[str]:
        """Update each build, and put the outcome into `result`. Returns the lines of what failed."""
        lines = []
        for name, entry in owed.items():
            done = self._module(args, "accept", name, entry["current"])
            if done.get("failed"):
                old = entry["still_served"][0]
                verdict, line = self._not_accepted(name, old, entry["current"], done)
                result["verdicts"][name] = shown(verdict)
                result["changed"] = True
                lines.append(line)
            elif done.get("restarted"):
                result["changed"] = True
                self._say(f"{name}: {entry['current'][:12]} was current, and serves {done['restarted']} now")
        with dying_with_the_play():
            for name, entry in new.items():
                verdict, line = self._update(args, name, entry)
                result["verdicts"][name] = shown(verdict)
                result["changed"] = True
                if line:
                    lines.append(line)
        return lines

    def _update(self, args: Mapping[str, Any], name: str, entry: Mapping[str, Any]) -> tuple[Verdict, str]:
        """Compare one build, and keep or reject its new release. The line is that of a failure, or empty."""
        old, new = str(entry["current"]), str(entry["release"])
        self._say(f"{name}: comparing {short(new, old)} with {short(old, new)}")
        try:
            variables = args["variables"]
            host = Host(self._vars["inventory_hostname"], variables=variables)
            verdict = judge(compare(host, LlmBox.of(variables), name, (old, new), self._say))
        except (Unreachable, InventoryError) as error:
            return Verdict("undecided", (str(error),)), f"{name}: not compared, {short(old)} stays: {error}"
        self._tell(name, verdict)
        if verdict.word == "keep":
            done = self._module(args, "accept", name, new)
            if not done.get("failed"):
                served = done.get("restarted")
                self._say(f"{name}: {short(new, old)} is current{f' and serves {served}' if served else ''}")
                return verdict, ""
            return self._not_accepted(name, old, new, done)
        if not verdict.compared or not verdict.measured:
            takes = "fix: run site.yml, which takes the new release without a comparison"
            then = AGAIN if verdict.compared else takes
            why = verdict.reasons[0]
            return verdict, f"{name}: undecided: {short(old)} stays, nothing is rejected: {why}; {then}"
        return self._reject(args, name, old, new, verdict)

    def _not_accepted(self, name: str, old: str, new: str, done: Mapping[str, Any]) -> tuple[Verdict, str]:
        """What came of a release that was to be current and to serve, and did not; as _update."""
        why = str(done["msg"])
        if done.get("tried"):  # the box has rejected it
            verdict = Verdict("roll back", (why,))
            return verdict, stays(name, old, new, verdict)
        # The guard, another switch, a full disk: nothing that it has done.
        line = f"{name}: undecided, nothing is rejected: {why}; {AGAIN}"
        return Verdict("undecided", (why,), measured=False), line

    def _reject(
        self, args: Mapping[str, Any], name: str, old: str, new: str, verdict: Verdict
    ) -> tuple[Verdict, str]:
        """Mark a release on the box, or site.yml would make it current; as _update."""
        done = self._module(args, "reject", name, new, reason=verdict.reasons[0])
        marked = f"; it could not be marked: {done['msg']}" if done.get("failed") else ""
        return verdict, stays(name, old, new, verdict) + marked

    def _tell(self, name: str, verdict: Verdict) -> None:
        self._say(f"{name}: {verdict.word}")
        for reason in verdict.reasons:
            self._say(f"  {reason}")

    def _module(self, args: Mapping[str, Any], phase: str, build: str, release: str, **more: str) -> Any:
        """One phase of llama_cpp_build on the box."""
        arguments = {
            "builds": {},
            "root": args["root"],
            "user": args["user"],
            "keep_releases": args["keep_releases"],
            "serving_user": args["variables"]["llm_user_name"],
            "phase": phase,
            "build": build,
            "release": release,
            **more,
        }
        return self._execute_module(
            module_name="llama_cpp_build", module_args=arguments, task_vars=self._vars
        )

    def _say(self, line: str) -> None:
        self._display.display(f"  [{self._vars.get('inventory_hostname', '')}] {line}")


@contextmanager
def dying_with_the_play() -> Iterator[None]:
    """End this process when its parent has ended: a killed ansible-playbook leaves its workers.

    With it the connection ends that holds the trial, and with that the trial.
    """
    controller, over = os.getppid(), threading.Event()

    def watch() -> None:
        while not over.wait(WATCH_S):
            if os.getppid() != controller:
                os._exit(1)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def shown(verdict: Verdict) -> dict[str, Any]:
    """A verdict in the task's result."""
    return {"verdict": verdict.word, "reasons": list(verdict.reasons)}


def short(release: str, other: str = "") -> str:
    """A release by its commit; with the hash of what it was built with, beside another one of that commit."""
    commit, dash, built_with = release.partition("-")
    return f"{commit[:12]}{dash}{built_with}" if commit == other.partition("-")[0] else commit[:12]


def stays(build: str, old: str, new: str, verdict: Verdict) -> str:
    """The line about a build whose old release stays: why, and what to do with the inventory."""
    reasons: Sequence[str] = verdict.reasons[:1]
    commit, data = old.partition("-")[0], f"llama_cpp_builds.{build}"
    back = f"commit {commit} of {data} back"
    if commit == new.partition("-")[0]:
        back = f"back what was changed, cmake_options of {data} or the host's compiler, CUDA or processor"
    return (
        f"{build}: {verdict.word}: {short(old, new)} stays, {short(new, old)} is rejected:"
        f" {' '.join(reasons)}; fix: put {back} (site.yml refuses the new one), or run this playbook again"
    )
