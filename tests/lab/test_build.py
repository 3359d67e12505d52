"""Role llama_cpp on a real host: interrupted in every way, it completes; unchanged, it does nothing.

The builds are the lab's real tree in a root of their own, so that the host's other releases are left alone.
A CMake variable that the tree does not know makes a new release which the compiler cache serves whole.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from roles.llama_cpp.library.llama_cpp_build import unit_properties
from tests.support import (
    BIN,
    LAB_INVENTORY,
    LLM,
    ROOT,
    PlaybookRun,
    Run,
    environment,
    on_host,
    run,
    stop_group,
)
from tests.support import ansible_playbook as play_book

PLAYBOOK = ROOT / "tests" / "lab" / "llama_cpp.yml"
BUILD_ROOT = "/opt/llama.cpp-test"
BUILD = "under-test"
LAB_BUILDS = "inventory/lab/group_vars/llama_hosts/builds.yml"
FIRST_STEP_S = 180
POLL_S = 0.3


def host(command: str, timeout: float = 60) -> str:
    """What a command prints that must succeed as root on the LLM host."""
    return on_host(LLM, f"sudo sh -c {shlex.quote(command)}", timeout=timeout).check().stdout


def lab_build() -> dict[str, Any]:
    """The first build of the lab's own data."""
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
    builds = json.loads(done.stdout[done.stdout.index("{") :])["llama_cpp_builds"]
    return dict(builds["upstream"])


@dataclass
class Builds:
    """The data of one test play, and the plays with it."""

    directory: Path
    entry: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)

    def variant(self, **options: Any) -> Builds:
        """The same build with more CMake options: another release."""
        entry = {**self.entry, "cmake_options": {**self.entry["cmake_options"], **options}}
        return Builds(self.directory, entry, self.options)

    def fresh(self) -> Builds:
        """A variant that was never built, though nothing in it differs for the compiler."""
        return self.variant(LLMBOX_TEST=secrets.token_hex(4))

    def arguments(self) -> list[str]:
        variables = self.directory / f"{secrets.token_hex(4)}.json"
        variables.write_text(
            json.dumps(
                {
                    "llama_cpp_root": BUILD_ROOT,
                    "llama_cpp_builds": {BUILD: self.entry},
                    "llama_cpp_follow_interval": 1,
                    "llama_lock": {},
                    **self.options,
                }
            ),
            encoding="utf-8",
        )
        return [str(PLAYBOOK), "--limit", LLM, "--extra-vars", f"@{variables}"]

    def play(self, *more: str, timeout: float = 600) -> PlaybookRun:
        return play_book(*self.arguments(), *more, timeout=timeout)

    def start(self) -> subprocess.Popen[str]:
        """A play in the background, in a session of its own."""
        return subprocess.Popen(
            [str(BIN / "ansible-playbook"), "-i", str(LAB_INVENTORY), *self.arguments()],
            cwd=ROOT,
            env=environment(),
            text=True,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )


@pytest.fixture(scope="module")
def builds(lab: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builds]:
    """The lab's build in a root of its own, built once."""
    remove_root()
    yield Builds(tmp_path_factory.mktemp("builds"), lab_build())
    remove_root()


def remove_root() -> None:
    host(f"systemctl stop 'llama-build-*'; systemctl reset-failed 'llama-build-*'; rm -rf {BUILD_ROOT}; true")


@pytest.fixture(scope="module")
def base(builds: Builds) -> Builds:
    """One release that stands finished and current."""
    if not link("current"):
        builds.play().check()
    return builds


@pytest.fixture
def background() -> Iterator[Callable[[Builds], subprocess.Popen[str]]]:
    """Starts plays in the background; ends what still runs at the end of the test."""
    started: list[subprocess.Popen[str]] = []

    def start(builds: Builds) -> subprocess.Popen[str]:
        started.append(builds.start())
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            stop_group(process)
        if process.stdout:
            process.stdout.close()


def link(name: str) -> str:
    """The release that current or previous points at; empty without one."""
    return host(f"readlink {BUILD_ROOT}/{BUILD}/{name} || true").strip().removeprefix("releases/")


def entries(what: str) -> list[str]:
    """Names in a directory of the build, hidden ones too."""
    return host(f"ls -A {BUILD_ROOT}/{BUILD}/{what} 2>/dev/null || true").split()


