"""The meter: what counts as a run, what is thrown away, what is repeated, and when it gives up."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from scripts import _measure
from scripts._measure import ALONE, Meter, NotLetIn, NotMeasured, Shape, prompt, shapes

SHAPE = Shape("short", 100, 40)
TIMINGS = {
    "cache_n": 0,
    "prompt_n": 110,
    "prompt_per_second": 500.0,
    "predicted_n": 40,
    "predicted_per_second": 80.0,
}


class FakeGateway:
    """Answers measurements with `answers` one after the other, the last one for ever; `pids` likewise."""

    def __init__(self, *answers: dict[str, Any] | int | Exception) -> None:
        self.answers = list(answers or [{}])
        self.pids: list[int] = [7]
        self.asked: list[dict[str, Any]] = []
        self.leases = True

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        assert body["model"] == "smol"
        if request.url.path == "/tokenize":
            return httpx.Response(200, json={"tokens": [1] * len(body["content"].split()) * 2})
        assert request.headers[ALONE]
        self.asked.append(body)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        pid = self.pids.pop(0) if len(self.pids) > 1 else self.pids[0]
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, int):
            return httpx.Response(answer, json={"error": {"message": "no turn"}})
        headers = {ALONE: str(pid)} if self.leases else {}
        return httpx.Response(200, json={"timings": {**TIMINGS, **answer}}, headers=headers)


@pytest.fixture
def slept() -> list[float]:
    return []


@pytest.fixture
def meter(slept: list[float]) -> Callable[[FakeGateway], Meter]:
    def made(gateway: FakeGateway) -> Meter:
        client = httpx.Client(base_url="http://box", transport=httpx.MockTransport(gateway))
        return Meter(client, "smol", sleep=slept.append)

    return made


def test_the_first_run_of_a_server_is_thrown_away(meter: Callable[[FakeGateway], Meter]) -> None:
    gateway = FakeGateway({"predicted_per_second": 1.0}, {})
    runs = list(meter(gateway).series(SHAPE, 3))
    assert [run.generation_tok_s for run in runs] == [80.0] * 3
    assert len(gateway.asked) == 4
    assert (runs[0].prompt_tokens, runs[0].prefill_tok_s, runs[0].generated_tokens) == (110, 500.0, 40)


def test_after_a_restart_the_first_run_is_thrown_away_again(meter: Callable[[FakeGateway], Meter]) -> None:
    gateway = FakeGateway()
    gateway.pids = [7, 7, 8, 8]
    assert len(list(meter(gateway).series(SHAPE, 2))) == 2
    assert len(gateway.asked) == 4


def test_no_prompt_is_like_another_from_its_first_word_on(meter: Callable[[FakeGateway], Meter]) -> None:
    gateway = FakeGateway()
    list(meter(gateway).series(SHAPE, 4))
    starts = {body["prompt"].split()[0] for body in gateway.asked}
    assert len(starts) == len(gateway.asked) == 5
    assert all(body["prompt"].endswith("in exactly 5 paragraphs") for body in gateway.asked)
    for body in gateway.asked:
        wanted = {"n_predict": 40, "temperature": 0.2, "cache_prompt": False, "ignore_eos": True}
        assert body.items() >= wanted.items()
        assert len(body["prompt"].split()) == pytest.approx(SHAPE.prompt / 2, abs=10), "two tokens a word"


def test_the_words_are_the_same_in_another_order() -> None:
    one, other = (sorted(prompt(50, nonce).split()[1:]) for nonce in ("a", "b"))
    assert one == other
    assert prompt(50, "a").split()[1:] != prompt(50, "b").split()[1:]


@pytest.mark.parametrize("trouble", [503, 502, 429, httpx.ReadError("the connection was closed")])
def test_a_disturbed_run_is_repeated(
    meter: Callable[[FakeGateway], Meter], slept: list[float], trouble: int | Exception
) -> None:
    gateway = FakeGateway({}, trouble, trouble, {})
    assert len(list(meter(gateway).series(SHAPE, 2))) == 2
    assert slept == [_measure.PAUSE_S] * 2


def test_a_box_that_is_never_free_is_given_up_with_the_reason(
    meter: Callable[[FakeGateway], Meter], slept: list[float]
) -> None:
    gateway = FakeGateway(503)
    with pytest.raises(NotMeasured, match=r"no run of 10 was undisturbed; the last: HTTP 503: no turn"):
        list(meter(gateway).series(SHAPE, 2))
    assert len(gateway.asked) == _measure.ATTEMPTS and len(slept) == _measure.ATTEMPTS - 1


def test_whoever_measures_may_have_no_more_of_it(slept: list[float]) -> None:
    def ended(why: str) -> None:
        raise RuntimeError(why)

    client = httpx.Client(base_url="http://box", transport=httpx.MockTransport(FakeGateway(503)))
    with pytest.raises(RuntimeError, match="HTTP 503: no turn"):
        list(Meter(client, "smol", sleep=slept.append, disturbed=ended).series(SHAPE, 1))
    assert slept == []


def test_a_server_that_restarts_between_warm_up_and_run_is_a_disturbance(
    meter: Callable[[FakeGateway], Meter],
) -> None:
    gateway = FakeGateway()
    gateway.pids = [7, 8, 8, 8]
    assert len(list(meter(gateway).series(SHAPE, 1))) == 1
    assert len(gateway.asked) == 4


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"cache_n": 3}, "3 tokens of the prompt came from a cache"),
        ({"predicted_n": 12}, "12 tokens of 40"),
        ({"predicted_per_second": 0.0}, "generated"),
        ({"prompt_n": None}, "no timings"),
        (400, "HTTP 400: no turn"),
        (401, "LLMBOX_KEY"),
    ],
)
def test_what_is_no_honest_measurement_is_none(
    meter: Callable[[FakeGateway], Meter], answer: dict[str, Any] | int, said: str
) -> None:
    with pytest.raises(NotMeasured, match=said):
        list(meter(FakeGateway(answer)).series(SHAPE, 1))


@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize(
    ("status", "times", "let_in"), [(401, 1, False), (403, 1, False), (429, 10, False), (503, 10, True)]
)
def test_who_is_not_let_in_is_told_from_a_server_that_does_not_answer(
    meter: Callable[[FakeGateway], Meter], at: int, status: int, times: int, let_in: bool
) -> None:
    gateway = FakeGateway(*[{}] * at, status)
    with pytest.raises(NotMeasured, match=f"HTTP {status}: no turn") as error:
        list(meter(gateway).series(SHAPE, 9))
    assert isinstance(error.value, NotLetIn) != let_in and len(gateway.asked) == at + times


def test_who_is_not_let_in_when_a_preset_is_to_serve_is_told_so() -> None:
    client = httpx.Client(base_url="http://box", transport=httpx.MockTransport(lambda _: httpx.Response(429)))
    with pytest.raises(NotLetIn, match="HTTP 429"):
        Meter(client, "smol").wake()


def test_a_gateway_without_leases_is_named(meter: Callable[[FakeGateway], Meter]) -> None:
    gateway = FakeGateway()
    gateway.leases = False
    with pytest.raises(NotMeasured, match=r"gives no leases.*site\.yml"):
        list(meter(gateway).series(SHAPE, 1))


def test_a_preset_that_does_not_start_is_told_with_the_gateways_reason() -> None:
    def refuse(_: httpx.Request) -> httpx.Response:
        return httpx.Response(503, json={"error": {"message": "start it with: lmswitch smol"}})

    client = httpx.Client(base_url="http://box", transport=httpx.MockTransport(refuse))
    with pytest.raises(NotMeasured, match="HTTP 503: start it with: lmswitch smol"):
        Meter(client, "smol").wake()


@pytest.mark.parametrize(
    ("context", "prompts"),
    [(98304, [1536, 16384]), (8192, [1536, 7936]), (4096, [1536, 3840]), (2304, [1536])],
)
def test_the_deep_run_fills_what_the_context_has(context: int, prompts: list[int]) -> None:
    assert [shape.prompt for shape in shapes(context)] == prompts
    assert all(shape.prompt + shape.generate < context for shape in shapes(context))


def test_a_context_without_room_is_told_with_the_least() -> None:
    with pytest.raises(NotMeasured, match=r"2048 tokens has no room .* it needs 2064"):
        shapes(2048)
