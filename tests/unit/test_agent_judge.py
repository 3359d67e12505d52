"""The judge of the agent's smoke test, on streams of the real Claude Code with a scripted model behind it.

recorded_agent_runs.jsonl holds one run of each script in tests/scripted_anthropic.py, and what lay on disk
afterwards; tests/lab/test_verify_agent.py plays them anew.
"""

from __future__ import annotations

import json
import socket
import sys
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from scripts import _confine
from scripts._agent_judge import RESULTS, Result, judge, read
from scripts._agent_run import (
    CONTRACT,
    CONTRACT_TEXT,
    Limits,
    Meter,
    Recorded,
    TestRun,
    final,
    record,
    settings,
    throw_away,
)
from tests.scripted_anthropic import MAIN, SCRIPTS

RECORDED = Path(__file__).with_name("recorded_agent_runs.jsonl")
# What falls short with each bad model, and what the first fault is called.
EXPECTED: dict[str, tuple[set[str], str]] = {
    "good": (set(), ""),
    "prose": ({"files", "pytest", "failure_patched"}, "turn 1: prose instead of a tool call"),
    "malformed": ({"files", "pytest", "failure_patched"}, "turn 1: malformed arguments in Write"),
    "leaked": (set(RESULTS), "turn 2: template tokens in the arguments of Write(main.py): <|im_end|>"),
    "truncated": (
        {"failure_patched", "not_truncated"},
        "turn 5: cut off in a call of Edit (stop_reason max_tokens)",
    ),
    "wrong_path": (
        {"files", "pytest", "failure_patched"},
        "turn 1: Write to a wrong path, outside the directory: /home/user/project/main.py",
    ),
    "empty": ({"files", "pytest", "failure_patched", "not_truncated"}, "turn 1: an empty answer"),
    "loop": (
        {"files", "pytest", "failure_patched", "not_truncated"},
        "turn 4: a loop: the same call 4 times and more: Read(test_contract.py)",
    ),
    "refusing": (set(RESULTS), "API Error: 422"),
}


@cache
def recordings() -> dict[str, Recorded]:
    """Every recorded run, by the name of its script."""
    found = {}
    for line in RECORDED.read_text().splitlines():
        data = json.loads(line)
        name, final = data.pop("name"), data.pop("final")
        found[name] = Recorded(
            **{
                **data,
                "events": tuple(data["events"]),
                "runs": tuple(TestRun(**run) for run in data["runs"]),
                "final": TestRun(**final) if final else None,
            }
        )
    return found


def results(recorded: Recorded) -> dict[str, Result]:
    return {result.name: result for result in judge(recorded)}


def test_every_script_is_recorded() -> None:
    assert recordings().keys() == SCRIPTS.keys() == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_what_falls_short_and_where(name: str) -> None:
    short, first = EXPECTED[name]
    found = results(recordings()[name])
    assert tuple(found) == RESULTS
    assert {one.name for one in found.values() if not one.ok} == short
    assert all(first in one.detail for one in found.values() if not one.ok), found
    assert all("\n" not in one.detail for one in found.values())


def test_a_claim_is_not_a_run() -> None:
    assert "though the model says that tests pass" in results(recordings()["prose"])["pytest"].detail


def test_a_run_counts_only_when_its_output_came_back() -> None:
    """The same calls with another output: what the stream says is not believed."""
    good = recordings()["good"]
    invented = tuple(replace(run, run="00000000") for run in good.runs)
    found = results(replace(good, runs=invented))
    assert not found["pytest"].ok and "its output did not come back" in found["pytest"].detail
    assert not found["failure_patched"].ok


def test_our_own_run_has_the_last_word() -> None:
    """A model that changes the test instead of the app passes in its own run only."""
    good = recordings()["good"]
    found = results(replace(good, final=TestRun("x", 1, failed=1)))
    assert [name for name, one in found.items() if not one.ok] == ["failure_patched"]
    assert "when run again with the first test as it was" in found["failure_patched"].detail


def test_our_own_run_has_the_first_test_as_it_was() -> None:
    """With the real pytest: a contract that was weakened until it passes is the one from before again."""
    with throw_away() as place:
        (place.work / "main.py").write_text(MAIN)
        (place.work / CONTRACT).write_text("def test_nothing() -> None:\n    pass\n")
        run = final(place, "http://127.0.0.1:9")
        assert run is not None and (run.exit, run.failed) == (1, 1)
        assert (place.work / CONTRACT).read_text() == CONTRACT_TEXT


