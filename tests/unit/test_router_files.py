"""LiteLLM's list of models and the router's settings, from the presets of all boxes."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from llama_common.roles import RoleVariables
from llama_common.router import RouterProblem, base_url, router_files, router_problems
from llm_router.ledger import Settings

from tests.support import ROOT

PRESET: dict[str, Any] = {
    "description": "d",
    "build": "b",
    "model": "m",
    "context": 4096,
    "kv_cache_type": "f16",
}
BOXES: list[dict[str, Any]] = [
    {
        "name": "one",
        "address": "10.0.0.1",
        "listen": None,
        "presets": {
            "coder": {**PRESET, "context": 65536, "parallel": 2},
            "vision": {**PRESET, "scope": "system"},
        },
    },
    {
        "name": "two",
        "address": "10.0.0.2",
        "listen": ["127.0.0.1:1", "10.9.9.9:1299"],
        "presets": {"coder": {**PRESET, "context": 98304}, "g": PRESET},
    },
]
ROLE = ROOT / "roles/litellm_router"


def options(**more: Any) -> dict[str, Any]:
    defaults = yaml.safe_load((ROLE / "defaults/main.yml").read_text())
    named = {name.removeprefix("litellm_router_"): value for name, value in defaults.items()}
    return {**named, "stop_seconds": named["stop_timeout"], "state_dir": "/var/lib/llm-router", **more}


def test_the_role_hands_on_each_of_its_settings_under_its_own_name() -> None:
    """What the box serves without: paths of the role's own."""
    text = (ROLE / "vars/main.yml").read_text()
    passed = dict(re.findall(r"(\w+)=litellm_router_(\w+)", text))
    handed = {name for name in options() if name not in ("state_dir", "stop_seconds", "path", "store")}
    assert passed == {("stop_seconds" if name == "stop_timeout" else name): name for name in handed}


def test_every_user_preset_of_every_box_is_there_in_both_protocols() -> None:
    made = router_files(BOXES, options(box_keys={"two": "g2"}))
    found = [
        (one["model_name"], one["litellm_params"]["model"], one["litellm_params"]["api_base"])
        for one in made["config.yaml"]["model_list"]
    ]
    assert found == [
        ("coder", "openai/coder", "http://10.0.0.1:1234/v1"),
        ("coder@messages", "anthropic/coder", "http://10.0.0.1:1234"),
        ("coder", "openai/coder", "http://10.9.9.9:1299/v1"),
        ("coder@messages", "anthropic/coder", "http://10.9.9.9:1299"),
        ("g", "openai/g", "http://10.9.9.9:1299/v1"),
        ("g@messages", "anthropic/g", "http://10.9.9.9:1299"),
    ]
    keys = {one["litellm_params"]["api_key"] for one in made["config.yaml"]["model_list"]}
    assert keys == {"none", "g2"}
    settings = Settings.model_validate(made["router.json"])
    assert settings.cloud == ""
    # The smaller box's: a request may come to either.
    assert [(one.name, one.context) for one in settings.models] == [("coder", 32768), ("g", 4096)]
    assert [(box.name, box.key) for box in settings.boxes] == [("one", ""), ("two", "g2")]


def test_a_preset_that_is_none_is_one_line() -> None:
    boxes = [{**BOXES[0], "presets": {"coder": {**PRESET, "context": "a lot"}}}]
    with pytest.raises(RouterProblem, match=r"one: llama_presets\.coder\.context = .*valid integer"):
        router_files(boxes, options())


def test_no_cloud_unless_it_is_named_with_its_key() -> None:
    with pytest.raises(RouterProblem, match="has no key; fix: set litellm_router_cloud_key"):
        router_files(BOXES, options(cloud_model="anthropic/x"))
    made = router_files(BOXES, options(cloud_model="anthropic/x", cloud_key="s3cret"))
    cloud = [one for one in made["config.yaml"]["model_list"] if one["model_info"].get("cloud")]
    assert [one["model_name"] for one in cloud] == ["cloud", "cloud@messages"]
    assert made["router.json"]["cloud"] == "cloud" and "s3cret" not in str(made["router.json"])
    assert "fallbacks" not in str(made["config.yaml"]), "each request gets its own, when its key may"


@pytest.mark.parametrize(
    ("boxes", "more", "where", "key", "fix"),
    [
        (BOXES, {"box_keys": {"three": "k"}}, "", "litellm_router_box_keys.three", "name one of one, two"),
        (BOXES, {"cloud_model": "a/b"}, "", "litellm_router_cloud_model", "Vault"),
        (
            [{**BOXES[0], "listen": ["127.0.0.1:1234", "[::1]:1234"]}],
            {},
            *("one", "llm_gateway_listen", "add an address of one"),
        ),
        (
            [{**BOXES[0], "presets": {"cloud": {}}}],
            {"cloud_model": "a/b", "cloud_key": "k"},
            *("one", "llama_presets.cloud", "another name"),
        ),
    ],
)
def test_what_cannot_be_routed_is_one_line_with_its_fix(
    boxes: list[dict[str, Any]], more: dict[str, Any], where: str, key: str, fix: str
) -> None:
    [(box, problem)] = router_problems(boxes, options(**more))
    assert (box, problem.key) == (where, key) and fix in problem.fix
    with pytest.raises(RouterProblem, match=key):
        router_files(boxes, options(**more))


def test_a_system_preset_may_be_called_what_it_likes() -> None:
    boxes = [{**BOXES[0], "presets": {"cloud": {"scope": "system"}}}]
    assert not list(router_problems(boxes, options(cloud_model="a/b", cloud_key="k")))


def test_where_a_gateway_is_reached() -> None:
    assert base_url("fd00::1", ["[::]:1234"]) == "http://[fd00::1]:1234"
    assert base_url("10.0.0.1", ["127.0.0.1:1234"]) == ""


def problems(**values: Any) -> list[str]:
    spec = yaml.safe_load((ROLE / "meta/argument_specs.yml").read_text())
    found = RoleVariables.of({"litellm_router": spec}).check(values)
    return [problem.line("file") for problem in found]


def test_the_inventorys_values_are_checked() -> None:
    key = {"name": "me", "sha256": "a" * 64}
    assert problems(litellm_router_keys=[key, {"name": "b", "sha256": "b" * 64, "cloud": True}]) == []
    for name, value, word in (
        ("litellm_router_keys", [{**key, "sha256": "my-own-key"}], "sha256"),
        ("litellm_router_keys", [{**key, "cloud": "yes"}], "cloud"),
        ("litellm_router_keys", [{**key, "tokens_per_day": 0}], "tokens_per_day"),
        ("litellm_router_keys", [key, key], "twice"),
        ("litellm_router_keys", [{**key, "budget": 5}], "budget"),
        ("litellm_router_listen", "everywhere", "litellm_router_listen"),
        ("litellm_router_listen", "0.0.0.0:99999", "litellm_router_listen"),
        ("litellm_router_hold_size", 1, "litellm_router_hold_size"),
        ("litellm_router_retries", 99, "litellm_router_retries"),
        ("litellm_router_cloud_model", 7, "litellm_router_cloud_model"),
    ):
        (line,) = problems(**{name: value})
        assert word in line and "fix: " in line and "my-own-key" not in line, line
    (line,) = problems(litellm_router_cloud_key=["s3cret"])
    assert "s3cret" not in line
