"""Two releases of a build under one preset: who is measured when, and what is made of what goes wrong."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from scripts import _compare as module
from scripts._ask_host import Unreachable
from scripts._compare import Bench, Refused, of_releases, prompt_cache_trouble, tool_call_trouble
from scripts._measure import NotLetIn, NotMeasured, Shape, Timed
from scripts._trial import Serving, TrialFailed
from scripts._verdict import Behaviour, Comparison, judge_preset

OLD, NEW = ["/r/old/llama-server", "-c", "1"], ["/r/new/llama-server", "-c", "1"]
NOTHING = "smol: nothing to compare with: the current release"
SHAPE = Shape("short", 1536, 400)
ANEW = 64  # tokens of a prompt's end that are read again whatever the cache holds


class Box:
    """A box on trial that does what its requests ask for, and no more.

    `speed` and `prefill` are tokens per second by release; what is named `failing` does not start.
    """

    preset = "smol"

    def __init__(self) -> None:
        self.log: list[str] = []
        self.now = self.release = ""
        self.speed = {"old": 100.0, "new": 100.0}
        self.prefill = {"old": 1000.0, "new": 1000.0}
        self.failing: dict[str, list[str]] = {}
        self.crashing: set[str] = set()
        self.foreign = ""
        self.busy: set[str] = set()
        self.no_tools: set[str] = set()
        self.no_cache: set[str] = set()
        self.cached = ""

    def which(self, command: Sequence[str]) -> str:
        """The release that a command line is of: "old" or "new"."""
        return command[0].split("/")[2]

    def run(self, command: Sequence[str] | None) -> None:
        assert command is not None
        name = self.which(command)
        self.log.append(f"start {name}")
        if name in self.failing:
            raise TrialFailed("smol failed after 0.6 s", self.failing[name])
        self.now, self.release, self.cached = command[0], name, ""

    def serving(self) -> Serving:
        return Serving(self.foreign or self.now, int(self.release in self.crashing))

    def series(self, shape: Shape, count: int) -> Iterator[Timed]:
        if self.release in self.busy:
            raise NotMeasured("no run of 10 was undisturbed")
        self.log.append(f"run {self.release}")
        noise = 1 + 0.001 * (len(self.log) % 3)
        read, written = noise * self.prefill[self.release], noise * self.speed[self.release]
        yield Timed(shape.prompt, read, shape.generate, written, 0.0, 1.0)

    def http(self, request: httpx.Request) -> httpx.Response:
        assert "x-llmbox-alone" in request.headers
        body = json.loads(request.content)
        assert body["model"] == self.preset
        if request.url.path == "/completion":
            return httpx.Response(200, json={"timings": self.timings(**body)})
        if self.release in self.no_tools:
            return httpx.Response(500, json={"error": {"message": "cannot parse"}})
        offered = [tool["function"]["name"] for tool in body.get("tools", [])]
        called = module.TOOL in offered and body.get("tool_choice") == "required"
        words = {"choices": [{"message": {"content": "4 °C"}}]}
        return httpx.Response(200, json=answered() if called else words)

    def timings(self, prompt: str, cache_prompt: bool | None = None, **_: object) -> dict[str, int]:
        """How much of a prompt is read, and how much was kept of the last one: by default, or as asked."""
        tokens = 1 + len(prompt.split())
        caches = self.release not in self.no_cache if cache_prompt is None else cache_prompt
        read = min(tokens, ANEW) if caches and prompt == self.cached else tokens
        self.cached = prompt
        return {"cache_n": tokens - read, "prompt_n": read}

    def bench(self) -> Bench:
        client = httpx.Client(transport=httpx.MockTransport(self.http), base_url="http://box")
        both = (OLD, NEW)
        return Bench(self, client, self, "smol", SHAPE, both, lambda _: None, lambda _: None)  # type: ignore[arg-type]


def answered(**function: Any) -> dict[str, Any]:
    """An answer of llama-server that calls the tool."""
    call = {"name": module.TOOL, "arguments": '{"city": "Oslo", "unit": "celsius"}', **function}
    return {"choices": [{"message": {"content": None, "tool_calls": [{"function": call}]}}]}


@pytest.fixture
def box() -> Box:
    return Box()


def test_pairs_are_interleaved_and_a_server_is_started_once_for_two_runs(box: Box) -> None:
    found = box.bench().compare()
    assert judge_preset(found).word == "keep" and found.old == found.new == Behaviour()
    assert len(found.generation) == len(found.prefill) == 5
    a, b = ["start old", "run old"], ["start new", "run new"]
    assert box.log == [*a, *b, b[1], *a, a[1], *b, b[1], *a, a[1], *b]


@pytest.mark.parametrize(
    ("change", "word", "reason"),
    [
        (lambda b: None, "keep", "smol: generation 100."),
        (lambda b: b.speed.update(new=70.0), "roll back", "smol: generation 100."),
        (lambda b: b.prefill.update(new=700.0), "roll back", "smol: prefill 100"),
        (lambda b: b.failing.update(new=["invalid argument: -x"]), "roll back", "smol does not start: inv"),
        (lambda b: b.no_tools.add("new"), "roll back", "smol: the new release breaks tool calls: HTTP 500"),
        (lambda b: b.no_cache.add("new"), "roll back", "smol: the new release loses the prompt cache: of"),
        (lambda b: b.crashing.add("new"), "roll back", "smol: the new release is not healthy: its server"),
        (
            lambda b: b.failing.update(old=["broken"]),
            "keep",
            f"{NOTHING} does not start: broken; the new one serv",
        ),
        (
            lambda b: b.crashing.add("old"),
            "keep",
            f"{NOTHING} is not healthy: its server ended 1 times while",
        ),
        (
            lambda b: (b.crashing.add("old"), b.busy.add("old")),  # a server that ends answers nothing
            "keep",
            f"{NOTHING} is not healthy: its server ended 1 times while",
        ),
        (
            lambda b: b.failing.update(old=["broken"], new=["so"]),
            "undecided",
            f"{NOTHING} does not start: broken; the new one does not start: so",
        ),
        (
            lambda b: (b.failing.update(old=["broken"]), b.no_cache.add("new")),
            "undecided",
            f"{NOTHING} does not start: broken; the new one loses the prompt cache: of",
        ),
        (
            lambda b: (b.failing.update(old=["broken"]), b.busy.add("new")),
            "undecided",
            f"{NOTHING} does not start: broken; the new one could not be measured: no run of 10",
        ),
        (lambda b: b.busy.add("new"), "undecided", "smol could not be measured: no run of 10"),
        (lambda b: b.busy.add("old"), "undecided", "smol could not be measured: no run of 10"),
        (lambda b: b.no_tools.update({"old", "new"}), "keep", "smol: generation 100."),
    ],
)
def test_what_happens_to_a_release_is_what_the_verdict_says(
    box: Box, change: Callable[[Box], None], word: str, reason: str
) -> None:
    change(box)
    verdict = judge_preset(box.bench().compare())
    assert (verdict.word, verdict.reasons[0][: len(reason)]) == (word, reason)


def ending_in_runs(
    monkeypatch: pytest.MonkeyPatch, box: Box, ends: dict[int, str], *, seen: bool = True
) -> None:
    """The server of a release ends in the run of this number, and is well once it is started anew.

    `seen`: the run itself comes to nothing for it.
    """
    runs, series, run = itertools.count(), box.series, box.run

    def ending(shape: Shape, count: int) -> Iterator[Timed]:
        if release := ends.get(next(runs)):
            assert box.release == release
            box.crashing.add(release)
            if seen:
                raise NotMeasured("HTTP 502: it ended")
        yield from series(shape, count)

    def started(command: Sequence[str] | None) -> None:
        box.crashing.clear()
        run(command)

    monkeypatch.setattr(box, "series", ending)
    monkeypatch.setattr(box, "run", started)


@pytest.mark.parametrize(("speed", "word"), [(30.0, "roll back"), (100.0, "keep")])
@pytest.mark.parametrize("busy", [True, False])
@pytest.mark.parametrize("at", [0, 3, 4, 7])
def test_a_release_that_ended_once_is_compared_with_all_the_same(
    box: Box, monkeypatch: pytest.MonkeyPatch, at: int, busy: bool, speed: float, word: str
) -> None:
    """Else one crash, of whatever reason, would keep any new release, however slow, or none.

    At each of these runs it is the old one that serves; its count stays until it is started anew.
    """
    box.speed["new"] = speed
    ending_in_runs(monkeypatch, box, {at: "old"}, seen=busy)
    found = box.bench().compare()
    assert judge_preset(found).word == word and len(found.generation) == 5
    assert found.old.health == found.trouble == ""


@pytest.mark.parametrize(
    ("ends", "word", "why"),
    [
        ({0: "old", 1: "new"}, "keep", "smol: generation 100."),
        ({0: "old", 4: "new"}, "keep", "smol: generation 100."),
        ({0: "old", 1: "new", 3: "new"}, "roll back", "smol: the new release is not healthy"),
        ({0: "old", 1: "new", 2: "old"}, "keep", f"{NOTHING} is not healthy: its server ended 1 times"),
        ({1: "new"}, "roll back", "smol: the new release is not healthy"),
        ({1: "new", 3: "old"}, "roll back", "smol: the new release is not healthy"),
    ],
)
def test_what_ended_the_current_release_may_end_the_new_one_too(
    box: Box, monkeypatch: pytest.MonkeyPatch, ends: dict[int, str], word: str, why: str
) -> None:
    """Another process that takes the memory, say: it is no fault of the one that it hits second."""
    ending_in_runs(monkeypatch, box, ends)
    verdict = judge_preset(box.bench().compare())
    assert verdict.word == word and verdict.reasons[0].startswith(why)


def test_a_release_that_ended_is_probed_anew(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that its end cut off is no answer."""
    answer, run = box.http, box.run

    def http(request: httpx.Request) -> httpx.Response:
        if box.log == ["start old"]:
            box.crashing.add("old")
            return httpx.Response(500, json={"error": {"message": "cut off"}})
        return answer(request)

    def started(command: Sequence[str] | None) -> None:
        box.crashing.clear()
        run(command)

    box.http = http  # type: ignore[method-assign]
    monkeypatch.setattr(box, "run", started)
    bench, said = box.bench(), list[str]()
    bench.tell = said.append
    found = bench.compare()
    assert judge_preset(found).word == "keep" and found.old == found.new == Behaviour()
    # No word of releases: with choose_draft both sides are the same one.
    assert said[0] == "smol: its server ended 1 times while it answered; once more"


