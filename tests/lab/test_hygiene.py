"""A lab that is removed leaves the machine exactly as it was, whatever moment it was interrupted at.

Every test runs in a world of its own (network, mount and process namespaces), where nothing but the lab can
change anything: what is found there before and after is compared without exceptions. A machine whose init is
systemd has one test more, outside of such a world: there systemd itself runs the lab's processes.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab import root as lab_root
from lab import sources
from lab.config import REPO_ROOT, from_environment

NAME = "hyg"
SEED = 20261122
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the lab needs root")

# What a lab could leave behind: run inside the world, prints JSON.
SNAPSHOT = """
import json, os, subprocess, sys
from pathlib import Path

name = sys.argv[1]

def said(*argv):
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()

def command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\\0")[0]
    except OSError:
        return None

mine = {os.getpid(), os.getppid()}
mounts = Path("/proc/self/mounts").read_text().splitlines()
groups = [line.split()[1] for line in mounts if line.split()[2] in ("cgroup", "cgroup2")]
ipv4 = Path("/proc/sys/net/ipv4")
network = os.stat("/proc/self/ns/net").st_ino
print(json.dumps({
    "interfaces": [" ".join(line.split()[1:3]) for line in said("ip", "-o", "link")],
    "addresses": [line.split()[3] for line in said("ip", "-o", "addr")],
    "routes": said("ip", "route", "show", "table", "all"),
    "mounts": mounts,
    "nftables": said("nft", "list", "ruleset"),
    "processes": sorted(filter(None, (command(p.name) for p in Path("/proc").iterdir()
                                      if p.name.isdigit() and int(p.name) not in mine))),
    "control groups": [str(path) for group in groups for path in Path(group).glob(f"llmbox-{name}-*")],
    "sysctls": {str(path): path.read_text() for path in (
        ipv4 / "ip_forward", *ipv4.glob("conf/*/forwarding"), *ipv4.glob("conf/*/accept_redirects"))},
    "run": [str(path) for path in Path("/run").glob(f"systemd/nspawn/*/{name}-*")],
    "ledger": [str(path) for path in Path("/run/llmbox-lab").glob(f"*-{network}.json")],
    "state": [str(path) for path in Path(sys.argv[2]).glob("*")],
}))
"""


# The machine's systemd is no part of a world, and could not be: it would start what it is asked for outside.
# Of its directory only the resolvers stay, which the lab reads.
EMPTY_WORLD = """
trap '' CHLD
if [ -d /run/systemd/system ]; then
  mount -t tmpfs -o mode=755 none /mnt
  [ ! -d /run/systemd/resolve ] || cp -a /run/systemd/resolve /mnt/
  mount --move /mnt /run/systemd
