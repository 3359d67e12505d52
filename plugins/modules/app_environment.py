#!/usr/bin/python3
"""Ansible module: an environment holds exactly the wanted wheels, unchanged, or is replaced at once."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import pwd
import re
import shutil
import stat
import subprocess
import sys
import tarfile
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule  # type: ignore[import-untyped]

DOCUMENTATION = r"""
---
module: app_environment
short_description: Keep a virtual environment of one app of this repository, installed without a package index
description:
  - Runs through its action plugin, which builds the wheelhouse of O(app) for the host's Python, system and
    machine once on the controller (scripts/build_wheelhouse.py). It needs the facts of the subset C(min).
  - Compares what is installed, file by file, with the digest of the wheelhouse, and the commands' links.
  - Compares everything else of the environment (commands, compiled files, modes, links' targets, files that
    do not belong there) with the list that was written when it was made, and refuses a store that others than
    its owner could change.
  - When they differ, ships the wheelhouse, makes a new environment beside, checks it, and moves the
    symbolic link O(path) to it in one step; a half-made environment is never active. The one before is kept.
  - All of it belongs to the user that runs the module, root with C(become).
options:
  app: {description: A folder of apps/., type: str, required: true}
  path: {description: The symbolic link that names the active environment., type: path, required: true}
  store: {description: The folder that holds the environments; theirs alone., type: path, required: true}
  links: {description: Commands of the environment to link, by the path of the link., type: dict, default: {}}
  state:
    description: Whether it is there; V(absent) removes store, path and those of the links that lead into it.
    type: str
    choices: [present, absent]
    default: present
  wheelhouse: {description: From the action plugin; what the environment must hold., type: dict}
  archive: {description: From the action plugin; without it the module only compares., type: path}
author: [llmbox]
"""

EXAMPLES = r"""
- name: Install the environment, or leave the one that is as it should be
  app_environment:
    app: llmbox
    path: /opt/llmbox
    store: /opt/llmbox-venvs
    links: {/usr/local/bin/lmswitch: bin/lmswitch}
"""

RETURN = r"""
reason: {description: Why it was not the wanted one; or empty., type: str, returned: always}
"""

PIP_TIMEOUT_S = 300
_RECORD_FIELDS = 3


class Refused(Exception):
    """The environment could not be made; the text is one line for the person."""


def sha256(path: Path) -> bytes:
    """The sha256 of a file. Raises OSError."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def file_digest(path: Path) -> str:
    """The same, as RECORD writes it."""
    return urlsafe_b64encode(sha256(path)).decode().rstrip("=")


def decides(path: str) -> bool:
    """True for files that decide what runs; scripts/build_wheelhouse.py has the same rule."""
    folder, _, name = path.partition("/")
    if path.startswith("../") or path.endswith(".pyc"):
        return False
    return not folder.endswith(".dist-info") or name == "entry_points.txt"


def installed_digest(venv: Path, python: str) -> tuple[str, dict[str, str]]:
    """Digest of what really lies in an environment, and its distributions. Raises OSError."""
    packages = venv / f"lib/python{python}/site-packages"
    lines: list[str] = []
    distributions: dict[str, str] = {}
    for folder in packages.glob("*.dist-info"):
        name, _, version = folder.name.removesuffix(".dist-info").partition("-")
        distributions[re.sub(r"[-_.]+", "-", name).lower()] = version
        with (folder / "RECORD").open(newline="") as record:
            paths = [row[0] for row in csv.reader(record) if len(row) == _RECORD_FIELDS]
        lines += [f"{path} {file_digest(packages / path)}" for path in paths if decides(path)]
    lines += [f"{name}=={version}" for name, version in distributions.items()]
    return hashlib.sha256("".join(f"{line}\n" for line in sorted(lines)).encode()).hexdigest(), distributions


