#!/usr/bin/env python3
"""Make the controller's environment: `.venv` with requirements.txt and the apps, installed editable.

A no-op when nothing changed: the stamp in `.venv`, written last, has the hash of the interpreter and
requirements.txt and that of the apps' pyproject files. Where only these changed, only the apps are installed
again. Standard library only; run by `make setup`.
Exit codes: 0 done, 1 a step failed, 2 this machine cannot run it (the line says what to do), 130 interrupted.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lab import config, packages  # noqa: E402 - found through the line above
from lab.shell import LabError  # noqa: E402

VENV = ROOT / ".venv"
LOCK = ROOT / ".venv.lock"
STAMP = VENV / "setup.sha256"
REQUIREMENTS = ROOT / "requirements.txt"
PIP_TIMEOUT_S = 1200
MIB = 1024 * 1024
ROOM = 64 * MIB  # below it no package of requirements.txt can be counted on to fit


def apps() -> list[Path]:
    """Folders of the Python packages of this repository."""
    return sorted(path.parent for path in (ROOT / "apps").glob("*/pyproject.toml"))


def fingerprints() -> tuple[str, str]:
    """Hashes of what decides what `.venv` holds: of the environment, and of how the apps are installed."""
    names = [app.name for app in apps()]
    environment = hashlib.sha256(f"{sys.executable} {sys.version} {ROOT} {names}".encode())
    environment.update(REQUIREMENTS.read_bytes())
    editable = hashlib.sha256(b"".join((app / "pyproject.toml").read_bytes() for app in apps()))
    return environment.hexdigest(), editable.hexdigest()


def stamp() -> list[str]:
    """The hashes that `.venv` was made for; none where it was not made to its end."""
    return STAMP.read_text().split() if STAMP.is_file() else []


def pip(*arguments: str) -> None:
    """Run the venv's pip. Raises subprocess.CalledProcessError when it fails."""
    subprocess.run(
        [str(VENV / "bin/python"), "-m", "pip", "--disable-pip-version-check", *arguments],
        check=True,
        timeout=PIP_TIMEOUT_S,
    )


def ensure_venv_module() -> None:
    """Install python3-venv where Debian leaves it out of the interpreter. Raises LabError when it may not."""
    lab = config.from_environment()
    packages.ensure(lab, {f"{sysconfig.get_path('stdlib')}/ensurepip/__init__.py": "python3-venv"})


def main() -> int:
    """Make or refresh the environment; of two at once, the second waits and finds it made."""
    with LOCK.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("setup: waiting for another setup of this checkout", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        return make()


def make() -> int:
    """Make the environment, or find it as it should be."""
    wanted, found = fingerprints(), stamp()
    if found == [*wanted]:
        return 0
    only_apps = found[:1] == [wanted[0]]
    try:
        ensure_venv_module()
    except LabError as error:
        print(f"setup: {error}", file=sys.stderr)
        return error.code
    STAMP.unlink(missing_ok=True)
    try:
        if only_apps:
            print(f"setup: installing the apps into {VENV.name} again", flush=True)
        else:
            make_environment()
        editable = [argument for app in apps() for argument in ("--editable", str(app))]
        pip("install", "--quiet", "--no-build-isolation", "--no-deps", *editable)
        STAMP.write_text(" ".join(wanted) + "\n")
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        why = room() or f"{error}; the lines above say why; run `make setup` again"
        print(f"setup: {why}", file=sys.stderr)
        return 1
    return 0


def make_environment() -> None:
    """A new `.venv` with requirements.txt. Raises subprocess.CalledProcessError when a step fails."""
    version = sys.version.split()[0]
    print(f"setup: making {VENV.name} with Python {version} (a few minutes the first time)", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=True, timeout=PIP_TIMEOUT_S)
    pip("install", "--quiet", "--requirement", str(REQUIREMENTS))


def room() -> str:
    """One line when the disk has no room for the environment, "" when it has."""
    free = shutil.disk_usage(ROOT).free
    if free >= ROOM:
        return ""
    fix = "make room, then run `make setup` again"
    return f"{ROOT} has {free // MIB} MiB free, {VENV.name} needs {ROOM // MIB}; {fix}"


def run() -> int:
    """Entry point: one line for what stops it."""
    try:
        return main()
    except KeyboardInterrupt:
        print("setup: interrupted; run `make setup` again, it begins anew", file=sys.stderr)
        return 130
    except OSError as error:
        fix = f"{VENV.name} must be yours: remove it, or become its owner"
        why = room() or f"{error.filename}: {error.strerror}; {fix}"
        print(f"setup: {why}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(run())
