"""`bootwin`: start Windows once, at the next start of the machine, and restart it.

It names the firmware's entry for Windows as the next one to boot (`BootNext`), looks whether that and nothing
else has changed in the firmware, and restarts. What starts by default stays as it is: the start after Windows
is Linux again. Standard library only.
Exit codes: 0 done, 1 refused or failed (one line says why), 2 bad usage.
"""

from __future__ import annotations

import argparse
import os
import re
import struct
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmbox.complaint import complaint
from llmbox.errors import EXIT_DONE, EXIT_FAILED, LlmboxError

COMMAND = "/usr/local/sbin/llmbox-bootwin"  # the one that sudo lets the LLM user run
TIMEOUT_S = 30
_GLOBAL = "8be4df61-93ca-11d2-aa0d-00e098032b8c"
_MEDIA, _HARD_DRIVE, _FILE = 4, 1, 4  # device path: type, and its two subtypes that say where a loader is
_SIGNATURE_IS_GUID = 2
_ACTIVE = 1  # of an entry's attributes: what lacks it the firmware passes over


@dataclass(frozen=True)
class Entry:
    """A boot entry of the firmware: its number, what it is called, where its program is."""

    number: int
    label: str
    partition: str | None = None  # GPT partition's unique id
    loader: str | None = None  # below the partition's root, with /

    @property
    def name(self) -> str:
        return f"Boot{self.number:04X}"


@dataclass(frozen=True)
class Machine:
    """Where the firmware's variables, partitions and mounts are found."""

    variables: Path = Path("/sys/firmware/efi/efivars")
    partitions: Path = Path("/dev/disk/by-partuuid")
    mounts: Path = Path("/proc/self/mounts")


def parse_entry(number: int, content: bytes) -> Entry:
    """Read a Boot#### variable as efivarfs gives it. Raises ValueError when it is none."""
    try:
        _, _, path_length = struct.unpack_from("<IIH", content)
        end = next(at for at in range(10, len(content) - 1, 2) if content[at : at + 2] == b"\0\0")
        label = content[10:end].decode("utf-16-le")
        partition, loader = _parse_path(content[end + 2 : end + 2 + path_length])
    except (struct.error, StopIteration, UnicodeDecodeError) as error:
        raise ValueError(f"Boot{number:04X} is no boot entry") from error
    return Entry(number, label, partition, loader)


def _parse_path(path: bytes) -> tuple[str | None, str | None]:
    partition = loader = None
    at = 0
    while at + 4 <= len(path):
        kind, subkind, length = struct.unpack_from("<BBH", path, at)
        if length < 4:
            break
        body = path[at + 4 : at + length]
        if (kind, subkind) == (_MEDIA, _HARD_DRIVE) and len(body) >= 38 and body[37] == _SIGNATURE_IS_GUID:
            partition = str(uuid.UUID(bytes_le=body[20:36]))
        elif (kind, subkind) == (_MEDIA, _FILE):
            loader = body.decode("utf-16-le").rstrip("\0").replace("\\", "/")
        at += length
    return partition, loader


def read_variables(folder: Path) -> dict[str, bytes]:
    """The boot entries, their order, the next and the present one, as bytes.

    Raises LlmboxError without EFI variables.
    """
    try:
        found = {
            path.name[: -len(_GLOBAL) - 1]: path.read_bytes()
            for path in folder.iterdir()
            if re.fullmatch(rf"Boot([0-9A-F]{{4}}|Order|Next|Current)-{_GLOBAL}", path.name)
        }
    except OSError as error:
        raise LlmboxError(f"{folder} cannot be read ({error.strerror}): {_NO_EFI}") from error
    if not found:
        raise LlmboxError(f"{folder} holds no boot entries: {_NO_EFI}")
    return found


_NO_EFI = (
    "this machine was not started through EFI, or its EFI variables are switched off; "
    "fix: start it in UEFI mode, with efivarfs mounted and without efi=noruntime"
)


