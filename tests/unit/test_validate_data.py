"""Every broken inventory is refused by the data model, in one line that names key, value and fix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from llama_common.presets import HostConfig
from llama_common.problems import InventoryError, Problem
from llama_common.source import Document
from llama_common.translate import misspelt

from tests.unit import broken_inventories as broken


def resolved(value: Any) -> Any:
    """A value with the templates of the sound inventory resolved."""
    if isinstance(value, dict):
        return {key: resolved(child) for key, child in value.items()}
    if isinstance(value, list):
        return [resolved(child) for child in value]
    return value.replace("{{ source_server }}", "https://models.example") if isinstance(value, str) else value


def variables(files: broken.Files, host: str) -> dict[str, Any]:
    """The data of one host, as Ansible would merge it."""
    merged: dict[str, Any] = {}
    for name in broken.HOST_FILES[host]:
        merged.update(files[name])
    return {name: resolved(value) for name, value in merged.items() if name in HostConfig.model_fields}


def problems(files: broken.Files) -> Iterator[Problem]:
    """What is wrong with an inventory, in the order in which validate.yml reports it."""
    texts = [content for content in files.values() if isinstance(content, str)]
    for text in texts:
        yield from (found.problem for found in Document.read(text).problems)
    if texts:
        return
    for key in (key for content in files.values() for key in content):
        meant = misspelt(key, list(HostConfig.model_fields))
        if meant:
            yield Problem((key,), "…", "is no variable of any role here", f"did you mean '{meant}'?")
    for host in broken.HOST_FILES:
        try:
            HostConfig.load(variables(files, host))
        except InventoryError as error:
            yield from error.problems


def test_there_are_enough_cases_with_names_of_their_own() -> None:
    """The bar of the data: at least 45 different ones, and as many for the gate."""
    assert len({case.name for case in broken.CASES}) == len(broken.CASES) >= 45
    assert sum(case.gate for case in broken.CASES) >= 45


def test_the_sound_inventory_is_sound() -> None:
    """What the cases break is right before."""
    assert list(problems(broken.inventory())) == []


@pytest.mark.parametrize(
    "case", [case for case in broken.CASES if not case.playbook_only], ids=lambda case: case.name
)
def test_refused_in_one_line(case: broken.Case) -> None:
    """The first problem is the one that was put in, and its line says all there is to say."""
    found = list(problems(broken.inventory(case)))
    assert found, "accepted"
    line = found[0].line("FILE")
    assert found[0].key == case.key, line
    assert case.says in found[0].message, line
    assert case.fix in found[0].fix, line
    assert line.startswith(f"refused: FILE: {case.key} = ")
    assert line.isprintable()
    if case.shown is not None:
        assert f" = {case.shown}: " in line
    assert "s3cret" not in line
    assert "hunter2" not in line
