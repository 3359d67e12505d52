#!/usr/bin/env python3
"""Build, once, everything that /opt/llmbox on a box installs, so that no box needs a package index.

A wheelhouse is one tar of wheels for one Python and one machine type: the two apps of this repository and the
pinned, hash-checked closure in apps/llmbox/requirements.lock (its pip only installs the rest).
It is kept under ${XDG_CACHE_HOME:-~/.cache}/llmbox/wheelhouse/<hash of everything that went in>/.
Prints one JSON object: archive, python, digest (of every file: what the box compares with), distributions.
Standard library only. Exit codes: 0 done, 1 a step failed (one line says which), 2 bad usage.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
APPS = ("llama_common", "llmbox")
LOCK = ROOT / "apps/llmbox/requirements.lock"
PIP_TIMEOUT_S = 600
# Oldest first; every supported Debian and Ubuntu has glibc 2.36 or newer.
GLIBCS = ("manylinux_2_17", "manylinux2014", "manylinux_2_28", "manylinux_2_34")


class BuildError(Exception):
    """A step failed; the text is one line for the person."""


def cache_root() -> Path:
    """Where wheelhouses are kept on this controller."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "llmbox/wheelhouse"


def app_files(root: Path = ROOT) -> list[Path]:
    """The files that go into the apps' wheels."""
    found: list[Path] = []
    for app in APPS:
        folder = root / "apps" / app
        sources = (path for path in (folder / "src").rglob("*") if path.is_file())
        found += [folder / "pyproject.toml", *(path for path in sources if wanted_source(path))]
    return sorted(found)


def wanted_source(path: Path) -> bool:
    """False for what Python and setuptools leave beside the sources."""
    return "__pycache__" not in path.parts and not any(part.endswith(".egg-info") for part in path.parts)


def fingerprint(python: str, machine: str, root: Path = ROOT) -> str:
    """Hash of everything that decides what the wheelhouse holds."""
    digest = hashlib.sha256(f"{python} {machine}\n".encode())
    for path in [Path(__file__), root / LOCK.relative_to(ROOT), *app_files(root)]:
        digest.update(f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:32]


def pip(*arguments: str) -> None:
    """Run this interpreter's pip. Raises BuildError with pip's last line when it fails."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise BuildError(f"pip {arguments[0]} did not end in {PIP_TIMEOUT_S} s: no package index?") from None
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise BuildError(f"pip {arguments[0]} failed: {said[-1] if said else f'exit {done.returncode}'}")


def download(python: str, machine: str, wheels: Path) -> None:
    """Fetch the pinned closure for another Python: pip evaluates markers for this one, so --no-deps."""
    platforms = [f"--platform={glibc}_{machine}" for glibc in GLIBCS]
    pip(
        "download",
        "--only-binary=:all:",
        "--no-deps",
        "--require-hashes",
        f"--python-version={python}",
        "--implementation=cp",
        *platforms,
        f"--dest={wheels}",
        f"--requirement={LOCK}",
    )


def build_apps(wheels: Path, scratch: Path) -> None:
    """Build the apps' wheels from a copy: setuptools writes beside its sources."""
    for app in APPS:
        copy = scratch / app
        skip = shutil.ignore_patterns("*.egg-info", "__pycache__", "build")
        shutil.copytree(ROOT / "apps" / app, copy, ignore=skip)
        pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", f"--wheel-dir={wheels}", str(copy))


def wheel_identity(wheel: Path) -> tuple[str, str]:
    """Normalized name and version of a wheel, from its file name."""
    name, version = wheel.name.split("-")[:2]
    return re.sub(r"[-_.]+", "-", name).lower(), version


def content_lines(wheel: Path) -> list[str]:
    """`path sha256` of every file of a wheel that decides what runs; tool-dependent metadata is left out."""
    with zipfile.ZipFile(wheel) as archive:
        record = next(name for name in archive.namelist() if name.endswith(".dist-info/RECORD"))
        rows = csv.reader(io.StringIO(archive.read(record).decode()))
        return [f"{path} {digest.partition('=')[2]}" for path, digest, *_ in rows if digest and decides(path)]


def decides(path: str) -> bool:
    """False for metadata that differs between build tools. The module llmbox_venv has the same rule."""
    folder, _, name = path.partition("/")
    return not folder.endswith(".dist-info") or name == "entry_points.txt"


def manifest(python: str, wheels: list[Path]) -> dict[str, object]:
    """What a box must have when these wheels are installed."""
    distributions = dict(wheel_identity(wheel) for wheel in wheels)
    lines = [line for wheel in wheels for line in content_lines(wheel)]
    lines += [f"{name}=={version}" for name, version in distributions.items()]
    digest = hashlib.sha256("".join(f"{line}\n" for line in sorted(lines)).encode()).hexdigest()
    return {"python": python, "digest": digest, "distributions": dict(sorted(distributions.items()))}


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """One build at a time; the other one then finds it done."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def ensure(python: str, machine: str, cache: Path) -> dict[str, object]:
    """The manifest of the wheelhouse, built unless the cache holds it. Raises BuildError."""
    folder = cache / fingerprint(python, machine)
    with exclusive(cache):
        known = folder / "manifest.json"
        if not known.is_file():
            with tempfile.TemporaryDirectory(dir=cache, prefix=".build-") as scratch_name:
                scratch = Path(scratch_name)
                made = build(python, machine, scratch)
                shutil.rmtree(folder, ignore_errors=True)
                made.rename(folder)
    content: dict[str, object] = json.loads(known.read_text())
    return {"archive": str(folder / "wheelhouse.tar"), **content}


def build(python: str, machine: str, scratch: Path) -> Path:
    """Make a finished wheelhouse folder inside `scratch`."""
    wheels, made = scratch / "wheels", scratch / "made"
    wheels.mkdir()
    made.mkdir()
    download(python, machine, wheels)
    build_apps(wheels, scratch / "src")
    every = sorted(wheels.glob("*.whl"))
    with tarfile.open(made / "wheelhouse.tar", "w") as archive:
        for wheel in every:
            archive.add(wheel, arcname=wheel.name)
    installed = [wheel for wheel in every if wheel_identity(wheel)[0] != "pip"]
    (made / "manifest.json").write_text(json.dumps(manifest(python, installed), indent=1) + "\n")
    return made


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Build the wheelhouse of /opt/llmbox for one target Python.")
    parser.add_argument("--python", required=True, help="the box's Python, e.g. 3.11")
    parser.add_argument("--machine", default=os.uname().machine, help="the box's machine type")
    parser.add_argument("--cache", type=Path, default=cache_root())
    options = parser.parse_args()
    if not re.fullmatch(r"3\.\d+", options.python) or not re.fullmatch(r"\w+", options.machine):
        parser.error(f"--python {options.python} --machine {options.machine}: like 3.11 and x86_64")
    try:
        print(json.dumps(ensure(options.python, options.machine, options.cache)))
    except BuildError as error:
        print(f"build_wheelhouse: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