def running_unit() -> str:
    """The unit of the build that runs; empty without one."""
    words = host("systemctl list-units --plain --no-legend --state=active,activating 'llama-build-*'").split()
    return words[0] if words else ""


def wait_for_compilers() -> str:
    """Wait until the running build compiles its first files; its unit."""
    deadline = time.monotonic() + FIRST_STEP_S
    while time.monotonic() < deadline:
        unit = running_unit()
        if unit and "\n[" in host(f"journalctl -q -o cat -n 50 -u {unit}"):
            return unit
        time.sleep(POLL_S)
    raise AssertionError(f"no build reached its first compiler within {FIRST_STEP_S} s")


def runs_of(unit: str) -> int:
    """How many times a unit was started since the host booted."""
    lines = host(f"journalctl -q -b -o json --output-fields=_SYSTEMD_INVOCATION_ID -u {unit}").splitlines()
    return len({json.loads(line).get("_SYSTEMD_INVOCATION_ID") for line in lines} - {None})


def stamp(release: str) -> dict[str, Any]:
    text = host(f"cat {BUILD_ROOT}/{BUILD}/releases/{release}/release.json")
    return dict(json.loads(text))


def server(release: str, argument: str = "--version") -> Run:
    """Run a release's server as the ordinary user, without root's rights."""
    return on_host(LLM, f"{BUILD_ROOT}/{BUILD}/releases/{release}/bin/llama-server {argument}")


def nothing_half_done() -> bool:
    return not [name for name in entries("releases") if name.startswith(".")] and not entries("build")


# -- the sample


def test_check_mode_says_what_it_would_build_and_changes_nothing(builds: Builds) -> None:
    if link("current"):
        pytest.skip("this host has a release already")
    done = builds.play("--check", "--diff").check()
    assert f"would build {BUILD}" in done.stdout
    assert f"-{BUILD}: none" in done.stdout
    assert host(f"ls -d {BUILD_ROOT} || true").strip() == ""


def test_a_finished_release_is_whole_and_runs_wherever_it_lies(base: Builds) -> None:
    release = link("current")
    found = stamp(release)
    assert release.startswith(f"{base.entry['commit']}-")
    assert found["commit"] == base.entry["commit"]
    assert base.entry["commit"][:7] in found["version"][0]
    assert found["cmake_options"]["GGML_NATIVE"] == "OFF"
    assert "llama-server" in found["targets"]
    assert "--model" in host(f"cat {BUILD_ROOT}/{BUILD}/current/help.txt")
    assert nothing_half_done()
    moved = host(
        f"cp -a {BUILD_ROOT}/{BUILD}/releases/{release} /opt/moved && ldd /opt/moved/bin/*;"
        " /opt/moved/bin/llama-server --version; rm -rf /opt/moved"
    )
    assert "not found" not in moved
    assert BUILD_ROOT not in moved
    assert server(release).check()
    assert host(f"find {BUILD_ROOT}/{BUILD}/releases/{release} ! -user root") == ""


def test_unchanged_it_is_not_built_again(base: Builds) -> None:
    release = link("current")
    before = host(f"stat -c %y {BUILD_ROOT}/{BUILD}/releases/{release}/release.json"), units_started()
    done = base.play("--diff").check()
    assert done.changed == 0
    assert base.play("--check", "--diff").check().changed == 0
    after = host(f"stat -c %y {BUILD_ROOT}/{BUILD}/releases/{release}/release.json"), units_started()
    assert after == before


def units_started() -> int:
    """How many builds this host's journal knows."""
    return int(host("journalctl -q -o cat _PID=1 | grep -c '^Start.*llama-build-.*service' || true"))


def test_the_play_killed_the_next_one_follows_and_one_changed_option_is_a_new_release(
    base: Builds, background: Callable[[Builds], subprocess.Popen[str]]
) -> None:
    old = link("current")
    changed = base.fresh()
    process = background(changed)
    unit = wait_for_compilers()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert running_unit() == unit
    done = changed.play().check()
    assert f"following {unit}, which runs already" in done.stdout
    assert runs_of(unit) == 1
    new = link("current")
    assert f"llama-build-{new}.service" == unit
    assert new != old
    assert link("previous") == old
    assert server(new).check()
    assert server(old).check()
    assert nothing_half_done()