def choose(variables: Mapping[str, bytes], label: str, machine: Machine) -> Entry:
    """The one entry with this label. Raises LlmboxError when there is none, or more than one."""
    entries: list[Entry] = []
    for name, content in sorted(variables.items()):
        if name not in ("BootOrder", "BootNext", "BootCurrent"):
            try:
                entries.append(parse_entry(int(name[4:], 16), content))
            except ValueError:
                continue  # of some vendor's making; it cannot be the one that is looked for
    found = [entry for entry in entries if entry.label == label]
    if not found:
        labels = ", ".join(f'"{entry.label}"' for entry in entries) or "none"
        raise LlmboxError(
            f'the firmware has no boot entry "{label}"; it has {labels}; fix: start Windows once from the '
            "firmware's menu, or set dual_boot_label to what Windows is called there"
        )
    if len(found) > 1:
        names = " and ".join(entry.name for entry in found)
        gone = [entry for entry in found if _is_gone(entry, machine)]
        one = gone[0] if 0 < len(gone) < len(found) else None
        raise LlmboxError(
            f'the firmware has {len(found)} boot entries "{label}" ({names}), and '
            + (
                f"{one.name} is of a Windows that is gone; "
                f"fix: sudo efibootmgr -b {one.number:04X} -B removes it"
                if one
                else "which one is to start cannot be told; fix: efibootmgr -v says where each is, and "
                "sudo efibootmgr -b NUMBER -B removes one"
            )
        )
    return found[0]


def mounted_at(entry: Entry, machine: Machine) -> Path | None:
    """Where the entry's partition is mounted; None when it is not. Raises LlmboxError when it is gone."""
    if entry.partition is None:
        return None
    link = machine.partitions / entry.partition
    if not link.exists():
        raise LlmboxError(
            f'{entry.name} "{entry.label}" starts from the partition {entry.partition}, which this machine '
            "does not have; fix: connect its disk, or remove the entry"
        )
    device = str(link.resolve())
    for line in machine.mounts.read_text().splitlines():
        source, place = line.split(" ")[:2]
        if source.startswith("/") and str(Path(source).resolve()) == device:
            return Path(place.replace("\\040", " "))
    return None


def _is_gone(entry: Entry, machine: Machine) -> bool:
    """Whether the entry's partition or its program is known not to be there."""
    try:
        place = mounted_at(entry, machine)
    except LlmboxError:
        return True
    return place is not None and not _has_loader(entry, place)


def _has_loader(entry: Entry, place: Path) -> bool:
    try:
        return entry.loader is None or (place / entry.loader.lstrip("/")).is_file()
    except PermissionError:
        return True  # for root only, as Debian and Ubuntu mount it: root looks again


def check_partition(entry: Entry, machine: Machine, free_mib: int) -> None:
    """Raises LlmboxError when the entry's program is not on its partition, or that is full."""
    place = mounted_at(entry, machine)
    if place is None:
        return
    if not _has_loader(entry, place):
        raise LlmboxError(
            f'{entry.name} "{entry.label}" starts {entry.loader}, which {place} does not have; '
            "fix: repair Windows' boot files, or remove the entry"
        )
    room = os.statvfs(place)
    if room.f_bavail * room.f_frsize < free_mib << 20:
        raise LlmboxError(
            f"the EFI system partition at {place} has {room.f_bavail * room.f_frsize / 2**20:.1f} MiB free, "
            f"less than dual_boot_esp_free_mib = {free_mib}: Windows writes its boot configuration there; "
            f"fix: remove what does not belong in {place}"
        )


def check_order(entry: Entry, variables: Mapping[str, bytes]) -> None:
    """Raises LlmboxError when the firmware starts the entry by itself, before the system that runs."""
    order, current = (_numbers(variables.get(name, b"")) for name in ("BootOrder", "BootCurrent"))
    order = [number for number in order if _is_active(variables.get(f"Boot{number:04X}", b""))]
    before = order[:1] if not current else order[: order.index(current[0])] if current[0] in order else order
    if entry.number in before:
        raise LlmboxError(
            f'the firmware starts {entry.name} "{entry.label}" before the system that runs: the start after '
            "it would be Windows again; fix: sudo efibootmgr --bootorder NUMBERS, Linux' first (efibootmgr "
            "shows them); where it is already, restart into it first"
        )


