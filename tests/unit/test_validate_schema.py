"""The JSON Schema for editors is current, describes everything, and knows good files from bad ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml
from llama_common import schema

from tests.support import ROOT
from tests.unit import broken_inventories as broken

STORED = ROOT / "docs/schema" / schema.FILE_NAME
CAUGHT = (
    "unknown-key",
    "text-for-number",
    "kv-unknown",
    "sha256-short",
    "preset-name-capital",
    "url-scheme",
    "two-sources",
)


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    """A validator with the stored schema, which must itself be sound."""
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(stored)
    return jsonschema.Draft202012Validator(stored)


def data_files() -> Iterator[Path]:
    """Every variable file of the repository's inventories that refers to the schema."""
    for path in sorted((ROOT / "inventory").rglob("*.yml")):
        if schema.FILE_NAME in path.read_text(encoding="utf-8").partition("\n")[0]:
            yield path


def test_the_stored_schema_is_current() -> None:
    """python -m llama_common.schema --write docs/schema was run after the last change of the model."""
    assert schema.main(["--check", str(STORED.parent)]) == 0


def test_a_stale_schema_is_named_with_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--check says what to run."""
    (tmp_path / schema.FILE_NAME).write_text("{}")
    assert schema.main(["--check", str(tmp_path)]) == 1
    assert f"--write {tmp_path}" in capsys.readouterr().err


def test_every_field_has_a_description() -> None:
    """What an editor shows beside a key."""
    stored = schema.schema()
    entries = {"HostConfig": stored, **stored["$defs"]}
    missing = [
        f"{name}.{key}"
        for name, entry in entries.items()
        for key, value in entry["properties"].items()
        if not value.get("description")
    ]
    assert missing == []


def test_the_sound_inventory_passes(validator: jsonschema.Draft202012Validator) -> None:
    """Templates and variables of other kinds are allowed."""
    for content in broken.SOUND.values():
        validator.validate(content)


@pytest.mark.parametrize("name", CAUGHT)
def test_an_editor_catches(name: str, validator: jsonschema.Draft202012Validator) -> None:
    """Some of the broken inventories are red before anything runs."""
    case = next(case for case in broken.CASES if case.name == name)
    files: dict[str, Any] = broken.inventory(case)
    assert not all(validator.is_valid(content) for content in files.values())


@pytest.mark.parametrize("path", list(data_files()), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_inventories_files_pass(path: Path, validator: jsonschema.Draft202012Validator) -> None:
    """The worked example and the lab are what the schema says, and their modelines lead to it."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    assert (path.parent / first.partition("$schema=")[2]).resolve() == STORED
    validator.validate(yaml.safe_load(path.read_text(encoding="utf-8")))
