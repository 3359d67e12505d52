#!/usr/bin/env python3
"""Make the controller's environment: `.venv` with requirements.txt and the apps, installed editable.

A no-op when nothing changed: the stamp in `.venv` is the hash of the interpreter, requirements.txt and the
apps' pyproject files, and it is written last. Standard library only; run by `make setup`.
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


def fingerprint() -> str:
    """Hash of everything that decides what `.venv` holds."""
    digest = hashlib.sha256(f"{sys.executable} {sys.version} {ROOT}".encode())
    for path in [REQUIREMENTS, *(app / "pyproject.toml" for app in apps())]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


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
    wanted = fingerprint()
    if STAMP.is_file() and STAMP.read_text().strip() == wanted:
        return 0
    try:
        ensure_venv_module()
    except LabError as error:
        print(f"setup: {error}", file=sys.stderr)
        return error.code
    version = sys.version.split()[0]
    print(f"setup: making {VENV.name} with Python {version} (a few minutes the first time)", flush=True)
    STAMP.unlink(missing_ok=True)
    try:
        subprocess.run(
            [sys.executable, "-m", "venv", "--clear", str(VENV)], check=True, timeout=PIP_TIMEOUT_S
        )
        pip("install", "--quiet", "--requirement", str(REQUIREMENTS))
        editable = [argument for app in apps() for argument in ("--editable", str(app))]
        pip("install", "--quiet", "--no-build-isolation", "--no-deps", *editable)
        STAMP.write_text(wanted + "\n")
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        why = room() or f"{error}; the lines above say why; run `make setup` again"
        print(f"setup: {why}", file=sys.stderr)
        return 1
    return 0


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
