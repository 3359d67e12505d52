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


def is_whole() -> str:
    """What is wrong with what serves: "" when it is exactly the current release, with its own unit."""
    status = json.loads(lmswitch("status --json").stdout)
    if status["state"] != "ready" or status["active"] != PRESET:
        return f"lmswitch: {status}"
    program = host("readlink /proc/$(pgrep -o -x llama-server)/exe")
    if f"/releases/{current()}/" not in program:
        return f"{program} serves, current is {current()}"
    return host("find /run/user/*/systemd/user -name '*llmbox-trial*'")


def settled() -> None:
    """Wait until what outlives a killed play has ended, then ask the preset something."""
    deadline = time.monotonic() + SETTLED_S
    while (wrong := is_whole()) and time.monotonic() < deadline:
        time.sleep(1)
    assert wrong == ""
    completion()
    assert is_whole() == ""


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


def killed_when(arguments: list[str], mark: str, after_s: float, command: str = "") -> None:
    """Run a play and, `after_s` seconds after it printed `mark`, kill it, or run `command` on the host."""
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
    try:
        said, deadline = b"", time.monotonic() + REACHED_S
        while not re.search(mark.encode(), said):
            assert time.monotonic() < deadline, said.decode()[-2000:]
            if select.select([process.stdout], [], [], 1)[0]:
                got = os.read(process.stdout.fileno(), 1 << 16)
                assert got, f"the play ended before {mark!r}: {said.decode()[-2000:]}"
                said += got
        time.sleep(after_s)
        if command:
            host(command)
            with suppress(subprocess.TimeoutExpired):  # it came too late, and the play goes on to compare
                process.wait(END_S)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)
        process.stdout.close()


BUILDS = r"fetch|configure|\d+ % \("  # a phase may be over before the play looks
KILL_BUILD = "systemctl kill --signal=KILL 'llama-build-*'"
# Where the play or the build is killed: (the step, what the play says then, what is killed on the host, or
# the play). Within a step the moment is drawn.
POINTS = [
    ("comparison", "comparing", ""),
    ("build", BUILDS, KILL_BUILD),
    ("build", "Build llama.cpp", ""),
    ("build", "Build llama.cpp", ""),
    ("build", BUILDS, ""),
    ("build", BUILDS, KILL_BUILD),
    ("comparison", "comparing", ""),
    ("comparison", "comparing", ""),
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
    killed_when(arguments, mark, after_s, kill)
    settled()
    if step != "change":
        assert current() == old


def test_rolled_back_the_former_release_serves_and_stays(new: tuple[Data, str], old: str) -> None:
    data, release = new
    ansible_playbook(*data.arguments(ACCEPT, build=BUILD, release=release), timeout=PLAY_S).check()
    assert current() == release
    settled()

    done = ansible_playbook(ROLLBACK, "--limit", LLM, "--extra-vars", f"build={BUILD}").check()
    print(keep_figures("rollback", "rollback_llama_cpp.yml, wall clock", [done.seconds], BAR_S))
    assert current() == old
    settled()

    again = ansible_playbook(ROLLBACK, "--limit", LLM, "--extra-vars", f"build={BUILD}")
    assert again.rc == 2 and f"{release} was rejected" in again.stdout and current() == old
    refused = ansible_playbook(*data.arguments(ROLE))
    assert refused.rc == 2 and "was rejected on this host" in refused.stdout, refused.tail()
    assert f"fix: put back {old.partition('-')[0]}" in refused.stdout
    assert current() == old
    assert is_whole() == ""
    unchanged = ansible_playbook(UPDATE, "--limit", LLM).check()
    assert unchanged.changed == 0 and "nothing new" in unchanged.stdout


def test_a_rollback_needs_a_build_that_is_there(lab: str) -> None:
    done = ansible_playbook(ROLLBACK, "--limit", LLM)
    assert done.rc == 2 and "no such build below /opt/llama.cpp; fix: " in done.stdout, done.tail()
