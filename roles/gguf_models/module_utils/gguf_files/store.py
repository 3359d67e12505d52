"""The models directory: names, stamps, what is verified, what is unused, whether the rest fits."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import stat
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FILE_MODE = 0o644
CHUNK_BYTES = 1 << 20
STAMP_MAX_BYTES = 4096
LOCK_NAME = ".gguf_models.lock"
HUB = "https://huggingface.co"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,199}\.gguf")
_SHA256 = re.compile(r"[0-9a-f]{64}")

OnBytes = Callable[[int], None]


class Refusal(Exception):
    """Something a person has to mend. The text is one line that names the file, the value and the fix."""


class DiskFull(Refusal):
    """No file can be installed before some space is free."""


def gigabytes(size: int) -> str:
    """A size for people: '18.6 GB', or '4.2 MB' below a gigabyte (decimal units)."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


@dataclass(frozen=True)
class ModelFile:
    """One file that must be in the models directory, from exactly one of `url` and `path`."""

    model: str
    name: str
    sha256: str
    size: int
    url: str | None = None
    path: str | None = None

    def __post_init__(self) -> None:
        """Check every field again on the host. Raises Refusal: a name from outside becomes a path here."""
        key = f"gguf_models.{self.model}"
        if not _NAME.fullmatch(self.name):
            raise Refusal(
                f"{key}: file name {self.name!r} is refused: letters, digits, '.', '_', '+' and '-' only, at"
                " most 205 characters, ending in .gguf; fix: give a plain file name without a directory"
            )
        if not _SHA256.fullmatch(self.sha256):
            raise Refusal(
                f"{key}: {self.name}: sha256 {self.sha256!r} is not 64 hexadecimal digits; "
                "fix: write the lock again with scripts/lock_models.py"
            )
        if isinstance(self.size, bool) or self.size <= 0:
            raise Refusal(
                f"{key}: {self.name}: size {self.size!r} is not a positive number of bytes; "
                "fix: write the lock again with scripts/lock_models.py"
            )
        if (self.url is None) == (self.path is None):
            raise Refusal(
                f"{key}: {self.name}: has {'no' if self.url is None else 'both'} url and path; fix: give one"
            )
        if self.path is not None and not self.path.startswith("/"):
            raise Refusal(f"{key}: {self.name}: path {self.path!r} is not absolute; fix: start it with /")
        if self.url is not None and urllib.parse.urlsplit(self.url).scheme not in ("http", "https"):
            raise Refusal(
                f"{key}: {self.name}: url {self.url!r} is neither http nor https; fix: use one of them"
            )


@dataclass(frozen=True)
class Plan:
    """Everything one run has to know. Bytes and seconds throughout."""

    directory: str
    files: tuple[ModelFile, ...]
    reserve_bytes: int = 0
    verify: str = "stat"
    hf_endpoint: str = HUB
    connect_timeout: float = 30.0
    stall_timeout: float = 60.0
    retries: int = 6

    @property
    def names(self) -> frozenset[str]:
        """The names of all files that belong in the directory."""
        return frozenset(file.name for file in self.files)

    @property
    def identity(self) -> str:
        """A digest of the whole plan: the same inventory gives the same one, on every controller."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """The plan as JSON, for the worker."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The reverse of `to_json`. Raises Refusal for a file that may not be."""
        data = json.loads(text)
        return cls(**{**data, "files": tuple(ModelFile(**file) for file in data["files"])})


def select(models: Sequence[Mapping[str, Any]], hf_endpoint: str) -> tuple[ModelFile, ...]:
    """The files of all models, hub URLs rewritten to `hf_endpoint`.

    Two models may share a file; raises Refusal when they disagree about its content.
    """
    files: dict[str, ModelFile] = {}
    for model in models:
        for entry in model["files"]:
            url = entry.get("url")
            if url is not None and url.startswith(HUB + "/"):
                url = hf_endpoint.rstrip("/") + url[len(HUB) :]
            file = ModelFile(
                model=model["name"],
                name=entry["file"],
                sha256=entry["sha256"],
                size=entry["size"],
                url=url,
                path=entry.get("path"),
            )
            other = files.setdefault(file.name, file)
            if other.sha256 != file.sha256:
                raise Refusal(
                    f"gguf_models: {other.model} and {file.model} both install {file.name} with different "
                    "sha256; fix: give one of them another `file`"
                )
    return tuple(files.values())


def stamp_path(directory: Path, name: str) -> Path:
    """Where the verified checksum of file `name` is kept."""
    return directory / f".{name}.sha256"


def part_path(directory: Path, name: str) -> Path:
    """Where file `name` grows until it is verified."""
    return directory / f".{name}.part"


def part_note_path(directory: Path, name: str) -> Path:
    """What a resumed download has to know about the part: checksum, ETag, bytes known to be on the disk."""
    return directory / f".{name}.part.json"


