#!/usr/bin/env python3
"""Build, once, everything that an environment of one app holds, so that no machine needs a package index.

    build_wheelhouse.py APP --python 3.11 [--system Linux|Darwin] [--machine x86_64]

A wheelhouse is one tar of wheels for one app of apps/, one Python, system and machine type: the app, those of
this repository that its pyproject.toml names, and the pinned, hash-checked closure in its requirements.lock
(whose pip only installs the rest; a pin may have a marker, which is read for the target). The module
app_environment installs it.
It is kept under ${XDG_CACHE_HOME:-~/.cache}/llmbox/wheelhouse/APP-<hash of everything that went in>/.
Prints one JSON object: archive, python, digest (of every file: what the host compares with), distributions.
Exit codes: 0 done, 1 a step failed (one line says which), 2 bad usage.
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
import tomllib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PIP_TIMEOUT_S = 1800
# Every supported Debian and Ubuntu has glibc 2.36 or newer. Oldest first: the wheel that runs in most places.
GLIBCS = ("manylinux2014", *(f"manylinux_2_{minor}" for minor in range(5, 37)))
# pip takes the wheels for every older macOS as well.
MACOS = "macosx_13_0"
SYSTEMS = ("Linux", "Darwin")


class BuildError(Exception):
    """A step failed; the text is one line for the person."""


def cache_root() -> Path:
    """Where wheelhouses are kept on this controller."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "llmbox/wheelhouse"


@dataclass(frozen=True)
class Target:
    """What a wheelhouse is for."""

    python: str
    machine: str
    system: str = "Linux"

    def platforms(self) -> list[str]:
        """The platform tags of the wheels that it runs."""
        names = (MACOS,) if self.system == "Darwin" else GLIBCS
        return [f"{name}_{self.machine}" for name in names]

    def applies(self, marker: str) -> bool:
        """Whether a line of a lock with this marker is for the target. Raises BuildError."""
        try:
            return Marker(marker).evaluate(
                {
                    "implementation_name": "cpython",
                    "platform_python_implementation": "CPython",
                    "os_name": "posix",
                    "platform_machine": self.machine,
                    "platform_system": self.system,
                    "python_full_version": f"{self.python}.0",
                    "python_version": self.python,
                    "sys_platform": self.system.lower(),
                }
            )
        except ValueError as error:
            raise BuildError(f"marker {marker!r}: {str(error).splitlines()[0]}") from None


@dataclass(frozen=True)
class App:
    """One app of apps/."""

    name: str
    root: Path = ROOT

    @property
    def folder(self) -> Path:
        """Its sources."""
        return self.root / "apps" / self.name

    @property
    def lock(self) -> Path:
        """What it needs from elsewhere, whole and pinned."""
        return self.folder / "requirements.lock"

    def project(self) -> dict[str, Any]:
        """The table `project` of its pyproject.toml. Raises BuildError."""
        try:
            content = tomllib.loads((self.folder / "pyproject.toml").read_text())
        except OSError:
            raise BuildError(
                f"apps/{self.name}/pyproject.toml is not there; fix: name a folder of apps/"
            ) from None
        return dict(content["project"])

    def needs(self) -> set[str]:
        """Names of the distributions that it depends on, those of its extras included. Raises BuildError."""
        project = self.project()
        extras: dict[str, list[str]] = project.get("optional-dependencies", {})
        lines = [project.get("dependencies", []), *extras.values()]
        return {canonicalize_name(Requirement(line).name) for line in chain.from_iterable(lines)}

    def packages(self) -> list[App]:
        """Itself and, of this repository, everything that it needs."""
        found = [self]
        for app in found:
            folders = sorted(path.parent.name for path in self.root.glob("apps/*/pyproject.toml"))
            own = [App(name, self.root) for name in folders if canonicalize_name(name) in app.needs()]
            found += [other for other in own if other not in found]
        return sorted(found, key=lambda app: app.name)

    def files(self) -> list[Path]:
        """What goes into the wheels of these packages."""
        found: list[Path] = []
        for app in self.packages():
            sources = (path for path in (app.folder / "src").rglob("*") if path.is_file())
            found += [app.folder / "pyproject.toml", *(path for path in sources if wanted_source(path))]
        return sorted(found)

    def check(self, target: Target) -> None:
        """Raises BuildError where no wheelhouse can be built for the target."""
        wanted = str(self.project().get("requires-python", ""))
        if not SpecifierSet(wanted).contains(target.python):
            fix = "set ansible_python_interpreter of the host to a newer one"
            raise BuildError(f"Python {target.python} is there, {self.name} needs {wanted}; fix: {fix}")
        if not self.lock.is_file():
            raise BuildError(
                f"apps/{self.name}/requirements.lock is not there; fix: pin what the app needs in it"
            )


def wanted_source(path: Path) -> bool:
    """False for what Python and setuptools leave beside the sources."""
    return "__pycache__" not in path.parts and not any(part.endswith(".egg-info") for part in path.parts)


