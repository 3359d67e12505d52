#!/usr/bin/python
"""One step of building llama.cpp on a host: probe, prepare, start, follow or activate; or of an update.

The action plugin of the same name calls it several times while a build runs and once on a host where nothing
is to be done. The build itself is files/llama_build.py in a transient unit, so that it outlives the play.
After a comparison an update accepts or rejects a release; a person may roll one back.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule  # type: ignore[import-untyped]

DOCUMENTATION = r"""
module: llama_cpp_build
short_description: Build pinned llama.cpp trees into releases and make them current
description:
  - For each build, finds out on the host whether its release exists and is whole, builds it in a transient
    unit where not, and points C(current) at it. Runs as one task for all builds of a host.
  - With C(phase) the action plugin says which step the module does; a task leaves it out.
options:
  builds:
    description: "Build name to C(repo), C(commit) (40 hex) and C(cmake_options) (strings)."
    type: dict
    required: true
  root:
    description: Directory of all builds.
    type: path
    default: /opt/llama.cpp
  user:
    description: The unprivileged system user that builds; it must exist before a build starts.
    type: str
    default: llama-build
  base_options:
    description: CMake options that a build may override.
    type: dict
    default: {}
  owned_options:
    description: CMake options that the releases rely on; a build that sets one of them is refused.
    type: dict
    default: {}
  targets:
    description: CMake targets; the first must exist in the tree, the others are built where it has them.
    type: list
    elements: str
    default: [llama-server]
  packages:
    description: Debian packages that a build needs.
    type: list
    elements: str
    default: []
  option_packages:
    description: Further packages, by the CMake option that needs them when it is ON.
    type: dict
    default: {}
  keep_releases:
    description: How many releases of a build stay, C(current) and C(previous) included.
    type: int
    default: 2
  remove_unused:
    description: Remove what earlier C(builds) left below the root; without it they are reported.
    type: bool
    default: false
  jobs:
    description: Compilers at once; 0 means one for each CPU, as far as the memory reaches.
    type: int
    default: 0
  nice:
    description: Nice level of the build.
    type: int
    default: 10
  memory_max:
    description: MemoryMax= of the build's unit.
    type: str
    default: 80%
  timeout:
    description: Seconds after which a build is ended.
    type: int
    default: 14400
  disk_min:
    description: Free bytes that must be there before a build starts.
    type: int
    default: 0
  memory_min:
    description: Available bytes of memory that must be there before a build starts.
    type: int
    default: 0
  follow_interval:
    description: Seconds between two looks at a running build.
    type: int
    default: 3
  activate:
    description: Make the built release C(current); otherwise it only stands beside it.
    type: bool
    default: true
  phase:
    description: The step; set by the action plugin, but for C(roll_back).
    type: str
    choices: [probe, prepare, remove, start, follow, activate, accept, reject, roll_back]
    default: probe
  build:
    description: The build that every phase but probe, prepare and remove is about.
    type: str
  release:
    description: The release that accept and reject are about.
    type: str
  reason:
    description: Why the release is rejected, in one line.
    type: str
    default: ""
  serving_user:
    description: The user whose lmswitch restarts a preset that serves with the build.
    type: str
    default: ""
  tool:
    description: Content of the build tool; set by the action plugin.
    type: str
author: [llmbox]
"""

STAMP = "release.json"
RUN_DIR = Path("/run/llama-build")
UNIT_PREFIX = "llama-build-"
JOURNAL_TAIL = 25
LMSWITCH = "/usr/local/bin/lmswitch"
DRIFT = "/usr/local/bin/llmbox-drift"
SYSTEM_UNITS = Path("/etc/systemd/system")
SERVER = "llama-server"
RESTART_TIMEOUT_S = 900
ROLLED_BACK = "rolled back to "
LOCK_PATIENCE_S, LOCK_PAUSE_S = 120.0, 1.0
WHOLE = ("probe", "prepare", "remove")
OF_A_BUILD = ("start", "follow", "activate")
OF_AN_UPDATE = ("accept", "reject", "roll_back")
_PROGRESS = re.compile(r"^\[(?P<done>\d+)/(?P<total>\d+)\] ", re.MULTILINE)
_PHASE = re.compile(r"^llama-build: phase (?P<phase>.+)$", re.MULTILINE)
_ERROR = re.compile(r"^llama-build: error: (?P<error>.+)$", re.MULTILINE)
_BUILD_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
_GIB = 1 << 30
_WAITING = ".previous.of."  # and a release: where `previous` leads once that one is current
_ON = frozenset({"1", "ON", "TRUE", "YES", "Y"})


class HostError(Exception):
    """The host cannot do what the play asks; the message is one line with the fix."""

    served = True  # what was to be restarted, before


class DoesNotServe(HostError):
    """A release was started and did not come to serve. Else the box refused, was busy or lacked something."""


@dataclass(frozen=True)
class Build:
    """One entry of llama_cpp_builds with the role's own CMake options merged in."""

    name: str
    repo: str
    commit: str
    cmake: dict[str, str]


@dataclass(frozen=True)
class Toolchain:
    """What decides, beside the data, which binary comes out."""

    compiler: str
    cuda: str | None
    cpu_target: str | None

    def identity(self) -> dict[str, str | None]:
        return {"compiler": self.compiler, "cuda": self.cuda, "cpu_target": self.cpu_target}


# -- pure logic


def merge_options(
    name: str, options: Mapping[str, str], base: Mapping[str, str], owned: Mapping[str, str]
) -> dict[str, str]:
    """The CMake options of one build: the role's defaults, then the data's, then what releases rely on.

    Raises HostError when the data sets an option that the role owns.
    """
    for key in options:
        if key in owned:
            raise HostError(
                f"llama_cpp_builds.{name}.cmake_options.{key} = {options[key]}: set by the role,"
                " because releases rely on it; fix: remove that line"
            )
    merged = {**base, **options, **owned}
    if is_on(merged.get("GGML_CUDA")):
        merged["CMAKE_CUDA_COMPILER_LAUNCHER"] = merged.get("CMAKE_CXX_COMPILER_LAUNCHER", "ccache")
    return merged