@pytest.mark.parametrize("own", ["a fixture", "settings of pytest", "no more"])
def test_a_build_that_the_model_made_up_is_none(own: str) -> None:
    """The fixture is nowhere to be seen: to write one is the most natural wrong answer."""
    made_up = MAIN.replace('{"status": "ok"}', '{"status": "ok", "build": "1.0.0"}')
    with throw_away() as place:
        right = made_up.replace("1.0.0", (place.witness / "build.txt").read_text().strip())
        (place.work / "main.py").write_text(right if own == "no more" else made_up)
        shadow = 'import pytest\n\n@pytest.fixture\ndef expected_build():\n    return "1.0.0"\n'
        (place.work / "conftest.py").write_text(shadow if own == "a fixture" else "")
        if own == "settings of pytest":
            (place.work / "pytest.ini").write_text("[pytest]\naddopts = --deselect test_contract.py\n")
            (place.work / "test_own.py").write_text("def test_nothing():\n    pass\n")
        run = final(place, "http://127.0.0.1:9")
        assert run is not None and run.exit == (0 if own == "no more" else 1), run


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_what_lies_in_the_first_test_s_place_makes_way(kind: str) -> None:
    with throw_away() as place:
        contract, other = place.work / CONTRACT, place.work / "main.py"
        contract.unlink()
        other.write_text(MAIN)
        contract.mkdir() if kind == "folder" else contract.symlink_to(other)
        run = final(place, "http://127.0.0.1:9")
        assert run is not None and (run.exit, run.failed) == (1, 1)
        assert other.read_text() == MAIN and contract.read_text() == CONTRACT_TEXT


CLIENT = """\
#!{python}
import socket, subprocess, sys
subprocess.Popen(["sleep", {nap!r}], start_new_session=True, stdout=-3, stderr=-3)  # to nowhere
for attempt in (
    lambda: open({outside!r}, "w"),
    lambda: socket.create_connection(("127.0.0.1", {port}), 2),
):
    try:
        attempt()
    except OSError:
        pass
"""


def sleeps(nap: str) -> bool:
    """Whether the client's child is still there."""
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if command.read_bytes() == f"sleep\0{nap}\0".encode():
                return True
    return False


