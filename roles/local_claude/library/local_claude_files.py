#!/usr/bin/python
"""Ansible module: our files, and marked blocks of ours in a person's files, which go without a trace.

A block stands first in its file, or first in an object or list of JSON with comments. So nothing of the
person's text moves or is written anew, what stands below wins in a shell, and a block can be cut out again.
"""

from __future__ import annotations

import difflib
import json
import os
import pwd
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule  # type: ignore[import-untyped]

DOCUMENTATION = r"""
---
module: local_claude_files
short_description: Keep files of our own, and marked blocks in a person's files
description:
  - Takes what the filter C(client_files) returns. All files belong to the user that runs the module.
  - A file of the person is changed only between our two marks, through its link if it is one, with its mode.
  - What is not wanted is taken out; a file or a folder that we had made is removed when it is empty.
options:
  files: {description: The files., type: list, elements: dict, required: true}
author: [llmbox]
"""

EXAMPLES = r"""
- name: Tell shells where the aliases are
  local_claude_files:
    files: [{paths: [/home/you/.zshrc], kind: block, text: ". ~/.config/llmbox/shell.sh", wanted: true}]
"""

RETURN = r"""
paths: {description: Files that changed., type: list, elements: str, returned: always}
"""

BEGIN, END = "BEGIN llmbox", "END llmbox"
OWN = "Managed by llmbox"  # in every file of our own: llama_common.clients
# In JSON not to the end of the line: there the person's text may go on.
SHELL, JSON = "#", "/*"
MAX_BYTES = 4 * 1024 * 1024
_MADE = re.compile(r"made with (?P<folders>\d+) folders")
_OURS = re.compile(r"; ours: (?P<names>.*?) \*/")


class Refused(Exception):
    """A file that cannot be changed safely; the text is one line for the person."""


@dataclass(frozen=True)
class Block:
    """Our part of a text: begin, end, and how many folders came with the file (None: it was there)."""

    start: int
    end: int
    folders: int | None


def find(text: str, comment: str, path: str) -> Block | None:
    """Our block, with the line break that belongs to it. Raises Refused for half a block."""
    sign = re.escape(comment)
    begins = [found.start() for found in re.finditer(rf"^[ \t]*{sign} {BEGIN}\b", text, re.MULTILINE)]
    ends = [found.end() for found in re.finditer(rf"^[ \t]*{sign} {END}(?: \*/)?", text, re.MULTILINE)]
    if not begins and not ends:
        return None
    if len(begins) != 1 or len(ends) != 1 or begins[0] > ends[0]:
        line = text.count("\n", 0, (begins + ends)[0]) + 1
        raise Refused(f"{path}:{line}: half a block of llmbox, or two of them; fix: remove its lines")
    made = _MADE.search(text, begins[0], text.index("\n", begins[0]))
    return Block(begins[0], ends[0], int(made["folders"]) if made else None)


def names_of(content: Any) -> list[str]:
    """How our members or items are called."""
    return list(content) if isinstance(content, dict) else [str(item["name"]) for item in content]


def without(
    text: str, comment: str, path: str, at: Sequence[str] = (), content: Any = ()
) -> tuple[str, int | None]:
    """The person's own text, and how many folders were made with the file (None: the file was theirs).

    Raises Refused.
    """
    block = find(text, comment, path)
    if block is None:
        return text, None
    if comment == SHELL:  # the block's last line break
        return text[: block.start] + text[block.end + 1 :], block.folders
    # The break before it; an editor may have made it one of its own.
    start = block.start - (2 if text[: block.start].endswith("\r\n") else 1)
    theirs = strays(text, block, path, at, content)
    behind_it = text[block.end :]
    if theirs and Document("[" + behind_it, path).filled(1):
        theirs += ","
    return text[:start] + theirs + behind_it, block.folders


