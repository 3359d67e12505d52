"""Change keys of one preset in the inventory's own YAML: not a byte beside them is touched."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from llama_common.memory import BATCH_FLAGS
from llama_common.presets import Preset

VARIABLE = "llama_presets"
UBATCH_FLAG = "--ubatch-size"
FLAGS = frozenset(flag for flag, name in BATCH_FLAGS.items() if name == "ubatch")
_NUMBER = re.compile(r"[0-9]+")
_ORDER = list(Preset.model_fields)

Changes = Mapping[str, int]


class CannotEdit(Exception):
    """The preset is not written so that a program may change it; the message is one line with the fix."""


def with_ubatch(extra_args: Sequence[str], value: int) -> list[str]:
    """The arguments with another --ubatch-size."""
    items = list(extra_args)
    for index in range(len(items) - 1, 0, -1):
        if items[index - 1] in FLAGS:
            items[index] = str(value)
            return items
    return [*items, UBATCH_FLAG, str(value)]


def find(inventory: Path, host: str, groups: Sequence[str], preset: str) -> Path:
    """The one file that holds a preset of a host. Raises CannotEdit."""
    folder = inventory if inventory.is_dir() else inventory.parent
    places = [folder / "group_vars" / group for group in ("all", *groups)] + [folder / "host_vars" / host]
    found = []
    for file in dict.fromkeys(file for place in places for file in _files(place)):
        text = file.read_text(encoding="utf-8", errors="replace")
        if not re.search(rf"^{VARIABLE}\s*:", text, re.MULTILINE):
            continue
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.YAMLError:
            continue
        if _value(_value(root, VARIABLE), preset) is not None:
            found.append(file)
    if len(found) != 1:
        where = ", ".join(map(str, found)) or f"no file of group_vars or host_vars below {folder}"
        raise CannotEdit(f"{VARIABLE}.{preset} stands in {where}; fix: change it by hand")
    return found[0]


def edit(text: str, preset: str, changes: Changes) -> str:
    """The file's text with other values for keys of the preset; `ubatch` is a flag in its extra_args.

    Raises CannotEdit.
    """
    for key, value in changes.items():
        before = _preset(text, preset)
        new = _with_ubatch(text, preset, value) if key == "ubatch" else _with_key(text, preset, key, value)
        wanted = dict(before)
        if key == "ubatch":
            wanted["extra_args"] = with_ubatch(before.get("extra_args", []), value)
        else:
            wanted[key] = str(value)
        if _plain(_root(new), preset) != _plain(_root(text), preset) or _preset(new, preset) != wanted:
            raise CannotEdit(f"{VARIABLE}.{preset}.{key} could not be changed alone; fix: change it by hand")
        text = new
    return text


def diff(file: Path, before: str, after: str) -> str:
    """What changes, as a unified diff."""
    old, new = (text.splitlines(keepends=True) for text in (before, after))
    return "".join(difflib.unified_diff(old, new, str(file), str(file), n=2))


def _files(place: Path) -> Iterator[Path]:
    """The files that Ansible reads for a group or a host."""
    for suffix in ("", ".yml", ".yaml", ".json"):
        path = place.with_name(place.name + suffix)
        if path.is_file():
            yield path
    if place.is_dir():
        yield from sorted(
            path
            for path in place.rglob("*")
            if path.is_file() and path.suffix in ("", ".yml", ".yaml", ".json") and path.name[:1] != "."
        )


def _root(text: str) -> yaml.Node | None:
    # Not the C loader: its marks count differently where the text is not ASCII.
    root: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    return root


def _value(node: yaml.Node | None, key: str) -> yaml.Node | None:
    """The value of a key that stands in the mapping itself."""
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            if isinstance(name, yaml.ScalarNode) and name.value == key:
                found: yaml.Node = value
                return found
    return None


def _mapping(text: str, preset: str) -> yaml.MappingNode:
    """The preset's own mapping. Raises CannotEdit when others share it, or parts of it."""
    root = _root(text)
    node = _value(_value(root, VARIABLE), preset)
    if not isinstance(node, yaml.MappingNode) or not node.value:
        raise CannotEdit(f"{VARIABLE}.{preset} is no mapping of keys here; fix: change it by hand")
    uses = Counter(id(each) for each in _nodes(root))
    if any(uses[id(each)] > 1 for each in (node, *(value for _, value in node.value))):
        raise CannotEdit(
            f"{VARIABLE}.{preset} shares an anchor with another place of the file; fix: change it by hand"
        )
    return node


