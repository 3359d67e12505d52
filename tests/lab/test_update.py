"""An update that is interrupted anywhere, and a rollback: the box serves the old or the new release, whole.

A CMake variable that the tree does not know makes a new release, which the compiler cache serves. The verdict
itself is tested with injected timings (tests/unit/test_verdict.py); here nothing depends on a speed.
"""

from __future__ import annotations

import json
import os
import random
import re
import secrets
import select
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from scripts._traffic import clients_beside
from tests.support import (
    BIN,
    LAB_INVENTORY,
    LLM,
    ROOT,
    Run,
    ansible_playbook,
    environment,
    expected,
    expected_host,
    keep_figures,
    on_host,
    run,
)

BUILD, PRESET = "tq3", "smol"
DIRECTORY = f"/opt/llama.cpp/{BUILD}"
UPDATE, ROLLBACK = "playbooks/update_llama_cpp.yml", "playbooks/rollback_llama_cpp.yml"
ROLE, ACCEPT = "tests/lab/llama_cpp.yml", "tests/lab/llama_cpp_accept.yml"
REACHED_S, END_S, SETTLED_S, PLAY_S = 300, 60, 300, 600
BAR_S = 60
SEED = 3


def host(command: str, timeout: float = 60) -> str:
    """What a command prints that must succeed as root on the LLM host."""
    return on_host(LLM, f"sudo sh -c {shlex.quote(command)}", timeout=timeout).check().stdout.strip()


def lmswitch(words: str) -> Run:
    """Run lmswitch as the presets' user."""
    return on_host(LLM, f"sudo -u {expected().user} lmswitch {words}", timeout=180)


def current() -> str:
    """The release that the build's `current` points at."""
    return host(f"readlink {DIRECTORY}/current").removeprefix("releases/")


def completion() -> None:
    """Ask the preset something through the gateway; fails when it does not answer."""
    body = {"model": PRESET, "prompt": "One, two,", "n_predict": 4}
    url = expected().url(expected_host().address)
    answer = httpx.post(f"{url}/completion", json=body, timeout=150, trust_env=False)
    assert answer.status_code == 200 and answer.json()["content"], answer.text


LOOK = f"""
echo "status=$(sudo -u "$1" lmswitch status --json)"
pid=$(sudo -u "$1" XDG_RUNTIME_DIR=/run/user/$(id -u "$1") \\
  systemctl --user show --property=MainPID --value llama-{PRESET}.service)
echo "pid=$pid"
echo "program=$(readlink "/proc/$pid/exe")"
echo "current=$(basename "$(readlink {DIRECTORY}/current)")"
echo "left=$(find /run/user -name '*llmbox-trial*' 2>/dev/null)"
"""


@dataclass(frozen=True)
class Seen:
    """What the preset runs at one moment. Whatever is missing is empty: a look never fails."""

    pid: str
    release: str
    wrong: str  # "" when it is exactly the current release, whole, with its own unit

    @classmethod
    def now(cls) -> Seen:
        """Look at the box."""
        said = host(f"set -- {expected().user}; {LOOK}")
        found = dict(line.partition("=")[::2] for line in said.splitlines())
        try:
            status = json.loads(found["status"])
        except ValueError:
            status = {"state": found["status"]}
        serves = re.fullmatch(rf"{DIRECTORY}/releases/([^/]+)/bin/llama-server", found["program"])
        release = serves[1] if serves else ""
        wrong = ""
        if (status.get("state"), status.get("active")) != ("ready", PRESET):
            wrong = f"lmswitch: {status}"
        elif not release or release != found["current"]:
            wrong = f"{found['program'] or 'nothing'} serves, current is {found['current']}"
        elif found["left"]:
            wrong = f"a trial is left: {found['left']}"
        return cls(found["pid"], release, wrong)


def settled() -> Seen:
    """Wait until what outlives a killed play has ended, and ask the preset something. What serves then."""
    deadline = time.monotonic() + SETTLED_S
    while True:
        seen = Seen.now()
        if not seen.wrong:
            completion()
            if Seen.now() == seen:  # what was killed may have begun a trial only now
                return seen
        assert time.monotonic() < deadline, seen
        time.sleep(1)