@pytest.mark.parametrize(
    ("options", "entry", "reason"),
    [
        (
            {"llama_cpp_build_disk_min": 1 << 50},
            {},
            "llama_cpp_build_disk_min is 1048576.0 GiB; fix: free space",
        ),
        (
            {"llama_cpp_build_memory_min": 1 << 50},
            {},
            "llama_cpp_build_memory_min is 1048576.0 GiB; fix: stop",
        ),
        ({}, {"commit": "0" * 40}, f"llama_cpp_builds.{BUILD}.commit = {'0' * 40}: not in git://"),
        ({}, {"cmake_options": {"CMAKE_C_FLAGS": "-Dggml_new_tensor=1x"}}, "invalid suffix"),
    ],
    ids=["disk", "memory", "commit", "compiler"],
)
def test_what_cannot_be_built_is_one_line_and_leaves_nothing(
    base: Builds, options: dict[str, Any], entry: dict[str, Any], reason: str
) -> None:
    before = link("current"), entries("releases")
    done = Builds(base.directory, {**base.fresh().entry, **entry}, options).play()
    assert done.rc == 2
    assert reason in done.stdout, done.tail()
    assert (link("current"), entries("releases")) == before
    assert running_unit() == ""
    assert nothing_half_done()


SANDBOX_PROBE = """
import os, pathlib, stat
def outcome(act):
    try:
        act()
    except OSError as error:
        return type(error).__name__ + ' ' + os.strerror(error.errno)
    return 'allowed'
mine = pathlib.Path('{root}/{build}/build/probe')
status = dict(line.split(':', 1) for line in open('/proc/self/status'))
print('elsewhere:', outcome(pathlib.Path('/opt/probe-open/file').touch))
print('other build:', outcome(pathlib.Path('{root}/other/file').touch))
print('own build:', outcome(mine.touch))
print('setuid:', outcome(lambda: mine.chmod(0o4755)))
print('home:', outcome(lambda: os.stat('/home/ops')))
print('tmp:', os.path.exists('/tmp/probe-marker'))
print('privileges:', status['NoNewPrivs'].strip(), int(status['CapBnd'], 16))
print('uid:', os.getuid() != 0, os.nice(0))
mine.unlink()
"""


def test_every_sandbox_line_has_its_effect(base: Builds) -> None:
    """The same acts with and without the unit's properties: forbidden there, allowed here."""
    probe = SANDBOX_PROBE.format(root=BUILD_ROOT, build=BUILD)
    open_to_all = f"/opt/probe-open {BUILD_ROOT}/other"
    host(f"mkdir -p {open_to_all} && chmod 1777 {open_to_all} && touch /tmp/probe-marker")
    directory = Path(BUILD_ROOT) / BUILD
    boxed = unit_properties("llama-build", directory, nice=10, memory_max="80%", timeout_s=60)
    plain = ["User=llama-build"]
    try:
        inside, outside = (probed(probe, properties) for properties in (boxed, plain))
    finally:
        host(f"rm -rf {open_to_all} /tmp/probe-marker")
    assert inside == {
        "elsewhere": "OSError Read-only file system",
        "other build": "OSError Read-only file system",
        "own build": "allowed",
        "setuid": "PermissionError Operation not permitted",
        "home": "PermissionError Permission denied",
        "tmp": "False",
        "privileges": "1 0",
        "uid": "True 10",
    }
    assert outside["elsewhere"] == outside["other build"] == outside["setuid"] == "allowed"
    assert outside["home"] == "allowed"
    assert outside["tmp"] == "True"
    assert outside["privileges"].startswith("0 ")
    assert not outside["privileges"].endswith(" 0")


def probed(program: str, properties: list[str]) -> dict[str, str]:
    """What the probe printed in a transient unit with these properties."""
    words = ["systemd-run", "--quiet", "--wait", "--pipe", *(f"--property={each}" for each in properties)]
    text = host(shlex.join([*words, "python3", "-c", program]))
    return dict(line.split(": ", 1) for line in text.splitlines())


# -- the rest