@pytest.mark.skipif(not _confine.abi(), reason="this kernel has no Landlock")
@pytest.mark.parametrize("who", ["the client", "the model's tests"])
def test_who_works_there_is_held_to_the_place_and_its_server_and_leaves_nothing_running(
    who: str, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    with socket.create_server(("127.0.0.1", 0)) as other, throw_away() as place:
        port = other.getsockname()[1]
        nap = f"300.{port}"  # nobody else's
        text = CLIENT.format(python=sys.executable, nap=nap, outside=str(outside), port=port)
        if who == "the client":
            program = place.root / "client"
            program.write_text(text)
            program.chmod(0o755)
            record(place, program, "http://127.0.0.1:9", "m", 32768, "", Limits(seconds=30))
        else:
            (place.work / "main.py").write_text(text + MAIN)
            assert final(place, "http://127.0.0.1:9") is not None
        other.settimeout(0.3)
        with pytest.raises(TimeoutError):
            other.accept()
        assert not outside.exists() and not sleeps(nap)


def test_a_failure_must_come_before_its_patch() -> None:
    good = recordings()["good"]
    passed = tuple(replace(run, exit=0, failed=0) for run in good.runs)
    assert "no failing run" in results(replace(good, runs=passed))["failure_patched"].detail


def with_other(was: str, becomes: str) -> Recorded:
    """The good run, in whose stream this text is another one."""
    good = recordings()["good"]
    stream = json.dumps(good.events)
    assert was in stream
    return replace(good, events=tuple(json.loads(stream.replace(was, becomes))))


def without(name: str) -> Recorded:
    """The good run, in which this tool is another one that neither reads nor writes."""
    return with_other(f'"name": "{name}"', '"name": "Glob"')


def assert_falls_short(recorded: Recorded, name: str, detail: str) -> None:
    """In this one alone, for this reason."""
    (one,) = (one for one in judge(recorded) if not one.ok)
    assert one.name == name and detail in one.detail, one


def test_each_step_is_asked_for_by_itself() -> None:
    assert results(without("Read"))["files"].detail == "no file was read"
    unpatched = results(without("Edit"))["failure_patched"].detail
    assert unpatched == "pytest failed and no file was changed after it"
    good = recordings()["good"]
    unproven = replace(good, runs=good.runs[:-1])
    assert_falls_short(unproven, "failure_patched", "no run passed after the change")


def test_an_answer_that_is_cut_off_is_found_in_a_run_that_comes_to_its_end() -> None:
    cut = with_other('"stop_reason": "end_turn"', '"stop_reason": "max_tokens"')
    assert_falls_short(cut, "not_truncated", "cut off (stop_reason max_tokens)")


def test_a_call_in_bare_text_is_found() -> None:
    call = json.dumps({"name": "Bash", "arguments": {"command": "ls"}})
    told = with_other("The service is there", json.dumps(call)[1:-1])
    assert_falls_short(told, "template_tokens", "a call as text in turn 7")


def test_a_token_in_the_arguments_alone_is_found() -> None:
    bad = recordings()["leaked"]
    clean = {name: text.replace("<|im_end|>", "") for name, text in bad.files.items()}
    assert results(replace(bad, files=clean))["template_tokens"].detail.startswith("<|im_end|> in turn 2")


def test_a_token_on_disk_alone_is_found() -> None:
    good = recordings()["good"]
    files = {**good.files, "main.py": good.files["main.py"] + "# <|im_end|>\n"}
    assert_falls_short(replace(good, files=files), "template_tokens", "<|im_end|> in main.py")


def test_a_file_that_is_not_there_or_not_whole() -> None:
    good = recordings()["good"]
    lost = {name: text for name, text in good.files.items() if name != "main.py"}
    assert "not on disk though written: main.py" in results(replace(good, files=lost))["files"].detail
    half = {**good.files, "main.py": good.files["main.py"][:-12]}
    found = results(replace(good, files=half))["not_truncated"]
    assert not found.ok and "main.py is no whole Python" in found.detail


def test_a_client_that_says_nothing_falls_short_everywhere() -> None:
    found = results(Recorded("/w", stderr="Segmentation fault", exit_code=139))
    assert not any(one.ok for one in found.values())
    assert all("without an answer: Segmentation fault" in one.detail for one in found.values())


def test_strange_lines_are_no_trouble() -> None:
    events: tuple[dict[str, Any], ...] = (
        {},
        {"type": "assistant"},
        {"type": "assistant", "message": {"id": "m", "content": None}},
        {"type": "user", "message": {"content": [1, {"type": "tool_result"}]}},
        {"type": "stream_event", "event": {"type": "message_start", "message": {"id": "m"}}},
        {"type": "assistant", "message": {"id": "m", "content": [{"type": "tool_use", "input": "no"}]}},
    )
    assert [len(turn.calls) for turn in read(events)] == [1]
    assert len(judge(Recorded("/w", events))) == len(RESULTS)


def start(number: int, tokens: int = 100) -> dict[str, Any]:
    message = {"id": f"m{number}", "usage": {"input_tokens": tokens}}
    return {"type": "stream_event", "event": {"type": "message_start", "message": message}}


def test_turns_time_and_tokens_are_bounded() -> None:
    limits = Limits(seconds=10, turns=3, tokens=1000)
    meter = Meter()
    for number in range(3):
        meter.take(start(number))
        assert meter.breach(limits, 1) == ""
    assert meter.breach(limits, 11) == "10 s"
    meter.take(start(3))
    assert meter.breach(limits, 1) == "3 turns"
    meter = Meter()
    meter.take(start(0, 900))
    for written in (40, 90, 90):
        delta = {"type": "message_delta", "usage": {"output_tokens": written}}
        meter.take({"type": "stream_event", "event": delta})
    assert (meter.tokens, meter.breach(limits, 1)) == (990, "")
    meter.take(start(1, 20))
    assert meter.breach(limits, 1) == "1000 tokens"


def test_the_settings_name_one_model_everywhere_and_hold_no_key() -> None:
    made = settings("http://h:1", "coder", 32768)
    models = {name: value for name, value in made["env"].items() if "MODEL" in name}
    assert len(models) == 5 and set(models.values()) == {"coder"}
    assert made["env"]["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == "32768"
    assert int(made["env"]["CLAUDE_CODE_MAX_OUTPUT_TOKENS"]) == 4096
    assert not any("KEY" in name or name.endswith("AUTH_TOKEN") for name in made["env"])
    assert not any(rule in ("Bash", "Bash(*)") for rule in made["permissions"]["allow"])