@dataclass(frozen=True)
class Data:
    """Extra variables that ask for another release of the build."""

    file: Path

    @classmethod
    def fresh(cls, folder: Path) -> Data:
        """A release that was never built, though nothing in it differs for the compiler."""
        done = run(
            BIN / "ansible",
            "-i",
            LAB_INVENTORY,
            LLM,
            "-m",
            "ansible.builtin.debug",
            "-a",
            "var=llama_cpp_builds",
            env={"ANSIBLE_CALLBACK_RESULT_FORMAT": "json"},
        ).check()
        builds: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])["llama_cpp_builds"]
        builds[BUILD]["cmake_options"]["LLMBOX_TEST"] = secrets.token_hex(4)
        file = folder / f"{secrets.token_hex(4)}.json"
        file.write_text(json.dumps({"llama_cpp_builds": builds, "llama_cpp_follow_interval": 1}))
        return cls(file)

    def arguments(self, playbook: str, **more: str) -> list[str]:
        """The arguments of ansible-playbook."""
        extra = [word for name, value in more.items() for word in ("--extra-vars", f"{name}={value}")]
        return [playbook, "--limit", LLM, "--extra-vars", f"@{self.file}", *extra]


@pytest.fixture
def old(lab: str) -> Iterator[str]:
    """The release of the inventory, which is current and serves; the box is as before afterwards."""
    release = current()
    alone = f"cd {DIRECTORY}/releases && find . -maxdepth 1 -mindepth 1 ! -name {release} -exec rm -rf {{}} +"
    host(f"{alone}; rm -rf ../rejected ../previous")
    lmswitch(PRESET).check()
    yield release
    host(
        "systemctl stop 'llama-build-*'; systemctl reset-failed 'llama-build-*';"  # one that was killed
        f" cd {DIRECTORY} && rm -rf rejected previous"
        f" && ln -sfn releases/{release} .current && mv -T .current current"
    )
    lmswitch(f"--restart {PRESET}").check()
    host(alone)


@pytest.fixture
def new(old: str, tmp_path: Path) -> tuple[Data, str]:
    """Another release that stands beside the current one, and the data that asks for it."""
    data = Data.fresh(tmp_path)
    before = set(host(f"ls {DIRECTORY}/releases").split())
    ansible_playbook(*data.arguments(ROLE, llama_cpp_activate="false"), timeout=PLAY_S).check()
    assert current() == old
    (release,) = set(host(f"ls {DIRECTORY}/releases").split()) - before
    return data, release


