"""What tests of several kinds share: the repository's root, running a playbook, a command on a host.

Import it as `from tests.support import ROOT, PlaybookRun`; conftest.py offers the same as fixtures.
"""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from scripts._inventory import Host, load
from scripts._llm_box import LlmBox

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "build" / "figures"
BIN = Path(sys.executable).parent
LAB_INVENTORY = ROOT / "inventory" / "lab"
LLM, OCR, CLIENT = "lab-llm", "lab-ocr", "lab-client"

_RECAP = re.compile(r"^(?P<host>\S+)\s+: (?P<counts>ok=\d+\s.*)$", re.MULTILINE)
_KILL_GRACE_S = 5


def lab_name() -> str:
    """The lab that LAB_NAME chooses."""
    return os.environ.get("LAB_NAME", "lab")


def environment(**extra: str) -> dict[str, str]:
    """Environment of programs under test: this venv first on PATH, the repository's settings, no colour."""
    inherited = {name: value for name, value in os.environ.items() if name != "ANSIBLE_FORCE_COLOR"}
    return {
        **inherited,
        "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
        "ANSIBLE_NOCOLOR": "1",
        "PYTHONUNBUFFERED": "1",
        **extra,
    }


@dataclass(frozen=True)
class Run:
    """One finished program: exit code, what it printed, how long it took."""

    argv: tuple[str, ...]
    rc: int
    stdout: str
    stderr: str
    seconds: float

    def check(self) -> Run:
        """Return self; fail the test with the end of the output unless the exit code is 0."""
        assert self.rc == 0, f"{' '.join(self.argv)}\nexit code {self.rc}\n{self.tail()}"
        return self

    def tail(self, lines: int = 60) -> str:
        """The end of both outputs, for the message of an assertion."""
        return "\n".join([*self.stdout.splitlines()[-lines:], *self.stderr.splitlines()[-lines:]])


@dataclass(frozen=True)
class PlaybookRun(Run):
    """One finished ansible-playbook."""

    @property
    def recap(self) -> dict[str, dict[str, int]]:
        """The play recap: {host: {ok, changed, unreachable, failed, skipped, rescued, ignored}}."""
        return parse_recap(self.stdout)

    @property
    def changed(self) -> int:
        """Changed tasks, over all hosts."""
        return sum(counts["changed"] for counts in self.recap.values())

    def check(self) -> PlaybookRun:
        """Return self; fail the test unless it ended with 0 and touched at least one host."""
        super().check()
        assert self.recap, f"{' '.join(self.argv)}: no host in the recap\n{self.tail()}"
        return self


def parse_recap(stdout: str) -> dict[str, dict[str, int]]:
    """The last play recap in what ansible-playbook printed."""
    _, _, recap = stdout.rpartition("PLAY RECAP")
    return {
        match["host"]: {name: int(count) for name, count in re.findall(r"(\w+)=(\d+)", match["counts"])}
        for match in _RECAP.finditer(recap)
    }


def run(
    *argv: str | Path,
    timeout: float = 60,
    env: Mapping[str, str] | None = None,
    stdin: str = "",
    cwd: Path = ROOT,
) -> Run:
    """Run a program from the repository's root; its whole process group dies at the timeout (seconds).

    Raises subprocess.TimeoutExpired with what it had printed.
    """
    words = tuple(str(word) for word in argv)
    rc, stdout, stderr, seconds = _run(words, timeout, env, stdin, cwd)
    return Run(words, rc, stdout, stderr, seconds)


def ansible_playbook(
    *args: str | Path,
    timeout: float = 600,
    inventory: Path = LAB_INVENTORY,
    env: Mapping[str, str] | None = None,
) -> PlaybookRun:
    """`ansible-playbook -i inventory ARGS` of this venv. Raises subprocess.TimeoutExpired (seconds)."""
    words = (str(BIN / "ansible-playbook"), "-i", str(inventory), *(str(word) for word in args))
    rc, stdout, stderr, seconds = _run(words, timeout, env, "", ROOT)
    return PlaybookRun(words, rc, stdout, stderr, seconds)


def on_host(host: str, command: str, *, timeout: float = 60, stdin: str = "") -> Run:
    """Run a shell command on a lab host as its ordinary sudo user; write `sudo …` where root is needed."""
    return run(sys.executable, "-m", "lab", "ssh", host, command, timeout=timeout, stdin=stdin)


@cache
def expected_host() -> Host:
    """What inventory/lab, with the roles' defaults, says of the LLM host."""
    (host,) = load(LAB_INVENTORY, limit=LLM)
    return host


@cache
def expected() -> LlmBox:
    """What the LLM host must look like: the values that tests on hosts compare with."""
    return LlmBox.of(expected_host().variables)


def keep_figures(name: str, what: str, seconds: Sequence[float], bar_s: float) -> str:
    """Write measured times beside the bar they have to meet into build/figures/NAME.json; their line of text.

    A test reports how long something took and does not judge it: another machine is slower.
    """
    found = {
        "what": what,
        "unit": "s",
        "count": len(seconds),
        "min": round(min(seconds), 2),
        "median": round(statistics.median(seconds), 2),
        "max": round(max(seconds), 2),
        "bar": bar_s,
        "cpus": os.cpu_count(),
        "commit": run("git", "rev-parse", "--short=12", "HEAD").stdout.strip() or None,
    }
    FIGURES.mkdir(parents=True, exist_ok=True)
    (FIGURES / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    spread = f"{found['min']:.2f}/{found['median']:.2f}/{found['max']:.2f} s (min/median/max)"
    return f"{what}: {spread} of {len(seconds)}, bar {bar_s:g} s"


def _run(
    words: tuple[str, ...],
    timeout: float,
    env: Mapping[str, str] | None,
    stdin: str,
    cwd: Path,
) -> tuple[int, str, str, float]:
    started = time.monotonic()
    with subprocess.Popen(
        words,
        cwd=cwd,
        env=environment(**(env or {})),
        text=True,
        start_new_session=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            stdout, stderr = process.communicate(stdin, timeout=timeout)
        except BaseException as error:
            stop_group(process)
            if isinstance(error, subprocess.TimeoutExpired):
                stdout, stderr = process.communicate()
                raise subprocess.TimeoutExpired(words, timeout, stdout, stderr) from None
            raise
    return process.returncode, stdout, stderr, time.monotonic() - started


def stop_group(process: subprocess.Popen[str]) -> None:
    """End a program that was started in its own session, and everything it started: SIGTERM, then SIGKILL."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, signum)
            process.wait(_KILL_GRACE_S)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
