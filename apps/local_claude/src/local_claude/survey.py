"""What a machine has for a llama-server: the program, its flags, and GGUF files with what their headers say.

It runs where the models are: here, or on the other side of SSH, where its source is sent together with that
of the two modules that it imports. Standard library only.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama_common import gguf

from local_claude import keeper

SERVERS = (
    "/opt/llama.cpp/*/current/bin/llama-server",
    "~/llama.cpp/build/bin/llama-server",
    "~/git/llama.cpp/build/bin/llama-server",
    "/opt/homebrew/bin/llama-server",
    "/usr/local/bin/llama-server",
)
FOLDERS = ("~/models/gguf", "~/Models/gguf", "~/models", "~/.lmstudio/models")
MAX_FILES = 200
MAX_DEPTH = 4
HELP_TIMEOUT_S = 20
NO_LLM = ("clip", "mmproj", "bert", "nomic-bert")
SHORT = (str, int, float, bool)
PART = re.compile(r"-([0-9]{5})-of-([0-9]{5})\.gguf$")


def survey(server: str, folder: str) -> dict[str, Any]:
    """Everything; `server` and `folder` are where to look instead of the usual places, "" for those."""
    program = find_server(server)
    files = []
    for path in list(find_files(folder))[:MAX_FILES]:
        found = describe(path)
        if found:
            files.append(found)
    return {"program": program, "help": help_of(program), "files": files}


def find_server(named: str) -> str:
    """The llama-server to use, "" when there is none."""
    if named:
        program = expanded(named)
        return str(program) if os.access(program, os.X_OK) else ""
    on_path = shutil.which("llama-server")
    if on_path:
        return on_path
    for pattern in SERVERS:
        place = expanded(pattern)
        for program in sorted(Path(place.anchor).glob(str(place.relative_to(place.anchor)))):
            if os.access(program, os.X_OK):
                return str(program)
    return ""


def expanded(text: str) -> Path:
    """A path, `~` read as a shell does: that of nobody stays as it is."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def help_of(program: str) -> str:
    """What the program says of its flags, "" when it does not run."""
    if not program:
        return ""
    me = os.getpid()
    try:
        done = subprocess.run(
            [program, "--help"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=HELP_TIMEOUT_S,
            check=False,
            preexec_fn=lambda: keeper.die_with(me),
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def find_files(folder: str) -> Iterator[Path]:
    """GGUF files below the folder, or the first usual one that has any; of a split model the first part."""
    for place in (folder,) if folder else FOLDERS:
        top = expanded(place)
        found = sorted(_below(top))
        if found or folder:
            yield from found
            return


def _below(top: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(top):
        if len(Path(place).relative_to(top).parts) >= MAX_DEPTH:
            folders.clear()
        for name in names:
            part = PART.search(name)
            first = part is None or int(part[1]) == 1
            if name.endswith(".gguf") and first and "mmproj" not in name.lower():
                yield Path(place) / name


def size_of(path: Path) -> int:
    """What the model takes on disk: of a split one all parts, since the first may be its header alone."""
    part = PART.search(path.name)
    if part is None:
        return path.stat().st_size
    parts = range(1, int(part[2]) + 1)
    paths = [path.with_name(f"{path.name[: part.start()]}-{one:05}-of-{part[2]}.gguf") for one in parts]
    return sum(one.stat().st_size for one in paths if one.is_file())


def describe(path: Path) -> dict[str, Any] | None:
    """Path, size and the short values of its header; None for what is no language model."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size

            def fetch(start: int, end: int) -> bytes:
                file.seek(start)
                return file.read(end - start)

            header = gguf.read(fetch, size)
        whole = size_of(path)
    except (OSError, gguf.HeaderError):
        return None
    if not header.architecture or header.architecture in NO_LLM:
        return None
    texts = {key: value for key, value in header.metadata.items() if isinstance(value, SHORT)}
    texts.pop("tokenizer.chat_template", None)
    lengths = {
        key: [value.items, getattr(value, "digest", "")]
        for key, value in header.metadata.items()
        if isinstance(value, gguf.Length)
    }
    return {"path": str(path), "size": whole, "values": texts, "lengths": lengths}
