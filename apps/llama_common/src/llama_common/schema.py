"""JSON Schema of the inventory's data files, so that editors complete and check them.

    python -m llama_common.schema --write docs/schema     write it
    python -m llama_common.schema --check docs/schema     exit 1 when the file there is not current

A file refers to it in its first line: `# yaml-language-server: $schema=…/llama_hosts.schema.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_common.presets import HostConfig

FILE_NAME = "llama_hosts.schema.json"

_TEMPLATE = {"type": "string", "pattern": r"\{\{.*\}\}", "description": "An Ansible template."}
_KEPT = frozenset({"description", "default", "title"})


def schema() -> dict[str, Any]:
    """The schema of a file that may hold any of the variables, and others beside them.

    Every value may be a template: what it becomes is checked by playbooks/validate.yml.
    """
    made = _named(HostConfig.model_json_schema())
    made.pop("required", None)
    made["additionalProperties"] = True
    definitions = {name: _with_templates(entry) for name, entry in made.pop("$defs").items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Builds, models and presets",
        "description": "Variables of the group llama_hosts; playbooks/validate.yml checks more.",
        **{key: value for key, value in _with_templates(made).items() if key != "description"},
        "$defs": definitions,
    }


def _named(value: Any) -> Any:
    """Mappings with checked names: a name that does not match is an error, which patternProperties is not."""
    if isinstance(value, list):
        return [_named(item) for item in value]
    if not isinstance(value, dict):
        return value
    made = {key: _named(inner) for key, inner in value.items()}
    if "patternProperties" in made:
        ((pattern, entry),) = made.pop("patternProperties").items()
        names = {**made.pop("propertyNames", {}), "pattern": pattern}
        made = {**made, "propertyNames": names, "additionalProperties": entry}
    return made


def text() -> str:
    """The schema as it is stored."""
    return json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"


def _with_templates(entry: dict[str, Any]) -> dict[str, Any]:
    """An object whose properties may also be templates; titles, which repeat the names, are left out."""
    properties = {name: _or_template(value) for name, value in entry.get("properties", {}).items()}
    return {
        **{key: value for key, value in entry.items() if key != "title"},
        **({"properties": properties} if properties else {}),
    }


def _or_template(value: dict[str, Any]) -> dict[str, Any]:
    """A property that is as it was, or a template; what describes it stays outside."""
    outside = {key: inner for key, inner in value.items() if key in _KEPT and key != "title"}
    inside = {key: inner for key, inner in value.items() if key not in _KEPT}
    return {"anyOf": [*(inside["anyOf"] if set(inside) == {"anyOf"} else [inside]), _TEMPLATE], **outside}


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit codes: 0 written or current, 1 not current, 2 bad usage or an unwritable folder."""
    parser = argparse.ArgumentParser(
        prog="python -m llama_common.schema", description=__doc__.splitlines()[0]
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", type=Path, metavar="DIR", help="write the schema into this folder")
    action.add_argument(
        "--check", type=Path, metavar="DIR", help="exit 1 when the schema there is not current"
    )
    arguments = parser.parse_args(argv)
    path = (arguments.write or arguments.check) / FILE_NAME
    try:
        if arguments.write:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text(), encoding="utf-8")
            print(path)
            return 0
        if path.is_file() and path.read_text(encoding="utf-8") == text():
            return 0
    except OSError as error:
        print(f"{path}: {error.strerror}; fix: choose a folder that can be written", file=sys.stderr)
        return 2
    command = f"python -m llama_common.schema --write {arguments.check}"
    print(f"{path}: not what llama_common says; fix: {command}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
