"""`python -m ocr_pipeline.check`: whether files of settings can be used, before one of them is written.

Standard input is one JSON object: the content of service.json, keys.json, shares.json and pipeline.json, by
name. Prints one line for each that cannot be used, without a word of what is secret. Exit codes: 0 all can be
used, 1 one cannot, 2 no such object.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from ocr_pipeline import settings as pipeline
from ocr_pipeline.api.keys import KeysFile
from ocr_pipeline.api.settings import Settings, SharesFile
from ocr_pipeline.database import DatabaseError, address
from ocr_pipeline.errors import EXIT_DONE, EXIT_FAILED, EXIT_USAGE
from ocr_pipeline.jobs.dispatch import HueyDispatch


def _service(content: Any) -> None:
    found = Settings.model_validate(content)
    for kind in ("database", "records"):
        address(found.url(kind))
    if found.queue and not found.queue.startswith("sqlite:"):  # that one would be made
        HueyDispatch(found.queue)


def _by(model: type[BaseModel]) -> Callable[[Any], Any]:
    return model.model_validate


CHECKS: Mapping[str, Callable[[Any], Any]] = {
    "service.json": _service,
    "keys.json": _by(KeysFile),
    "shares.json": _by(SharesFile),
    "pipeline.json": _by(pipeline.Settings),
}


def problems(files: Mapping[str, Any]) -> list[str]:
    """One line for each file that cannot be used."""
    found = []
    for name, check in CHECKS.items():
        try:
            if name in files:
                check(files[name])
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "the whole"
            found.append(f"{name}: {where}: {first['msg'].removeprefix('Value error, ')}")
        except (DatabaseError, ValueError) as error:
            found.append(f"{name}: {error}")
    return found


def main() -> int:
    """Entry point."""
    try:
        files = json.load(sys.stdin)
        unknown = sorted(set(files) - set(CHECKS))
    except (ValueError, TypeError):
        files, unknown = {}, ["no JSON object"]
    if unknown or not isinstance(files, dict):
        print(f"ocr_pipeline.check: standard input: {unknown[:1]} is no file of settings", file=sys.stderr)
        return EXIT_USAGE
    found = problems(files)
    for line in found:
        print(line)
    return EXIT_FAILED if found else EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