@pytest.mark.long
def test_the_build_killed_the_next_play_completes(
    base: Builds, background: Callable[[Builds], subprocess.Popen[str]]
) -> None:
    changed = base.fresh()
    before = link("current")
    process = background(changed)
    unit = wait_for_compilers()
    host(f"systemctl kill --signal=KILL {unit}")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert f"build {BUILD} ({base.entry['commit'][:12]}) failed: it was killed by signal 9" in output
    assert link("current") == before
    assert nothing_half_done()
    changed.play().check()
    assert runs_of(unit) == 2
    assert f"llama-build-{link('current')}.service" == unit
    assert link("previous") == before
    assert nothing_half_done()


@pytest.mark.long
def test_the_host_rebooted_the_next_play_completes(
    base: Builds, background: Callable[[Builds], subprocess.Popen[str]]
) -> None:
    changed = base.fresh()
    before = link("current")
    process = background(changed)
    unit = wait_for_compilers()
    os.killpg(process.pid, signal.SIGKILL)
    run("python3", "-m", "lab", "reboot", LLM, timeout=180).check()
    assert running_unit() == ""
    assert link("current") == before
    changed.play().check()
    assert f"llama-build-{link('current')}.service" == unit
    assert runs_of(unit) == 1
    assert nothing_half_done()


@pytest.mark.long
def test_a_damaged_release_is_found_and_built_again(base: Builds) -> None:
    release = link("current")
    library = host(f"ls {BUILD_ROOT}/{BUILD}/current/bin/libggml-base.so.*.*").split()[0]
    host(f"truncate -s 1000 {library}")
    current = Builds(base.directory, entry_of(release, base), base.options)
    checked = current.play("--check").check()
    assert "has 1000 bytes instead of" in checked.stdout
    assert server(release).rc != 0
    current.play().check()
    assert link("current") == release
    assert server(release).check()
    assert nothing_half_done()
    assert current.play().check().changed == 0


def entry_of(release: str, base: Builds) -> dict[str, Any]:
    """The data that leads to a release of an earlier test."""
    options = stamp(release)["cmake_options"]
    extra = {name: options[name] for name in ("LLMBOX_TEST",) if name in options}
    return base.variant(**extra).entry


@pytest.mark.long
def test_a_build_gone_from_the_data_is_reported_and_removed_on_request(base: Builds) -> None:
    host(
        f"cd {BUILD_ROOT} && mkdir -p gone/releases/old notes; echo x > gone/releases/old/x; ln -s gone link"
    )
    reported = base.play().check()
    assert reported.changed == 0
    assert "llama_cpp_builds does not name gone (0.0 GiB)" in " ".join(
        reported.stdout.split() + reported.stderr.split()
    )

    removing = replace(base, options={"llama_cpp_remove_unused": True})
    predicted = removing.play("--check", "--diff").check()
    assert predicted.changed == 1 and "-gone (unused)" in predicted.stdout
    assert removing.play().check().changed == 1
    assert host(f"ls {BUILD_ROOT}").split() == ["libexec", "link", "notes", BUILD]
    assert removing.play().check().changed == 0
    host(f"rm -r {BUILD_ROOT}/link {BUILD_ROOT}/notes")


def test_two_plays_at_once_are_one_build(
    base: Builds, background: Callable[[Builds], subprocess.Popen[str]]
) -> None:
    changed = base.fresh()
    # A ninja below a ninja is a compiler that was forked a moment ago.
    ninjas = (
        'ps -eo pid=,ppid=,comm= | awk \'$3 == "ninja" {parent[$1] = $2}'
        " END {for (pid in parent) if (!(parent[pid] in parent)) n++; print n + 0}'"
    )
    most = f"m=0; while [ ! -e /run/stop-probe ]; do n=$({ninjas}); [ $n -gt $m ] && m=$n; sleep 0.1; done"
    host("rm -f /run/stop-probe")
    host(f"systemd-run --quiet --unit=ninja-probe sh -c {shlex.quote(most + '; echo most ninjas $m')}")
    processes = [background(changed), background(changed)]
    outputs = [process.communicate(timeout=400)[0] for process in processes]
    host("touch /run/stop-probe; sleep 0.5")
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert runs_of(f"llama-build-{link('current')}.service") == 1
    assert "most ninjas 1" in host("journalctl -q -o cat -u ninja-probe; rm -f /run/stop-probe")
    assert nothing_half_done()