def strays(text: str, block: Block, path: str, at: Sequence[str], content: Any) -> str:
    """What is in our block of JSON and not ours: an editor puts a new setting behind the last one there is.

    The block names what is ours, as by now the inventory may say something else. Raises Refused.
    """
    first = text.index("\n", block.start)
    last = text.rindex(f"{JSON} {END}", block.start, block.end)
    named = _OURS.search(text, block.start, first)
    ours = named["names"].split(" ") if named else names_of(content)
    body = text[first:last]
    brackets = "{}" if Document(body, path).starts('"') else "[]"
    # As many lines before it as in the file, so that a refusal names the right one.
    lines = "\n" * text.count("\n", 0, first)
    document = Document(f"{lines}{brackets[0]}{body}{brackets[1]}", path)
    return document.others(len(lines), set(ours), at)


def marks(comment: str, folders: int | None, ours: Sequence[str] = ()) -> tuple[str, str]:
    """The first and the last line of a block. In JSON the first names what is ours in it."""
    made = "" if folders is None else f", made with {folders} folders"
    close = f"; ours: {' '.join(ours)} */" if comment == JSON else ""
    return f"{comment} {BEGIN}: roles/local_claude{made}{close}", f"{comment} {END}{close and ' */'}"


def with_lines(text: str, lines: str, folders: int | None) -> str:
    """A text with a block of lines before everything else."""
    begin, end = marks(SHELL, folders)
    return f"{begin}\n{lines}\n{end}\n{text}"


def with_json(text: str, at: Sequence[str], content: Any, folders: int | None, path: str) -> str:
    """JSON with our members or items first in what lies at `at`, which is made where it is missing.

    Raises Refused.
    """
    document = Document(text, path)
    position, depth, rest = document.place(at, content)
    inner: Any = content
    for key in reversed(rest):
        inner = {key: inner}
    lines = json.dumps(inner, indent=2, ensure_ascii=False).splitlines()[1:-1]
    pad = "  " * depth
    begin, end = marks(JSON, folders, names_of(content))
    body = "\n".join(pad + line for line in lines) + ("," if document.filled(position) else "")
    return f"{text[:position]}\n  {pad}{begin}\n{body}\n  {pad}{end}{text[position:]}"


