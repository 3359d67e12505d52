#!/usr/bin/python3
"""Build one llama.cpp release from a pinned commit. The transient unit `llama-build-<release>` runs it.

Usage: llama-build SPEC.json. The unit runs it as an unprivileged user that may write to the build's `src`,
`build` and `releases` directories and to the ccache, nothing else. What it prints goes to the journal:
`llama-build: phase NAME` lines, the output of git, CMake and Ninja, and as the last line either
`llama-build: done …` or `llama-build: error: …`.

A release appears under its final name by one rename, after its stamp (release.json) was written and synced;
until then it is `releases/.<release>.partial`, which is removed when anything goes wrong.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

GIT_TIMEOUT_S = 3600
SMOKE_TIMEOUT_S = 120
STAMP = "release.json"
HELP = "help.txt"
TYPES = "types.json"
_TAIL_LINES = 400
_BUILD_TAG = re.compile(r"^(?P<commit>[0-9a-f]{40})\trefs/tags/b(?P<number>\d{1,9})(\^\{\})?$", re.MULTILINE)
# "version: 1 (83e5675)" in one tree, "version: 0.5.0-dev (build 1, commit 83e5675)" in the other
_VERSION_COMMIT = re.compile(r"[( ](?P<commit>[0-9a-f]{7,40})\)")
_TENSOR_TYPE = re.compile(r"^\s*GGML_TYPE_(\w+)\s*=\s*(\d+)\s*,", re.MULTILINE)
_ERROR_LINE = re.compile(r"(?i)(\berror\b|\bfatal\b|undefined reference|no space left|killed signal)")


class BuildError(Exception):
    """The build cannot be finished; the message is one line for the person who runs the play."""


@dataclass(frozen=True)
class Spec:
    """One build: what the play decided, written by root where the build user cannot change it."""

    build: str
    release: str
    repo: str
    commit: str
    directory: Path  # /opt/llama.cpp/<build>
    lock: Path
    cmake: dict[str, str]
    targets: tuple[str, ...]  # the first must exist in the tree, the others are built where it has them
    jobs: int
    identity: dict[str, Any]  # recorded in the stamp: what the release's name was derived from

    @classmethod
    def load(cls, path: Path) -> Spec:
        """Read SPEC.json. Raises BuildError when it is not what the play writes."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                build=data["build"],
                release=data["release"],
                repo=data["repo"],
                commit=data["commit"],
                directory=Path(data["directory"]),
                lock=Path(data["lock"]),
                cmake=dict(data["cmake"]),
                targets=tuple(data["targets"]),
                jobs=int(data["jobs"]),
                identity=dict(data["identity"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BuildError(
                f"{path}: not a build specification: {error!r}; fix: run the play again"
            ) from None

    @property
    def source(self) -> Path:
        return self.directory / "src"

    @property
    def tree(self) -> Path:
        return self.directory / "build"

    @property
    def final(self) -> Path:
        return self.directory / "releases" / self.release

    @property
    def partial(self) -> Path:
        return self.directory / "releases" / f".{self.release}.partial"


def main(argv: Sequence[str]) -> int:
    """Build the release that SPEC.json names. Returns 0 when it stands finished under its final name."""
    signal.signal(signal.SIGTERM, _terminated)
    os.umask(0o022)
    try:
        spec = Spec.load(Path(argv[1]))
        with exclusive(spec.lock):
            build(spec)
    except BuildError as error:
        print(f"llama-build: error: {error}", flush=True)
        return 1
    except OSError as error:
        print(f"llama-build: error: {error}", flush=True)
        return 1
    return 0


def build(spec: Spec) -> None:
    """All steps, in order. Whatever fails, nothing half-done stays behind."""
    if (spec.final / STAMP).is_file():
        print(f"llama-build: done {spec.release} (already built)", flush=True)
        return
    started = time.monotonic()
    remove(spec.partial)
    clear(spec.tree)
    try:
        phase("fetch")
        fetch(spec)
        phase("configure")
        configure(spec)
        phase("compile")
        built = compile_targets(spec)
        phase("install")
        install(spec, built)
        phase("smoke test")
        smoke = smoke_test(spec, built)
        seconds = round(time.monotonic() - started, 1)
        write_stamp(spec, {"targets": built, **smoke, "build_seconds": seconds})
        promote(spec)
    finally:
        remove(spec.partial)
        clear(spec.tree)
    print(f"llama-build: done {spec.release} in {seconds} s", flush=True)


def phase(name: str) -> None:
    """Say where the build is; the play shows it."""
    print(f"llama-build: phase {name}", flush=True)


@contextlib.contextmanager
def exclusive(lock: Path) -> Iterator[None]:
    """Hold the host's build lock: two builds never run at once, whoever started them."""
    with lock.open("rb") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            phase("wait for the build that runs")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


# -- steps


def fetch(spec: Spec) -> None:
    """Bring exactly the pinned commit into the checkout. Raises BuildError when HEAD is another one then."""
    try:
        _fetch_into(spec)
    except BuildError as first:
        # A checkout that was cut off in the middle may be beyond repair; a fresh one is cheap.
        print(f"llama-build: fetching again into an empty checkout, because: {first}", flush=True)
        clear(spec.source)
        _fetch_into(spec)


def _fetch_into(spec: Spec) -> None:
    if not (spec.source / ".git").is_dir():
        clear(spec.source)
        git(spec, "init", "--quiet", ".")
    for stale in (spec.source / ".git").glob("*.lock"):
        stale.unlink()
    if not _has_commit(spec):
        try:
            git(spec, "fetch", "--quiet", "--depth", "1", "--no-tags", "--", spec.repo, spec.commit)
        except BuildError:
            # Not every server hands out a commit by its hash.
            print("llama-build: fetching all branches and tags", flush=True)
            git(
                spec,
                "fetch",
                "--quiet",
                "--",
                spec.repo,
                "+refs/heads/*:refs/pin/*",
                "+refs/tags/*:refs/tags/*",
            )
    if not _has_commit(spec):
        raise BuildError(
            f"llama_cpp_builds.{spec.build}.commit = {spec.commit}: not in {spec.repo};"
            " fix: name a commit that it has"
        )
    git(spec, "checkout", "--quiet", "--force", "--detach", spec.commit)
    git(spec, "clean", "-xffdq")
    head = git(spec, "rev-parse", "HEAD").strip()
    if head != spec.commit:
        raise BuildError(
            f"{spec.source}: HEAD is {head}, the pin is {spec.commit}; fix: remove that directory"
        )


def _has_commit(spec: Spec) -> bool:
    try:
        git(spec, "cat-file", "-e", f"{spec.commit}^{{commit}}")
    except BuildError:
        return False
    return True


def build_number(tags: str, commit: str) -> int | None:
    """The N of upstream's tag bN on the pinned commit, from the text of `git ls-remote --tags`."""
    numbers = [int(match["number"]) for match in _BUILD_TAG.finditer(tags) if match["commit"] == commit]
    return max(numbers, default=None)


def configure(spec: Spec) -> None:
    """Run CMake in the empty build directory."""
    options = dict(spec.cmake)
    try:
        number = build_number(git(spec, "ls-remote", "--tags", "--", spec.repo, "b[0-9]*"), spec.commit)
    except BuildError:
        number = None
    if number is not None:
        # A checkout of depth 1 counts one commit; without this `--version` would say 1.
        options.setdefault("LLAMA_BUILD_NUMBER", str(number))
    definitions = [f"-D{name}={value}" for name, value in sorted(options.items())]
    stream(
        "cmake", ["cmake", "-G", "Ninja", "-S", str(spec.source), "-B", str(spec.tree), *definitions], spec
    )


def compile_targets(spec: Spec) -> list[str]:
    """Build the targets that the tree has and return them."""
    known = set(
        re.findall(
            r"^([\w.-]+): phony$",
            _output(["ninja", "-C", str(spec.tree), "-t", "targets", "all"], spec),
            re.MULTILINE,
        )
    )
    wanted = [target for target in spec.targets if target in known]
    if spec.targets[0] not in wanted:
        raise BuildError(
            f"{spec.repo} at {spec.commit} has no target {spec.targets[0]}; fix: pin a llama.cpp tree"
        )
    stream("ninja", ["ninja", "-C", str(spec.tree), "-j", str(spec.jobs), *wanted], spec)
    return wanted


def install(spec: Spec, built: Sequence[str]) -> None:
    """Copy the programs and every shared library into one directory.

    RPATH is $ORIGIN, so the release runs wherever it lies; ggml looks for backends beside the program.
    """
    target = spec.partial / "bin"
    target.mkdir(parents=True)
    output = spec.tree / "bin"
    libraries = [path for path in output.iterdir() if re.search(r"\.so(\.\d+)*$", path.name)]
    for path in sorted([*(output / name for name in built), *libraries]):
        shutil.copy2(path, target / path.name, follow_symlinks=False)
    for licence in ("LICENSE", "licenses"):
        source = spec.source / licence
        if source.is_file():
            shutil.copy2(source, spec.partial / licence)
        elif source.is_dir():
            shutil.copytree(source, spec.partial / licence)


def smoke_test(spec: Spec, built: Sequence[str]) -> dict[str, Any]:
    """Run what was built. Returns version and devices for the stamp; writes help.txt and types.json.

    Raises BuildError when a library is missing or comes from the build directory, when the server does not
    name the pinned commit, or when it cannot list its devices.
    """
    programs = [spec.partial / "bin" / name for name in built]
    for program in programs:
        libraries = _output(["ldd", str(program)], spec)
        for line in libraries.splitlines():
            if "not found" in line or str(spec.tree) in line:
                raise BuildError(
                    f"{program.name}: {' '.join(line.split())}; the release would not run on its own"
                )
    server = str(programs[0])
    version = _output([server, "--version"], spec).strip()
    match = _VERSION_COMMIT.search(version)
    if match is None or not spec.commit.startswith(match["commit"]):
        raise BuildError(f"llama-server --version says {version!r}, which does not name commit {spec.commit}")
    devices = _output([server, "--list-devices"], spec)
    (spec.partial / HELP).write_text(_output([server, "--help"], spec), encoding="utf-8")
    types = tensor_types(spec.source / "ggml/include/ggml.h")
    if types:
        (spec.partial / TYPES).write_text(json.dumps(types) + "\n", encoding="utf-8")
    return {"version": version.splitlines(), "devices": _devices(devices)}


def tensor_types(header: Path) -> dict[str, str]:
    """Number and name of each tensor type that the source knows; empty where it does not say so."""
    try:
        found = _TENSOR_TYPE.findall(header.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return {}
    return {number: name.lower() for name, number in found if name != "COUNT"}


def _devices(text: str) -> list[str]:
    """The lines below `Available devices:`; none on a CPU build."""
    _, _, listed = text.partition("Available devices:")
    return [line.strip() for line in listed.splitlines() if ":" in line]


def write_stamp(spec: Spec, outcome: dict[str, Any]) -> None:
    """Write release.json, the last file of a release, and make it and all the others durable."""
    stamp = {
        "build": spec.build,
        "release": spec.release,
        "repo": spec.repo,
        "commit": spec.commit,
        **spec.identity,
        **outcome,
        "files": manifest(spec.partial),
    }
    for path in [*spec.partial.rglob("*")]:
        if path.is_file() and not path.is_symlink():
            _sync(path)
    path = spec.partial / STAMP
    path.write_text(json.dumps(stamp, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    for item in (path, spec.partial / "bin", spec.partial):
        _sync(item)


def promote(spec: Spec) -> None:
    """Give the finished release its name; a damaged one of that name steps aside in the same moment."""
    aside = spec.final.with_name(f".{spec.release}.damaged")
    if spec.final.exists():
        remove(aside)
        spec.final.rename(aside)
    spec.partial.rename(spec.final)
    _sync(spec.final.parent)
    remove(aside)


def manifest(release: Path) -> dict[str, dict[str, Any]]:
    """Every file of a release: size and sha256, or where a link points."""
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(release.rglob("*")):
        name = str(path.relative_to(release))
        if path.is_symlink():
            files[name] = {"link": str(path.readlink())}
        elif path.is_file() and name != STAMP:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            files[name] = {"size": path.stat().st_size, "sha256": digest}
    return files


# -- programs and files


def environment(spec: Spec) -> dict[str, str]:
    """The environment of every program: git asks nothing, ccache hits whatever the release is called."""
    cache = os.environ.get("CACHE_DIRECTORY", str(spec.directory / "build"))
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "LANG": "C.UTF-8",
        "HOME": cache,
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_CONFIG_GLOBAL": "/dev/null",
        "NINJA_STATUS": "[%f/%t] ",
        "CCACHE_DIR": f"{cache}/ccache",
        "CCACHE_BASEDIR": str(spec.directory),
        "CCACHE_NOHASHDIR": "1",
        "CCACHE_COMPILERCHECK": "content",
        "CCACHE_SLOPPINESS": "time_macros,include_file_mtime,include_file_ctime",
        "CCACHE_MAXSIZE": "10G",
        # Behind a proxy or a company's own CA the unit needs what the host gives its services.
        **{name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")},
    }


def git(spec: Spec, *args: str) -> str:
    """Run git in the checkout and return what it prints. Raises BuildError with git's last line."""
    return _output(
        ["git", "-c", "advice.detachedHead=false", "-C", str(spec.source), *args], spec, GIT_TIMEOUT_S
    )


def _output(argv: Sequence[str], spec: Spec, timeout_s: float = SMOKE_TIMEOUT_S) -> str:
    try:
        done = subprocess.run(
            argv,
            env=environment(spec),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise BuildError(f"{_shown(argv)}: no end after {timeout_s} s") from None
    except OSError as error:
        raise BuildError(f"{_shown(argv)}: {error.strerror}; fix: install it (llama_cpp_packages)") from None
    output = done.stdout + done.stderr
    if done.returncode != 0:
        raise BuildError(f"{_shown(argv)}: {_ended(done.returncode)}: {cause(output.splitlines())}")
    return output


def stream(what: str, argv: Sequence[str], spec: Spec) -> None:
    """Run a long program, its output into the journal. Raises BuildError with the line that says why."""
    tail: collections.deque[str] = collections.deque(maxlen=_TAIL_LINES)
    try:
        process = subprocess.Popen(
            argv,
            env=environment(spec),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise BuildError(f"{_shown(argv)}: {error.strerror}; fix: install it (llama_cpp_packages)") from None
    with process:
        for line in process.stdout or ():
            tail.append(line.rstrip())
            print(line, end="", flush=True)
    if process.returncode != 0:
        raise BuildError(f"{what}: {_ended(process.returncode)}: {cause(tail)}")


def cause(lines: Sequence[str] | collections.deque[str]) -> str:
    """The line that says why a program failed: the first error, after Ninja's FAILED if there is one."""
    words = [line.strip() for line in lines if line.strip()]
    start = next((index for index, line in enumerate(words) if line.startswith("FAILED:")), 0)
    # The line after FAILED: is the whole command, which may contain the word error (-Werror=…).
    candidates = (
        words[start + 2 :] if words[start : start + 1] and words[start].startswith("FAILED:") else words
    )
    errors = [line for line in candidates if _ERROR_LINE.search(line) and not line.startswith("ninja:")]
    return (errors or candidates[-1:] or words[-1:] or ["it printed nothing"])[0]


def _ended(returncode: int) -> str:
    return f"ended by signal {-returncode}" if returncode < 0 else f"exit code {returncode}"


def _shown(argv: Sequence[str]) -> str:
    words = [Path(argv[0]).name, *argv[1:]]
    if words[0] == "git":
        words = ["git", *words[5:]]
    text = " ".join(words)
    return text if len(text) <= 160 else f"{text[:157]}..."


def clear(directory: Path) -> None:
    """Empty a directory that cannot be removed itself, because its parent is root's."""
    for path in directory.iterdir():
        remove(path)


def remove(path: Path) -> None:
    """Remove a file, link or tree; what cannot be removed is left for root, which sweeps at the next play."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _terminated(_signum: int, _frame: object) -> NoReturn:
    raise BuildError("the build was stopped")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