fi
ip link set lo up && echo ready && exec sleep infinity
"""


class World:
    """Network, mount and process namespaces with nothing in them; their first process reaps orphans."""

    def __init__(self) -> None:
        self._first = subprocess.Popen(
            [
                *("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
                *("sh", "-e", "-c", EMPTY_WORLD),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._first.stdout is not None
        assert self._first.stdout.readline() == "ready\n"
        (inner,) = Path(f"/proc/{self._first.pid}/task/{self._first.pid}/children").read_text().split()
        self._enter = ["nsenter", f"--target={inner}", "--net", "--mount", "--pid", f"--wd={REPO_ROOT}", "--"]
        self.lab_dir = from_environment({**os.environ, "LAB_NAME": NAME}).state

    def close(self) -> None:
        self._first.kill()
        self._first.wait()

    def run(self, *argv: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self._enter, *argv],
            env={**os.environ, "LAB_NAME": NAME},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def lab(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", "lab", *words)

    def snapshot(self) -> dict[str, Any]:
        done = self.run(sys.executable, "-c", SNAPSHOT, NAME, str(self.lab_dir))
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def interrupted(self, number: signal.Signals, after: float, *words: str) -> None:
        """Run a lab command and signal it after some seconds, or when it ends before."""
        command = f'echo $$; exec "{sys.executable}" -m lab {" ".join(words)}'
        with subprocess.Popen(
            [*self._enter, "sh", "-c", command],
            env={**os.environ, "LAB_NAME": NAME},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            assert process.stdout is not None
            pid = process.stdout.readline().strip()
            time.sleep(after)
            self.run("kill", f"-{number.value}", pid)
            process.wait(timeout=30)


@pytest.fixture(scope="module", autouse=True)
def caches() -> None:
    """What needs the network is made before, outside of the worlds."""
    lab = from_environment()
    lab_root.base(lab, [])
    sources.prepare(lab.cache / "sources", REPO_ROOT)


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    # Numbers of namespaces come again: what one that was killed has left is no matter of this one.
    made.run("sh", "-c", "rm -f /run/llmbox-lab/*-$(stat -Lc %i /proc/self/ns/net).json")
    yield made
    made.lab("down")
    made.close()


def difference(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    return {key: (before[key], after[key]) for key in before if before[key] != after[key]}


def test_up_and_down_twice_leave_nothing(world: World) -> None:
    before = world.snapshot()
    for _ in range(2):
        assert world.lab("up").returncode == 0
        during = world.snapshot()
        assert {"interfaces", "nftables", "processes", "control groups", "sysctls", "state"} <= set(
            difference(before, during)
        )
        assert len([line for line in during["processes"] if line.endswith("systemd-nspawn")]) == 3
        again = world.lab("up")
        assert again.returncode == 0
        repeated = set(difference(during, world.snapshot()))
        assert repeated <= {"addresses", "routes"}  # makes nothing; the kernel is still settling on those two
        down = world.lab("down")
        assert down.returncode == 0, down.stderr
        assert difference(before, world.snapshot()) == {}
    assert "was not there" in world.lab("down").stderr


def test_a_world_has_no_systemd(world: World) -> None:
    assert not world.run("ls", "-d", "/run/systemd/system").stdout


# What says by its name that it is another lab's.
OTHERS = re.compile(
    rf"""llmbox-(?!{NAME}\b)[a-z0-9]+\b | llmbox_lab_(?!{NAME}\b) | /lab/(?!{NAME}/)[a-z0-9]+/
    | \bv[be]-(?!{NAME}-)[a-z0-9]+-(llm|ocr|cli)\b | /nspawn/[a-z-]+/(?!{NAME}-)""",
    re.VERBOSE,
)


def machine_snapshot() -> dict[str, list[str]]:
    """What a lab could leave on a machine whose systemd runs it, without what another lab has there."""

    def said(*argv: str) -> list[str]:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=True)
        return done.stdout.splitlines()

    plain = ("systemctl", "--no-pager", "--no-legend", "--plain")
    found = {
        "interfaces": [line.split()[1] for line in said("ip", "-o", "link")],
        "mounts": Path("/proc/self/mounts").read_text().splitlines(),
        "nftables": said("nft", "list", "tables"),
        "units": said(*plain, "list-units", "--all", "llmbox-*"),
        "enabled units": said(*plain, "list-unit-files", "--state=enabled"),
        "ip_forward": [Path("/proc/sys/net/ipv4/ip_forward").read_text()],
    }
    return {kind: [line for line in lines if not OTHERS.search(line)] for kind, lines in found.items()}


@pytest.mark.parametrize(
    ("line", "others"),
    [
        (f"llmbox-{NAME}:", False),
        (f"llmbox-{NAME}-llm.service loaded active running", False),
        ("llmbox-lab-llm.service loaded active running", True),
        ("llmbox-hygi:", True),
        (f"table ip llmbox_lab_{NAME}", False),
        ("table ip llmbox_lab_lab", True),
        (f"vb-{NAME}-llm@if2:", False),
        ("vb-lab-llm@if2:", True),
        ("tmpfs /run/systemd/nspawn/unix-export/lab-llm tmpfs rw", True),
        (f"tmpfs /run/systemd/nspawn/unix-export/{NAME}-llm tmpfs rw", False),
        ("docker0:", False),
    ],
)
def test_only_another_lab_s_things_do_not_count(line: str, others: bool) -> None:
    assert bool(OTHERS.search(line)) is others


@pytest.mark.skipif(not Path("/run/systemd/system").is_dir(), reason="this machine's init is not systemd")
def test_on_systemd_up_and_down_leave_nothing() -> None:
    """Outside of the worlds: the lab's processes are units of the machine's systemd."""

    def lab(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "lab", *words],
            cwd=REPO_ROOT,
            env={**os.environ, "LAB_NAME": NAME},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    before = machine_snapshot()
    try:
        for _ in range(2):
            up = lab("up", "--only", "llm")
            assert up.returncode == 0, up.stderr
            during = machine_snapshot()
            assert {"interfaces", "nftables", "units"} <= set(difference(before, during))
            assert f"llmbox-{NAME}-llm.service" in {line.split()[0] for line in during["units"]}
            assert lab("ssh", "llm", "true").returncode == 0
            rebooted = lab("reboot", "llm")
            assert rebooted.returncode == 0, rebooted.stderr
            down = lab("down")
            assert down.returncode == 0, down.stderr
            assert difference(before, machine_snapshot()) == {}
    finally:
        lab("down")


def test_a_host_comes_back_from_a_reboot_and_from_poweroff(world: World) -> None:
    assert world.lab("up", "--only", "llm").returncode == 0
    rebooted = world.lab("reboot", "llm")
    assert (rebooted.returncode, "rebooted" in rebooted.stderr) == (0, True)
    assert world.lab("poweroff", "llm").returncode == 0
    assert world.lab("ssh", "llm", "touch", "kept").returncode == 255
    assert world.lab("start", "llm").returncode == 0
    assert world.lab("ssh", "llm", "touch", "kept").returncode == 0
    assert world.lab("up", "--only", "llm").returncode == 0
    assert world.lab("ssh", "llm", "ls", "kept").returncode == 0
    assert world.lab("up", "--only", "llm", "--fresh", "llm").returncode == 0
    assert world.lab("ssh", "llm", "ls", "kept").returncode == 2


def test_what_is_not_ours_is_refused_and_never_removed(world: World) -> None:
    bridge = from_environment({**os.environ, "LAB_NAME": NAME}).bridge
    world.run("ip", "link", "add", bridge, "type", "bridge")
    before = world.snapshot()
    refused = world.lab("up")
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith(
        f"lab: interface {bridge} exists and is not this lab's; fix:"
    )
    assert world.lab("down").returncode == 0
    assert difference(before, world.snapshot()) == {}


def test_a_subnet_in_use_is_refused(world: World) -> None:
    subnet = from_environment({**os.environ, "LAB_NAME": NAME}).subnet
    world.run("ip", "link", "add", "other", "type", "bridge")
    world.run("ip", "link", "set", "other", "up")
    world.run("ip", "addr", "add", subnet.replace(".0/", ".9/"), "dev", "other")
    refused = world.lab("up")
    assert refused.returncode == 2
    assert f"{subnet} is in use already" in refused.stderr


def test_a_firewall_that_drops_the_labs_packets_is_named(world: World) -> None:
    world.run(
        "nft",
        "table ip filter { chain FORWARD { type filter hook forward priority 0; policy drop; }; }",
    )
    refused = world.lab("up")
    assert refused.returncode == 2
    assert "drops packets of the lab hosts (chain ip filter FORWARD)" in refused.stderr
    assert "fix: iptables -I FORWARD" in refused.stderr


def test_a_host_that_cannot_reach_the_source_server_is_named(world: World) -> None:
    """Whatever drops its packets: here a rule, not a policy."""
    bridge = from_environment({**os.environ, "LAB_NAME": NAME}).bridge
    rule = f'iifname "{bridge}" tcp dport 8088 drop'
    world.run("nft", f"table inet wall {{ chain in {{ type filter hook input priority 0; {rule}; }}; }}")
    refused = world.lab("up", "--only", "llm")
    assert refused.returncode == 2
    assert (
        f"a firewall of this machine drops what enters at {bridge}; fix:" in refused.stderr.splitlines()[-1]
    )


def test_a_second_command_is_refused_at_once(world: World) -> None:
    lock = from_environment({**os.environ, "LAB_NAME": NAME}).cache / "lab" / f".{NAME}.lock"
    lock.unlink(missing_ok=True)
    with subprocess.Popen(
        [*world._enter, sys.executable, "-m", "lab", "up", "--only", "llm"],
        env={**os.environ, "LAB_NAME": NAME},
        stderr=subprocess.PIPE,
        text=True,
    ) as first:
        while first.poll() is None and not (lock.exists() and lock.read_text()):
            time.sleep(0.01)
        second = world.lab("down")
        assert second.returncode == 3
        assert second.stderr.startswith(f"lab: another command works on lab '{NAME}' (up, pid ")
        assert second.stderr.count("\n") == 1
        first.communicate(timeout=120)
        assert first.returncode == 0


def cases(count: int) -> list[tuple[str, signal.Signals, float]]:
    """Seeded moments of interruption; the first ones are the sample of the gate."""
    dice = random.Random(SEED)  # noqa: S311 - moments, not secrets
    numbers = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
    verbs = ("up", "up", "down")
    return [
        (
            verbs[index % 3],
            numbers[index // 3 % 3] if index >= 3 else numbers[index],
            round(dice.uniform(0.05, 2.5), 2),
        )
        for index in range(count)
    ]


def interrupt_and_recover(world: World, verb: str, number: signal.Signals, after: float) -> None:
    before = world.snapshot()
    if verb == "down":
        assert world.lab("up", "--only", "llm").returncode == 0
        world.interrupted(number, after / 4, "down")
    else:
        world.interrupted(number, after, "up", "--only", "llm")
    up = world.lab("up", "--only", "llm")
    assert up.returncode == 0, up.stderr
    assert world.lab("ssh", "llm", "true").returncode == 0
    world.interrupted(number, after, "up", "--only", "llm", "--fresh", "llm")
    down = world.lab("down")
    assert down.returncode == 0, down.stderr
    assert difference(before, world.snapshot()) == {}


@pytest.mark.parametrize(("verb", "number", "after"), cases(3))
def test_interrupted(world: World, verb: str, number: signal.Signals, after: float) -> None:
    interrupt_and_recover(world, verb, number, after)


@pytest.mark.long
@pytest.mark.parametrize(("verb", "number", "after"), cases(45)[3:])
def test_interrupted_at_many_moments(world: World, verb: str, number: signal.Signals, after: float) -> None:
    interrupt_and_recover(world, verb, number, after)


@pytest.mark.long
@pytest.mark.parametrize("after", [1, 4, 9, 16])
def test_making_the_root_file_system_can_be_killed(tmp_path: Path, after: float) -> None:
    """Outside of the worlds: mmdebstrap needs the network."""
    mounts = Path("/proc/self/mounts").read_text()
    env = {**os.environ, "LAB_NAME": NAME, "XDG_CACHE_HOME": str(tmp_path)}
    (tmp_path / "llmbox").mkdir()
    (tmp_path / "llmbox/sources").symlink_to(from_environment().cache / "sources")
    with subprocess.Popen(
        [sys.executable, "-m", "lab", "up"], cwd=REPO_ROOT, env=env, start_new_session=True
    ) as process:
        time.sleep(after)
        process.kill()
    time.sleep(0.5)
    assert Path("/proc/self/mounts").read_text() == mounts
    survivors = subprocess.run(
        ["pgrep", "--full", str(tmp_path)], capture_output=True, text=True, check=False
    ).stdout
    assert survivors == ""
    down = subprocess.run(
        [sys.executable, "-m", "lab", "down"], cwd=REPO_ROOT, env=env, timeout=60, check=False
    )
    assert down.returncode == 0
