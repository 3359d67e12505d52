"""JSON files that the playbook renders for the box: read, held to their model, refused in one line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from llmbox.errors import LlmboxError, UsageError

Model = TypeVar("Model", bound=BaseModel)


def problem(error: ValidationError, *prefix: str) -> str:
    """The first thing that is wrong: the key, with `prefix` before it, its value and what it should be."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in (*prefix, *first["loc"])) or "the whole"
    value = "" if isinstance(first["input"], dict | BaseModel) else f" = {first['input']!r:.60}"
    return f"{where}{value}: {own_words(first['msg'])}"


def own_words(message: str) -> str:
    """What a validator of ours said, without pydantic's introduction."""
    return message.removeprefix("Value error, ")


def read(
    path: Path, model: type[Model], remedy: str, tell: Callable[[ValidationError], str] = problem
) -> Model:
    """The file's content. Raises UsageError in one line: what is wrong, in `tell`'s words, and the remedy."""
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); {remedy}") from None
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} is not JSON (line {error.lineno}: {error.msg}); {remedy}") from None
    except (ValueError, RecursionError):
        raise UsageError(f"{path} is not usable JSON; {remedy}") from None
    try:
        return model.model_validate(found)
    except ValidationError as error:
        raise UsageError(f"{path}: {tell(error)}; {remedy}") from None


def main(check: Callable[[Path], object]) -> int:
    """`check` the file named on the command line: exit 0, or 2 and one line that says what is wrong."""
    try:
        check(Path(sys.argv[1]))
    except LlmboxError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0
