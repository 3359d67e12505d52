"""YAML text as a person wrote it: where a key stands, what is there twice, where it breaks. Needs PyYAML."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from llama_common.problems import Problem

_Loader: type[yaml.SafeLoader] | type[yaml.CSafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_VAULT = "$ANSIBLE_VAULT"
_STANDARD = "tag:yaml.org,2002:"
_MERGE, _NULL = f"{_STANDARD}merge", f"{_STANDARD}null"
_CONVERTED = frozenset(f"{_STANDARD}{name}" for name in ("int", "float", "bool", "timestamp", "binary"))
_ANSIBLE_TAGS = frozenset({"!vault", "!vault-encrypted", "!unsafe"})


@dataclass(frozen=True)
class Found:
    """A problem of the text itself, with its line."""

    line: int
    problem: Problem


@dataclass(frozen=True)
class Document:
    """One YAML file: its tree with line marks, or what is wrong with the text."""

    root: yaml.Node | None
    problems: tuple[Found, ...] = ()

    @classmethod
    def of(cls, data: bytes, decrypt: Callable[[], object]) -> Document:
        """Parse a file, which must be UTF-8. `decrypt` raises when no password at hand opens a vault."""
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            number = data.count(b"\n", 0, error.start)
            problem = Problem(
                ("(text)",),
                data.split(b"\n")[number].decode(errors="replace").strip(),
                f"is not UTF-8: byte 0x{data[error.start]:02x} at position {error.start}",
                "save the file in the encoding UTF-8",
            )
            return cls(None, (Found(number + 1, problem),))
        if text.startswith(_VAULT):
            try:
                decrypt()
            except Exception:  # Ansible's own errors, which this package does not know
                return cls(None, (Found(1, locked(["(file)"])),))
        return cls.read(text)

    @classmethod
    def read(cls, text: str) -> Document:
        """Parse `text`; nothing is constructed, so tags such as !vault do not matter."""
        if text.startswith(_VAULT):
            return cls(None)
        try:
            return cls._checked(text)
        except yaml.YAMLError as error:
            return cls(None, (_syntax(error, text),))
        except RecursionError:
            problem = Problem(("(text)",), text[:40], "is nested too deeply to be read", "write it flatter")
            return cls(None, (Found(1, problem),))

    @classmethod
    def _checked(cls, text: str) -> Document:
        root = yaml.compose(text, Loader=_Loader)
        if root is not None and not isinstance(root, yaml.MappingNode) and root.tag != _NULL:
            kind = "a list" if isinstance(root, yaml.SequenceNode) else "a single value"
            problem = Problem(("(file)",), kind, "holds no variables", "write lines of the form name: value")
            return cls(None, (Found(root.start_mark.line + 1, problem),))
        return cls(root, (*_unusable(root, (), (), set()), *_duplicates(root, (), set())))

    def variables(self) -> Iterator[tuple[str, int]]:
        """The top-level keys with their lines."""
        if isinstance(self.root, yaml.MappingNode):
            for key, _ in self.root.value:
                yield str(key.value), key.start_mark.line + 1

    def line(self, path: Sequence[str]) -> int | None:
        """The line of the deepest part of `path` that is there; None when not even its first key is."""
        return _line(self.root, path)

    def line_of_host(self, host: str, path: Sequence[str]) -> int | None:
        """The same in a list of hosts, below `hosts: {HOST: ...}` of whatever group."""
        for node in _hosts(self.root, set()):
            mark, variables = _child(node, host)
            if mark is not None and (line := _line(variables, path)) is not None:
                return line
        return None


def locked(path: Sequence[str]) -> Problem:
    """The problem of a file or a value that no vault password at hand opens."""
    return Problem(
        tuple(path),
        "***",
        "is encrypted, and no vault password that was given opens it",
        "add --ask-vault-pass or --vault-password-file FILE",
    )


def shown(path: Path) -> str:
    """A path as a person in the current folder would type it."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _line(node: yaml.Node | None, path: Sequence[str]) -> int | None:
    found = None
    for step in path:
        mark, node = _child(node, step)
        if mark is None:
            break
        found = mark.line + 1
    return found