def killed_when(arguments: list[str], mark: str, after_s: float, end: str, command: str = "") -> str:
    """Run a play and, `after_s` seconds after it printed `mark`, kill it, or run `command` on the host.

    No later than when it prints `end`. Returns what the play said.
    """
    process = subprocess.Popen(
        [str(BIN / "ansible-playbook"), "-i", str(LAB_INVENTORY), *arguments],
        cwd=ROOT,
        env=environment(),
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout is not None
    said = b""

    def read(wait_s: float) -> bytes:
        """What it says within this time."""
        assert process.stdout is not None
        return (
            os.read(process.stdout.fileno(), 1 << 16)
            if select.select([process.stdout], [], [], wait_s)[0]
            else b""
        )

    try:
        deadline = time.monotonic() + REACHED_S
        while not re.search(mark.encode(), said):
            assert process.poll() is None and time.monotonic() < deadline, said.decode()[-2000:]
            said += read(1)
        deadline = time.monotonic() + after_s
        while time.monotonic() < deadline and end.encode() not in said and process.poll() is None:
            said += read(0.1)
        if command:
            host(command)
            with suppress(subprocess.TimeoutExpired):  # it came too late, and the play goes on to compare
                process.wait(END_S)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
        while got := read(0):
            said += got
        process.stdout.close()
    return said.decode(errors="replace")


BUILDS = r"fetch|configure|\d+ % \("  # a phase may be over before the play looks
COMPARES = "comparing"
# A step is over when the play says so: how long it takes is the machine's.
ENDS = {"build": ": built, ", "comparison": "PLAY RECAP", "change": "PLAY RECAP"}
KILL_BUILD = "systemctl kill --signal=KILL 'llama-build-*'"
# Where the play or the build is killed: (the step, what the play says then, what is killed on the host, or
# the play). Within a step the moment is drawn.
POINTS = [
    ("comparison", COMPARES, ""),
    ("build", BUILDS, KILL_BUILD),
    ("build", "Build llama.cpp", ""),
    ("build", "Build llama.cpp", ""),
    ("build", BUILDS, ""),
    ("build", BUILDS, KILL_BUILD),
    ("comparison", COMPARES, ""),
    ("comparison", COMPARES, ""),
    ("change", "Accept the release", ""),
    ("change", "Accept the release", ""),
]
LENGTH_S = {"build": 10.0, "comparison": 25.0, "change": 4.0}
SAMPLE = 2


def points() -> list[Any]:
    """The points with their moments; beyond the sample they belong to the long run."""
    rng = random.Random(SEED)  # noqa: S311  (moments, not a secret)
    return [
        pytest.param(
            step,
            mark,
            kill,
            round(rng.uniform(0, LENGTH_S[step]), 1),
            id=f"{number}-{step}-{'build' if kill else 'play'}",
            marks=[] if number < SAMPLE else [pytest.mark.long],
        )
        for number, (step, mark, kill) in enumerate(POINTS)
    ]


@pytest.mark.parametrize(("step", "mark", "kill", "after_s"), points())
def test_killed_anywhere_the_box_serves_one_release_whole(
    old: str, tmp_path: Path, request: pytest.FixtureRequest, step: str, mark: str, kill: str, after_s: float
) -> None:
    if step in ("comparison", "change"):  # its build is no part of it
        data, release = request.getfixturevalue("new")
        more = {"build": BUILD, "release": release} if step == "change" else {}
        arguments = data.arguments(ACCEPT if step == "change" else UPDATE, **more)
    else:
        arguments = Data.fresh(tmp_path).arguments(UPDATE)
    before = Seen.now()
    box, address = expected(), expected_host().address
    with clients_beside(box.url(address), [PRESET], clients=2, pause_s=0.3) as traffic:
        said = killed_when(arguments, mark, after_s, ENDS[step], kill)
        killed = time.monotonic()
        seen = settled()
    last = next(line.strip() for line in reversed(said.splitlines()) if line.strip())
    print(f"killed after {last!r}; {seen.release} serves; {traffic.summary()}")
    if step != "change":
        assert seen.release == old
    if COMPARES not in said and step != "change":
        assert seen == before  # a build touches nothing that serves
    # It was always serving: whatever was asked before, during and after it was answered, in time.
    assert not [one for one in traffic.sent if not one.ok], traffic.failed
    assert min(one.began for one in traffic.sent) < killed < max(one.began for one in traffic.sent)
    hold = float(expected_host().variables["llm_gateway_hold_timeout"])
    assert max(one.waited_ms for one in traffic.sent) < 1000 * hold


@pytest.mark.long
@pytest.mark.parametrize("playbook", [UPDATE, "playbooks/llm_server.yml"])
def test_killed_between_the_links_and_the_restart_the_next_run_restarts(
    new: tuple[Data, str], old: str, playbook: str
) -> None:
    """What kill -9 of that step leaves: the new release is current, the one before serves."""
    data, release = new
    for link, target in (("previous", old), ("current", release)):
        host(f"cd {DIRECTORY} && ln -sfn releases/{target} .{link} && mv -T .{link} {link}")
    assert f"{old}/bin/llama-server serves, current is {release}" in Seen.now().wrong
    ansible_playbook(*data.arguments(playbook), timeout=PLAY_S).check()
    assert settled().release == release
    assert ansible_playbook(*data.arguments(playbook), timeout=PLAY_S).check().changed == 0


def drift_of_releases() -> list[str]:
    """What the box itself finds different in its releases."""
    said = host("sudo llmbox-drift check --json || true")
    return [each["path"] for each in json.loads(said)["drift"] if each["path"].startswith(DIRECTORY)]


def test_rolled_back_the_former_release_serves_and_stays(new: tuple[Data, str], old: str) -> None:
    data, release = new
    ansible_playbook(*data.arguments(ACCEPT, build=BUILD, release=release), timeout=PLAY_S).check()
    assert current() == release
    settled()
    assert drift_of_releases() == []

    done = ansible_playbook(ROLLBACK, "--limit", LLM, "--extra-vars", f"build={BUILD}").check()
    print(keep_figures("rollback", "rollback_llama_cpp.yml, wall clock", [done.seconds], BAR_S))
    assert current() == old
    settled()
    assert drift_of_releases() == []

    again = ansible_playbook(ROLLBACK, "--limit", LLM, "--extra-vars", f"build={BUILD}")
    assert again.rc == 2 and f"{release} was rejected" in again.stdout and current() == old
    refused = ansible_playbook(*data.arguments(ROLE))
    assert refused.rc == 2 and "was rejected on this host" in refused.stdout, refused.tail()
    assert f"fix: put back what {old} was built with" in refused.stdout  # the commit is the same
    assert current() == old
    assert Seen.now().wrong == ""
    unchanged = ansible_playbook(UPDATE, "--limit", LLM).check()
    assert unchanged.changed == 0 and "nothing new" in unchanged.stdout


def test_a_rollback_needs_a_build_that_is_there(lab: str) -> None:
    done = ansible_playbook(ROLLBACK, "--limit", LLM)
    assert done.rc == 2 and "no such build below /opt/llama.cpp; fix: " in done.stdout, done.tail()