@pytest.mark.parametrize(
    ("at", "change", "word"),
    [
        (0, lambda b: None, "keep"),
        (0, lambda b: b.no_tools.add("new"), "undecided"),
        (3, lambda b: None, "undecided"),  # it can serve: a pair was made
    ],
)
def test_a_release_that_ended_and_does_not_start_again_is_nothing_to_compare_with(
    box: Box, monkeypatch: pytest.MonkeyPatch, at: int, change: Callable[[Box], None], word: str
) -> None:
    runs, series = iter(range(99)), box.series

    def ending(shape: Shape, count: int) -> Iterator[Timed]:
        if next(runs) == at:
            box.crashing.add("old")
            box.failing["old"] = ["an Xid"]
        yield from series(shape, count)

    change(box)
    monkeypatch.setattr(box, "series", ending)
    verdict = judge_preset(box.bench().compare())
    assert (verdict.word, verdict.compared) == (word, at > 0 or word == "keep")
    assert ("the current release does not start: an Xid" in verdict.reasons[0]) == (at == 0)


def test_a_new_release_that_ended_once_is_not_tried_again(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(box, "serving", lambda: Serving(box.now, 1))  # both end
    box.crashing.update({"old", "new"})
    found = box.bench().compare()
    assert judge_preset(found).word == "undecided" and found.generation == ()
    assert box.log.count("run new") == 1


def test_a_release_that_started_before_and_does_not_again_leaves_it_open(box: Box) -> None:
    runs, start = iter(range(9)), box.run

    def run(command: Sequence[str] | None) -> None:
        if next(runs) == 2:
            box.failing["old"] = ["out of memory"]
        start(command)

    box.run = run  # type: ignore[method-assign]
    verdict = judge_preset(box.bench().compare())
    assert (verdict.word, verdict.compared) == ("undecided", True)
    assert "it started before and then did not: smol failed" in verdict.reasons[0]


@pytest.mark.parametrize("start", range(3))
def test_a_start_that_the_box_refuses_is_no_fault_of_a_release(box: Box, start: int) -> None:
    starts, run = iter(range(9)), box.run

    def refused(command: Sequence[str] | None) -> None:
        if next(starts) == start:
            raise NotMeasured("smol is refused: the GPU is out of service")
        run(command)

    box.run = refused  # type: ignore[method-assign]
    verdict = judge_preset(box.bench().compare())
    line = "smol could not be measured: smol is refused: the GPU is out of service"
    assert (verdict.word, verdict.reasons) == ("undecided", (line,))


def test_figures_of_another_program_count_for_nothing(box: Box) -> None:
    box.foreign = "/r/third/llama-server"
    found = box.bench().compare()
    assert found.generation == ()
    assert found.trouble == "/r/third/llama-server served instead of /r/old/llama-server"


def test_an_unsteady_box_is_measured_longer_but_not_for_ever(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = iter([100.0, 60, 160, 100, 90, 120, 70, 100, 130, 80] * 5)
    monkeypatch.setattr(
        box, "series", lambda shape, count: iter([Timed(1, 1000.0, 1, next(speeds), 0.0, 1.0)])
    )
    found = box.bench().compare()
    assert len(found.generation) == module.MOST_PAIRS
    assert judge_preset(found).word == "undecided"


def test_a_busy_gateway_is_asked_again_and_no_fault_of_the_release(box: Box) -> None:
    replies = [httpx.Response(503, json={}), httpx.Response(200, json={"a": 1})]
    bench = box.bench()
    bench.client = httpx.Client(
        transport=httpx.MockTransport(lambda _: replies.pop(0) if replies else httpx.Response(503)),
        base_url="http://box",
    )
    slept: list[float] = []
    bench.sleep = slept.append
    assert bench._ask("/x", {}) == {"a": 1}
    with pytest.raises(NotMeasured, match="HTTP 503"):
        bench._ask("/x", {})
    assert slept == [3.0] * 3, "once between the two, twice between the three"


@pytest.mark.parametrize(("status", "error"), [(429, NotMeasured), (502, NotMeasured), (400, Refused)])
def test_what_passes_is_told_from_what_is_refused(box: Box, status: int, error: type[Exception]) -> None:
    bench = box.bench()
    answer = httpx.MockTransport(lambda _: httpx.Response(status, json={"error": {"message": "so"}}))
    bench.client = httpx.Client(transport=answer, base_url="http://box")
    with pytest.raises(error, match="so"):
        bench._ask("/x", {})


@pytest.mark.parametrize(
    ("status", "fix"), [(401, "; fix: LLMBOX_KEY=KEY in the environment"), (403, ""), (429, "")]
)
@pytest.mark.parametrize("at", [0, 2, 5])
def test_who_is_not_let_in_has_compared_nothing(box: Box, status: int, fix: str, at: int) -> None:
    """With the right key the release may well be kept: it is neither undecided nor rejected.

    A key's tokens may be used up by the comparison itself, and a key may be replaced meanwhile.
    """
    asked, answer = itertools.count(), box.http

    def http(request: httpx.Request) -> httpx.Response:
        refused = httpx.Response(status, json={"error": {"message": "no"}})
        return refused if next(asked) >= at else answer(request)

    box.http = http  # type: ignore[method-assign]
    with pytest.raises(Unreachable) as error:
        box.bench().compare()
    assert str(error.value) == f"HTTP {status}: no{fix}"
    assert box.log[-1] == ("start old" if at < 3 else "start new")


@pytest.mark.parametrize("release", ["old", "new"])
@pytest.mark.parametrize("broken", [True, False])
def test_a_run_that_is_not_let_in_has_compared_nothing(
    box: Box, monkeypatch: pytest.MonkeyPatch, release: str, broken: bool
) -> None:
    series = box.series

    def stopped(shape: Shape, count: int) -> Iterator[Timed]:
        if box.release == release:
            raise NotLetIn("the key has used up its tokens_per_day")
        yield from series(shape, count)

    monkeypatch.setattr(box, "series", stopped)
    if broken and release == "new":
        box.failing["old"] = ["broken"]
    with pytest.raises(Unreachable, match="tokens_per_day"):
        box.bench().compare()


def test_a_release_is_probed_once(box: Box) -> None:
    asked: list[str] = []
    answer = box.http
    box.http = lambda request: asked.append(request.url.path) or answer(request)  # type: ignore
    box.bench().compare()
    assert asked == ["/v1/chat/completions", "/completion", "/completion"] * 2


@pytest.mark.parametrize(
    ("reply", "trouble"),
    [
        (answered(), ""),
        (answered(name="other"), "it called other(city, unit)"),
        (answered(arguments='{"city": "Oslo"}'), "it called get_weather(city)"),
        (answered(arguments="{"), "its answer is no tool call"),
        (
            {"choices": [{"message": {"content": "<tool_call>"}}]},
            "no tool_calls in its answer: '<tool_call>'",
        ),
        ({"choices": []}, "its answer is no tool call"),
        ([], "its answer is no tool call"),
    ],
)
def test_only_a_parsed_call_is_a_tool_call(reply: Any, trouble: str) -> None:
    assert tool_call_trouble(lambda *_: reply) == trouble


def test_the_cache_must_hold_the_prompt_when_it_is_sent_again() -> None:
    def answers(*hits: tuple[int, int]) -> Callable[[str, Mapping[str, Any]], Any]:
        left = list(hits)
        return lambda *_: {"timings": dict(zip(("cache_n", "prompt_n"), left.pop(0), strict=True))}

    assert prompt_cache_trouble(answers((0, 1000), (999, 1))) == ""
    assert prompt_cache_trouble(answers((0, 1000), (0, 1000), (999, 1))) == ""  # a client was in between
    lost = prompt_cache_trouble(answers((0, 1000), (1, 999), (100, 900)))
    assert lost == "of 1000 tokens of the same prompt 100 came from it"
    assert prompt_cache_trouble(answers((0, 1000), (900, 100))) == ""
    lost = prompt_cache_trouble(answers((0, 1000), *[(899, 101)] * 2))
    assert lost == "of 1000 tokens of the same prompt 899 came from it"
    assert "no timings" in prompt_cache_trouble(lambda *_: {})

    def refused(*_: Any) -> Any:
        raise Refused("HTTP 400: no")

    assert prompt_cache_trouble(refused) == tool_call_trouble(refused) == "HTTP 400: no"


def test_both_sides_have_the_same_flags() -> None:
    command = ["/opt/llama.cpp/up/current/bin/llama-server", "--ctx-size", "4096"]
    told = {"presets": {"smol": {"command": command}}}
    assert of_releases("smol", told, ("one", "two")) == (
        ["/opt/llama.cpp/up/releases/one/bin/llama-server", "--ctx-size", "4096"],
        ["/opt/llama.cpp/up/releases/two/bin/llama-server", "--ctx-size", "4096"],
    )
    assert of_releases("other", told, ("one", "two")) is None
    assert of_releases("smol", None, ("one", "two")) is None
    for other in (["/usr/bin/llama-server"], []):
        assert of_releases("smol", {"presets": {"smol": {"command": other}}}, ("one", "two")) is None


def test_a_build_without_presets_needs_no_host() -> None:
    box = SimpleNamespace(names=lambda _: [], config=None)
    assert module.compare(None, box, "up", ("one", "two"), print) == []  # type: ignore[arg-type]


class Presets:
    """A box with presets of two builds, one of which it does not know; what was measured is kept."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, speeds: Mapping[str, float]) -> None:
        self.speeds, self.measured, self.keys = speeds, list[str](), list[str | None]()
        builds = {"a": "up", "other": "tq3", "unknown": "up", "b": "up", "c": "up"}
        known = {name: {"command": ["/o/current/bin/llama-server"]} for name in builds.keys() - {"unknown"}}
        self.box: Any = SimpleNamespace(
            names=lambda _scope: list(builds),
            config=SimpleNamespace(llama_presets={n: SimpleNamespace(build=b) for n, b in builds.items()}),
            front=SimpleNamespace(host="127.0.0.1", port=1234),
            request=dict,
            slot_context=lambda _preset: 32768,
        )
        monkeypatch.setattr(module, "ask", lambda *_, **__: {"llm": {"presets": {"presets": known}}})
        monkeypatch.setattr(module, "reach", lambda *_: nullcontext("http://box"))
        monkeypatch.setattr(module, "trial", lambda _host, preset: nullcontext(preset))
        monkeypatch.setattr(module, "Bench", self.bench)

    def bench(self, _held: Any, client: httpx.Client, _meter: Any, preset: str, *_: Any) -> Any:
        self.measured.append(preset)
        self.keys.append(client.headers.get("authorization"))
        if preset not in self.speeds:
            raise TrialFailed("the lock was lost", [])
        pairs = ((100.0, self.speeds[preset]),) * 5
        return SimpleNamespace(compare=lambda: Comparison(preset, generation=pairs, prefill=pairs))

    def compare(self) -> list[Comparison]:
        host: Any = None
        return module.compare(host, self.box, "up", ("one", "two"), lambda _: None)


def test_presets_of_the_build_are_compared_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLMBOX_KEY", raising=False)
    presets = Presets(monkeypatch, {"a": 100.0, "b": 100.0, "c": 100.0})
    found = presets.compare()
    assert [one.preset for one in found] == ["a", "unknown", "b", "c"]
    assert [one.known for one in found] == [True, False, True, True]
    assert presets.measured == ["a", "b", "c"] and presets.keys == [None] * 3


def test_the_first_that_speaks_against_the_new_release_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    presets = Presets(monkeypatch, {"a": 100.0, "b": 50.0, "c": 100.0})
    assert [one.preset for one in presets.compare()] == ["a", "unknown", "b"]


def test_one_that_cannot_be_measured_does_not_keep_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMBOX_KEY", "k")
    presets = Presets(monkeypatch, {"b": 100.0, "c": 100.0})
    found = presets.compare()
    assert [one.preset for one in found] == ["a", "unknown", "b", "c"] and "lock was lost" in found[0].trouble
    assert presets.keys == ["Bearer k"] * 3
