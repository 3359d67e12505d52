"""Role ocr_service, the validation of its data and the service mean the same settings, keys and shares."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from llama_common.roles import OcrKey, OcrShare, RoleVariables
from ocr_pipeline.api.keys import Key, new
from ocr_pipeline.api.settings import Settings, ShareEntry

from tests.support import ROOT

ROLE = ROOT / "roles/ocr_service"


def read(path: str) -> Any:
    return yaml.safe_load((ROLE / path).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def variables() -> RoleVariables:
    return RoleVariables.of({"ocr_service": read("meta/argument_specs.yml")})


def test_the_defaults_are_settings_that_the_service_takes() -> None:
    defaults = read("defaults/main.yml")
    rendered = {
        key: defaults.get(template.strip("{} "), "/etc/ocr/x.json")
        for key, template in read("vars/main.yml")["_ocr_service_settings"].items()
    }
    settings = Settings.model_validate(rendered)
    untouched = Settings()
    names = ("queue_limit", "job_limit", "attempts", "image_timeout", "answer_timeout")
    for name in (*names, "retention", "records_retention"):
        assert getattr(settings, name) == getattr(untouched, name)


def test_the_specification_repeats_the_defaults() -> None:
    options = read("meta/argument_specs.yml")["argument_specs"]["main"]["options"]
    assert {name: option["default"] for name, option in options.items()} == read("defaults/main.yml")


def test_keys_and_shares_of_the_inventory_are_the_services() -> None:
    assert OcrKey.model_fields.keys() == Key.model_fields.keys()
    entry = new("laptop")[1]
    Key.model_validate(OcrKey.model_validate(entry).model_dump())
    share = {"server": "nas.lan", "share": "photos", "username": "ocr", "password": "x"}
    ShareEntry.model_validate(OcrShare.model_validate(share).model_dump())


def test_the_defaults_pass_the_validation(variables: RoleVariables) -> None:
    assert variables.check(read("defaults/main.yml")) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ocr_service_user", "root"),
        ("ocr_service_port", 80),
        ("ocr_service_host", "ocr-box"),
        ("ocr_service_state_dir", "/etc"),
        ("ocr_service_workers", 0),
        ("ocr_service_attempts", 21),
        ("ocr_service_keys", [{"name": "x", "sha256": "the key itself"}]),
        ("ocr_service_keys", [{"name": "x"}]),
        ("ocr_service_shares", {"field": {"server": "a b", "share": "s", "username": "u", "password": "p"}}),
        ("ocr_service_shares", {"field": {"server": "a", "share": "s", "username": "u"}}),
        ("ocr_service_competing_units", ["lmstudio; reboot"]),
        ("ocr_service_worker_memory_max", "lots"),
    ],
)
def test_bad_data_is_refused_before_the_box_is_contacted(
    variables: RoleVariables, name: str, value: Any
) -> None:
    found = variables.check({name: value})
    assert [problem.path[0] for problem in found] == [name]
    assert all(problem.fix for problem in found)


def test_no_refusal_shows_a_password(variables: RoleVariables) -> None:
    share = {"server": "a b", "share": "s", "username": "u", "password": "hunter22"}
    found = variables.check({"ocr_service_shares": {"field": share}})
    assert found
    assert "hunter22" not in "".join(problem.line("x") for problem in found)


@pytest.mark.parametrize("unit", ["ocr-api.service", "ocr-worker@.service"])
def test_units_are_hardened(unit: str) -> None:
    text = (ROLE / f"templates/{unit}.j2").read_text()
    assert "{% include 'hardening.j2' %}" in text
    assert "User={{ ocr_service_user }}" in text
    assert "Restart=always" in text
    assert "MemoryMax=" in text
