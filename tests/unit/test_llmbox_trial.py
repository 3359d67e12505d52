"""A preset on trial: what its unit runs meanwhile, and what the box serves afterwards, whatever happened."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from llmbox import trial as module
from llmbox.presets import PresetsFile
from llmbox.systemd import UnitState
from llmbox.trial import DROP_IN, Trial, drop_in, hold, lines, out_of_memory, unit_command

OWN = ["/opt/llama.cpp/up/current/bin/llama-server", "-c", "4096"]
OTHER = ["/opt/llama.cpp/up/releases/new/bin/llama-server", "-c", "4096"]


class Box:
    """A service manager and lmswitch in one: units run what their drop-in said when it was last read."""

    def __init__(self, runtime: Path, up: str = "a") -> None:
        fields = {"description": "d", "build": "up", "model": "m", "context": 4096, "command": OWN}
        one = {**fields, "listen": "/run/x.sock"}
        self.presets = PresetsFile.model_validate(
            {
                "version": 1,
                "user": "llm",
                "presets": {name: {**one, "unit": f"llama-{name}.service"} for name in "ab"},
            }
        )
        self.runtime, self.proc = runtime, runtime / "proc"
        self.up, self.pid = "", 0
        self.failing: list[str] | None = None  # the command that does not start
        self.refused: set[int] = set()  # the requests, counted from 1, that lmswitch does not even try
        self.journal: list[str] = []
        self.did: list[str] = []
        self.read: dict[str, str] = {}  # drop-ins by preset, as of the last reload
        if up:
            self.start(up)

    def show(self, units: list[str]) -> dict[str, UnitState]:
        return {
            unit: UnitState(unit, active="active", sub="running", main_pid=self.pid)
            if unit == f"llama-{self.up}.service"
            else UnitState(unit)
            for unit in units
        }

    def reload(self) -> None:
        paths = {name: self.folder(name) / DROP_IN for name in "ab"}
        self.read = {name: path.read_text() for name, path in paths.items() if path.exists()}

    def restarts(self, unit: str) -> int:
        return 3

    def journal_since(self, unit: str, since_s: float, count: int) -> list[str]:
        return self.journal

    def switch(self, words: Sequence[str], timeout_s: float) -> dict[str, Any]:
        self.did.append(" ".join(words))
        if len(self.did) in self.refused:
            return {"ok": False, "message": "another switch is under way (7)"}
        if words[0] == "off":
            self.up = ""
        elif not self.start(words[-1]):
            said = {"ok": False, "message": f"{words[-1]} failed after 1.0 s", "reason": ["it broke"]}
            return {**said, "changed": True}
        return {"ok": True, "message": "ready"}

    def start(self, name: str) -> bool:
        command = self.read[name].rpartition("ExecStart=")[2].split() if name in self.read else OWN
        self.up = "" if command == self.failing else name
        self.pid += 1
        process = self.proc / str(self.pid)
        process.mkdir(parents=True)
        (process / "cmdline").write_text("\0".join(command) + "\0")
        (process / "exe").symlink_to(command[0].replace("current", "releases/old"))
        return bool(self.up)

    def folder(self, name: str) -> Path:
        return self.runtime / f"systemd/user/llama-{name}.service.d"

    def trial(self, preset: str = "a", former: str = "a") -> Trial:
        found = self.presets.presets[preset]
        return Trial(found, former, self.presets, self.runtime, self, self.switch, self.proc, lambda: 0.0)


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


def running(box: Box) -> list[str]:
    return (box.proc / str(box.pid) / "cmdline").read_text().rstrip("\0").split("\0")


def test_its_drop_in_is_read_after_every_one_of_a_person() -> None:
    """systemd takes them by name: an ExecStart= of a person's would run under the trial's name."""
    own = ["99-own.conf", "local.conf", "override.conf", "z.conf"]
    assert sorted([*own, DROP_IN])[-1] == DROP_IN


def test_the_unit_runs_exactly_the_command_that_was_asked_for() -> None:
    text = drop_in(["/bin/x", "100%", "a b", "$HOME", ""])
    assert text.endswith('[Service]\nExecStart=\nExecStart=/bin/x 100%% "a b" "$$HOME" ""\n')
    with pytest.raises(ValueError, match="absolute path"):
        drop_in(["x"])


def test_another_command_serves_and_then_the_own_one_again(box: Box) -> None:
    trial = box.trial()
    said = trial.answer({"command": OTHER})
    serves = {"executable": OTHER[0], "restarts": 3, "out_of_memory": False}
    assert said == {"ok": True, "message": "ready", **serves}
    assert trial.answer({})["executable"] == OTHER[0]
    assert trial.answer({"command": None})["ok"] and running(box) == OWN
    assert not box.folder("a").exists()


def test_a_command_that_does_not_start_is_told_with_its_reason_and_the_own_one_serves(box: Box) -> None:
    box.failing, box.journal = OTHER, ["ggml_backend_cuda: cudaMalloc failed: out of memory"]
    said = box.trial().answer({"command": OTHER})
    assert (said["ok"], said["out_of_memory"], said["reason"]) == (False, True, ["it broke"])
    assert box.up == "a" and running(box) == OWN
    assert not box.folder("a").exists()


@pytest.mark.parametrize(("refused", "tried"), [(set(), True), ({1}, False), ({2}, False), ({1, 2}, False)])
def test_a_start_that_was_refused_is_told_from_one_that_failed(
    box: Box, refused: set[int], tried: bool
) -> None:
    """The guard may take the card away under a start: then the preset's own command is refused as well."""
    box.failing, box.refused = OTHER, refused
    said = box.trial().answer({"command": OTHER})
    assert (said["ok"], said["tried"]) == (False, tried)