def _is_active(entry: bytes) -> bool:
    return bool(int.from_bytes(entry[4:8], "little") & _ACTIVE)


def _numbers(variable: bytes) -> list[int]:
    return [int.from_bytes(variable[at : at + 2], "little") for at in range(4, len(variable) - 1, 2)]


def prepare(machine: Machine, label: str, free_mib: int) -> tuple[Entry, dict[str, bytes]]:
    """The entry for Windows and the firmware's variables. Raises LlmboxError where Windows cannot start."""
    variables = read_variables(machine.variables)
    entry = choose(variables, label, machine)
    waiting = variables.get("BootNext", b"")[4:]
    if waiting and waiting != struct.pack("<H", entry.number):
        number = int.from_bytes(waiting[:2], "little")
        raise LlmboxError(
            f"something else is to start next (BootNext = {number:04X}, a firmware update, say); "
            "fix: restart first, or sudo efibootmgr --delete-bootnext"
        )
    check_order(entry, variables)
    check_partition(entry, machine, free_mib)
    return entry, variables


def set_next(machine: Machine, entry: Entry, before: Mapping[str, bytes]) -> None:
    """Name the entry as the next to start. Raises LlmboxError unless that, and only that, has come about."""
    said = complaint(["efibootmgr", "--quiet", "--bootnext", f"{entry.number:04X}"], TIMEOUT_S)
    after = read_variables(machine.variables)
    wanted = struct.pack("<H", entry.number)
    if after.get("BootNext", b"")[4:] != wanted:
        if "BootNext" in after and after["BootNext"] != before.get("BootNext"):
            take_back()
        raise LlmboxError(
            f"the firmware refuses BootNext = {entry.number:04X} ({said or 'it stays as it was'})"
        )
    others = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)} - {
        "BootNext"
    }
    if others:
        if "BootNext" not in before:
            take_back()
        raise LlmboxError(
            f"the firmware changed {', '.join(sorted(others))} when BootNext was set; not restarted; "
            "fix: look at efibootmgr -v, something else is writing there"
        )


def take_back() -> None:
    """Have nothing start next but what usually does."""
    complaint(["efibootmgr", "--quiet", "--delete-bootnext"], TIMEOUT_S)


def boot_windows(machine: Machine, label: str, free_mib: int) -> None:
    """Set BootNext and restart. Raises LlmboxError; BootNext is then as it was."""
    entry, before = prepare(machine, label, free_mib)
    set_next(machine, entry, before)
    if said := complaint(["systemctl", "reboot"], TIMEOUT_S):
        if "BootNext" in before:
            raise LlmboxError(f"the machine does not restart ({said}); Windows starts next, as before")
        take_back()
        raise LlmboxError(f"the machine does not restart ({said}); Windows will not start next either")
    print(f'restarting into {entry.name} "{label}"; the start after that is the usual one')


def main(
    arguments: Sequence[str] | None = None,
    machine: Machine | None = None,
    become_root: Callable[[str, list[str]], object] = os.execvp,
) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="bootwin", description="Start Windows once, now.")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be done, or why not; change nothing"
    )
    # What the role's data say; the installed command brings them along.
    parser.add_argument("--label", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--esp-free-mib", type=int, required=True, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    machine = machine or Machine()
    try:
        if options.dry_run:
            entry, _ = prepare(machine, options.label, options.esp_free_mib)
            print(
                f'would start {entry.name} "{entry.label}" once: BootNext = {entry.number:04X}, then restart'
            )
        elif os.geteuid() != 0:
            become_root("sudo", ["sudo", "--non-interactive", COMMAND])
        else:
            boot_windows(machine, options.label, options.esp_free_mib)
    except LlmboxError as error:
        print(f"bootwin: {error}", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