class Document:
    """A reader of JSON with comments and trailing commas that knows where things stand."""

    def __init__(self, text: str, path: str) -> None:
        self.text, self.path = text, path

    def place(self, at: Sequence[str], content: Any) -> tuple[int, int, Sequence[str]]:
        """Where to insert: behind which bracket, its depth, and which keys are missing. Raises Refused."""
        position = self._skip(1 if self.text.startswith("\ufeff") else 0)
        if self.text[position : position + 1] != "{":
            raise self._refused(position, "is no object of JSON")
        self._readable(position)
        depth = 0
        for number, key in enumerate(at):
            members = self._members(position)
            if key not in members:
                return position + 1, depth, at[number:]
            last = number == len(at) - 1
            bracket = "[" if last and isinstance(content, list) else "{"
            if self.text[members[key]] != bracket:
                kind = "list" if bracket == "[" else "object"
                raise self._refused(members[key], f"{key} is no {kind}")
            position, depth = members[key], depth + 1
        self._check_twice(position, content)
        return position + 1, depth, ()

    def filled(self, position: int) -> bool:
        """Whether anything but comments stands behind a bracket."""
        return self.text[self._skip(position)] not in "]}"

    def starts(self, sign: str) -> bool:
        """Whether the first thing that is neither blank nor comment begins so."""
        return self.text.startswith(sign, self._skip(0))

    def others(self, position: int, ours: set[str], at: Sequence[str]) -> str:
        """The members or items of a container that are not ours, as they stand there, with commas between.

        What lies in one of the keys `at` was made for ours, and may hold others by now. Raises Refused.
        """
        self._readable(position)
        found, seen, begin = [], set(), position + 1
        keyed = self.text[position] == "{"
        for key, start in self._container(position)[0]:
            end = self._value(start)
            name = key if keyed else self._name(start) if self.text[start] == "{" else ""
            if keyed and key in at and self.text[start] in "{[":
                if inner := self.others(start, ours, at):
                    found.append(f"{self.text[begin : start + 1]}{inner}{self._tail(end)}")
            elif name not in ours or name in seen:
                found.append(self.text[begin:end])
            seen.add(name)
            after = self._skip(end)
            begin = after + 1 if self.text[after : after + 1] == "," else after
        return ",".join(found)

    def _tail(self, end: int) -> str:
        """The closing bracket that ends here, with the blanks before it."""
        before = self.text[: end - 1]
        return before[len(before.rstrip()) :] + self.text[end - 1]

    def _readable(self, position: int) -> None:
        """Raises Refused for what cannot be read to its end."""
        try:
            self._value(position)
        except (RecursionError, ValueError):
            raise self._refused(position, "cannot be read as JSON") from None

    def _check_twice(self, position: int, content: Any) -> None:
        """Refuse what is there already: of two the person's would win, or both would be mixed."""
        if isinstance(content, dict):
            taken, wanted = self._members(position), set(content)
        else:
            items = [start for _, start in self._container(position)[0] if self.text[start] == "{"]
            taken, wanted = {self._name(start): start for start in items}, {item["name"] for item in content}
        for name in sorted(taken.keys() & wanted):
            raise self._refused(taken[name], f"{name} is set there already", "remove it")

    def _name(self, position: int) -> str:
        """The text of the member `name` of an object, "" without one."""
        at = self._members(position).get("name")
        return str(json.loads(self.text[at : self._value(at)])) if at and self.text[at] == '"' else ""

    def _refused(self, position: int, what: str, fix: str = "mend it") -> Refused:
        line = self.text.count("\n", 0, position) + 1
        return Refused(f"{self.path}:{line}: {what}; fix: {fix}, or switch this file off in the inventory")

    def _skip(self, position: int) -> int:
        """The next character that is neither blank nor comment."""
        found = re.compile(r"(?:\s+|//[^\n]*|/\*.*?\*/)*", re.DOTALL).match(self.text, position)
        return found.end() if found else position

    def _members(self, position: int) -> dict[str, int]:
        """Keys of the object whose bracket is here, each with where its value begins. Raises Refused."""
        return dict(self._container(position)[0])

    def _container(self, position: int) -> tuple[list[tuple[str, int]], int]:
        """What is in an object or list, with key ("" in a list) and begin; its end. Raises Refused."""
        closing = "}" if self.text[position] == "{" else "]"
        found: list[tuple[str, int]] = []
        at = self._skip(position + 1)
        while self.text[at : at + 1] != closing:
            key = ""
            if closing == "}":
                if self.text[at : at + 1] != '"':
                    raise self._refused(at, "cannot be read as JSON: a key is missing")
                end = self._value(at)
                key, at = json.loads(self.text[at:end]), self._skip(end)
                if self.text[at : at + 1] != ":":
                    raise self._refused(at, "cannot be read as JSON: ':' is missing")
                at = self._skip(at + 1)
            found.append((key, at))
            at = self._skip(self._value(at))
            if self.text[at : at + 1] == ",":
                at = self._skip(at + 1)
            elif self.text[at : at + 1] != closing:
                raise self._refused(at, f"cannot be read as JSON: ',' or '{closing}' is missing")
        return found, at + 1

    def _value(self, position: int) -> int:
        """Where the value ends that begins here. Raises Refused."""
        if self.text[position : position + 1] in ("{", "["):
            return self._container(position)[1]
        found = re.compile(r'"(?:[^"\\\n]|\\.)*"|[-+\w.]+').match(self.text, position)
        if found is None:
            raise self._refused(position, "cannot be read as JSON: a value is missing")
        return found.end()


@dataclass(frozen=True)
class Change:
    """A file before and after; None: it is not there."""

    path: Path
    before: str | None
    after: str | None
    folders: int = 0

    @property
    def shown(self) -> dict[str, str]:
        """For --diff: only lines around ours, for a person's files may hold secrets."""
        before, after = (self.before or "").splitlines(), (self.after or "").splitlines()
        found = list(difflib.unified_diff(before, after, n=0, lineterm=""))[2:]
        # A byte that is no UTF-8 cannot be sent to the controller.
        lines = [line.encode(errors="replace").decode() for line in found if not line.startswith("@@")]
        return {
            "header": str(self.path),
            "prepared": f"{self.path}\n" + "".join(f"{line}\n" for line in lines),
        }