def lstat(path: Path) -> os.stat_result | None:
    """The stat of `path` itself, None when there is nothing."""
    try:
        return path.lstat()
    except FileNotFoundError:
        return None


def open_regular(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open a regular file, never through a symlink at its end. Raises OSError."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, FILE_MODE)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is not a regular file")
    return descriptor


def read_json(path: Path, limit: int = STAMP_MAX_BYTES) -> dict[str, Any]:
    """The JSON object in a small file; {} when it is missing, too large, or anything else."""
    try:
        with os.fdopen(open_regular(path), "rb") as stream:
            text = stream.read(limit + 1)
        data = json.loads(text) if len(text) <= limit else {}
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def write_json(path: Path, data: Mapping[str, Any], mode: int = FILE_MODE) -> None:
    """Write a small JSON file atomically: a reader sees the former one or the new one."""
    draft = path.with_name(path.name + ".new")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        json.dump(data, stream, sort_keys=True)
        stream.write("\n")
    draft.replace(path)


def stamp_of(status: os.stat_result, sha256: str) -> dict[str, Any]:
    """A stamp: the checksum and all of the stat that changes when the content is written.

    `ctime_ns` is there because a tool may set mtime back, but nothing sets ctime.
    """
    return {
        "sha256": sha256,
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
        "inode": status.st_ino,
    }


def stamped_sha256(directory: Path, name: str) -> str | None:
    """The checksum that was verified for the file as it is now; None when it changed since."""
    status, stamp = lstat(directory / name), read_json(stamp_path(directory, name))
    if (
        status is None
        or not isinstance(stamp.get("sha256"), str)
        or stamp != stamp_of(status, stamp["sha256"])
    ):
        return None
    return str(stamp["sha256"])


def set_mode(directory: Path, name: str) -> None:
    """Give a file its mode and keep a valid stamp valid, for chmod changes ctime. Raises OSError."""
    sha256 = stamped_sha256(directory, name)
    descriptor = open_regular(directory / name)
    try:
        os.fchmod(descriptor, FILE_MODE)
        status = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    if sha256:
        write_json(stamp_path(directory, name), stamp_of(status, sha256))


def adopt(directory: Path, names: frozenset[str], uid: int, gid: int) -> list[str]:
    """As root: give the owner the files that someone else copied into the directory. Returns their names.

    Only in a directory that is the owner's already, only regular files, none with a second hard link (its
    other name may stand anywhere). Raises Refusal for what cannot be given away safely.
    """
    try:
        folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return []
    adopted = []
    try:
        status = os.fstat(folder)
        if status.st_uid != uid:
            raise Refusal(
                f"{directory} belongs to user {status.st_uid}, not to the models' owner (user {uid}); fix: "
                f"`chown {uid}:{gid} {directory}`, or set gguf_models_dir to another directory"
            )
        for name in sorted(names & {entry.name for entry in directory.iterdir()}):
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if status.st_uid == uid or not stat.S_ISREG(status.st_mode):
                continue
            descriptor = os.open(
                name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder
            )
            try:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
                    raise Refusal(
                        f"{directory / name} belongs to user {status.st_uid} and has other hard links; fix:"
                        " copy it, or remove it"
                    )
                os.fchown(descriptor, uid, gid)
            finally:
                os.close(descriptor)
            adopted.append(name)
    finally:
        os.close(folder)
    return adopted


def hash_file(path: Path, on_bytes: OnBytes = lambda _: None) -> str:
    """The sha256 of a regular file, read in chunks. Raises OSError."""
    digest = hashlib.sha256()
    with os.fdopen(open_regular(path), "rb", buffering=0) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
            on_bytes(len(chunk))
    return digest.hexdigest()


# What `inspect` says about one file.
OK, UNVERIFIED, WRONG, MISSING = "ok", "unverified", "wrong", "missing"


@dataclass(frozen=True)
class FileState:
    """How one wanted file stands. `part` counts the bytes of an unfinished download that can be used."""

    name: str
    state: str
    mode_differs: bool = False
    part: int = 0


def inspect_file(directory: Path, file: ModelFile, *, full: bool = False) -> FileState:
    """Look at one file by its stat and its stamp; `full` trusts no stamp.

    Raises Refusal for what may not be replaced.
    """
    status = lstat(directory / file.name)
    if status is None:
        return FileState(file.name, MISSING, part=usable_part(directory, file))
    if stat.S_ISLNK(status.st_mode) or not stat.S_ISREG(status.st_mode):
        kind = "a symlink" if stat.S_ISLNK(status.st_mode) else "not a regular file"
        raise Refusal(
            f"{directory / file.name} is {kind}, it is left alone; fix: move it away, or give its target as "
            f"gguf_models.{file.model}.path"
        )
    differs = stat.S_IMODE(status.st_mode) != FILE_MODE
    sha256 = None if full else stamped_sha256(directory, file.name)
    if status.st_size != file.size or (sha256 is not None and sha256 != file.sha256):
        return FileState(file.name, WRONG, differs, usable_part(directory, file))
    return FileState(file.name, OK if sha256 else UNVERIFIED, differs)


