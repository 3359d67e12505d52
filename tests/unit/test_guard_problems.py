"""Presets that the GPU guard could not stop, and which hosts have a guard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from llama_common.guard import guard_problems
from llama_common.presets import HostConfig

from tests.support import ansible_playbook
from tests.unit import broken_inventories as broken
from tests.unit.test_validate_data import variables

SYSTEM = {"scope": "system", "listen": "127.0.0.1:8090"}


def config(build: str, **changes: Any) -> HostConfig:
    """The sound LLM box with one more preset, of the build upstream (CUDA) or fork (none)."""
    files = broken.inventory()
    vision = {**broken.SOUND["ocr"]["llama_presets"]["vision"], "build": build, **changes}
    files["presets"]["llama_presets"]["vision"] = vision
    return HostConfig.load(variables(files, "box"))


def test_a_system_preset_on_the_card_is_refused() -> None:
    (problem,) = guard_problems(config("upstream"))
    assert problem.path == ("llama_presets", "vision", "scope") and "scope user" in problem.fix
    assert "could not stop it" in problem.message and "build upstream has GGML_CUDA" in problem.message


def test_one_off_the_card_and_a_user_preset_are_not() -> None:
    assert list(guard_problems(config("fork"))) == []
    assert list(guard_problems(HostConfig.load(variables(broken.inventory(), "box")))) == []


@pytest.mark.parametrize(
    ("group", "host_variables", "refused"),
    [
        ("llm_servers", {"llama_presets_gpu_memory_mib": 65536}, True),
        ("llm_servers", {"gpu_guard_enabled": True}, True),
        ("llm_servers", {"llama_presets_gpu_memory_mib": 65536, "gpu_guard_enabled": False}, False),
        ("llm_servers", {}, False),
        ("ocr_servers", {"llama_presets_gpu_memory_mib": 65536}, False),
    ],
)
def test_only_a_box_with_a_guard_asks_for_it(
    tmp_path: Path, group: str, host_variables: dict[str, Any], refused: bool
) -> None:
    """The vision preset of an OCR box stays one of the system: no guard is there."""
    files = broken.inventory()
    if group == "llm_servers":
        files["presets"]["llama_presets"]["vision"] = files["ocr"]["llama_presets"]["vision"]
    broken.write(files, tmp_path, host_variables)
    done = ansible_playbook("playbooks/validate.yml", inventory=tmp_path, timeout=120)
    assert ("llama_presets.vision.scope" in done.stdout + done.stderr) is refused, done.tail()
    assert (done.rc != 0) is refused, done.tail()