def is_on(value: str | None) -> bool:
    """Whether CMake takes this option for true."""
    return (value or "").strip().upper() in _ON


def release_name(commit: str, cmake: Mapping[str, str], toolchain: Toolchain) -> str:
    """`<commit>-<config hash>`: 12 hex digits of a sha256 over everything that decides the binary."""
    content = json.dumps([commit, sorted(cmake.items()), toolchain.identity()], sort_keys=True)
    return f"{commit}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def needed_packages(
    packages: Sequence[str],
    option_packages: Mapping[str, Sequence[str]],
    options: Sequence[Mapping[str, str]],
) -> list[str]:
    """The packages of the role and those of every option that some build switches on."""
    extra = [
        package
        for option, wanted in option_packages.items()
        if any(is_on(each.get(option)) for each in options)
        for package in wanted
    ]
    return sorted({*packages, *extra})


def progress(journal: str) -> dict[str, Any]:
    """Where a build is, from its journal: phase, and of the compile phase the steps done and in all."""
    phases = list(_PHASE.finditer(journal))
    steps = list(_PROGRESS.finditer(journal))
    found: dict[str, Any] = {"phase": phases[-1]["phase"] if phases else "start", "done": None, "total": None}
    # journalctl may hand out a tail that begins after the phase line.
    if steps and (not phases or phases[-1]["phase"] == "compile"):
        found.update(phase="compile", done=int(steps[-1]["done"]), total=int(steps[-1]["total"]))
    return found


def failure(result: str, status: str, journal: str, memory_max: str, timeout_s: int) -> str:
    """Why a unit failed, in one line, from systemd's Result= and the journal."""
    errors = _ERROR.findall(journal)
    if result == "oom-kill":
        return (
            f"out of memory at {memory_max} (llama_cpp_build_memory_max);"
            " fix: lower llama_cpp_build_jobs, or raise the limit"
        )
    if result == "timeout":
        return (
            f"no end after {timeout_s} s (llama_cpp_build_timeout);"
            " fix: raise it, or see in the journal what hung"
        )
    if errors:
        return str(errors[-1])
    if result in ("signal", "core-dump"):
        return f"it was killed by signal {status}; run the play again"
    return f"it ended without a word ({result}, status {status}); run the play again"


def releases_to_remove(ranked: Sequence[str], keep: int, protected: set[str]) -> list[str]:
    """Which of the releases, newest first, go: all beyond `keep`; the protected ones take first places."""
    room = max(0, keep - len(protected))
    spare = [name for name in ranked if name not in protected]
    return spare[room:]


def unit_properties(user: str, directory: Path, *, nice: int, memory_max: str, timeout_s: int) -> list[str]:
    """Properties of a build's transient unit; tests/lab/test_build.py proves what each sandbox line does."""
    return [
        f"User={user}",
        f"Nice={nice}",
        "CPUWeight=20",
        "IOWeight=20",
        f"MemoryMax={memory_max}",
        f"RuntimeMaxSec={timeout_s}",
        "TimeoutStopSec=10",
        "LogRateLimitIntervalSec=0",
        "CacheDirectory=llama.cpp",
        "ProtectSystem=strict",
        f"ReadWritePaths={directory}/src {directory}/build {directory}/releases",
        "ProtectHome=yes",
        "PrivateTmp=yes",
        "NoNewPrivileges=yes",
        "RestrictSUIDSGID=yes",
        "CapabilityBoundingSet=",
    ]


def wrong_file(
    release: Path, files: Mapping[str, Mapping[str, Any]], programs: Sequence[str] = ()
) -> str | None:
    """None when every file of the manifest is there and whole, or what is wrong with the first that is not.

    Every file is read: a file's time can be set, and no other mark of it is worth trusting.
    `programs` are the names of those files that everybody must be able to run.
    """
    owner = release.lstat().st_uid
    for name in (".", "bin", STAMP):
        wrong = wrong_access((release / name).lstat(), owner)
        if wrong:
            return f"{'the release' if name == '.' else name} {wrong}"
    for name, wanted in files.items():
        path = release / name
        try:
            info = path.lstat()
        except OSError:
            return f"{name} is missing"
        if "link" in wanted:
            if not stat.S_ISLNK(info.st_mode) or str(path.readlink()) != wanted["link"]:
                return f"{name} is no link to {wanted['link']}"
        elif not stat.S_ISREG(info.st_mode) or info.st_size != wanted["size"]:
            return f"{name} has {info.st_size} bytes instead of {wanted['size']}"
        elif _sha256(path) != wanted["sha256"]:
            return f"{name} has another content than when it was built"
        wrong = wrong_access(info, owner, program=name in programs)
        if wrong:
            return f"{name} {wrong}"
    return None


def wrong_access(info: os.stat_result, owner: int, program: bool = False) -> str | None:
    """None when only root, or the build user before root has the release, can change it and all can use it.

    `owner` is the release's; while root takes it over, files of both are in it.
    """
    if info.st_uid not in (0, owner):
        return f"belongs to user {info.st_uid} instead of {'root' if owner == 0 else owner}"
    if stat.S_ISLNK(info.st_mode):
        return None
    mode = stat.S_IMODE(info.st_mode)
    if mode & 0o022:
        return f"has mode {mode:04o}: others than its owner can change it"
    needed = 0o555 if program or stat.S_ISDIR(info.st_mode) else 0o444
    if mode & needed != needed:
        return f"has mode {mode:04o}: not everybody can {'run' if needed & 0o111 else 'read'} it"
    return None


