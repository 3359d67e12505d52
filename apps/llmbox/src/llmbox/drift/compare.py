"""What was deployed against what is there; nothing is looked at here."""

from __future__ import annotations

import difflib
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SHOWN_CHARACTERS = 120

# Where a mode has more than one good value: what is said of it instead.
OF_THE_MODE = ("writable", "readable", "executable")

# What lies at a path (type, mode, owner, group, and sha256 or target); None for nothing.
Entry = Mapping[str, str]
# The type of what the disk, or its rights, do not give; `error` says why.
UNREADABLE = "unreadable"


@dataclass(frozen=True)
class Difference:
    """One thing that is not as it was deployed. `diff` is the whole difference of a text."""

    path: str
    expected: str
    found: str
    diff: str = ""

    def __str__(self) -> str:
        return f"{printable(self.path)}: expected {self.expected}, found {self.found}"


def compare(path: str, expected: Entry | None, found: Entry | None) -> Iterator[Difference]:
    """How what lies at `path` differs in what `expected` says of it."""
    if found is not None and found["type"] == UNREADABLE:
        yield Difference(path, kind(expected), kind(found))  # whatever was expected, nobody knows
        return
    if expected is None or found is None or expected["type"] != found["type"]:
        if expected is not found:
            diff = text_diff((expected or {}).get("text", ""), (found or {}).get("text", ""))
            yield Difference(path, kind(expected), kind(found), diff)
        return
    for key in ("target", "mode", "owner", "group", *OF_THE_MODE):
        if key in expected and expected[key] != found[key]:
            yield Difference(path, f"{key} {shown(expected[key])}", f"{key} {shown(found[key])}")
    if "sha256" in expected and expected["sha256"] != found["sha256"]:
        if "text" in expected and "text" in found:
            yield text_difference(path, expected["text"], found["text"])
        else:
            yield Difference(path, f"sha256 {expected['sha256']}", f"sha256 {found['sha256']}")


def kind(entry: Entry | None) -> str:
    """What lies there, in words."""
    if entry is None:
        return "nothing"
    if entry["type"] == UNREADABLE:
        return f"nothing that can be read: {entry['error']}"
    return f"a link to {shown(entry['target'])}" if entry["type"] == "link" else f"a {entry['type']}"


def text_difference(path: str, expected: str, found: str) -> Difference:
    """The first line that differs, and all of it as a unified diff."""
    before, after = expected.splitlines(), found.splitlines()
    pairs = zip(before, after, strict=False)
    number = next((at for at, (old, new) in enumerate(pairs) if old != new), min(len(before), len(after)))

    def line(lines: Sequence[str]) -> str:
        return f"line {number + 1} {shown(lines[number])!r}" if number < len(lines) else "the end of the file"

    if number == len(before) == len(after):
        return Difference(path, f"{len(expected)} characters", f"the same lines in {len(found)} characters")
    return Difference(path, line(before), line(after), text_diff(expected, found))


def text_diff(expected: str, found: str) -> str:
    """A unified diff without context."""
    texts = expected.splitlines(), found.splitlines()
    return "\n".join(difflib.unified_diff(*texts, "deployed", "found", n=0, lineterm=""))


def shown(text: str) -> str:
    """A text that fits into a line."""
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"


def printable(text: str) -> str:
    """A name that others may have chosen, safe to show on root's terminal."""
    return text if text.isprintable() else repr(text)


def compare_all(
    expected: Mapping[str, Entry | None], found: Mapping[str, Entry | None]
) -> Iterator[Difference]:
    """`compare` for every path that either of them names."""
    for path in sorted(expected.keys() | found.keys()):
        yield from compare(path, expected.get(path), found.get(path))


def release_members(folder: str, listing: Mapping[str, Any]) -> dict[str, Entry]:
    """What a llama.cpp release must hold, from its release.json."""
    own = {"owner": "root", "writable": "by its owner", "readable": "by everybody"}
    runs = {**own, "executable": "by everybody"}
    members: dict[str, Entry] = {path: {"type": "folder", **runs} for path in (folder, f"{folder}/bin")}
    for name, wanted in listing["files"].items():
        if "link" in wanted:
            members[f"{folder}/{name}"] = {"type": "link", "target": wanted["link"]}
        else:
            access = runs if name.removeprefix("bin/") in listing["targets"] else own
            members[f"{folder}/{name}"] = {"type": "file", **access, "sha256": wanted["sha256"]}
    return members


def environment_members(folder: str, listing: Mapping[str, str]) -> dict[str, Entry]:
    """What a Python environment must hold, from the list that roles/llmbox wrote: `MODE SHA256|TARGET`."""
    members: dict[str, Entry] = {}
    for name, text in listing.items():
        mode, _, content = text.partition(" ")
        path = folder if name == "." else f"{folder}/{name}"
        own = {"owner": "root", "mode": f"{stat.S_IMODE(int(mode, 8)):04o}"}
        if stat.S_ISLNK(int(mode, 8)):
            members[path] = {"type": "link", "target": content}
        elif stat.S_ISDIR(int(mode, 8)):
            members[path] = {"type": "folder", **own}
        else:
            members[path] = {"type": "file", **own, "sha256": content}
    return members


def unit_differences(
    units: Sequence[Mapping[str, Any]], states: Mapping[tuple[str, str], Mapping[str, str]]
) -> Iterator[Difference]:
    """Units that do not run, or would not after a boot, as they should; `states` by user ("": the system)."""
    for unit in units:
        user = unit.get("user") or ""
        state = states.get((user, unit["unit"]), {})
        where = f"{unit['unit']} of {user or 'the system'}"
        for key, name, good in (
            ("enabled", "UnitFileState", {"enabled"}),
            # On its way is no drift: it may be restarting.
            ("active", "ActiveState", {"active", "activating", "reloading", "deactivating"}),
        ):
            if key not in unit:
                continue
            value = state.get(name) or "no answer"
            if (value in good) != unit[key] or not state:
                yield Difference(where, key if unit[key] else f"not {key}", value)


def member_differences(
    members: Sequence[Mapping[str, Any]], groups: Mapping[str, Iterable[str]]
) -> Iterator[Difference]:
    """Users who are no longer in their groups; `groups` by user."""
    for member in members:
        for group in member["groups"]:
            if group not in groups.get(member["user"], ()):
                yield Difference("/etc/group", f"{member['user']} in {group}", f"{member['user']} not in it")


def word_differences(
    where: str, wanted: Sequence[str], found: Iterable[str], what: str
) -> Iterator[Difference]:
    """Words that are no longer among those `found`."""
    there = set(found)
    for word in wanted:
        if word not in there:
            yield Difference(where, f"{shown(word)} {what}", f"{shown(word)} not {what}")


def drop_in_folders(unit: str) -> list[str]:
    """Names of the folders with drop-ins of a unit: its own, its template's, its prefixes', its type's."""
    stem, _, suffix = unit.rpartition(".")
    name, at, instance = stem.partition("@")
    names = [stem, *([f"{name}@"] if at and instance else [])]
    pieces = name.split("-")
    names += ["-".join(pieces[:count]) + "-" for count in range(len(pieces) - 1, 0, -1)]
    return [f"{one}.{suffix}.d" for one in names] + [f"{suffix}.d"]
