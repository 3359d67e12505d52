"""What a recorded run of the agent shows: five results, and where it went wrong first. Pure."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import PurePosixPath
from typing import Any

from llm_router.answers import leaked_tokens, unparsed_call

from scripts._agent_run import CONTRACT, Recorded, TestRun

RESULTS = ("files", "pytest", "failure_patched", "template_tokens", "not_truncated")
WRITERS = ("Write", "Edit", "MultiEdit")
LOOP = 4  # the same call that often, one after the other, is a loop
_EXCERPT = 80
_NORMAL_STOPS = ("end_turn", "tool_use", "stop_sequence")
_MALFORMED = re.compile(r"InputValidationError|No such tool available|could not be parsed", re.IGNORECASE)


@dataclass
class Call:
    """One tool call as the client understood it, and what came of it."""

    turn: int
    name: str
    input: Mapping[str, Any]
    result: str = ""
    refused: bool = False

    @property
    def path(self) -> str:
        """The file that it is about."""
        return str(self.input.get("file_path") or self.input.get("path") or "")

    def __str__(self) -> str:
        about = PurePosixPath(self.path).name or str(self.input.get("command") or ", ".join(self.input))
        return f"{self.name}({excerpt(about)})"


@dataclass
class Turn:
    """One answer of the model. `stop` is why it ended, as the server says."""

    number: int
    texts: list[str] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    stop: str = ""

    @property
    def text(self) -> str:
        """What it said."""
        return "\n".join(self.texts).strip()

    @property
    def empty(self) -> bool:
        """Whether it came to its end with nothing in it."""
        return self.stop in _NORMAL_STOPS and not self.text and not self.calls


@dataclass(frozen=True)
class Fault:
    """Something that went wrong in a turn."""

    turn: int
    text: str

    def __str__(self) -> str:
        return f"turn {self.turn}: {self.text}" if self.turn else self.text


@dataclass(frozen=True)
class Result:
    """One of the five. `value` beside what was wanted; `detail` says what fell short."""

    name: str
    ok: bool
    value: str | int
    wanted: str | int
    detail: str = ""


def judge(recorded: Recorded) -> list[Result]:
    """The five results, in the order of RESULTS."""
    turns = read(recorded.events)
    story = faults(recorded, turns)
    first = story[0] if story else None
    found = [
        files(recorded, turns),
        pytest_seen(recorded, turns),
        patched(recorded, turns),
        tokens(recorded, turns),
        truncation(recorded, turns),
    ]
    return [result if result.ok else _with_cause(result, first) for result in found]


def _with_cause(result: Result, first: Fault | None) -> Result:
    if first is None or str(first) in result.detail:
        return result
    detail = f"{result.detail}; first of all, {first}"
    return Result(result.name, result.ok, result.value, result.wanted, detail)


# --- reading the stream ---


def read(events: Sequence[Mapping[str, Any]]) -> list[Turn]:
    """The model's answers with the calls in them, oldest first."""
    turns: list[Turn] = []
    by_message: dict[str, Turn] = {}
    calls: dict[str, Call] = {}
    for event in events:
        kind, message = event.get("type"), event.get("message")
        if kind == "stream_event":
            _take_stream(event.get("event") or {}, turns, by_message)
        elif kind == "assistant" and isinstance(message, dict):
            turn = by_message.get(str(message.get("id")))
            if turn is None:  # a message of the client's own: an error that it tells
                continue
            turn.stop = turn.stop or str(message.get("stop_reason") or "")
            for block in blocks(message):
                if block.get("type") == "text":
                    turn.texts.append(str(block.get("text", "")))
                elif block.get("type") == "tool_use":
                    given = block.get("input")
                    call = Call(turn.number, str(block.get("name")), given if isinstance(given, dict) else {})
                    turn.calls.append(call)
                    calls[str(block.get("id"))] = call
        elif kind == "user" and isinstance(message, dict):
            for block in blocks(message):
                if block.get("type") == "tool_result" and (told := calls.get(str(block.get("tool_use_id")))):
                    told.result = plain_text(block.get("content"))
                    told.refused = bool(block.get("is_error"))
    return turns


def _take_stream(inner: Mapping[str, Any], turns: list[Turn], by_message: dict[str, Turn]) -> None:
    if inner.get("type") == "message_start":
        turns.append(Turn(len(turns) + 1))
        by_message[str((inner.get("message") or {}).get("id"))] = turns[-1]
    elif inner.get("type") == "message_delta" and turns:
        turns[-1].stop = str((inner.get("delta") or {}).get("stop_reason") or "")