def planned(entry: dict[str, Any]) -> Change:
    """What one entry of the list makes of its file. Raises Refused and OSError."""
    path, make = target(entry)
    file, before = behind(path), read(path)
    if entry["kind"] == "own":
        theirs = before is not None and OWN not in before
        if theirs and entry["wanted"]:
            raise Refused(f"{path} is there and not ours; fix: move it away, or remove it")
        kept = before if theirs else None
        return Change(path, before, entry["text"] if entry["wanted"] else kept, 1)
    comment = JSON if entry["kind"] == "json" else SHELL
    empty = "{\n}\n" if comment == JSON else ""
    ours = (entry["at"], entry["content"]) if comment == JSON else ()
    text, folders = (empty, missing(file)) if before is None else without(before, comment, str(path), *ours)
    if not entry["wanted"] or (before is None and not make):
        gone = before is None or (folders is not None and text == empty)
        return Change(path, before, None if gone else text, folders or 0)
    if comment == SHELL:
        return Change(path, before, with_lines(text, entry["text"], folders))
    # An empty file is no JSON; VS Code leaves one behind.
    if not text.strip():
        raise Refused(f"{path}:1: is empty, no JSON; fix: remove it, or write {{}}")
    return Change(path, before, with_json(text, entry["at"], entry["content"], folders, str(path)))


def target(entry: dict[str, Any]) -> tuple[Path, bool]:
    """The file of an entry, and whether to make it: the one with our marks, the first there is, the last."""
    paths = [Path(path) for path in entry.get("paths") or [entry["path"]]]
    there = [path for path in paths if path.exists()]
    marked = [path for path in there if BEGIN in (read(path) or "")]
    return (marked or there or paths[-1:])[0], bool(entry.get("make", True))


def read(path: Path) -> str | None:
    """A file's text as it is, None where there is none. Raises Refused and OSError."""
    if not path.exists():
        return None
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        raise Refused(f"{path} is no file of text; fix: move it away")
    return path.read_bytes().decode(errors="surrogateescape")  # any byte comes back as it was


def behind(path: Path) -> Path:
    """The file behind a link, whether it is there or not. Raises Refused."""
    found = Path(os.path.realpath(path))
    if found.is_symlink():
        raise Refused(f"{path} is a link that leads back to itself; fix: remove it")
    return found


def missing(path: Path) -> int:
    """How many folders above a file are not there."""
    return sum(1 for folder in path.parents if not folder.exists())


def apply(change: Change) -> None:
    """Do it through a link, with mode and owner of what was there: whole or not at all, but for a hard link.

    Raises Refused and OSError.
    """
    path = behind(change.path)
    if change.after is None:
        path.unlink()
        for folder in list(path.parents)[: change.folders]:
            if any(folder.iterdir()):
                break
            folder.rmdir()
        return
    content = change.after.encode(errors="surrogateescape")
    if path.exists() and path.stat().st_nlink > 1:  # a new file would leave the other names with the old text
        path.write_bytes(content)
        return
    for folder in reversed(path.parents):
        if not folder.exists():
            folder.mkdir(mode=0o700)
    mode = path.stat().st_mode & 0o7777 if path.exists() else 0o600
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(name).chmod(mode)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def main() -> None:
    """Module entry point."""
    module = AnsibleModule(
        argument_spec={"files": {"type": "list", "elements": "dict", "required": True}},
        supports_check_mode=True,
    )
    try:
        # All are looked at before one is touched.
        changes = [planned(entry) for entry in module.params["files"]]
        changes = [change for change in changes if change.before != change.after]
        if not module.check_mode:
            for change in changes:
                apply(change)
    except Refused as refused:
        module.fail_json(msg=f"{refused}; nothing was changed")
    except OSError as error:
        user = pwd.getpwuid(os.geteuid()).pw_name
        module.fail_json(msg=f"{error.filename}: {error.strerror}; fix: make it {user}'s")
    module.exit_json(
        changed=bool(changes),
        paths=[str(change.path) for change in changes],
        diff=[change.shown for change in changes],
    )


if __name__ == "__main__":
    main()
