"""Role llm_gateway and the gateway mean the same settings and keys."""

from __future__ import annotations

from typing import Any

import yaml
from llama_common.presets import GatewayKey
from llmbox.gateway.keyfile import Key
from llmbox.gateway.settings import Settings

from scripts._llm_box import GATEWAY_UNITS
from tests.support import ROOT

ROLE = ROOT / "roles/llm_gateway"


def read(path: str) -> Any:
    return yaml.safe_load((ROLE / path).read_text(encoding="utf-8"))


def test_the_defaults_are_settings_that_the_gateway_takes() -> None:
    """Every setting is rendered from the variable of its name, and nothing else is."""
    defaults = read("defaults/main.yml")
    rendered = {}
    for key, template in read("vars/main.yml")["_llm_gateway_settings"].items():
        name = template.strip("{} ")
        if name in defaults:
            assert name == f"llm_gateway_{key}"
        rendered[key] = defaults.get(name, template)
    assert rendered.keys() == Settings.model_fields.keys()
    Settings.model_validate(rendered)


def test_the_specification_repeats_the_defaults() -> None:
    options = read("meta/argument_specs.yml")["argument_specs"]["main"]["options"]
    assert {name: option["default"] for name, option in options.items()} == read("defaults/main.yml")


def test_a_key_of_the_inventory_is_one_of_the_gateway_s() -> None:
    assert GatewayKey.model_fields.keys() == Key.model_fields.keys()
    key = {
        "name": "a.b_c@d-1",
        "sha256": "0" * 64,
        "presets": ["coder"],
        "measures": True,
        "tokens_per_day": 10**12,
    }
    Key.model_validate(GatewayKey.model_validate(key).model_dump())


def test_the_units_are_those_that_the_scripts_look_at() -> None:
    assert {f"{unit}.j2" for unit in GATEWAY_UNITS} == {
        file.name for file in (ROLE / "templates").glob("llm-gateway.*")
    }