def inspect(plan: Plan) -> list[FileState]:
    """How every file of the plan stands, in the plan's order."""
    return [inspect_file(Path(plan.directory), file, full=plan.verify == "full") for file in plan.files]


def boot_id() -> str:
    """The kernel's random identity of this boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def usable_part(directory: Path, file: ModelFile) -> int:
    """Bytes of an unfinished download that a new one can go on from.

    After a reboot only what had been synced counts: a power failure leaves zeros where data was in memory.
    """
    status, note = lstat(part_path(directory, file.name)), read_json(part_note_path(directory, file.name))
    if status is None or not stat.S_ISREG(status.st_mode) or note.get("sha256") != file.sha256:
        return 0
    have = status.st_size
    if note.get("boot") != boot_id():
        synced = note.get("synced")
        have = min(have, synced if isinstance(synced, int) and synced >= 0 else 0)
    return have if have <= file.size else 0


def free_bytes(directory: Path) -> int:
    """Bytes an ordinary user can still write where `directory` is, or will be made."""
    while not directory.exists():
        directory = directory.parent
    figures = os.statvfs(directory)
    return figures.f_bavail * figures.f_frsize


def missing_bytes(files: Sequence[ModelFile], states: Sequence[FileState]) -> int:
    """Bytes still to be written.

    A file that is replaced counts whole: the former one stays until the new is verified.
    """
    return sum(
        file.size - state.part
        for file, state in zip(files, states, strict=True)
        if state.state in (MISSING, WRONG)
    )


def check_space(plan: Plan, missing: int, free: int) -> None:
    """Raises Refusal when all missing bytes and the reserve do not fit."""
    if missing and missing + plan.reserve_bytes > free:
        raise DiskFull(
            f"{plan.directory}: {gigabytes(missing)} of models are missing and"
            f" {gigabytes(plan.reserve_bytes)} stay in reserve, but only {gigabytes(free)} are free:"
            f" {gigabytes(missing + plan.reserve_bytes - free)} too few; fix: free some space, set"
            " gguf_models_remove_unused: true, or move gguf_models_dir to a larger file system"
        )


@dataclass(frozen=True)
class Unused:
    """A model or an unfinished download that no preset asks for. `paths` is what goes when it is removed."""

    name: str
    size: int
    paths: tuple[str, ...]


def names_of(directory: Path, paths: Sequence[str]) -> frozenset[str]:
    """The names in `directory` of those `paths` that lead into it, also by way of symlinks."""
    folder, found = directory.resolve(), set()
    for text in paths:
        path = Path(text)
        for place in (path.parent.resolve() / path.name, path.resolve()):
            if place.parent == folder:
                found.add(place.name)
    return frozenset(found)


def unused_files(directory: Path, wanted: frozenset[str]) -> list[Unused]:
    """The *.gguf files directly in `directory` that are not wanted, each with its stamp and its parts.

    Symlinks, directories and everything with another name are not ours and never listed.
    """
    try:
        present = {
            entry.name: entry.stat(follow_symlinks=False).st_size
            for entry in os.scandir(directory)
            if entry.is_file(follow_symlinks=False)
        }
    except FileNotFoundError:
        return []
    found = []
    owners = {re.sub(r"^\.(.+)\.(sha256|part|part\.json)$", r"\1", name) for name in present}
    for name in sorted(owners - wanted):
        if _NAME.fullmatch(name):
            data, notes = (name, f".{name}.part"), (f".{name}.sha256", f".{name}.part.json")
            found.append(
                Unused(
                    name,
                    sum(present.get(own, 0) for own in data),
                    tuple(own for own in (*data, *notes) if own in present),
                )
            )
    return found


def remove_unused(directory: Path, wanted: frozenset[str]) -> list[Unused]:
    """Remove what `unused_files` lists. The caller holds the lock."""
    found = unused_files(directory, wanted)
    for unused in found:
        for name in unused.paths:
            (directory / name).unlink(missing_ok=True)
    return found


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the directory's lock.

    Raises Refusal at once when another process has it. The kernel frees it at any death.
    """
    descriptor = os.open(
        directory / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE
    )
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refusal(
                f"{directory}: another run is writing models there (it holds {LOCK_NAME}); fix: wait for it, "
                "or stop it with `systemctl stop gguf-fetch`; both resume where they were"
            ) from None
        yield
    finally:
        os.close(descriptor)
