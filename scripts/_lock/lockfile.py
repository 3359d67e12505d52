"""The lock file: read, compare, render, replace in one step."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from llama_common.presets import Lock as Data
from pydantic import ValidationError

from . import COMMIT, ROOT, SHA256, CannotRunError, Lock, last_line

LOCK_PATH = Path("group_vars/llama_hosts/lock.yml")
SCHEMA = ROOT / "docs/schema/llama_hosts.schema.json"
KINDS = {"builds": "build", "models": "model", "headers": "header"}


def shown(path: Path) -> str:
    """A path as a person types it from the repository."""
    resolved = path.resolve()
    return str(resolved.relative_to(ROOT)) if resolved.is_relative_to(ROOT) else str(path)


def path_of(inventory: Path) -> Path:
    """Where the lock of an inventory stands. Raises CannotRunError where writing it would hide variables."""
    path = (inventory if inventory.is_dir() else inventory.parent) / LOCK_PATH
    folder = path.parent
    for single in (folder.with_suffix(suffix) for suffix in (".yml", ".yaml", ".json")):
        if single.exists() and not folder.exists():
            raise CannotRunError(
                f"{shown(single)}: Ansible stops reading it once the folder {folder.name} is beside it; "
                f"fix: make that folder and move the file into it as main{single.suffix}"
            )
    return path


def read(path: Path) -> Lock:
    """The lock as it stands, empty when there is none. Raises CannotRunError when the file is no lock."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {kind: {} for kind in KINDS}
    except OSError as error:
        raise CannotRunError(f"{shown(path)}: {error.strerror}; fix: make it a readable file") from None
    except (ValueError, yaml.YAMLError) as error:
        raise CannotRunError(
            f"{shown(path)}: {last_line(str(error))}; fix: remove it and run this again"
        ) from None
    try:
        lock = content.get("llama_lock") if isinstance(content, dict) else None
        return {**{kind: {} for kind in KINDS}, **Data.model_validate(lock).model_dump()}
    except ValidationError as error:
        place = ".".join(str(part) for part in ("llama_lock", *error.errors()[0]["loc"]))
        raise CannotRunError(
            f"{shown(path)}: {place}: not what this command writes; fix: remove the file and run this again"
        ) from None


def render(lock: Lock, path: Path, command: str) -> str:
    """The text of the lock file: sorted, every string quoted, so that equal locks are equal bytes."""
    lines = [
        "---",
        f"# Written by: {command}",
        "# Change the builds or the models and run that again, not this file.",
    ]
    if path.resolve().is_relative_to(ROOT):
        schema = os.path.relpath(SCHEMA, path.resolve().parent)
        lines.insert(0, f"# yaml-language-server: $schema={schema}")
    lines.append("llama_lock:")
    for kind in KINDS:
        entries = lock.get(kind, {})
        lines.append(f"  {kind}:" if entries else f"  {kind}: {{}}")
        for name, entry in sorted(entries.items()):
            lines.append(f"    {name}:")
            for key, value in entry.items():
                if isinstance(value, dict):
                    lines.append(f"      {key}:" if value else f"      {key}: {{}}")
                    lines += [
                        f"        {json.dumps(inner)}: {json.dumps(inner_value)}"
                        for inner, inner_value in sorted(value.items())
                    ]
                    continue
                if not isinstance(value, list):
                    lines.append(f"      {key}: {json.dumps(value)}")
                    continue
                lines.append(f"      {key}:")
                for one in value:
                    pairs = [f"{inner}: {json.dumps(inner_value)}" for inner, inner_value in one.items()]
                    lines += [
                        f"        {'- ' if index == 0 else '  '}{pair}" for index, pair in enumerate(pairs)
                    ]
    return "\n".join(lines) + "\n"


def write(path: Path, content: str) -> None:
    """Replace `path` in one step; what stood there stays whole until then. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name with a dot in front: Ansible reads every other file of the folder.
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def differences(old: Lock, new: Lock) -> Iterator[str]:
    """What changes: a line for each entry, an indented one for each of its facts."""
    for kind, singular in KINDS.items():
        former, latter = old.get(kind, {}), new.get(kind, {})
        for name in sorted(former | latter):
            before, after = former.get(name), latter.get(name)
            if before == after:
                continue
            yield f"{'+' if before is None else '-' if after is None else '~'} {singular} {name}"
            was, becomes = _facts(before), _facts(after)
            for key in dict.fromkeys([*was, *becomes]):
                if before is None:
                    yield f"    {key}: {becomes[key]}"
                elif after is not None and was.get(key) != becomes.get(key):
                    yield f"    {key}: {was.get(key, 'none')} -> {becomes.get(key, 'none')}"


def _facts(entry: Mapping[str, Any] | None) -> dict[str, str]:
    facts = {
        key: f"{len(value)} kinds" if isinstance(value, dict) else _short(value)
        for key, value in (entry or {}).items()
        if key != "files"
    }
    for one in (entry or {}).get("files") or []:
        facts[str(one.get("file"))] = f"{_short(one.get('size'))}, sha256 {_short(one.get('sha256'))}"
    return facts


def _short(value: object) -> str:
    """Hashes cut for reading, sizes in bytes with a unit."""
    if isinstance(value, int):
        return f"{value / 1e9:.2f} GB" if value >= 10**9 else f"{value / 1e6:.1f} MB"
    written = str(value)
    return written[:12] if COMMIT.fullmatch(written) or SHA256.fullmatch(written) else written