def fingerprint(app: App, target: Target) -> str:
    """Hash of everything that decides what the wheelhouse holds."""
    digest = hashlib.sha256(f"{app.name} {target}\n".encode())
    for path in [Path(__file__), app.lock, *app.files()]:
        digest.update(f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:32]


def pins(lock: str, target: Target) -> str:
    """The lines of a lock that are for the target, without their markers. Raises BuildError."""
    kept = []
    for line in lock.replace("\\\n", " ").splitlines():
        pin, hashes, rest = line.partition(" --hash=")
        requirement, _, marker = pin.partition(";")
        if line.startswith("#") or not requirement.strip():
            continue
        if not marker or target.applies(marker.strip()):
            kept.append(f"{requirement.strip()}{hashes}{rest}\n")
    return "".join(kept)


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


def download(app: App, target: Target, wheels: Path, scratch: Path) -> None:
    """Fetch the pinned closure for another machine: pip would read markers for this one, so --no-deps."""
    requirements = scratch / "requirements.txt"
    requirements.write_text(pins(app.lock.read_text(), target))
    pip(
        "download",
        "--only-binary=:all:",
        "--no-deps",
        "--require-hashes",
        f"--python-version={target.python}",
        "--implementation=cp",
        *(f"--platform={platform}" for platform in target.platforms()),
        f"--dest={wheels}",
        f"--requirement={requirements}",
    )


def build_apps(app: App, wheels: Path, scratch: Path) -> None:
    """Build the packages' wheels from a copy: setuptools writes beside its sources."""
    for package in app.packages():
        copy = scratch / package.name
        skip = shutil.ignore_patterns("*.egg-info", "__pycache__", "build")
        shutil.copytree(package.folder, copy, ignore=skip)
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
        placed = [(destination(path), digest.partition("=")[2]) for path, digest, *_ in rows if digest]
        return [f"{path} {digest}" for path, digest in placed if path and decides(path)]


def destination(path: str) -> str:
    """Where pip puts a file of a wheel, from site-packages; "" for elsewhere: commands, manual pages."""
    folder, _, rest = path.partition("/")
    if not folder.endswith(".data"):
        return path
    scheme, _, inside = rest.partition("/")
    return inside if scheme in ("purelib", "platlib") else ""


def decides(path: str) -> bool:
    """False for metadata that differs between build tools. The module app_environment has the same rule."""
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


def ensure(app: App, target: Target, cache: Path) -> dict[str, object]:
    """The manifest of the wheelhouse, built unless the cache holds it. Raises BuildError."""
    app.check(target)
    folder = cache / f"{app.name}-{fingerprint(app, target)}"
    with exclusive(cache):
        known = folder / "manifest.json"
        if not known.is_file():
            with tempfile.TemporaryDirectory(dir=cache, prefix=".build-") as scratch_name:
                made = build(app, target, Path(scratch_name))
                shutil.rmtree(folder, ignore_errors=True)
                made.rename(folder)
    content: dict[str, object] = json.loads(known.read_text())
    return {"archive": str(folder / "wheelhouse.tar"), **content}


def build(app: App, target: Target, scratch: Path) -> Path:
    """Make a finished wheelhouse folder inside `scratch`."""
    wheels, made = scratch / "wheels", scratch / "made"
    wheels.mkdir()
    made.mkdir()
    download(app, target, wheels, scratch)
    build_apps(app, wheels, scratch / "src")
    every = sorted(wheels.glob("*.whl"))
    with tarfile.open(made / "wheelhouse.tar", "w") as archive:
        for wheel in every:
            archive.add(wheel, arcname=wheel.name)
    installed = [wheel for wheel in every if wheel_identity(wheel)[0] != "pip"]
    (made / "manifest.json").write_text(json.dumps(manifest(target.python, installed), indent=1) + "\n")
    return made


def main() -> int:
    """Entry point."""
    here = os.uname()
    parser = argparse.ArgumentParser(description="Build the wheelhouse of one app for one target.")
    parser.add_argument("app", metavar="APP", help="a folder of apps/ with a requirements.lock, e.g. llmbox")
    parser.add_argument("--python", required=True, help="the host's Python, e.g. 3.11")
    parser.add_argument("--system", default=here.sysname, choices=SYSTEMS, help="the host's `uname -s`")
    parser.add_argument("--machine", default=here.machine, help="the host's machine type, its `uname -m`")
    parser.add_argument("--cache", type=Path, default=cache_root())
    options = parser.parse_args()
    if not re.fullmatch(r"3\.\d+", options.python) or not re.fullmatch(r"\w+", options.machine):
        parser.error(f"--python {options.python} --machine {options.machine}: like 3.11 and x86_64")
    target = Target(options.python, options.machine, options.system)
    try:
        print(json.dumps(ensure(App(options.app), target, options.cache)))
    except BuildError as error:
        print(f"build_wheelhouse: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
