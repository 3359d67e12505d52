"""What a release is asked before a switch: its flags, and the tensor types of the model."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from llmbox import gate
from llmbox.presets import BoxPreset

from tests.unit.test_command import CURRENT_HELP
from tests.unit.test_llmbox_switch import FakeSystemd, make, presets


def release(root: Path, build: str, types: dict[str, str] | None = None, text: str = CURRENT_HELP) -> Path:
    """The current release of a build. Returns its llama-server."""
    folder = root / build / "current"
    (folder / "bin").mkdir(parents=True)
    (folder / "help.txt").write_text(text)
    if types is not None:
        (folder / "types.json").write_text(json.dumps(types))
    return folder / "bin/llama-server"


def preset(command: list[str], **more: Any) -> BoxPreset:
    keys = {"name": "coder", "description": "d", "build": "upstream", "model": "m", "context": 4096}
    place = {"listen": "127.0.0.1:1234", "unit": "llama-coder.service"}
    return BoxPreset.model_validate({**keys, **place, "command": command, **more})


def model(name: str, *types: int, files: Sequence[str] = ()) -> dict[str, Any]:
    return {"name": name, "files": list(files), "tensor_types": list(types)}


def test_known_flags_pass(tmp_path: Path) -> None:
    server = str(release(tmp_path, "upstream"))
    assert gate.refusal(preset([server, "--model", "m.gguf", "--ctx-size", "4096"])) == ""


def test_the_value_of_a_flag_is_no_flag_however_it_begins(tmp_path: Path) -> None:
    server = str(release(tmp_path, "upstream"))
    assert gate.refusal(preset([server, "--model", "--odd.gguf", "--ctx-size", "4096"])) == ""
    said = gate.refusal(preset([server, "--model", "--odd.gguf", "--treads", "4"]))
    assert "does not know --treads" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--treads", "4"],
            "llama-server of the build upstream does not know --treads, did you mean --threads?",
        ),
        (
            ["--draft-max", "4"],
            "llama-server of the build upstream: --draft-max: the argument has been removed",
        ),
    ],
)
def test_unknown_and_removed_flags_are_named(tmp_path: Path, words: list[str], said: str) -> None:
    assert said in gate.refusal(preset([str(release(tmp_path, "upstream")), *words]))


def test_a_tq3_file_on_upstream_is_refused_by_name(tmp_path: Path) -> None:
    server = str(release(tmp_path, "upstream", {"0": "f32", "12": "q4_k"}))
    release(tmp_path, "tq3", {"0": "f32", "12": "q4_k", "46": "tq3_4s"})
    said = gate.refusal(preset([server], models=[model("m", 0, 46)]))
    assert said == (
        "m has tensors of type TQ3_4S, which the build upstream does not know; write build: tq3, which does"
    )
    assert gate.refusal(preset([server], models=[model("m", 0, 12)])) == ""


def test_it_is_the_draft_that_is_named_for_its_types(tmp_path: Path) -> None:
    server = str(release(tmp_path, "upstream", {"0": "f32"}))
    said = gate.refusal(preset([server], models=[model("m", 0), model("small", 0, 46)]))
    assert said.startswith("small has tensors of type 46, which the build upstream does not know")


def gguf_file(path: Path, *types: int) -> str:
    """A GGUF file with one tensor of each type."""
    text = b"GGUF" + struct.pack("<IQQ", 3, len(types), 0)
    for index, kind in enumerate(types):
        text += struct.pack("<Q2sIQIQ", 2, b"t%d" % index, 1, 4, kind, 32 * index)
    path.write_bytes(text.ljust(-(-len(text) // 32) * 32 + 32 * len(types), b"\0"))
    return str(path)


def test_where_the_lock_has_no_header_the_files_say_the_types(tmp_path: Path) -> None:
    server = str(release(tmp_path, "upstream", {"0": "f32", "12": "q4_k"}))
    release(tmp_path, "tq3", {"0": "f32", "46": "tq3_4s"})
    plain, odd = gguf_file(tmp_path / "a.gguf", 0, 12), gguf_file(tmp_path / "b.gguf", 12, 46)
    assert gate.refusal(preset([server], models=[model("local", files=[plain])])) == ""
    said = gate.refusal(preset([server], models=[model("local", files=[plain, odd])]))
    assert said == (
        "local has tensors of type TQ3_4S, which the build upstream does not know; write build: tq3, which "
        "does"
    )


def test_a_file_that_cannot_be_read_is_left_to_the_server(tmp_path: Path) -> None:
    server = str(release(tmp_path, "upstream", {"0": "f32"}))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"PK")
    files = [str(broken), str(tmp_path / "none.gguf")]
    assert gate.refusal(preset([server], models=[model("local", files=files)])) == ""


def test_a_type_that_nobody_knows_is_refused_by_number(tmp_path: Path) -> None:
    server = str(release(tmp_path, "upstream", {"0": "f32"}))
    assert "tensors of type 99" in gate.refusal(preset([server], models=[model("m", 99)]))


def test_a_release_that_says_nothing_is_not_held_to_anything(tmp_path: Path) -> None:
    server = str(release(tmp_path, "upstream", text=""))
    assert gate.refusal(preset([server, "--anything"], models=[model("m", 99)])) == ""


def test_a_refused_preset_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "refusal", lambda wanted: f"{wanted.name} does not know --x")
    systemd = FakeSystemd()
    systemd.up("llama-gemma.service")
    outcome = make(systemd)[0].switch("coder")
    assert not outcome.ok
    assert outcome.message == "coder is refused: coder does not know --x; gemma still serves"
    assert outcome.serving == "gemma"
    assert systemd.active() == ["llama-gemma.service"]
    assert not [call for call in systemd.calls if call.startswith(("start", "stop"))]
    assert presets().presets["coder"].models == []
    assert make(systemd)[0].refusal("coder") == outcome.message
