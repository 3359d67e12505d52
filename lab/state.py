"""What this lab has made on the machine, written down before it is made so that it can always be undone."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lab.config import Lab
from lab.shell import LabError, say

# Facts about the running kernel, shared by all labs: gone with a reboot, exactly as what they describe.
MACHINE_DIR = Path("/run/llmbox-lab")


class Claims:
    """The list of things this lab made or is about to make: `kind name`, e.g. `interface llmbox-lab`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.suite: str | None = None
        self.things: list[str] = []
        if path.exists():
            content = json.loads(path.read_text())
            self.suite = content["suite"]
            self.things = content["things"]

    def claim(self, kind: str, name: str, *, exists: bool) -> None:
        """Write down that `name` is about to be made.

        Raises LabError when it exists already and is not ours.
        """
        thing = f"{kind} {name}"
        if thing in self.things:
            return
        if exists:
            raise LabError(
                f"{kind} {name} exists and is not this lab's; fix: remove it or choose another LAB_NAME",
                2,
            )
        self.things.append(thing)
        self.save()

    def of(self, kind: str) -> list[str]:
        """Return the names of this kind that are claimed, newest first."""
        return [
            name
            for found, _, name in (thing.partition(" ") for thing in reversed(self.things))
            if found == kind
        ]

    def release(self, kind: str, name: str) -> None:
        """Forget a thing that is gone."""
        self.things.remove(f"{kind} {name}")
        self.save()

    def save(self) -> None:
        write_atomically(
            self._path, json.dumps({"suite": self.suite, "things": self.things}, indent=1) + "\n"
        )


def write_atomically(path: Path, text: str, mode: int = 0o644) -> None:
    """Write a file so that a reader, or a power cut, finds either the old content or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.partial")
    with half.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    half.chmod(mode)
    half.replace(path)


@contextlib.contextmanager
def only_command(lab: Lab, verb: str) -> Iterator[None]:
    """Hold the lab's lock; a second command on the same lab ends at once with one line and exit status 3."""
    path = lab.cache / "lab" / f".{lab.name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            raise LabError(
                f"another command works on lab {lab.name!r} ({stream.read().strip() or 'just started'}): "
                "wait for its end, or choose another LAB_NAME",
                3,
            ) from None
        stream.truncate(0)
        stream.write(f"{verb}, pid {os.getpid()}")
        stream.flush()
        yield


@contextlib.contextmanager
def shared_cache(path: Path, what: str) -> Iterator[None]:
    """Hold the lock of a cache that all labs use, waiting for whoever holds it."""
    path.mkdir(parents=True, exist_ok=True)
    with (path / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another lab that prepares {what}")
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def machine_ledger(name: str) -> Iterator[dict[str, Any]]:
    """Give the content of a ledger shared by all labs, to read and to change; an empty one is removed."""
    MACHINE_DIR.mkdir(exist_ok=True)
    path = MACHINE_DIR / f"{name}.json"
    with (MACHINE_DIR / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        ledger: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        yield ledger
        if ledger:
            write_atomically(path, json.dumps(ledger))
        else:
            path.unlink(missing_ok=True)
            if not any(entry.name != ".lock" for entry in MACHINE_DIR.iterdir()):
                (MACHINE_DIR / ".lock").unlink()
                MACHINE_DIR.rmdir()