def blocks(message: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The content blocks of a message."""
    content = message.get("content")
    if isinstance(content, str):
        yield {"type": "text", "text": content}
    elif isinstance(content, list):
        yield from (block for block in content if isinstance(block, dict))


def plain_text(content: Any) -> str:
    """The text of a tool's result."""
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return str(content or "")


def excerpt(text: str) -> str:
    """The beginning of a text, on one line."""
    words = " ".join(text.split())
    return words if len(words) <= _EXCERPT else f"{words[:_EXCERPT]}…"


def outcome(events: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The client's own last line."""
    return next((event for event in reversed(events) if event.get("type") == "result"), {})


# --- what went wrong, in order ---


def faults(recorded: Recorded, turns: Sequence[Turn]) -> list[Fault]:
    """Everything that went wrong, the earliest first."""
    found = [fault for turn in turns for fault in _turn_faults(recorded, turn)]
    found += _loops(turns)
    found.sort(key=lambda fault: fault.turn)
    last = turns[-1].number if turns else 0
    if error := api_error(recorded):
        found.append(Fault(last, error))
    if recorded.stopped:
        found.append(Fault(last, f"stopped at the limit of {recorded.stopped}"))
    if turns and not any(turn.calls for turn in turns) and turns[0].text:
        said = excerpt(turns[0].text)
        found.append(Fault(1, f"prose instead of a tool call: “{said}”"))
    if not turns and not found:
        found.append(
            Fault(0, f"the client ended without an answer: {excerpt(recorded.stderr) or 'silently'}")
        )
    return found


def _turn_faults(recorded: Recorded, turn: Turn) -> Iterator[Fault]:
    if leaks := leaked_tokens(turn.text):
        yield Fault(turn.number, f"template tokens in the answer: {', '.join(leaks)}")
    if unparsed := unparsed_call(turn.text):
        yield Fault(turn.number, f"a tool call that the server did not parse, as text: {excerpt(unparsed)}")
    cut = cut_off(turn)
    if cut:
        yield Fault(turn.number, cut)
    for call in turn.calls:
        if leaks := leaked_tokens(str(dict(call.input))):
            yield Fault(turn.number, f"template tokens in the arguments of {call}: {', '.join(leaks)}")
        if cut:
            continue
        if call.refused and _MALFORMED.search(call.result):
            said = excerpt(call.result.removeprefix("<tool_use_error>"))
            yield Fault(turn.number, f"malformed arguments in {call}: {said}")
        elif call.name in WRITERS and call.path and not inside(recorded.work, call.path):
            yield Fault(turn.number, f"{call.name} to a wrong path, outside the directory: {call.path}")
        elif call.refused and call.name != "Bash":
            yield Fault(turn.number, f"{call} was refused: {excerpt(call.result)}")
    if turn.empty:
        yield Fault(turn.number, "an empty answer")


def cut_off(turn: Turn) -> str:
    """How an answer was cut off, or nothing."""
    if not turn.stop or turn.stop in _NORMAL_STOPS:
        return ""
    where = f" in a call of {turn.calls[-1].name}" if turn.calls else ""
    return f"cut off{where} (stop_reason {turn.stop})"


def _loops(turns: Sequence[Turn]) -> list[Fault]:
    calls = [call for turn in turns for call in turn.calls]
    run = 1
    for before, call in pairwise(calls):
        run = run + 1 if (before.name, before.input) == (call.name, call.input) else 1
        if run == LOOP:
            return [Fault(call.turn, f"a loop: the same call {LOOP} times and more: {call}")]
    return []


def api_error(recorded: Recorded) -> str:
    """What the server refused, in the client's words, or nothing."""
    last = outcome(recorded.events)
    said = str(last.get("result") or "")
    if last.get("is_error") or said.startswith("API Error"):
        return f"the client gave up: {excerpt(said) or last.get('subtype')}"
    return ""


def inside(work: str, path: str) -> bool:
    """Whether a path that the model named is in the directory."""
    full = PurePosixPath(work, path)
    return ".." not in full.parts and full.is_relative_to(work)


# --- the five results ---


def files(recorded: Recorded, turns: Sequence[Turn]) -> Result:
    """Files were read, and an app and a test of its own lie where they belong."""
    calls = [call for turn in turns for call in turn.calls]
    reads = [call for call in calls if call.name == "Read" and not call.refused]
    written = sorted({call.path for call in calls if _wrote(recorded, call)})
    names = [str(PurePosixPath(recorded.work, path).relative_to(recorded.work)) for path in written]
    own = [name for name in names if name in recorded.files]
    apps = [name for name in own if "FastAPI(" in recorded.files[name] and "/health" in recorded.files[name]]
    tests = [
        name
        for name in own
        if name != CONTRACT and "def test_" in recorded.files[name] and "health" in recorded.files[name]
    ]
    short = [
        *([] if reads else ["no file was read"]),
        *([] if apps else ["no file with a FastAPI app and /health was written"]),
        *([] if tests else ["no test of /health was written"]),
    ]
    if not any(turn.calls for turn in turns):
        short = ["not one tool call arrived"]
    if lost := [name for name in names if name not in recorded.files]:
        short.append(f"not on disk though written: {', '.join(lost)}")
    value = f"{len(reads)} read, {len(own)} written"
    return Result("files", not short, value, "1 read, 2 written", ", ".join(short))


def _wrote(recorded: Recorded, call: Call) -> bool:
    return call.name in WRITERS and not call.refused and inside(recorded.work, call.path)


def pytest_seen(recorded: Recorded, turns: Sequence[Turn]) -> Result:
    """pytest ran, and what it really printed came to the model."""
    shown = seen_runs(recorded, turns)
    value = told(run for _, run in shown)
    if shown:
        return Result("pytest", True, value, "a run whose output was seen")
    claims = any(re.search(r"\d+ passed|tests? pass", turn.text) for turn in turns)
    if recorded.runs:
        detail = f"pytest ran ({told(recorded.runs)}), but its output did not come back"
    else:
        detail = "pytest never ran" + (", though the model says that tests pass" if claims else "")
    denied = [call for turn in turns for call in turn.calls if call.name == "Bash" and call.refused]
    if not recorded.runs and denied:
        detail += f"; {denied[0]} was refused: {excerpt(denied[0].result)}"
    return Result("pytest", False, value, "a run whose output was seen", detail)


def seen_runs(recorded: Recorded, turns: Sequence[Turn]) -> list[tuple[int, TestRun]]:
    """The runs of pytest whose output the model was shown, each with its call's place among all calls."""
    calls = [call for turn in turns for call in turn.calls]
    return [
        (place, run)
        for place, call in enumerate(calls)
        for run in recorded.runs
        if call.name == "Bash" and f"run {run.run}" in call.result
    ]


def told(runs: Iterable[TestRun]) -> str:
    """Runs of pytest in a few words."""
    alike = [(code, len(list(group))) for code, group in groupby(run.exit for run in runs)]
    return (
        ", ".join(f"exit {code}" + (f" ({count} times)" if count > 1 else "") for code, count in alike)
        or "none"
    )


def patched(recorded: Recorded, turns: Sequence[Turn]) -> Result:
    """A run failed, a file was changed after it, a later run passed, and passes when we run it."""
    calls = [call for turn in turns for call in turn.calls]
    shown = seen_runs(recorded, turns)
    failed = [place for place, run in shown if run.exit != 0]
    edits = [place for place, call in enumerate(calls) if _wrote(recorded, call)]
    after = [place for place in edits if failed and place > failed[0]]
    passed = [place for place, run in shown if run.exit == 0 and after and place > after[0]]
    own = recorded.final
    value = f"{told(run for _, run in shown)}; ours: {told([own] if own else [])}"
    wanted = "exit 1, …, exit 0; ours: exit 0"
    if not failed:
        detail = "no failing run of pytest was seen, so none was patched"
    elif not after:
        detail = "pytest failed and no file was changed after it"
    elif not passed:
        detail = "no run passed after the change"
    elif own is None or own.exit != 0:
        detail = "it does not pass when run again with the first test as it was"
    else:
        return Result("failure_patched", True, value, wanted)
    return Result("failure_patched", False, value, wanted, detail)


def tokens(recorded: Recorded, turns: Sequence[Turn]) -> Result:
    """No token of the model's chat template in what it said, called or wrote, and no call left as text."""
    found: list[str] = []
    for turn in turns:
        found += [f"{token} in turn {turn.number}" for token in leaked_tokens(turn.text)]
        if unparsed_call(turn.text):
            found.append(f"a call as text in turn {turn.number}")
        for call in turn.calls:
            found += [f"{token} in turn {call.turn}" for token in leaked_tokens(str(dict(call.input)))]
    found += [f"{token} in {name}" for name, text in recorded.files.items() for token in leaked_tokens(text)]
    if not turns:
        return Result("template_tokens", False, 0, 0, "there is no answer to look at")
    found = list(dict.fromkeys(found))
    return Result("template_tokens", not found, len(found), 0, ", ".join(found[:5]))


def truncation(recorded: Recorded, turns: Sequence[Turn]) -> Result:
    """The run came to its own end: no answer cut off or empty, every file whole Python, no limit reached."""
    found = []
    for turn in turns:
        if cut := cut_off(turn):
            found.append(str(Fault(turn.number, cut)))
        elif turn.empty:
            found.append(str(Fault(turn.number, "an empty answer")))
    found += [f"{name} is no whole Python: {why}" for name, why in broken_python(recorded.files)]
    if recorded.stopped:
        found.append(f"stopped at the limit of {recorded.stopped}")
    elif error := api_error(recorded):
        found.append(error)
    elif not outcome(recorded.events):
        found.append("the client's stream has no end")
    detail = ", ".join(found[:3])
    return Result("not_truncated", not found, len(found), 0, detail)


def broken_python(texts: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Files that do not parse, each with the reason."""
    for name, text in texts.items():
        if name.endswith(".py"):
            try:
                ast.parse(text)
            except (SyntaxError, ValueError) as error:
                yield name, str(getattr(error, "msg", error))
