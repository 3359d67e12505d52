"""Releases and environments: folders that come with a list of what they hold."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmbox.drift.compare import Difference, Entry, compare_all, environment_members, release_members
from llmbox.drift.host import look


def listing_of(path: str) -> str:
    """The list that was written beside an environment; `path` is the link that names it."""
    return f"{os.path.realpath(path)}.json"


def surveyed(deployed: Mapping[str, Any]) -> list[str]:
    """Every path of which `record` keeps what lies there."""
    paths = [*deployed.get("files", [])]
    for link in deployed.get("environments", []):
        paths += [link, listing_of(link)]
    for build in deployed.get("builds", []):
        for link in (f"{build}/current", f"{build}/previous"):
            paths.append(link)
            if Path(link).is_symlink():
                paths.append(f"{os.path.realpath(link)}/release.json")
    return sorted(set(paths))


def tree_differences(manifest: Mapping[str, Any]) -> Iterator[Difference]:
    """What is wrong inside the releases and environments that were deployed, by their own lists.

    A list that was changed itself is named by its own checksum and not believed.
    """
    entries: Mapping[str, Entry | None] = manifest["entries"]
    for link in manifest["deployed"].get("environments", []):
        folder = target_of(link, entries)
        listing = trusted(f"{folder}.json", entries)
        if listing is not None:
            found = {path: look(path, None) for path in below(folder)}
            yield from tree_difference(folder, environment_members(folder, listing), found)
    for build in manifest["deployed"].get("builds", []):
        targets = {target_of(f"{build}/{name}", entries) for name in ("current", "previous")}
        for folder in sorted(targets - {""}):
            listing = trusted(f"{folder}/release.json", entries)
            if listing is not None:
                members = release_members(folder, listing)
                # A file more beside the programs is no dead weight: ggml loads backends from there.
                paths = {*members, *below(f"{folder}/bin")}
                found = {path: look(path, None) for path in paths}
                yield from tree_difference(folder, members, found)


def tree_difference(
    folder: str, expected: Mapping[str, Entry], found: Mapping[str, Entry | None]
) -> Iterator[Difference]:
    """Every difference below a folder; one line for a folder that is gone."""
    if found.get(folder) is None:
        yield Difference(folder, "a folder", "nothing")
    else:
        yield from compare_all(expected, found)


def target_of(link: str, entries: Mapping[str, Entry | None]) -> str:
    """Where a link led when it was recorded; "" where there was none."""
    entry = entries.get(link)
    return os.path.normpath(Path(link).parent / entry["target"]) if entry and "target" in entry else ""


def trusted(path: str, entries: Mapping[str, Entry | None]) -> Mapping[str, Any] | None:
    """The content of a list, None unless it is the one that was recorded."""
    entry = entries.get(path)
    try:
        content = Path(path).read_bytes()
    except OSError:
        return None
    if not entry or entry.get("sha256") != hashlib.sha256(content).hexdigest():
        return None
    data: Mapping[str, Any] = json.loads(content)
    return data


def below(folder: str) -> Iterator[str]:
    """A folder and everything in it, without following links."""
    yield folder
    for place, folders, files in os.walk(folder):
        yield from (f"{place}/{name}" for name in (*folders, *files))