def _hosts(node: yaml.Node | None, seen: set[int]) -> Iterator[yaml.Node]:
    """The mappings below every key `hosts` of a tree."""
    if not isinstance(node, yaml.MappingNode) or id(node) in seen:
        return
    seen.add(id(node))
    for key, value in node.value:
        if key.value == "hosts":
            yield value
        else:
            yield from _hosts(value, seen)


def _child(node: yaml.Node | None, step: str) -> tuple[yaml.Mark | None, yaml.Node | None]:
    """Where the key or item `step` of `node` begins, and its value; keys of merged mappings (<<) count."""
    if isinstance(node, yaml.SequenceNode) and step.isdecimal() and int(step) < len(node.value):
        item = node.value[int(step)]
        return item.start_mark, item
    if isinstance(node, yaml.MappingNode):
        for key, value in reversed(node.value):
            if key.value == step and isinstance(key, yaml.ScalarNode):
                return key.start_mark, value
        for key, value in reversed(node.value):
            if key.tag == _MERGE:
                for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    mark, found = _child(merged, step)
                    if mark is not None:
                        return mark, found
    return None, None


def _unusable(
    node: yaml.Node | None, path: tuple[str, ...], above: tuple[int, ...], seen: set[int]
) -> Iterator[Found]:
    """What composes, and what Ansible's own reader would fail on without naming the place."""
    if node is None:
        return
    line = node.start_mark.line + 1
    if id(node) in above:
        problem = Problem(path, "*alias", "contains itself", "take the alias out of its own anchor")
        yield Found(line, problem)
        return
    if id(node) in seen:
        return
    seen.add(id(node))
    name = node.tag.removeprefix(_STANDARD)
    if (name == node.tag and node.tag not in _ANSIBLE_TAGS) or ":" in name or "/" in name:
        problem = Problem(path, node.tag, "is a YAML tag that Ansible does not know", "remove the tag")
        yield Found(line, problem)
    elif isinstance(node, yaml.ScalarNode) and node.tag in _CONVERTED:
        try:
            yaml.constructor.SafeConstructor().construct_object(node)
        except Exception:  # whatever int(), date() or b64decode() raise
            kind = f"is no {name} that exists"
            yield Found(
                line, Problem(path, node.value, kind, "correct it, or put it in quotes to make it text")
            )
    above = (*above, id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _unusable(item, (*path, str(index)), above, seen)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                problem = Problem(
                    path,
                    "{{ … }}" if isinstance(key, yaml.MappingNode) else "[…]",
                    "has a list or a mapping where the name of a key must stand",
                    'put a template in quotes: "{{ name }}"',
                )
                yield Found(key.start_mark.line + 1, problem)
                continue
            merged = value.value if isinstance(value, yaml.SequenceNode) else [value]
            if key.tag == _MERGE and not all(isinstance(one, yaml.MappingNode) for one in merged):
                problem = Problem((*path, "<<"), "…", "merges what is no mapping", "write <<: *ANCHOR of one")
                yield Found(key.start_mark.line + 1, problem)
            yield from _unusable(value, (*path, str(key.value)), above, seen)


def _duplicates(node: yaml.Node | None, path: tuple[str, ...], seen: set[int]) -> Iterator[Found]:
    """Keys that stand twice in one mapping: the parser would take the last one and say nothing."""
    if node is None or id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _duplicates(item, (*path, str(index)), seen)
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in lines and key.tag != _MERGE:
                shown = value.value if isinstance(value, yaml.ScalarNode) else "…"
                problem = Problem(
                    (*path, key.value),
                    shown,
                    f"this key is already on line {lines[key.value]}; one of them would silently be lost",
                    "keep one of them",
                )
                yield Found(line, problem)
            lines.setdefault(key.value, line)
            yield from _duplicates(value, (*path, str(key.value)), seen)


def _syntax(error: yaml.YAMLError, text: str) -> Found:
    """The line and the words of a parser's error."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    words = str(getattr(error, "problem", None) or getattr(error, "reason", None) or "cannot be read")
    lines = text.splitlines()
    number = min(mark.line, len(lines) - 1) if mark is not None and lines else 0
    line = lines[number].strip() if lines else ""
    problem = Problem(
        ("(YAML)",),
        line,
        f"is not valid YAML: {words}",
        "check indentation, colons, quotes and brackets on this line and the one before",
    )
    return Found(number + 1, problem)
