"""`python -m ocr_pipeline.check`: whether files of settings can be used, before one of them is written.

Standard input is one JSON object: the content of service.json, keys.json, shares.json and pipeline.json, by
name. Templates and a detector's weights that they name are loaded, with the rights of who calls this. Prints
one line for each that cannot be used, without a word of what is secret. Exit codes: 0 all can be used, 1 one
cannot, 2 no such object.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ocr_pipeline import settings as pipeline
from ocr_pipeline.api.keys import KeysFile
from ocr_pipeline.api.settings import Settings, SharesFile
from ocr_pipeline.database import DatabaseError, address
from ocr_pipeline.errors import EXIT_DONE, EXIT_FAILED, EXIT_USAGE, SettingsError
from ocr_pipeline.jobs.dispatch import HueyDispatch

HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # noqa: S108 - a worker's unit shows it none of them


def _service(content: Any, _state_dir: Path) -> None:
    found = Settings.model_validate(content)
    for kind in ("database", "records"):
        address(found.url(kind))
    if found.queue and not found.queue.startswith("sqlite:"):  # that one would be made
        HueyDispatch(found.queue)


def _pipeline(content: Any, state_dir: Path) -> None:
    chosen = pipeline.Settings.model_validate(content)
    for name, path in (("detector.weights", chosen.detector.weights), ("templates", chosen.templates)):
        if path and not Path(path).is_absolute():
            raise SettingsError(f"{name} = {path!r}: must be an absolute path")
        if hidden := [folder for folder in HIDDEN if path and Path(path).is_relative_to(folder)]:
            raise SettingsError(f"{name} = {path!r}: a worker sees nothing of {hidden[0]}; put it elsewhere")
    # The folder itself is made when the unit starts.
    if chosen.gpu_lock and Path(chosen.gpu_lock).parent != state_dir:
        raise SettingsError(
            f"gpu_lock = {chosen.gpu_lock!r}: must be a file in {state_dir}, which workers share"
        )
    from ocr_pipeline import build

    build.pipeline(chosen)  # as a worker does


def _by(model: type[BaseModel]) -> Callable[[Any, Path], Any]:
    return lambda content, _state_dir: model.model_validate(content)


CHECKS: Mapping[str, Callable[[Any, Path], Any]] = {
    "service.json": _service,
    "keys.json": _by(KeysFile),
    "shares.json": _by(SharesFile),
    "pipeline.json": _pipeline,
}


def problems(files: Mapping[str, Any]) -> list[str]:
    """One line for each file that cannot be used."""
    found = []
    service = files.get("service.json")
    named = service.get("state_dir") if isinstance(service, Mapping) else None
    state_dir = Path(named if isinstance(named, str) else Settings().state_dir)
    for name, check in CHECKS.items():
        try:
            if name in files:
                check(files[name], state_dir)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "the whole"
            found.append(f"{name}: {where}: {first['msg'].removeprefix('Value error, ')}")
        except (DatabaseError, SettingsError, ValueError) as error:
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
