"""The controller's side of a trial: questions, answers, and what becomes of it when something ends."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import llmbox.trial
import pytest

from scripts import _trial
from scripts._ask_host import Unreachable
from scripts._measure import NotMeasured
from scripts._trial import Serving, TrialFailed, last_words, trial

PROGRAM = "/opt/llama.cpp/up/releases/new/bin/llama-server"


@pytest.fixture
def box(tmp_path: Path) -> Any:
    """`box(answer, ...)` is a host whose trial gives these answers, one a question, and then ends."""

    def host(*answers: object, last: str = "") -> Any:
        program = tmp_path / "ssh"
        says = "".join(
            f"ask || exit; echo '{json.dumps(answer) if isinstance(answer, dict) else answer}'\n"
            for answer in answers
        )
        program.write_text(
            f'#!/bin/sh\necho "$@" > {tmp_path}/argv\n'
            'ask() { line=""; while [ -z "$line" ]; do read -r line || return 1; '
            f'if [ -z "$line" ]; then echo >> {tmp_path}/signs; else echo "$line" >> {tmp_path}/asked; fi; '
            "done; }\n"
            f"{says}{f'echo {last!r} >&2; exit 1' if last else f'ask; echo ended > {tmp_path}/ended'}\n"
        )
        program.chmod(0o755)
        return SimpleNamespace(
            variables={"llm_user_name": "llm", "llmbox_path": "/opt/llmbox"},
            address="box",
            ssh=lambda command: [str(program), "box", "--", command],
        )

    return host


FINE = {"ok": True, "message": "", "executable": PROGRAM, "restarts": 2}


def test_a_trial_is_asked_for_as_the_presets_user_and_ends_with_the_body(box: Any, tmp_path: Path) -> None:
    with trial(box(FINE, FINE, FINE), "coder") as held:
        held.run(["/x", "a b"])
        assert held.serving() == Serving(PROGRAM, 2)
        assert not (tmp_path / "ended").exists()
    assert (tmp_path / "ended").exists()
    argv = (tmp_path / "argv").read_text()
    assert "ServerAliveInterval" in argv
    assert "box -- sudo -n -u llm /opt/llmbox/bin/python -I -m llmbox.trial coder" in argv
    asked = [json.loads(line) for line in (tmp_path / "asked").read_text().splitlines()]
    assert asked == [{}, {"command": ["/x", "a b"]}, {}]


def test_while_a_run_lasts_the_box_hears_that_somebody_is_there(
    box: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the box ends the trial under a measurement that takes longer than its patience."""
    assert 3 * _trial.SIGN_OF_LIFE_S < llmbox.trial.SILENCE_S
    monkeypatch.setattr(_trial, "SIGN_OF_LIFE_S", 0.01)
    with trial(box(FINE), "coder"):
        deadline = time.monotonic() + 10
        while not (tmp_path / "signs").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / "signs").exists()


def test_it_ends_when_the_body_fails(box: Any, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), trial(box(FINE), "coder"):
        raise ZeroDivisionError
    assert (tmp_path / "ended").exists()


def test_a_preset_that_does_not_start_is_an_error_of_its_own(box: Any) -> None:
    failed = {"ok": False, "message": "coder failed", "reason": ["x", "too big "], "out_of_memory": True}
    with (
        trial(box(FINE, failed), "coder") as held,
        pytest.raises(TrialFailed, match="coder failed") as raised,
    ):
        held.run(["/x"])
    assert raised.value.out_of_memory and last_words(raised.value) == "too big"


def test_a_start_that_the_box_refuses_says_nothing_about_the_program(box: Any) -> None:
    refused = {"ok": False, "message": "another switch is under way (7)", "reason": [], "tried": False}
    with trial(box(FINE, refused), "coder") as held, pytest.raises(NotMeasured, match="another switch"):
        held.run(["/x"])


@pytest.mark.parametrize("said", [{"tried": True}, {}], ids=["it was tried", "an older box"])
def test_a_start_that_was_tried_is_the_programs_fault(box: Any, said: dict[str, bool]) -> None:
    failed = {"ok": False, "message": "coder failed", **said}
    with trial(box(FINE, failed), "coder") as held, pytest.raises(TrialFailed, match="coder failed"):
        held.run(["/x"])


def test_the_words_of_the_wait_are_not_the_reason() -> None:
    lines = ["error: invalid argument: -x", "llmbox-wait-ready: llama-server (pid 7) ended"]
    assert last_words(TrialFailed("m", lines)) == "error: invalid argument: -x"
    assert last_words(TrialFailed("m", lines[1:])) == "m"


def test_a_trial_that_is_refused_says_why(box: Any) -> None:
    with (
        pytest.raises(TrialFailed, match="another trial"),
        trial(box({"ok": False, "message": "another trial is under way"}), "coder"),
    ):
        pass


@pytest.mark.parametrize(
    ("answers", "last", "said"),
    [
        ([], "python: No module named llmbox.trial", "No module named llmbox.trial; fix: run site.yml"),
        ([], "sudo: a password is required", "passwordless sudo"),
        (["Welcome!"], "", "no answer: Welcome!"),
    ],
)
def test_a_host_that_cannot_do_it_is_one_line(box: Any, answers: list[str], last: str, said: str) -> None:
    with pytest.raises(Unreachable, match=said), trial(box(*answers, last=last), "coder"):
        pass