def strangers(release: Path) -> list[Path]:
    """What lies beside the programs of a release and is not of it: ggml would load a backend from there.

    Only of a release that is root's: in another one `bin` may be a link to anywhere.
    """
    folder = release / "bin"
    try:
        files = json.loads((release / STAMP).read_text(encoding="utf-8"))["files"]
        if release.lstat().st_uid != os.geteuid() or folder.is_symlink():
            return []
        return sorted(path for path in folder.iterdir() if f"bin/{path.name}" not in files)
    except (OSError, ValueError, KeyError, TypeError):
        return []  # damaged, which is told elsewhere


def told(error: OSError) -> str:
    """What went wrong with which file, and the fix, in one line."""
    file = error.filename2 or error.filename
    if file is None:
        return str(error)
    fix = "free space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "put that right on the host"
    return f"{file}: {error.strerror}; fix: {fix}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- the host


def run(argv: Sequence[str], timeout_s: float = 60, check: bool = True, user: str | None = None) -> str:
    """Run a program and return its two outputs, as `user` where one is named and root asks.

    Raises HostError with the program's last line when it fails.
    """
    try:
        done: subprocess.CompletedProcess[str] = subprocess.run(
            argv,
            **(unprivileged(user) if user and os.geteuid() == 0 else {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
            env={**os.environ, "LC_ALL": "C.UTF-8"},
        )
    except subprocess.TimeoutExpired:
        raise HostError(f"{argv[0]}: no end after {timeout_s} s") from None
    except OSError as error:
        raise HostError(f"{argv[0]}: {error.strerror}") from None
    if check and done.returncode != 0:
        last = (done.stdout.strip().splitlines() or ["it printed nothing"])[-1]
        raise HostError(f"{' '.join(argv[:3])}: exit code {done.returncode}: {last}")
    return done.stdout


def unprivileged(user: str) -> dict[str, Any]:
    """Arguments of subprocess.run that make a program run as `user`, or as nobody where there is none."""
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        entry = pwd.getpwnam("nobody")
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": (), "cwd": "/"}


def missing_packages(packages: Sequence[str]) -> list[str]:
    """Those of the packages that dpkg does not call installed."""
    if not packages:
        return []
    listed = run(
        ["dpkg-query", "--show", "--showformat=${Package} ${db:Status-Status}\n", *packages], check=False
    )
    installed = {line.split()[0] for line in listed.splitlines() if line.endswith(" installed")}
    return [package for package in packages if package not in installed]


def toolchain(name: str, cmake: Mapping[str, str]) -> Toolchain:
    """Ask the compilers of one build who they are. Raises HostError naming the option of a missing one."""
    compilers = []
    for option, default in (("CMAKE_C_COMPILER", "cc"), ("CMAKE_CXX_COMPILER", "c++")):
        program = cmake.get(option, default)
        try:
            text = run([program, "--version"])
            number = run([program, "-dumpfullversion", "-dumpversion"]).split()[0]
        except (HostError, IndexError) as error:
            raise HostError(
                f"llama_cpp_builds.{name}: no working compiler {program} ({option}): {error}"
            ) from None
        compilers.append(f"{'Clang' if 'clang' in text else 'GNU'} {number}")
    cuda = None
    if is_on(cmake.get("GGML_CUDA")):
        nvcc = cmake.get("CMAKE_CUDA_COMPILER", "nvcc")
        try:
            text = run([nvcc, "--version"])
        except HostError as error:
            raise HostError(
                f"llama_cpp_builds.{name}.cmake_options.CMAKE_CUDA_COMPILER = {nvcc}: {error};"
                " fix: install the CUDA toolkit, or name its nvcc"
            ) from None
        release = re.search(r"release [\d.]+, V([\d.]+)", text)
        cuda = release[1] if release else text.strip().splitlines()[-1]
    native = None
    if is_on(cmake.get("GGML_NATIVE", "ON")):
        native = cpu_target(cmake.get("CMAKE_C_COMPILER", "cc"))
    return Toolchain(" / ".join(dict.fromkeys(compilers)), cuda, native)


def cpu_target(compiler: str) -> str:
    """What -march=native means on this host: the resolved name and a digest of the CPU's flags."""
    text = run([compiler, "-march=native", "-E", "-v", "-x", "c", os.devnull])
    march = re.search(r"-march=(?!native)(\S+)", text)
    flags = re.search(
        r"^(?:flags|Features)\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE
    )
    digest = (
        hashlib.sha256(" ".join(sorted(flags[1].split())).encode()).hexdigest()[:12] if flags else "unknown"
    )
    return f"{march[1] if march else 'native'} flags {digest}"


def damage(release: Path, user: str | None = None) -> str | None:
    """None for a finished, whole release whose server starts as `user`; otherwise what is wrong.

    `absent` means that there is no such release, or none that was ever finished.
    """
    try:
        stamp = json.loads((release / STAMP).read_text(encoding="utf-8"))
        files = dict(stamp["files"])
        programs = [f"bin/{target}" for target in stamp["targets"]]
        server = release / programs[0]
    except FileNotFoundError:
        return "absent"
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        return f"{STAMP} cannot be read: {error!r}"
    try:
        wrong = wrong_file(release, files, programs)
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    if wrong:
        return wrong
    try:
        run([str(server), "--version"], timeout_s=60, user=user)
    except HostError as error:
        return f"llama-server does not start: {error}"
    return None


def unit_of(release: str) -> str:
    return f"{UNIT_PREFIX}{release}.service"


def unit_state(unit: str) -> dict[str, str]:
    """What systemd knows about a unit; LoadState is not-found when it is gone."""
    names = "LoadState,ActiveState,Result,ExecMainStatus,InvocationID,ExecMainStartTimestampMonotonic"
    text = run(["systemctl", "show", "--property", names, "--", unit])
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


def is_running(state: Mapping[str, str]) -> bool:
    return state.get("ActiveState") in ("active", "activating", "deactivating", "reloading")


def running_units() -> list[str]:
    """Every build of llama.cpp that runs on this host."""
    text = run(
        ["systemctl", "list-units", "--plain", "--no-legend", "--all", f"{UNIT_PREFIX}*.service"], check=False
    )
    words = [line.split() for line in text.splitlines()]
    return [
        word[0] for word in words if len(word) > 2 and word[2] in ("active", "activating", "deactivating")
    ]


def journal_of(invocation: str, lines: int) -> str:
    """The last lines that one run of a unit wrote."""
    if not invocation:
        return ""
    return run(
        [
            "journalctl",
            "--quiet",
            "--no-pager",
            "--output=cat",
            f"--lines={lines}",
            f"_SYSTEMD_INVOCATION_ID={invocation}",
        ],
        check=False,
    )


def link_target(link: Path) -> str | None:
    """The release that `current` or `previous` points at."""
    try:
        return link.readlink().name
    except OSError:
        return None


def point(link: Path, release: str) -> None:
    """Point a link at a release with one rename: there is no moment without a link."""
    fresh = link.with_name(f".{link.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(Path("releases") / release)
    fresh.replace(link)


def swap(directory: Path, release: str, former: str | None) -> None:
    """Point `current` at a release, `previous` at the former one; killed between, settle() completes it."""
    waiting = directory / f"{_WAITING}{release}"
    waiting.unlink(missing_ok=True)
    if former:
        waiting.symlink_to(Path("releases") / former)
    point(directory / "current", release)
    if former:
        waiting.replace(directory / "previous")


def settle(directory: Path) -> None:
    """Complete what a swap was killed in; one that had not reached `current` is forgotten."""
    current = link_target(directory / "current")
    for waiting in directory.glob(f"{_WAITING}*"):
        if waiting.name.removeprefix(_WAITING) == current:
            waiting.replace(directory / "previous")
        else:
            waiting.unlink()


def rejection(directory: Path, release: str) -> str | None:
    """Why this release of the build in `directory` was rejected on this host; None when it was not."""
    try:
        return (directory / "rejected" / release).read_text(encoding="utf-8").strip()
    except OSError:
        return None


def reject(directory: Path, release: str, reason: str) -> None:
    """Keep on the host that this release is not wanted: no play makes it current by itself."""
    _directory(directory / "rejected", 0, 0, 0o755)
    path = directory / "rejected" / release
    fresh = path.with_name(f".{release}")
    fresh.write_text(f"{time.strftime('%Y-%m-%d', time.gmtime())}: {reason}\n", encoding="utf-8")
    fresh.replace(path)


def rolled_back_to(directory: Path, release: str) -> str | None:
    """The release that a rollback from this one leads, or was to lead, to."""
    _, found, target = (rejection(directory, release) or "").rpartition(f": {ROLLED_BACK}")
    return target if found else None


def restart_serving(user: str, build: str) -> str | None:
    """Restart the preset that serves with this build, or that has failed, if any. Returns its name.

    Raises DoesNotServe when it was started, HostError when it was not.
    """
    try:
        uid = pwd.getpwnam(user).pw_uid
    except KeyError:
        return None
    lmswitch = ["runuser", "-u", user, "--", "env", f"XDG_RUNTIME_DIR=/run/user/{uid}", LMSWITCH, "--json"]
    if not Path(LMSWITCH).exists():
        return None
    status = _answer(run([*lmswitch, "status"], check=False))
    if "active" not in status:  # no answer is not "nothing serves": the other release may serve on
        raise HostError(str(status.get("message")))
    active = status["active"]
    if not active or status.get("build") != build:
        return None
    deadline = time.monotonic() + LOCK_PATIENCE_S
    while True:
        said = _answer(run([*lmswitch, "--restart", active], timeout_s=RESTART_TIMEOUT_S, check=False))
        if said.get("ok"):
            return str(active)
        if "another switch is under way" not in str(said.get("message")) or time.monotonic() > deadline:
            lines = [line for line in said.get("reason") or [] if "llmbox-wait-ready" not in line]
            kind = DoesNotServe if said.get("changed") else HostError
            failure = kind(" ".join([str(said.get("message")), *lines[-1:]]))
            failure.served = status.get("state") != "failed"
            raise failure
        time.sleep(LOCK_PAUSE_S)


def renew_record(directory: Path) -> None:
    """Tell the record of what was deployed that the releases of a build changed places, where there is one.

    A failure is no reason to fail: the next look at the box names the difference.
    """
    if Path(DRIFT).exists():
        with contextlib.suppress(HostError):
            run([DRIFT, "renew", str(directory)])


def _answer(text: str) -> dict[str, Any]:
    """The object among the lines that lmswitch --json printed."""
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict):
                return found
    return {"message": f"lmswitch gave no answer: {text.strip()[-200:]}"}


def in_use(releases: Path, program: str = "") -> set[str]:
    """Releases of which some process runs a program, or this one."""
    used = set()
    for process in Path("/proc").glob("[0-9]*/exe"):
        with contextlib.suppress(OSError, ValueError):
            path = process.readlink().relative_to(releases)
            if program in ("", path.name):
                used.add(path.parts[0])
    return used


def still_served(directory: Path) -> list[str]:
    """Releases beside the current one that serve: it became current, and nothing was restarted yet."""
    return sorted(in_use(directory / "releases", SERVER) - {link_target(directory / "current") or ""})


def without_gateway(directory: Path) -> str:
    """Why releases of this build do not take turns here: a system preset runs it. "" when none does.

    What is installed says so, not what runs: one that is down now would come up with what was never compared.
    """
    command = f"{directory}/current/"
    for unit in sorted(SYSTEM_UNITS.glob("llama-*.service")):
        if unit.is_file() and command in unit.read_text(encoding="utf-8", errors="replace"):
            return (
                f"{directory}: {unit.name} of the system serves with this build, without a gateway that could"
                " hold requests while releases change places; fix: write the commit that it should run into"
                f" llama_cpp_builds.{directory.name}, then site.yml; or give that preset a build of its own"
            )
    return ""


@contextlib.contextmanager
def one_play() -> Iterator[None]:
    """Keep two plays from starting, sweeping or activating at the same moment."""
    RUN_DIR.mkdir(mode=0o755, exist_ok=True)
    with (RUN_DIR / "play.lock").open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


class Host:
    """The builds of one host: what the task asks for, and what is there."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        self.params = params
        self.root = Path(params["root"])
        self.tool = self.root / "libexec" / "llama-build"
        self.builds = {
            name: Build(
                name,
                entry["repo"],
                entry["commit"],
                merge_options(name, entry["cmake_options"], params["base_options"], params["owned_options"]),
            )
            for name, entry in sorted(params["builds"].items())
        }
        self._toolchains: dict[str, Toolchain] = {}

    def toolchain(self, build: Build) -> Toolchain:
        if build.name not in self._toolchains:
            self._toolchains[build.name] = toolchain(build.name, build.cmake)
        return self._toolchains[build.name]

    def release(self, build: Build) -> str:
        return release_name(build.commit, build.cmake, self.toolchain(build))

    def directory(self, build: Build) -> Path:
        return self.root / build.name

    def packages(self) -> list[str]:
        return missing_packages(
            needed_packages(
                self.params["packages"],
                self.params["option_packages"],
                [build.cmake for build in self.builds.values()],
            )
        )

    # -- phases

    def probe(self) -> dict[str, Any]:
        """What is there and what is to do, without changing anything."""
        packages = self.packages()
        plan = [self._probe_build(build, bool(packages)) for build in self.builds.values()]
        unused = self._unused()
        removable = self.params["remove_unused"] and not all(entry["in_use"] for entry in unused)
        to_do = (
            packages or self._tool_differs() or removable or any(entry["action"] != "none" for entry in plan)
        )
        return {"changed": bool(to_do), "missing_packages": packages, "plan": plan, "unused": unused}

    def _unused(self) -> list[dict[str, Any]]:
        """Builds below the root that the data does not name: size, and whether a process runs one of them.

        Only what this module makes counts: a directory with a build's name and `releases` in it, no link.
        """
        return [
            {"build": path.name, "bytes": _size(path), "in_use": bool(in_use(path / "releases"))}
            for path in sorted(self.root.glob("*"))
            if path.name not in self.builds and _BUILD_NAME.fullmatch(path.name)
            if not path.is_symlink() and (path / "releases").is_dir()
        ]

    def remove(self) -> dict[str, Any]:
        """Remove the unused builds of which nothing runs, and stop what still builds them."""
        with one_play():
            stopped = self._stop_unwanted()
            removed = [entry["build"] for entry in self._unused() if not entry["in_use"]]
            for name in removed:
                shutil.rmtree(self.root / name)
                (RUN_DIR / f"{name}.json").unlink(missing_ok=True)
        return {"changed": bool(removed), "removed": removed, "stopped": stopped}

    def _probe_build(self, build: Build, packages_missing: bool) -> dict[str, Any]:
        directory = self.directory(build)
        current = link_target(directory / "current")
        entry: dict[str, Any] = {"build": build.name, "commit": build.commit, "current": current}
        entry["still_served"] = still_served(directory)
        entry["without_gateway"] = without_gateway(directory)
        try:
            release = self.release(build)
        except HostError as error:
            if not packages_missing:
                raise
            return {**entry, "release": None, "action": "build", "reason": str(error)}
        deferred = not self.params["activate"] and current is not None
        if current != release and not deferred:
            self._refuse_rejected(build, release, current)
        wrong = self._damage(build, release)
        entry["release"] = release
        if wrong:
            return {**entry, "action": "build", "reason": wrong}
        if current != release and not deferred:
            return {**entry, "action": "activate", "reason": f"current is {current or 'not set'}"}
        if (directory / "releases" / release).stat().st_uid != 0:
            return {**entry, "action": "activate", "reason": "still owned by the build user"}
        if current != release:
            return {**entry, "action": "none", "reason": f"built; current is {current}"}
        stale = self._stale(directory, release) + [str(path) for path in self._strangers(directory)]
        if stale:
            return {**entry, "action": "activate", "reason": f"to be removed: {', '.join(stale)}"}
        return {**entry, "action": "none", "reason": "built and current"}

    def _refuse_rejected(self, build: Build, release: str, current: str | None) -> None:
        """Raises HostError when this host has rejected the release that the data asks for."""
        reason = rejection(self.directory(build), release)
        if reason:
            back = (current or "the commit before").partition("-")[0]
            if back == build.commit:  # with other options, or by another compiler
                back = f"what {current} was built with (its {STAMP})"
            raise HostError(
                f"llama_cpp_builds.{build.name}: commit {build.commit} was rejected on this host ({reason});"
                f" fix: put back {back}, compare again with"
                " playbooks/update_llama_cpp.yml, or take it nevertheless: remove"
                f" {self.directory(build)}/rejected/{release}"
            )

    def prepare(self) -> dict[str, Any]:
        """The directories and the build tool."""
        changed = _directory(self.root, 0, 0, 0o755) | _directory(self.tool.parent, 0, 0, 0o755)
        content = self.params["tool"] or ""
        if self._tool_differs():
            fresh = self.tool.with_name(".llama-build.new")
            fresh.write_text(content, encoding="utf-8")
            fresh.chmod(0o755)
            fresh.replace(self.tool)
            changed = True
        return {"changed": changed}

    def _tool_differs(self) -> bool:
        try:
            info = self.tool.stat()
            return (
                self.tool.read_text(encoding="utf-8") != (self.params["tool"] or "")
                or stat.S_IMODE(info.st_mode) != 0o755
                or info.st_uid != 0
            )
        except OSError:
            return True

    def start(self, build: Build) -> dict[str, Any]:
        """Start the unit of a build, unless it runs already or its release stands finished."""
        release = self.release(build)
        unit = unit_of(release)
        directory = self.directory(build)
        with one_play():
            state = unit_state(unit)
            if is_running(state):
                return {"changed": False, "unit": unit, "release": release, "found_running": True}
            stopped = self._stop_unwanted()
            wrong = self._damage(build, release)
            if wrong is None:
                return {
                    "changed": False,
                    "unit": unit,
                    "release": release,
                    "found_running": False,
                    "stopped": stopped,
                }
            self._check_room(build)
            self._prepare_directories(build, release)
            spec = self._write_spec(build, release)
            run(["systemctl", "reset-failed", "--", unit], check=False)
            properties = unit_properties(
                self.params["user"],
                directory,
                nice=self.params["nice"],
                memory_max=self.params["memory_max"],
                timeout_s=self.params["timeout"],
            )
            run(
                [
                    "systemd-run",
                    "--quiet",
                    f"--unit={unit}",
                    "--service-type=exec",
                    f"--description=Build of llama.cpp {build.name} {build.commit[:12]}",
                    *(f"--property={each}" for each in properties),
                    "--",
                    str(self.tool),
                    str(spec),
                ]
            )
        return {"changed": True, "unit": unit, "release": release, "found_running": False, "stopped": stopped}

    def follow(self, build: Build) -> dict[str, Any]:
        """How far the unit of a build is: running, ready or failed."""
        release = self.release(build)
        state = unit_state(unit_of(release))
        invocation = state.get("InvocationID", "")
        if is_running(state):
            started_us = int(state.get("ExecMainStartTimestampMonotonic") or 0)
            elapsed = time.clock_gettime(time.CLOCK_MONOTONIC) - started_us / 1e6 if started_us else 0.0
            return {"state": "running", "elapsed": elapsed, **progress(journal_of(invocation, 400))}
        wrong = self._damage(build, release)
        if wrong is None:
            return {"state": "ready"}
        run(["journalctl", "--sync"], check=False)
        journal = journal_of(invocation, 400)
        reason = failure(
            state.get("Result", ""),
            state.get("ExecMainStatus", ""),
            journal,
            self.params["memory_max"],
            self.params["timeout"],
        )
        with one_play():
            if not is_running(unit_state(unit_of(release))):
                self._sweep(build)
        return {"state": "failed", "reason": reason, "journal": journal.splitlines()[-JOURNAL_TAIL:]}

    def activate(self, build: Build) -> dict[str, Any]:
        """Make the finished release current, keep the former one as previous, remove what is too many."""
        release = self.release(build)
        directory = self.directory(build)
        with one_play():
            wrong = self._damage(build, release)
            if wrong:
                raise HostError(f"{directory}/releases/{release}: {wrong}; run the play again")
            changed = _give_to_root(directory / "releases" / release)
            settle(directory)
            former = link_target(directory / "current")
            stale: list[str] = []
            if self.params["activate"] or former in (None, release):
                if former != release:
                    whole = former and (directory / "releases" / former / STAMP).is_file()
                    swap(directory, release, former if whole else None)
                    changed = True
                stale = self._prune(directory, release)
            for path in self._strangers(directory):
                _remove(path)
                stale.append(str(path))
            self._sweep(build)
        return {"changed": changed or bool(stale), "removed": stale, "former": former}

    # -- an update, by name: the data may ask for another release meanwhile

    def accept(self, name: str, release: str) -> dict[str, Any]:
        """Make a release current after a comparison, and restart what serves with its build.

        One that is current already is what a run left that died between the two. Raises DoesNotServe when
        it was taken back, and rejected.
        """
        directory = self.root / name
        with one_play():
            self._refuse_without_gateway(directory)
            self._refuse_damaged(directory, release)
            _give_to_root(directory / "releases" / release)
            (directory / "rejected" / release).unlink(missing_ok=True)
            settle(directory)
            former = link_target(directory / "current")
            try:
                restarted = self._change(directory, release, former)
            except DoesNotServe as error:
                # Here, for the play may be gone by now, and site.yml would make the release current again.
                try:
                    reject(directory, release, str(error))
                except OSError as unmarked:
                    raise DoesNotServe(f"{error}; it could not be marked: {told(unmarked)}") from None
                raise
            removed = self._prune(directory, release)
            renew_record(directory)
        changed = former != release or restarted is not None
        return {"changed": changed, "former": former, "restarted": restarted, "removed": removed}

    def reject(self, name: str, release: str) -> dict[str, Any]:
        """Keep that a release lost a comparison, and why."""
        with one_play():
            reject(self.root / name, release, self.params["reason"])
        return {"changed": True}

    def roll_back(self, name: str) -> dict[str, Any]:
        """Make `previous` current again and restart what serves with the build; what is left is rejected."""
        directory = self.root / name
        if not _BUILD_NAME.fullmatch(name) or not (directory / "releases").is_dir():
            there = sorted(path.parent.name for path in self.root.glob("*/releases"))
            raise HostError(f"build = {name!r}: no such build below {self.root}; fix: {' or '.join(there)}")
        with one_play():
            self._refuse_without_gateway(directory)
            settle(directory)
            current, previous = (link_target(directory / link) for link in ("current", "previous"))
            if not current or not previous or current == previous:
                raise HostError(
                    f"{directory}/previous: there is no release to go back to; current is {current};"
                    f" fix: an older commit in llama_cpp_builds.{name}, then playbooks/update_llama_cpp.yml"
                )
            reason = rejection(directory, previous)
            if rolled_back_to(directory, previous) == current and still_served(directory):
                # It was killed before its restart, which is all that is left of it.
                restarted = self._back(directory, current, current)
                renew_record(directory)
                return {"changed": True, "release": current, "former": previous, "restarted": restarted}
            if reason:
                raise HostError(
                    f"{directory}/previous: {previous} was rejected ({reason}), and nothing older stands"
                    f" here; {current} stays; fix: another commit in llama_cpp_builds.{name}, then"
                    " playbooks/update_llama_cpp.yml"
                )
            self._refuse_damaged(directory, previous)
            # First, or a play that ends between the two would find it not rejected and go to it again.
            reject(directory, current, f"{ROLLED_BACK}{previous}")
            restarted = self._back(directory, previous, current)
            renew_record(directory)
        return {"changed": True, "release": previous, "former": current, "restarted": restarted}

    def _back(self, directory: Path, release: str, former: str) -> str | None:
        """`_change`, after which what serves on is not rejected."""
        try:
            return self._change(directory, release, former)
        except HostError:
            (directory / "rejected" / str(link_target(directory / "current"))).unlink(missing_ok=True)
            raise

    def _change(self, directory: Path, release: str, former: str | None) -> str | None:
        """Swap the links and restart what serves; as before when it does not start. Returns the preset.

        Raises DoesNotServe when it was put back for the release's fault, HostError for anything else.
        """
        before = link_target(directory / "previous")
        owed = former == release  # it was killed between the links and the restart
        if owed:
            serving = still_served(directory)
            if not serving:
                return None
            former = before if before in serving else None
        try:
            swap(directory, release, former)
            return restart_serving(self.params["serving_user"], directory.name)
        except (HostError, OSError) as error:
            if isinstance(error, HostError) and not error.served:
                return None  # it had failed before: nothing is lost, and it says nothing about the release
            kind = DoesNotServe if isinstance(error, DoesNotServe) else HostError
            left = ""
            if owed and kind is HostError:
                raise  # the one before serves on, and the next run may restart it
            try:
                if former and link_target(directory / "current") != former:
                    swap(directory, former, release if owed else before)
                    if not before:
                        (directory / "previous").unlink(missing_ok=True)  # there was none
                    restart_serving(self.params["serving_user"], directory.name)
            except OSError:
                pass
            except HostError as refused:
                left = f", but could not be restarted: {refused}"
                if not isinstance(refused, DoesNotServe):
                    kind = HostError  # what refuses this one too may have ended the start: the guard, say
            if owed:
                renew_record(directory)
            now = link_target(directory / "current")
            if now == release:
                kind = HostError  # it could not be taken back: what is current is not to be rejected
            words = "does not serve" if kind is DoesNotServe else "cannot take over"
            why = f"{words}: {told(error) if isinstance(error, OSError) else error}"
            again = " again" if now == former else ""
            raise kind(f"{release} {why}; {now} is current{again}{left}") from None

    def _refuse_without_gateway(self, directory: Path) -> None:
        """Raises HostError when a preset that is not behind the gateway runs the build."""
        if why := without_gateway(directory):
            raise HostError(why)

    def _refuse_damaged(self, directory: Path, release: str) -> None:
        """Raises HostError when the release cannot be made current."""
        wrong = damage(directory / "releases" / release, self.params["user"])
        if wrong:
            raise HostError(
                f"{directory}/releases/{release}: {wrong}; fix: playbooks/update_llama_cpp.yml with commit"
                f" {release.partition('-')[0]} in llama_cpp_builds.{directory.name}, which builds it anew"
            )

    def _prune(self, directory: Path, release: str) -> list[str]:
        """Remove the releases that are too many now that `release` is current."""
        stale = self._stale(directory, release)
        for name in stale:
            shutil.rmtree(directory / "releases" / name)
        return stale

    # -- parts of phases

    def _damage(self, build: Build, release: str) -> str | None:
        # What an unprivileged user built is not run by root.
        return damage(self.directory(build) / "releases" / release, self.params["user"])

    def _stale(self, directory: Path, release: str) -> list[str]:
        """Releases that pruning would remove once `release` is current."""
        releases = directory / "releases"
        current, previous = (link_target(directory / name) for name in ("current", "previous"))
        former = current if current != release else previous
        protected = {name for name in (release, former) if name}
        names = [path.name for path in releases.glob("*") if not path.name.startswith(".")]
        ranked = sorted(names, key=lambda name: _built_at(releases / name), reverse=True)
        # What a process still runs stays, without taking a place.
        used = in_use(releases) if len(names) > len(protected) else set()
        return [
            name
            for name in releases_to_remove(ranked, self.params["keep_releases"], protected)
            if name not in used
        ]

    def _strangers(self, directory: Path) -> list[Path]:
        """What is in a release that serves or may be gone back to, and not of it."""
        names = {link_target(directory / link) for link in ("current", "previous")} - {None}
        return [path for name in sorted(map(str, names)) for path in strangers(directory / "releases" / name)]

    def _stop_unwanted(self) -> list[str]:
        """Stop builds that this host's data no longer asks for: they would only be in the way."""
        wanted = {unit_of(self.release(build)) for build in self.builds.values()}
        unwanted = [unit for unit in running_units() if unit not in wanted]
        for unit in unwanted:
            run(["systemctl", "stop", "--", unit], check=False)
        return unwanted

    def _check_room(self, build: Build) -> None:
        """Refuse a build that cannot end well."""
        disk = os.statvfs(self.root)
        free = disk.f_bavail * disk.f_frsize
        if free < self.params["disk_min"]:
            raise HostError(
                f"build {build.name}: {self.root} has {free / _GIB:.1f} GiB free,"
                f" llama_cpp_build_disk_min is {self.params['disk_min'] / _GIB:.1f} GiB;"
                " fix: free space, or lower llama_cpp_keep_releases or that limit"
            )
        available = _available_memory()
        if available < self.params["memory_min"]:
            raise HostError(
                f"build {build.name}: {available / _GIB:.1f} GiB of memory available,"
                f" llama_cpp_build_memory_min is {self.params['memory_min'] / _GIB:.1f} GiB;"
                " fix: stop what uses it (lmswitch off), or lower that limit"
            )

    def _prepare_directories(self, build: Build, release: str) -> None:
        directory = self.directory(build)
        try:
            user = pwd.getpwnam(self.params["user"])
        except KeyError:
            raise HostError(f"no user {self.params['user']} on this host; fix: run the whole role") from None
        _directory(directory, 0, 0, 0o755)
        for name in ("src", "build"):
            _directory(directory / name, user.pw_uid, user.pw_gid, 0o755)
        # Sticky: the build user adds a release, but cannot touch those that were given to root.
        _directory(directory / "releases", 0, user.pw_gid, 0o1775)
        self._sweep(build)
        final = directory / "releases" / release
        if final.is_dir():
            # No longer a release, but what still works of it stays until the new one takes its place.
            (final / STAMP).unlink(missing_ok=True)
            os.chown(final, user.pw_uid, user.pw_gid)
        else:
            final.unlink(missing_ok=True)

    def _write_spec(self, build: Build, release: str) -> Path:
        RUN_DIR.mkdir(mode=0o755, exist_ok=True)
        lock = RUN_DIR / "build.lock"
        lock.touch(mode=0o644)
        path = RUN_DIR / f"{build.name}.json"
        identity = {"cmake_options": build.cmake, **self.toolchain(build).identity()}
        content = {
            "build": build.name,
            "release": release,
            "repo": build.repo,
            "commit": build.commit,
            "directory": str(self.directory(build)),
            "lock": str(lock),
            "cmake": build.cmake,
            "targets": self.params["targets"],
            "jobs": self._jobs(build),
            "identity": identity,
        }
        path.write_text(json.dumps(content, indent=1), encoding="utf-8")
        path.chmod(0o644)
        return path

    def _jobs(self, build: Build) -> int:
        """As asked for, or one for each CPU with 1 GiB of memory for each, 2 GiB for nvcc."""
        if self.params["jobs"] > 0:
            return int(self.params["jobs"])
        each = (2 if is_on(build.cmake.get("GGML_CUDA")) else 1) * _GIB
        return max(1, min(len(os.sched_getaffinity(0)), _available_memory() // each))

    def _sweep(self, build: Build) -> None:
        """Remove what an ended build left half-done, unless a build of the same name runs."""
        directory = self.directory(build)
        running = {unit.removeprefix(UNIT_PREFIX).removesuffix(".service") for unit in running_units()}
        for path in (directory / "releases").glob(".*"):
            if not any(path.name.startswith(f".{release}.") for release in running):
                shutil.rmtree(path)
        if not running and (directory / "build").is_dir():
            for path in (directory / "build").iterdir():
                _remove(path)


def _available_memory() -> int:
    """MemAvailable of the host in bytes."""
    text = Path("/proc/meminfo").read_text(encoding="utf-8")
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _size(directory: Path) -> int:
    """Bytes of all files below a directory."""
    return sum(
        os.lstat(f"{folder}/{name}").st_size for folder, _, names in os.walk(directory) for name in names
    )


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that is in it."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _built_at(release: Path) -> float:
    """When a release was finished; 0 for what never was."""
    try:
        return (release / STAMP).stat().st_mtime
    except OSError:
        return 0.0


def _directory(path: Path, uid: int, gid: int, mode: int) -> bool:
    """Make a directory with that owner and mode; True when something changed."""
    path.mkdir(parents=True, exist_ok=True)
    info = path.stat()
    if (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (uid, gid, mode):
        return False
    os.chown(path, uid, gid)
    path.chmod(mode)
    return True


def _give_to_root(release: Path) -> bool:
    """Make root the owner of a release, so that no later build can change it; True when it was not."""
    if release.lstat().st_uid == 0:
        return False
    # The release itself comes last: when this is interrupted, it is done again.
    for directory, names, files in os.walk(release, topdown=False):
        for name in (*names, *files):
            os.chown(f"{directory}/{name}", 0, 0, follow_symlinks=False)
    os.chown(release, 0, 0)
    return True


def main() -> None:
    """Run one phase."""
    module = AnsibleModule(
        argument_spec={
            "builds": {"type": "dict", "required": True},
            "root": {"type": "path", "default": "/opt/llama.cpp"},
            "user": {"type": "str", "default": "llama-build"},
            "base_options": {"type": "dict", "default": {}},
            "owned_options": {"type": "dict", "default": {}},
            "targets": {"type": "list", "elements": "str", "default": ["llama-server"]},
            "packages": {"type": "list", "elements": "str", "default": []},
            "option_packages": {"type": "dict", "default": {}},
            "keep_releases": {"type": "int", "default": 2},
            "remove_unused": {"type": "bool", "default": False},
            "jobs": {"type": "int", "default": 0},
            "nice": {"type": "int", "default": 10},
            "memory_max": {"type": "str", "default": "80%"},
            "timeout": {"type": "int", "default": 14400},
            "disk_min": {"type": "int", "default": 0},
            "memory_min": {"type": "int", "default": 0},
            "follow_interval": {"type": "int", "default": 3},
            "activate": {"type": "bool", "default": True},
            "phase": {
                "type": "str",
                "choices": [*WHOLE, *OF_A_BUILD, *OF_AN_UPDATE],
                "default": "probe",
            },
            "build": {"type": "str"},
            "release": {"type": "str"},
            "reason": {"type": "str", "default": ""},
            "serving_user": {"type": "str", "default": ""},
            "tool": {"type": "str"},
        },
        supports_check_mode=True,
    )
    phase = module.params["phase"]
    if module.check_mode and phase != "probe":
        module.fail_json(msg=f"phase {phase} changes the host: not in check mode")
    try:
        host = Host(module.params)
        if phase in WHOLE:
            result = getattr(host, phase)()
        elif phase in OF_AN_UPDATE:
            # Whoever hangs up now must not leave the links changed and the old release serving.
            for number in (signal.SIGHUP, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
            names = ["build"] if phase == "roll_back" else ["build", "release"]
            result = getattr(host, phase)(*(module.params[name] or "" for name in names))
        else:
            result = getattr(host, phase)(host.builds[module.params["build"]])
    except HostError as error:
        module.fail_json(msg=str(error), tried=isinstance(error, DoesNotServe))
    except OSError as error:
        module.fail_json(msg=f"phase {phase}: {told(error)}; then run it again")
    module.exit_json(**result)


if __name__ == "__main__":
    main()