def test_an_own_command_that_fails_too_was_tried(box: Box) -> None:
    box.failing = OWN
    assert box.trial().answer({"command": None})["tried"] is True


def test_what_cannot_be_a_command_changes_nothing(box: Box) -> None:
    for command in (["relative"], 7, ["/bin/x", "line\nbreak"]):
        assert box.trial().answer({"command": command})["ok"] is False
    assert box.did == [] and not box.folder("a").exists()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("llama_model_load: error: unable to allocate CUDA0 buffer", True),
        ("ggml_backend_cuda_buffer_type_alloc_buffer: allocating 9 MiB: cudaMalloc failed: x", True),
        ("terminate called after throwing an instance of 'std::bad_alloc'", True),
        ("llmbox: the kernel killed it for lack of memory", True),
        ("CUDA error: out of memory", True),
        ("error: unknown argument: --memory", False),
        ("llama_model_load: failed to open model", False),
    ],
)
def test_out_of_memory_is_told_apart_from_other_failures(line: str, expected: bool) -> None:
    assert out_of_memory(["before", line]) is expected


@pytest.mark.parametrize(
    ("former", "asked_meanwhile", "serves", "did"),
    [
        ("a", None, "a", ["--restart a"]),
        ("b", None, "b", ["b"]),
        ("", None, "", ["off"]),
        ("a", "b", "b", []),
        ("", "b", "b", []),
    ],
)
def test_afterwards_what_served_before_serves_unless_somebody_asked_for_another(
    tmp_path: Path, former: str, asked_meanwhile: str | None, serves: str, did: list[str]
) -> None:
    box = Box(tmp_path, up=former)
    trial = box.trial(former=former)
    trial.answer({"command": OTHER})
    if asked_meanwhile:
        box.start(asked_meanwhile)
    box.did.clear()
    trial.end()
    assert (box.up, box.did) == (serves, did)
    trial.end()
    assert box.did == did  # the second time there is nothing to do


def test_a_server_that_died_of_memory_while_it_answered_is_told_apart(box: Box) -> None:
    trial = box.trial()
    assert trial.answer({"command": OTHER})["out_of_memory"] is False
    for line, memory in (("CUDA error: out of memory", True), ("Segmentation fault", False)):
        box.journal = [line]
        assert trial.answer({})["out_of_memory"] is memory


def test_what_a_killed_trial_left_is_found_and_removed(box: Box) -> None:
    box.folder("b").mkdir(parents=True)
    (box.folder("b") / DROP_IN).write_text("[Service]\n")
    (box.folder("b") / "mine.conf").write_text("a person's own")
    box.trial().answer({"command": OTHER})
    assert sorted(path.name for path in box.folder("b").iterdir()) == ["mine.conf"]
    (box.trial()).end()  # as ExecStopPost= does, by another process
    assert running(box) == OWN and not box.folder("a").exists()


def test_lines_are_answered_and_the_end_of_them_ends_the_trial(box: Box) -> None:
    said: list[str] = []
    hold(box.trial(), iter(["", json.dumps({"command": OTHER}), "nonsense", "[1]", "{}"]), said.append)
    answers = [json.loads(line) for line in said]
    assert [answer["ok"] for answer in answers] == [True, False, False, True]
    assert running(box) == OWN


def test_a_broken_connection_ends_the_trial_too(box: Box) -> None:
    def gone(_text: str) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        hold(box.trial(), iter([json.dumps({"command": OTHER})]), gone)
    assert running(box) == OWN


def test_lines_end_with_the_input_and_with_silence() -> None:
    reading, writing = os.pipe()
    os.write(writing, b"one\n\ntwo\nhal")
    assert list(lines(reading, 0.01)) == ["one", "", "two"]
    os.close(writing)
    assert list(lines(reading, 60)) == []
    os.close(reading)


def test_systemd_ends_the_trial_when_its_holder_is_killed(box: Box) -> None:
    argv = unit_command(box.presets.presets["a"], "", 300)
    assert "--unit=llmbox-trial.service" in argv
    stop = next(word for word in argv if word.startswith("--property=ExecStopPost="))
    assert stop.endswith('-I -m llmbox.trial --end a ""')
    assert argv[-3:] == ["--hold", "a", ""]


def test_misuse_is_one_line(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["trial"])
    assert module.main() == 2
    assert "usage:" in json.loads(capfd.readouterr().out)["message"]