def walk(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Everything below a folder, and the folder itself, without following links. Raises OSError."""
    yield str(folder), os.lstat(folder)
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from walk(Path(entry.path))
            else:
                yield entry.path, entry.stat(follow_symlinks=False)


def foreign(folder: Path) -> str:
    """A path that others than who runs this could change, or "". Raises OSError."""
    for path, status in walk(folder):
        writable = not stat.S_ISLNK(status.st_mode) and status.st_mode & 0o022
        if status.st_uid != os.geteuid() or writable:
            return f"{path} could be changed by others than its owner"
    return ""


def survey(venv: Path) -> dict[str, str]:
    """What lies in an environment: mode and sha256 or a link's target, by path. Raises OSError."""
    found = {}
    for path, status in walk(venv):
        content = ""
        if stat.S_ISLNK(status.st_mode):
            content = str(Path(path).readlink())
        elif stat.S_ISREG(status.st_mode):
            content = sha256(Path(path)).hex()
        found[os.path.relpath(path, venv)] = f"{status.st_mode:o} {content}"
    return found


def manifest(venv: Path) -> Path:
    """Where the survey of an environment lies that was taken when it was made."""
    return venv.with_name(f"{venv.name}.json")


def damage(venv: Path) -> str:
    """How an environment differs from what it was when it was made, or "". Raises OSError.

    Compiled files count too: Python runs them instead of their sources. pip compiles every source, so Python
    itself has none to add.
    """
    changed = foreign(venv)
    if changed:
        return changed
    try:
        made = json.loads(manifest(venv).read_text())
    except (OSError, ValueError):
        return f"{manifest(venv)} cannot be read"
    found = survey(venv)
    for path in sorted(made.keys() | found.keys()):
        if path not in found:
            return f"{venv / path} is missing"
        if path not in made:
            return f"{venv / path} does not belong there"
        if made[path] != found[path]:
            return f"{venv / path} was changed"
    return ""


def runs(venv: Path, python: str) -> bool:
    """True when the environment's interpreter starts and is the wanted version."""
    try:
        done = subprocess.run(
            [str(venv / "bin/python"), "-I", "-S", "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    except OSError:
        return False
    return done.stdout.strip() == python


def difference(venv: Path, wheelhouse: dict[str, Any], links: dict[str, str]) -> tuple[str, dict[str, str]]:
    """Why the environment is not the wanted one ("" when it is), and what is installed.

    `links`: the path of each command's link, and where it must lead.
    """
    if not venv.is_dir():
        return f"{venv} does not exist", {}
    try:
        # Before anything of it is run.
        changed = damage(venv.resolve())
    except OSError as error:
        return f"{error.filename} cannot be read", {}
    if changed:
        return changed, {}
    if not runs(venv, wheelhouse["python"]):
        return f"{venv}/bin/python is not Python {wheelhouse['python']}", {}
    try:
        digest, distributions = installed_digest(venv, wheelhouse["python"])
    except OSError as error:
        return f"{error.filename} is missing", {}
    if distributions != wheelhouse["distributions"]:
        return "other versions are installed", distributions
    if digest != wheelhouse["digest"]:
        return "installed files differ from the wheelhouse", distributions
    for link, target in links.items():
        if not leads(Path(link), target) or not Path(target).exists():
            return f"{link} does not lead to {target}", distributions
    return "", distributions


def leads(link: Path, target: str) -> bool:
    """Whether this is a link to exactly that."""
    return link.is_symlink() and str(link.readlink()) == target


def install(venv: Path, archive: Path) -> None:
    """Make the environment from the wheelhouse. Raises Refused with pip's error in one line."""
    shutil.rmtree(venv, ignore_errors=True)
    venv.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    os.chown(venv.parent, os.geteuid(), os.getegid())
    venv.parent.chmod(0o755)
    wheels = venv.parent / f".wheels-{venv.name}"
    shutil.rmtree(wheels, ignore_errors=True)
    wheels.mkdir(mode=0o700)
    try:
        with tarfile.open(archive) as tar:
            for member in tar.getmembers():
                if not re.fullmatch(r"[A-Za-z0-9_.+-]+\.whl", member.name) or not member.isfile():
                    raise Refused(f"{archive} holds {member.name!r}, which is not a wheel")
            tar.extractall(wheels)  # noqa: S202  (each name was checked to be a plain file name)
        every = sorted(str(wheel) for wheel in wheels.glob("*.whl"))
        installer = next((wheel for wheel in every if Path(wheel).name.startswith("pip-")), None)
        if installer is None:
            raise Refused(f"{archive} holds no pip")
        # --without-pip: Debian's python3-venv would only be needed for its copy of pip.
        command([sys.executable, "-I", "-m", "venv", "--without-pip", str(venv)])
        command(
            [
                str(venv / "bin/python"),
                "-I",
                f"{installer}/pip",
                "--isolated",
                "--disable-pip-version-check",
                "install",
                "--no-index",
                "--no-deps",
                "--no-cache-dir",
                "--no-warn-script-location",
                *(wheel for wheel in every if wheel != installer),
            ]
        )
    finally:
        shutil.rmtree(wheels, ignore_errors=True)
    write_manifest(venv)


def write_manifest(venv: Path) -> None:
    """Keep what an environment holds now, beside it. Raises OSError."""
    fresh = manifest(venv).with_suffix(".new")
    fresh.unlink(missing_ok=True)
    fresh.write_text(json.dumps(survey(venv), indent=0, sort_keys=True))
    fresh.chmod(0o644)
    fresh.replace(manifest(venv))


def command(argv: list[str]) -> None:
    """Run one command with root's umask and a bare environment. Raises Refused when it fails."""
    home = pwd.getpwuid(os.geteuid()).pw_dir
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "HOME": home}
    done = subprocess.run(
        argv, capture_output=True, text=True, timeout=PIP_TIMEOUT_S, check=False, env=environment, umask=0o022
    )
    if done.returncode != 0:
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise Refused(f"{argv[0]} failed: {said[-1] if said else done.returncode}")


def point(link: Path, target: str) -> None:
    """Make `link` a symbolic link to `target` in one step, whatever is there now."""
    if link.is_dir() and not link.is_symlink():
        raise Refused(f"{link} is a folder, not a link; move it away")
    link.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    fresh = link.with_name(f".{link.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    fresh.replace(link)


def prune(store: Path, keep: set[Path]) -> None:
    """Remove everything but these environments and their lists."""
    kept = keep | {manifest(venv) for venv in keep}
    for path in store.iterdir():
        if path in kept:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def misplaced(link: Path, store: Path) -> str:
    """Why neither the link nor the store can be trusted, or "". Raises OSError."""
    if link.resolve().parent != store:
        return f"{link} leads out of {store}"
    return foreign(store)


def whole(venv: Path) -> bool:
    """True for an environment that is worth keeping: as it was made, and nobody else's to change."""
    try:
        return not damage(venv)
    except OSError:
        return False


def remove(link: Path, store: Path, links: dict[str, str], *, dry: bool) -> list[str]:
    """Remove the environments and what leads to them; what there was. Raises OSError."""
    found = [Path(path) for path, target in links.items() if leads(Path(path), target)]
    found += [link] if link.is_symlink() else []
    for path in [] if dry else found:
        path.unlink()
    if store.is_dir():
        found.append(store)
        if not dry:
            shutil.rmtree(store)
    return [str(path) for path in found]


def replace(
    link: Path, store: Path, links: dict[str, str], wheelhouse: dict[str, Any], archive: Path
) -> None:
    """Make a new environment and what leads to it. Raises Refused, OSError and subprocess.TimeoutExpired."""
    venv = store / f"{wheelhouse['python']}-{wheelhouse['digest'][:16]}"
    former = link.resolve() if link.is_symlink() else None
    if former == venv:
        # The active one was damaged: its replacement needs a name of its own.
        venv = venv.with_name(f"{venv.name}-{os.getpid()}")
    try:
        kept = {former} if former and whole(former) else set()
        install(venv, archive)
        left = difference(venv, wheelhouse, {})[0]
        if left:
            raise Refused(f"the new environment is not the wanted one: {left}")
        point(link, str(venv))
        for name, target in links.items():
            point(Path(name), target)
        prune(store, {venv, *kept})
    except (Refused, OSError, subprocess.TimeoutExpired):
        shutil.rmtree(venv, ignore_errors=not link.exists() or link.resolve() != venv)
        raise


def main() -> None:
    """Module entry point."""
    module = AnsibleModule(
        argument_spec={
            "app": {"type": "str", "required": True},
            "path": {"type": "path", "required": True},
            "store": {"type": "path", "required": True},
            "links": {"type": "dict", "default": {}},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "wheelhouse": {"type": "dict"},
            "archive": {"type": "path"},
        },
        required_if=[("state", "present", ["wheelhouse"])],
        supports_check_mode=True,
    )
    wanted = module.params
    link, store, wheelhouse = Path(wanted["path"]), Path(wanted["store"]), wanted["wheelhouse"]
    links = {path: f"{link}/{command}" for path, command in wanted["links"].items()}
    relative = [str(path) for path in (link, store, *links) if not str(path).startswith("/")]
    if relative:
        module.fail_json(
            msg=f"{relative[0]} is no absolute path; a template as a key of links is left as it is"
        )
    if wanted["state"] == "absent":
        try:
            removed = remove(link, store, links, dry=module.check_mode)
        except OSError as error:
            module.fail_json(msg=f"{error.filename} could not be removed: {error.strerror}")
        before = "".join(f"{path}\n" for path in removed)
        module.exit_json(changed=bool(removed), reason="", diff={"before": before, "after": ""})
    store = store.resolve()
    reason, installed = difference(link, wheelhouse, links)
    try:
        reason = reason or misplaced(link, store)
    except OSError as error:
        reason = f"{error.filename} cannot be read"
    shown = {"before": listing(installed), "after": listing(wheelhouse["distributions"])}
    if not reason or wanted["archive"] is None or module.check_mode:
        module.exit_json(changed=False, reason=reason, **({"diff": shown} if reason else {}))
    try:
        replace(link, store, links, wheelhouse, Path(wanted["archive"]))
    except (Refused, OSError, subprocess.TimeoutExpired) as error:
        module.fail_json(msg=f"{link} could not be made: {error}")
    module.exit_json(changed=True, reason=reason, diff=shown)


def listing(distributions: dict[str, str]) -> str:
    """Distributions as lines, for --diff."""
    return "".join(f"{name}=={version}\n" for name, version in sorted(distributions.items()))


if __name__ == "__main__":
    main()
