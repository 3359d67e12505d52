"""What lies on this host, and what its service managers say."""

from __future__ import annotations

import contextlib
import grp
import hashlib
import os
import pwd
import stat
import subprocess
from collections.abc import Container, Iterable, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from llmbox.drift.compare import UNREADABLE, Entry, drop_in_folders

ANSWER_TIMEOUT_S = 20
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
# Settings, units and lists are far smaller. What others than root may write must not keep root reading.
FILE_LIMIT_BYTES = 1 << 24
TEXT_LIMIT_BYTES = 1 << 16
CHUNK_BYTES = 1 << 20
# systemd.unit(5), without what packages own.
SYSTEM_FOLDERS = (
    "/etc/systemd/system",
    "/etc/systemd/system.control",
    "/run/systemd/system",
    "/run/systemd/system.control",
    "/usr/local/lib/systemd/system",
)
USER_FOLDERS = ("/etc/systemd/user", "/run/systemd/user", "/usr/local/lib/systemd/user")
HOME_FOLDERS = (".config/systemd/user", ".config/systemd/user.control")
RUNTIME_FOLDERS = ("systemd/user", "systemd/user.control")
# llmbox.trial's, which this package, that runs where nothing is installed, cannot import.
TRIAL_UNIT, TRIAL_DROP_IN = "llmbox-trial.service", "zz-llmbox-trial.conf"


def look(path: str, limit: int | None = FILE_LIMIT_BYTES) -> Entry | None:
    """What lies at a path; a link at its end is not followed. Files beyond `limit` bytes are not read.

    A bad sector under one file is told of that file, and hides nothing of the others.
    """
    try:
        return read(path, limit)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return unreadable(error)


def unreadable(error: OSError) -> Entry:
    """What is told of a thing that cannot be read."""
    return {"type": UNREADABLE, "error": error.strerror or str(error)}


def read(path: str, limit: int | None) -> Entry:
    """What lies at a path. Raises OSError."""
    info = Path(path).lstat()
    if stat.S_ISLNK(info.st_mode):
        return {"type": "link", "target": str(Path(path).readlink())}
    entry = {
        "type": "other thing",
        "mode": f"{stat.S_IMODE(info.st_mode):04o}",
        "owner": user_name(info.st_uid),
        "group": group_name(info.st_gid),
        "writable": "by others too" if info.st_mode & 0o022 else "by its owner",
        "readable": "by everybody" if info.st_mode & 0o444 == 0o444 else "by some only",
        "executable": "by everybody" if info.st_mode & 0o111 == 0o111 else "by some only",
    }
    if stat.S_ISDIR(info.st_mode):
        return {**entry, "type": "folder"}
    if not stat.S_ISREG(info.st_mode):
        return entry
    with open_regular(path) as handle:
        if limit is not None and info.st_size > limit:
            return {**entry, "type": "file", "sha256": f"not computed: {info.st_size} bytes"}
        digest, head = hashlib.sha256(), b""
        while chunk := os.read(handle.fileno(), CHUNK_BYTES):
            digest.update(chunk)
            head = head if len(head) > TEXT_LIMIT_BYTES else head + chunk
    entry = {**entry, "type": "file", "sha256": digest.hexdigest()}
    # Reports show lines of it: of a file that not everybody may read, its checksum must do.
    if info.st_mode & 0o004 and len(head) <= TEXT_LIMIT_BYTES:
        with contextlib.suppress(UnicodeDecodeError):
            entry["text"] = head.decode()
    return entry


def open_regular(path: str) -> FileIO:
    """A regular file, open for reading; never a link or a pipe in its place. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    handle = FileIO(descriptor)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        handle.close()
        raise OSError(f"{path} is no regular file")
    return handle


def lines_of(path: str) -> list[str]:
    """The lines of a text in which others may write what they like; none when it is not there.

    Raises OSError when it cannot be read.
    """
    try:
        with open_regular(os.path.realpath(path)) as handle:
            return handle.read(FILE_LIMIT_BYTES).decode(errors="replace").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return []


def user_name(uid: int) -> str:
    """The name of a user, or its number where it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def group_name(gid: int) -> str:
    """The name of a group, or its number where it has none."""
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def groups_of(users: Iterable[str]) -> dict[str, set[str]]:
    """The groups of each user that exists."""
    found = {}
    for user in users:
        try:
            entry = pwd.getpwnam(user)
        except KeyError:
            continue
        found[user] = {group_name(gid) for gid in os.getgrouplist(user, entry.pw_gid)}
    return found