def _nodes(node: yaml.Node | None) -> Iterator[yaml.Node]:
    if node is None:
        return
    yield node
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _nodes(item)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from _nodes(key)
            yield from _nodes(value)


def _plain(node: yaml.Node | None, preset: str) -> Any:
    """What stands in the file, without the preset: it must be the same after a change."""
    if isinstance(node, yaml.MappingNode):
        return [
            (_plain(key, ""), None if key.value == preset else _plain(value, preset if depth else ""))
            for key, value in node.value
            for depth in [not preset or key.value == VARIABLE]
        ]
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, "") for item in node.value]
    return None if node is None else (node.tag, node.value)


def _preset(text: str, preset: str) -> dict[str, Any]:
    """The keys of the preset: texts, lists of texts, or whatever else as it is."""
    found = {}
    for key, value in _mapping(text, preset).value:
        if isinstance(value, yaml.ScalarNode):
            found[key.value] = value.value
        elif key.value == "extra_args":
            found[key.value] = [item.value for item in value.value]
        else:
            found[key.value] = _plain(value, "")
    return found


def _with_key(text: str, preset: str, key: str, value: int) -> str:
    node = _mapping(text, preset)
    old = _value(node, key)
    if old is None:
        return _with_new_key(text, node, key, str(value))
    start, end = old.start_mark.index, old.end_mark.index
    if not isinstance(old, yaml.ScalarNode) or not _NUMBER.fullmatch(text[start:end]):
        raise CannotEdit(
            f"{VARIABLE}.{preset}.{key} is {text[start:end]!r}, no plain number; fix: write {key}: {value}"
        )
    return text[:start] + str(value) + text[end:]


def _with_ubatch(text: str, preset: str, value: int) -> str:
    node = _mapping(text, preset)
    old = _value(node, "extra_args")
    if old is None:
        return _with_new_key(text, node, "extra_args", f'[{UBATCH_FLAG}, "{value}"]')
    if not isinstance(old, yaml.SequenceNode):
        raise CannotEdit(f"{VARIABLE}.{preset}.extra_args is no list here; fix: add {UBATCH_FLAG} {value}")
    items = old.value
    for index in range(len(items) - 1, 0, -1):
        if items[index - 1].value in FLAGS:
            start, end = items[index].start_mark.index, items[index].end_mark.index
            return f'{text[:start]}"{value}"{text[end:]}'
    if not items or old.flow_style:
        at = items[-1].end_mark.index if items else old.end_mark.index - 1
        comma = ", " if items else ""
        return f'{text[:at]}{comma}{UBATCH_FLAG}, "{value}"{text[at:]}'
    indent = " " * (old.start_mark.column)
    at = _line_end(text, items[-1].end_mark.index)
    newline = _newline(text)
    return f'{text[:at]}{newline}{indent}- {UBATCH_FLAG}{newline}{indent}- "{value}"{text[at:]}'


def _with_new_key(text: str, node: yaml.MappingNode, key: str, value: str) -> str:
    """The key after the one that stands before it in the preset's schema, on a line of its own."""
    entries = [pair for pair in node.value if isinstance(pair[1], yaml.ScalarNode)] or node.value
    before = [pair for pair in entries if _rank(pair[0].value) < _rank(key)] or entries
    name, last = max(before, key=lambda pair: (_rank(pair[0].value), pair[0].start_mark.index))
    if node.flow_style:
        at = last.end_mark.index
        return f"{text[:at]}, {key}: {value}{text[at:]}"
    at = _line_end(text, last.end_mark.index)
    return f"{text[:at]}{_newline(text)}{' ' * name.start_mark.column}{key}: {value}{text[at:]}"


def _rank(key: str) -> int:
    return _ORDER.index(key) if key in _ORDER else -1


def _line_end(text: str, index: int) -> int:
    """The end of the line that a value ends on; its comment stays with it."""
    if index and text[index - 1] == "\n":  # of a block scalar, which ends with its line
        return index - (2 if text[index - 2 : index] == "\r\n" else 1)
    end = re.compile(r"\r?\n|\Z").search(text, index)
    assert end is not None
    return end.start()


def _newline(text: str) -> str:
    return "\r\n" if "\r\n" in text else "\n"
