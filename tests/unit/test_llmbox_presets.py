"""presets.json: what is refused, in one line with the remedy, and how words are found in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from llmbox.errors import UsageError
from llmbox.presets import VERBS, check_thoroughly, load

PRESET: dict[str, Any] = {
    "description": "A coder",
    "aliases": ["c"],
    "build": "upstream",
    "model": "tiny",
    "context": 4096,
    "kv_cache_type": "q8_0",
    "agent": False,
    "listen": "127.0.0.1:1234",
    "unit": "llama-coder.service",
    "command": ["/opt/llama.cpp/upstream/current/bin/llama-server"],
}


def write(tmp_path: Path, **preset: Any) -> Path:
    """A presets.json with one preset, changed as told (None removes a key)."""
    fields = {key: value for key, value in {**PRESET, **preset}.items() if value is not None}
    path = tmp_path / "presets.json"
    path.write_text(json.dumps({"version": 1, "user": "llm", "presets": {"coder": fields}}))
    return path


def test_a_preset_is_found_by_name_and_by_alias(tmp_path: Path) -> None:
    presets = load(write(tmp_path))
    assert presets.find("coder") is presets.find("c")
    assert presets.exclusive == [presets.find("c")]


def test_an_unknown_word_lists_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown preset or verb 'coda'; presets: coder \(c\); verbs: off"):
        load(write(tmp_path)).find("coda")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"unit": "../x.service"}, "presets.coder.unit"),
        ({"context": 0}, "presets.coder.context"),
        ({"listen": "nowhere"}, "presets.coder.listen"),
        ({"command": []}, "presets.coder.command"),
        ({"command": None}, "presets.coder.command"),
        ({"scope": "world"}, "presets.coder.scope"),
        ({"aliases": ["coder"]}, "names two presets"),
        ({"aliases": ["off"]}, "is a verb of lmswitch"),
    ],
)
def test_bad_data_is_refused_in_one_line(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as error:
        load(write(tmp_path, **change))
    assert said in str(error.value) and "\n" not in str(error.value)
    assert "run the playbook llm_server.yml" in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"version": 2, "user": "llm", "presets": {}}', '{"presets": 1}']
)
def test_what_is_no_presets_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "presets.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"run the playbook llm_server\.yml"):
        load(path)


def test_a_missing_file_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot be read .*run the playbook"):
        load(tmp_path / "presets.json")


def test_the_thorough_check_holds_presets_to_the_inventory_s_model(tmp_path: Path) -> None:
    check_thoroughly(write(tmp_path))
    with pytest.raises(UsageError, match=r"presets\.coder\.kv_cache_type = 'q5_9'"):
        check_thoroughly(write(tmp_path, kv_cache_type="q5_9"))


def test_no_preset_can_be_named_like_a_verb() -> None:
    from llama_common.fields import LMSWITCH_VERBS

    assert set(VERBS) <= set(LMSWITCH_VERBS)
