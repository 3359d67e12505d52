"""Every broken inventory is refused by the data model, in one line that names key, value and fix."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import yaml
from llama_common.cuda import cuda_problems
from llama_common.presets import HostConfig
from llama_common.problems import InventoryError, Problem
from llama_common.roles import LIMITS, RoleVariables
from llama_common.source import Document

from tests.support import ROOT
from tests.unit import broken_inventories as broken


@cache
def role_variables() -> RoleVariables:
    """What the roles of this repository know."""
    files = ROOT.glob("roles/*/meta/argument_specs.yml")
    return RoleVariables.of({file.parts[-3]: yaml.safe_load(file.read_text()) for file in files})


def resolved(value: Any) -> Any:
    """A value with the templates of the sound inventory resolved."""
    if isinstance(value, dict):
        return {key: resolved(child) for key, child in value.items()}
    if isinstance(value, list):
        return [resolved(child) for child in value]
    return value.replace("{{ source_server }}", "https://models.example") if isinstance(value, str) else value


def merged(files: broken.Files, host: str) -> dict[str, Any]:
    """The variables of one host, as Ansible would merge them."""
    found: dict[str, Any] = {}
    for name in broken.HOST_FILES[host]:
        found.update(files[name])
    return {name: resolved(value) for name, value in found.items()}


def variables(files: broken.Files, host: str) -> dict[str, Any]:
    """The data of one host that HostConfig describes."""
    return {name: value for name, value in merged(files, host).items() if name in HostConfig.model_fields}


def problems(files: broken.Files) -> Iterator[Problem]:
    """What is wrong with an inventory, in the order in which validate.yml reports it."""
    texts = [content for content in files.values() if isinstance(content, str)]
    for text in texts:
        yield from (found.problem for found in Document.read(text).problems)
    if texts:
        return
    roles = role_variables()
    for host in broken.HOST_FILES:
        values = merged(files, host)
        yield from (found for name in values if (found := roles.unknown(name, values[name])))
        yield from roles.check({name: values[name] for name in roles.of_host(values)})
        try:
            yield from cuda_problems(HostConfig.load(variables(files, host)), values)
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


def test_the_roles_defaults_keep_to_their_own_limits() -> None:
    """Every default that is no template, and no limit is about a variable that has gone."""
    defaults: dict[str, Any] = {}
    for file in ROOT.glob("roles/*/defaults/main.yml"):
        defaults |= yaml.safe_load(file.read_text())
    roles = role_variables()
    plain = {name: defaults[name] for name in roles.of_host(defaults) if "{{" not in str(defaults[name])}
    assert len(plain) > 20
    assert roles.check(plain) == []
    assert set(LIMITS) <= set(defaults)
    assert all(name in roles.known for name in defaults)


def test_a_variable_that_is_not_to_be_logged_is_not_shown() -> None:
    """`no_log: true` in the specification hides the value, and a name that ends like a secret's does."""
    options = {"box_proxy": {"type": "dict", "no_log": True}, "box_size": {"type": "int"}}
    roles = RoleVariables.of({"box": {"argument_specs": {"main": {"options": options}}}})
    (hidden,) = roles.check({"box_proxy": "s3cret"})
    (seen,) = roles.check({"box_size": "big"})
    unknown = roles.unknown("box_tokn_password", "s3cret")
    assert unknown is not None
    assert "s3cret" not in hidden.line("F") + unknown.line("F")
    assert '= "big": ' in seen.line("F")
