"""The role gguf_models on a real host, against a server of the test that misbehaves and counts."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests import support
from tests.lab.flaky_server import FlakyServer, Served, running

MB = 1_000_000
SIZE = 20 * MB
SLOW = MB // 5  # bytes per second: a download lasts longer than any play takes to start
OWNER = "gguf-test"
HOME = f"/home/{OWNER}"
DIRECTORY = f"{HOME}/models"
UNIT = "gguf-fetch"
PLAY = """---
- name: Models of the test
  hosts: lab-llm
  become: true
  gather_facts: false
  roles: [gguf_models]
"""


def host(command: str, timeout: float = 60) -> str:
    """Output of a command that root runs on the LLM host; it must succeed."""
    return support.on_host(support.LLM, f"sudo sh -c '{command}'", timeout=timeout).check().stdout


def random_bytes(seed: int, size: int = SIZE) -> bytes:
    """The same bytes for the same seed."""
    return random.Random(seed).randbytes(size)  # noqa: S311 - test data


@dataclass
class Role:
    """The role gguf_models with the models of one test: those that presets use, and those that none does."""

    folder: Path
    server: FlakyServer
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    unused: dict[str, dict[str, Any]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def serve(self, name: str, content: bytes, served: Served | None = None) -> Served:
        """Add a model with the true checksum of `content`; `served` may serve something else."""
        self.models[name] = {
            "url": f"{self.server.url}/{name}.gguf",
            "sha256": hashlib.sha256(content).hexdigest(),
            "size": len(content),
        }
        self.server.files[f"/{name}.gguf"] = served or Served(content)
        return self.server.files[f"/{name}.gguf"]

    def arguments(self) -> list[str | Path]:
        """Arguments for ansible-playbook; the data goes the same way as an inventory's."""
        presets = {
            name: {
                "description": name,
                "build": "upstream",
                "model": name,
                "context": 4096,
                "kv_cache_type": "f16",
                "n_gpu_layers": 0,
                "threads": 1,
                "agent": False,
            }
            for name in self.models
        }
        variables = {
            "gguf_models": self.models | self.unused,
            "llama_presets": presets,
            "gguf_models_dir": DIRECTORY,
            "gguf_models_owner": OWNER,
            "gguf_models_reserve_bytes": 0,
            "gguf_models_follow_interval": 1,
            "gguf_models_stall_timeout": 5,
            "gguf_models_retries": 2,
            **self.settings,
        }
        play, data = self.folder / "play.yml", self.folder / "variables.json"
        play.write_text(PLAY)
        data.write_text(json.dumps(variables))
        return [play, "-e", f"@{data}"]

    def run(self, *more: str) -> support.PlaybookRun:
        """One play."""
        return support.ansible_playbook(*self.arguments(), *more, timeout=180)

    def start(self) -> subprocess.Popen[str]:
        """One play in the background, in a process group of its own."""
        command = [support.BIN / "ansible-playbook", "-i", support.LAB_INVENTORY, *self.arguments()]
        return subprocess.Popen(
            command,
            cwd=support.ROOT,
            env=support.environment(),
            start_new_session=True,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def served(self, name: str) -> int:
        """Body bytes that were sent for a model."""
        return self.server.bytes_served.get(f"/{name}.gguf", 0)

    def wait_until_served(self, name: str, size: int, timeout: float = 60) -> None:
        """Return when `size` bytes of a model have been sent."""
        deadline = time.monotonic() + timeout
        while self.served(name) < size:
            assert time.monotonic() < deadline, f"only {self.served(name)} bytes of {name} were asked for"
            time.sleep(0.05)


@pytest.fixture(scope="module")
def address(lab_hostvars: dict[str, dict[str, Any]]) -> str:
    """The machine's own address in the lab's network."""
    return str(urlsplit(lab_hostvars[support.LLM]["lab_source_http"]).hostname)


@pytest.fixture
def owner(lab: str) -> Iterator[None]:
    """A user of the test's own, so that the real models stay untouched."""
    host(f"systemctl stop {UNIT} 2>/dev/null; userdel -rf {OWNER} 2>/dev/null; useradd -m {OWNER}")
    yield
    host(
        f"systemctl stop {UNIT} 2>/dev/null; umount {HOME}/small 2>/dev/null; userdel -rf {OWNER}"
        " 2>/dev/null; true"
    )


@pytest.fixture
def role(address: str, owner: None, tmp_path: Path) -> Iterator[Role]:
    with running(address) as server:
        yield Role(tmp_path, server)


def checksum(name: str, directory: str = DIRECTORY) -> str:
    """sha256 of a model on the host."""
    return host(f"sha256sum {directory}/{name}.gguf").split()[0]


def descendants(pid: int) -> list[int]:
    """Process ids of all children, their children and so on."""
    task = Path(f"/proc/{pid}/task/{pid}/children")
    children = [int(child) for child in task.read_text().split()] if task.exists() else []
    return [*children, *(grandchild for child in children for grandchild in descendants(child))]


def kill_play(play: subprocess.Popen[str]) -> None:
    """kill -9 of ansible-playbook and all of its children."""
    workers = descendants(play.pid)
    os.killpg(play.pid, signal.SIGKILL)
    play.wait(timeout=10)
    # Its worker has a session of its own, lives on, and must notice.
    deadline = time.monotonic() + 15
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "a worker of the killed play goes on"
        time.sleep(0.1)


def test_from_nothing_through_two_cuts_to_unchanged(role: Role) -> None:
    cuts = [SIZE * 3 // 10, SIZE * 7 // 10]
    role.serve("big", random_bytes(1), Served(random_bytes(1), cut_at=list(cuts)))
    role.serve("small", random_bytes(2, MB))

    host(f"userdel -rf {OWNER} 2>/dev/null")
    predicted = role.run("--check", "--diff").check()
    assert predicted.changed == 1
    assert "would download 2 files, 21.0 MB" in predicted.stdout
    assert "+big.gguf 20.0 MB sha256" in predicted.stdout
    assert role.server.requests == []
    host(f"useradd -m {OWNER}")

    first = role.run().check()
    assert first.changed == 1
    assert role.served("big") <= 1.05 * SIZE
    assert [request.range for request in role.server.requests if "big" in request.path] == [
        None,
        *(f"bytes={cut}-" for cut in cuts),
    ]
    assert checksum("big") == role.models["big"]["sha256"]
    modes = host(f'stat -c "%a %U %G" {DIRECTORY} {DIRECTORY}/big.gguf').splitlines()
    assert modes == [f"755 {OWNER} {OWNER}", f"644 {OWNER} {OWNER}"]
    assert host(f"ls -A {DIRECTORY}").split() == [
        ".big.gguf.sha256",
        ".gguf_models.lock",
        ".small.gguf.sha256",
        "big.gguf",
        "small.gguf",
    ]

    requests = len(role.server.requests)
    assert role.run("--diff").check().changed == 0
    assert role.run("--check", "--diff").check().changed == 0
    assert len(role.server.requests) == requests


def test_a_wrong_checksum_replaces_nothing(role: Role) -> None:
    role.serve("m", random_bytes(1), Served(random_bytes(2)))
    host(f"install -d -o {OWNER} -g {OWNER} {DIRECTORY}; echo former > {DIRECTORY}/m.gguf")
    failed = role.run()
    assert failed.rc == 2
    assert "m.gguf: wrong checksum" in failed.stdout
    assert role.models["m"]["sha256"] in failed.stdout
    assert "Traceback" not in failed.stdout
    assert host(f"cat {DIRECTORY}/m.gguf") == "former\n"
    assert "part" not in host(f"ls -A {DIRECTORY}")

    role.serve("m", random_bytes(1))
    assert role.run().check().changed == 1
    assert checksum("m") == role.models["m"]["sha256"]


def test_a_disk_too_small_is_refused_before_the_first_byte(role: Role) -> None:
    host(
        f"install -d -o {OWNER} {HOME}/small; mount -t tmpfs -o size=32m tmpfs {HOME}/small; chown {OWNER}:"
        f" {HOME}/small"
    )
    role.settings["gguf_models_dir"] = f"{HOME}/small/models"
    role.serve("one", random_bytes(1))
    role.serve("two", random_bytes(2))
    for arguments in (["--check"], []):
        failed = role.run(*arguments)
        assert failed.rc == 2
        assert "40.0 MB of models are missing" in failed.stdout
        assert "MB too few; fix: free some space" in " ".join(failed.stdout.split())
    assert role.server.requests == []
    del role.models["two"]
    assert role.run().check().changed == 1
    assert checksum("one", f"{HOME}/small/models") == role.models["one"]["sha256"]


def test_a_killed_play_is_found_and_followed(role: Role) -> None:
    served = role.serve("m", random_bytes(1), Served(random_bytes(1), bytes_per_s=SLOW))
    first = role.start()
    role.wait_until_served("m", SLOW)
    kill_play(first)

    second = role.start()
    assert second.stdout is not None
    lines = []
    for line in second.stdout:
        lines.append(line)
        if " MB/s, " in line:  # it follows: the rest may come at once
            served.bytes_per_s = float("inf")
    assert second.wait(timeout=60) == 0, "".join(lines)
    assert "following the download that runs already" in "".join(lines)
    assert any(re.search(r"m\.gguf: \d+ % \([\d.]+/20\.0 MB\), [\d.]+ MB/s, .* left", line) for line in lines)
    assert "changed=1" in "".join(lines)
    assert len(role.server.requests) == 1, "the download was started twice"
    assert role.served("m") == SIZE
    assert checksum("m") == role.models["m"]["sha256"]


def test_a_killed_download_resumes(role: Role) -> None:
    role.settings["gguf_models_stall_timeout"] = 300
    role.serve("m", random_bytes(1), Served(random_bytes(1), stall_at=[SIZE // 3], stall_seconds=300))
    play = role.start()
    role.wait_until_served("m", SIZE // 3)
    host(f"systemctl kill -s KILL {UNIT}")
    output, _ = play.communicate(timeout=60)
    assert play.returncode == 2
    assert "the download ended before it was done" in " ".join(output.split())
    assert "run again, it resumes" in " ".join(output.split())

    assert role.run().check().changed == 1
    assert role.server.requests[1].range is not None
    assert role.served("m") <= 1.05 * SIZE
    assert checksum("m") == role.models["m"]["sha256"]


@pytest.mark.long
def test_a_rebooted_host_resumes(role: Role) -> None:
    role.settings["gguf_models_stall_timeout"] = 300
    role.serve("m", random_bytes(1), Served(random_bytes(1), stall_at=[SIZE // 3], stall_seconds=300))
    play = role.start()
    role.wait_until_served("m", SIZE // 3)
    kill_play(play)
    support.run(sys.executable, "-m", "lab", "reboot", support.LLM, timeout=120).check()

    assert role.run().check().changed == 1
    assert role.served("m") <= 1.05 * SIZE
    assert checksum("m") == role.models["m"]["sha256"]


@pytest.mark.long
def test_another_list_at_the_same_time(role: Role) -> None:
    served = role.serve("m", random_bytes(1), Served(random_bytes(1), bytes_per_s=SLOW))
    play = role.start()
    role.wait_until_served("m", SLOW)
    role.serve("n", random_bytes(2, MB))
    refused = role.run()
    assert refused.rc == 2
    assert "another play is downloading another list of models" in " ".join(refused.stdout.split())
    assert role.served("n") == 0

    kill_play(play)
    host('touch -d "10 minutes ago" /run/gguf-models/followed')
    served.bytes_per_s = float("inf")
    assert role.run().check().changed == 1, "a download that nobody follows any more stands in the way"
    assert role.served("m") <= 1.05 * SIZE
    assert checksum("m") == role.models["m"]["sha256"]


def test_unused_models_are_reported_and_removed_on_request(role: Role) -> None:
    role.serve("m", random_bytes(1, MB))
    role.run().check()
    host(
        f"cd {DIRECTORY}; head -c 1500000 /dev/zero > old.gguf; echo x > .old.gguf.sha256; echo x >"
        f" notes.txt; ln -s /etc/hostname link.gguf; chown -h {OWNER}: *"
    )
    reported = role.run().check()
    assert reported.changed == 0
    said = " ".join(reported.stdout.split() + reported.stderr.split())
    assert "no preset uses old.gguf (1.5 MB)" in said
    assert "DEPRECATION" not in said

    host(f"cp {DIRECTORY}/old.gguf {DIRECTORY}/source.gguf; chown {OWNER}: {DIRECTORY}/source.gguf")
    role.settings["gguf_models_remove_unused"] = True
    role.unused = {"copy": {"path": f"{DIRECTORY}/source.gguf", "sha256": checksum("old"), "size": 1_500_000}}
    predicted = role.run("--check", "--diff").check()
    assert predicted.changed == 1
    assert "-old.gguf (unused)" in predicted.stdout
    assert role.run().check().changed == 1
    assert host(f"ls -A {DIRECTORY}").split() == [
        ".gguf_models.lock",
        ".m.gguf.sha256",
        "link.gguf",
        "m.gguf",
        "notes.txt",
        "source.gguf",
    ]


@pytest.mark.long
def test_a_changed_file_is_found_and_replaced(role: Role) -> None:
    role.serve("m", random_bytes(1, MB))
    role.run().check()
    host(f"printf x | dd of={DIRECTORY}/m.gguf conv=notrunc bs=1 seek=1000 2>/dev/null")
    assert role.run("--check").check().changed == 1
    assert role.run().check().changed == 1
    assert checksum("m") == role.models["m"]["sha256"]
    host(f"touch {DIRECTORY}/m.gguf")
    assert role.run().check().changed == 0, "the same content with another time is no change"
    host(f"chmod 0600 {DIRECTORY}/m.gguf; chown root: {DIRECTORY}/m.gguf")
    assert role.run().check().changed == 1
    assert host(f'stat -c "%a %U" {DIRECTORY}/m.gguf').split() == ["644", OWNER]


def test_a_local_file_on_the_host_is_a_source(role: Role) -> None:
    host(f"head -c 3000000 /dev/urandom > {HOME}/source.gguf; chown {OWNER}: {HOME}/source.gguf")
    digest = host(f"sha256sum {HOME}/source.gguf").split()[0]
    role.models["m"] = {"path": f"{HOME}/source.gguf", "sha256": digest, "size": 3000000, "file": "m.gguf"}
    assert role.run().check().changed == 1
    assert checksum("m") == digest
    assert role.run().check().changed == 0


def test_the_token_stays_with_the_hub(role: Role, address: str) -> None:
    role.settings |= {"gguf_models_hf_token": "hf_secret"}
    role.serve("m", random_bytes(1, MB))
    run = role.run("-vvv").check()
    assert "hf_secret" not in run.stdout
    assert role.server.requests[0].authorization is None
    assert host("ls /run/gguf-models").split() == ["begin.lock", "followed", "plan.json", "worker.pyz"]


def sandbox() -> list[str]:
    """The unit's sandbox lines, read from the module's source."""
    tree = ast.parse((support.ROOT / "roles/gguf_models/library/gguf_models.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["SANDBOX"]:
            return list(ast.literal_eval(node.value))
    raise AssertionError("no SANDBOX in the module")


# What each line of the sandbox forbids. Root's attempts are those that the owner could not make anyway: their
# lines matter when the process has come by more rights.
MODULES = "/usr/lib/modules/gguf-test"
IMPORTS = "import ctypes as c, mmap, os, socket; lib = c.CDLL(None); "
PROBES = {
    "NoNewPrivileges=yes": ("owner", "assert lib.prctl(39, 0, 0, 0, 0) == 0"),
    "CapabilityBoundingSet=": ("root", "os.setuid(65534)"),
    "ProtectSystem=strict": ("owner", "open('/var/tmp/gguf-test', 'w')"),
    "ProtectHome=read-only": ("owner", f"open('{HOME}/x', 'w')"),
    "PrivateDevices=yes": ("root", "open('/dev/gguf-test', 'w')"),
    "ProtectKernelTunables=yes": ("root", "open('/proc/sys/net/ipv4/ip_forward', 'r+')"),
    "ProtectKernelModules=yes": ("root", f"open('{MODULES}')"),
    "ProtectKernelLogs=yes": ("root", "assert os.stat('/proc/kmsg').st_mode & 0o777"),
    "ProtectControlGroups=yes": ("root", "d = '/sys/fs/cgroup/gguf-test'; os.mkdir(d); os.rmdir(d)"),
    "ProtectHostname=yes": ("root", "socket.sethostname(socket.gethostname())"),
    "RestrictSUIDSGID=yes": ("owner", f"os.chmod('{DIRECTORY}', 0o4755)"),
    "RestrictNamespaces=yes": ("owner", "assert lib.unshare(0x10000000) == 0"),
    "RestrictRealtime=yes": ("root", "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))"),
    "LockPersonality=yes": ("owner", "assert lib.personality(0x40000) != -1"),
    "MemoryDenyWriteExecute=yes": ("owner", "mmap.mmap(-1, 4096, prot=7)"),
    # getpid through the 32-bit gate: push rbx; mov eax, 20; int 0x80; pop rbx; ret
    "SystemCallArchitectures=native": (
        "owner",
        "m = mmap.mmap(-1, 4096, prot=7); m.write(bytes.fromhex('53b814000000cd805bc3'));"
        " assert c.CFUNCTYPE(c.c_int)(c.addressof(c.c_char.from_buffer(m)))() > 0",
    ),
    "SystemCallFilter=@system-service": ("owner", "assert lib.ptrace(0, 0, 0, 0) == 0"),
    "RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX": (
        "owner",
        "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    ),
}


def attempt(who: str, code: str, *lines: str) -> support.Run:
    """Run Python code on the LLM host in a transient unit with these lines."""
    every = [*lines, f"User={OWNER}"] if who == "owner" else lines
    properties = " ".join(f'-p "{line}"' for line in every)
    return support.on_host(
        support.LLM,
        f'sudo systemd-run --quiet --wait --collect --pipe {properties} python3 -I -c "{IMPORTS}{code}"',
    )


def test_every_line_of_the_sandbox_has_a_probe() -> None:
    assert sorted(PROBES) == sorted(sandbox())


@pytest.fixture(scope="module")
def probed(lab: str) -> Iterator[None]:
    """What the probes touch."""
    host(f"userdel -rf {OWNER} 2>/dev/null; useradd -m {OWNER}")
    host(f"install -d -o {OWNER} -g {OWNER} {DIRECTORY}; install -D /dev/null {MODULES}")
    yield
    host(f"userdel -rf {OWNER} 2>/dev/null; rm -f {MODULES} /var/tmp/gguf-test /dev/gguf-test")


@pytest.mark.parametrize("line", PROBES)
def test_each_line_of_the_sandbox_forbids_something(probed: None, line: str) -> None:
    who, code = PROBES[line]
    control = attempt(who, code)
    assert control.rc == 0, f"possible without the sandbox, or the probe proves nothing\n{control.tail()}"
    assert attempt(who, code, line).rc != 0, "possible with this line"
    assert attempt(who, code, *sandbox(), f"ReadWritePaths={DIRECTORY}").rc != 0, "possible in the sandbox"


def test_the_sandbox_lets_the_download_write_where_it_must(probed: None) -> None:
    lines = [*sandbox(), f"ReadWritePaths={DIRECTORY}"]
    attempt("owner", f"open('{DIRECTORY}/x', 'w')", *lines).check()


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10))
def test_interrupted_anywhere(role: Role, seed: int) -> None:
    """The play or the download is killed at random moments, up to three times; then one run completes it."""
    chance = random.Random(seed)  # noqa: S311 - test data
    served = role.serve("m", random_bytes(seed), Served(random_bytes(seed), bytes_per_s=4 * MB))
    kills = chance.randint(1, 3)
    for step in range(1, kills + 1):
        play = role.start()
        role.wait_until_served("m", min(SIZE - MB, round(SIZE * (step - 1 + chance.random()) / (kills + 1))))
        if chance.random() < 0.5:
            host(f"systemctl kill -s KILL {UNIT} || true")
            play.communicate(timeout=60)
        else:
            kill_play(play)
    served.bytes_per_s = float("inf")
    role.run().check()
    assert checksum("m") == role.models["m"]["sha256"]
    assert role.served("m") <= 1.05 * SIZE
    assert role.run().check().changed == 0