def ask(
    argv: Sequence[str], environment: Mapping[str, str] = ENVIRONMENT, **identity: Any
) -> subprocess.CompletedProcess[str] | None:
    """Run a program that only looks; None when it is missing or gives no answer in time."""
    try:
        return subprocess.run(
            argv,
            **identity,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=ANSWER_TIMEOUT_S,
            check=False,
            cwd="/",
        )
    except (OSError, subprocess.TimeoutExpired):
        return None


def systemctl(user: str, *arguments: str) -> str:
    """Output of systemctl of the system (user "") or of a user's manager; "" when it does not answer."""
    identity: dict[str, Any] = {}
    environment = dict(ENVIRONMENT)
    scope = "--system"
    if user:
        try:
            entry = pwd.getpwnam(user)
        except KeyError:
            return ""
        if os.geteuid() != entry.pw_uid:
            identity = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": ()}
        environment["XDG_RUNTIME_DIR"] = f"/run/user/{entry.pw_uid}"
        scope = "--user"
    done = ask(["systemctl", scope, "--no-pager", *arguments], environment, **identity)
    return done.stdout if done else ""


def unit_states(units: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], dict[str, str]]:
    """What each service manager says of its units, asked once each."""
    states = {}
    # Not a template, of which only the drop-ins are of interest: at its name systemctl gives up.
    asked = [unit for unit in units if "enabled" in unit or "active" in unit]
    for user in sorted({unit.get("user") or "" for unit in asked}):
        names = [unit["unit"] for unit in asked if (unit.get("user") or "") == user]
        said = systemctl(user, "show", "--property=Id,UnitFileState,ActiveState", *names)
        for block in said.split("\n\n"):
            values = dict(line.partition("=")[::2] for line in block.splitlines())
            if "Id" in values:
                states[user, values["Id"]] = values
    return states


def overrides(
    units: Sequence[Mapping[str, Any]], deployed: Container[str] = frozenset()
) -> dict[str, Entry | None]:
    """Drop-ins of the units, and whole units of their names, anywhere but in a package's folder.

    Not the units that were `deployed` themselves. Nor the drop-in of a trial while it is held: it ends by
    itself, and its preset runs its own command then.
    """
    found: dict[str, Entry | None] = {}
    for unit in units:
        user = unit.get("user") or ""
        for folder in unit_folders(user):
            whole = f"{folder}/{unit['unit']}"
            if whole not in deployed and (entry := look(whole)):
                found[whole] = entry
            for name in drop_in_folders(unit["unit"]):
                for path in sorted(Path(folder, name).glob("*.conf")):
                    if not (path.name == TRIAL_DROP_IN and user and on_trial(user)):
                        found.setdefault(str(path), look(str(path)))
    return found


def on_trial(user: str) -> bool:
    """Whether a preset of the user is on trial now."""
    return "ActiveState=active" in systemctl(user, "show", "--property=ActiveState", TRIAL_UNIT)


def unit_folders(user: str) -> list[str]:
    """Where the service manager of the system (""), or of a user, finds units."""
    if not user:
        return list(SYSTEM_FOLDERS)
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        return list(USER_FOLDERS)
    home = [f"{entry.pw_dir}/{folder}" for folder in HOME_FOLDERS]
    return [*home, *USER_FOLDERS, *(f"/run/user/{entry.pw_uid}/{folder}" for folder in RUNTIME_FOLDERS)]


def held_packages() -> set[str]:
    """Packages that apt must leave as they are."""
    done = ask(["dpkg-query", "--show", "--showformat=${db:Status-Want} ${Package}\n"])
    listed = done.stdout.splitlines() if done else []
    return {line.split()[1] for line in listed if line.startswith("hold ")}


def table(name: str) -> Entry | None:
    """An nftables table as it is loaded, in nft's own words without counters; None when it is not."""
    done = ask(["nft", "--stateless", "list", "table", *name.split()])
    if done is None or done.returncode != 0:
        return None
    digest = hashlib.sha256(done.stdout.encode()).hexdigest()
    return {"type": "table", "sha256": digest, "text": done.stdout}
