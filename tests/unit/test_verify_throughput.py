"""verify_throughput: figures against floors and the past, exit codes, screen, JSON, and the way back."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from llama_common.presets import Expect

from scripts import _history_chart, verify_throughput
from scripts._ask_host import Unreachable
from scripts._gpu_watch import GpuWatch
from scripts._history import History, Run
from scripts._inventory import Host
from scripts._measure import ALONE
from scripts._statistics import BASELINE_LEAST
from scripts.verify_throughput import RUNS, figures
from tests.unit.test_verify_health import RELEASE, VARIABLES, seen

EXPECT = Expect.model_validate(
    {"generation_tok_s": {"target": 100.0, "floor": 60.0}, "prefill_tok_s": {"target": 500.0}}
)
RUN = Run("2026-11-22T10:00:00+00:00", "one", "short", "r", "none", 1550, 500.0, 400, 100.0)


def runs(count: int, speed: float = 100.0) -> list[Run]:
    """Runs that vary by 1 % around `speed`."""
    return [replace(RUN, generation_tok_s=speed * (0.99 + 0.01 * (number % 3))) for number in range(count)]


def checks(made: list[Run], before: list[Run]) -> dict[str, Any]:
    found = figures("one", EXPECT, made, [*before, *made])
    return {check.name: check for figure in found for check in figure.checks()}


def test_the_best_run_is_held_against_the_floor() -> None:
    found = checks(runs(RUNS), [])
    assert all(check.ok for check in found.values())
    assert (found["one.generation"].value, found["one.generation"].limit) == (101.0, 60.0)
    assert found["one.generation"].detail == "target 100 tok/s, +1.0%"
    assert found["one.prefill"].limit is None
    slow = checks(runs(RUNS, 50.0), [])["one.generation"]
    assert not slow.ok and "floor of 60 tok/s in llama_presets.one.expect.generation_tok_s" in slow.detail
    assert checks(runs(RUNS - 1, 50.0) + runs(1, 61.0), [])["one.generation"].ok, "the best counts"


def test_the_newest_runs_are_held_against_the_boxs_own_past() -> None:
    past = runs(30)
    assert checks(runs(RUNS), past)["one.generation_trend"].ok
    slower = checks(runs(RUNS, 88.0), past)
    trend = slower["one.generation_trend"]
    assert slower["one.generation"].ok and not trend.ok
    assert "-12.0% beside 100.0 tok/s of 30 runs" in trend.detail and "fix: " in trend.detail
    assert trend.limit is not None and 90 < float(trend.limit) < 98
    assert slower["one.prefill_trend"].ok


def test_another_release_or_driver_begins_a_new_past() -> None:
    for past in ([replace(run, release="old") for run in runs(30)], runs(BASELINE_LEAST - 1)):
        trend = checks(runs(RUNS, 50.0), past)["one.generation_trend"]
        assert trend.ok and trend.limit is None and "no baseline yet" in trend.detail


def test_a_noisy_past_says_what_it_can_see() -> None:
    past = [replace(RUN, generation_tok_s=100.0 * (0.8 + 0.1 * (number % 5))) for number in range(40)]
    detail = checks(runs(RUNS, 95.0), past)["one.generation_trend"].detail
    assert "a slowdown of " in detail and "vary too much for a finer verdict (±13" in detail
    past = [replace(RUN, generation_tok_s=100.0 * (0.2 + 0.4 * (number // RUNS % 5))) for number in range(40)]
    assert "no slowdown could be told" in checks(runs(RUNS, 95.0), past)["one.generation_trend"].detail


def test_deep_runs_have_figures_of_their_own_without_a_target() -> None:
    deep = [replace(run, shape="deep") for run in runs(RUNS, 55.0)]
    found = checks([*runs(RUNS), *deep], [])
    assert set(found) == {
        f"one.{name}{depth}{trend}"
        for name in ("generation", "prefill")
        for depth in ("", "_deep")
        for trend in ("", "_trend")
    }
    assert found["one.generation_deep"].limit is None and found["one.generation_deep"].ok


def test_what_the_gpu_did_is_information() -> None:
    gpu = {"utilization_percent": 96.0, "power_w": 281.5, "temperature_c": 71.0, "memory_mib": 14012.0}
    made = [replace(run, gpu=gpu) for run in runs(3)]
    found = verify_throughput.gpu_checks("one", made, "")
    assert [(check.name, check.value, check.unit) for check in found] == [
        ("one.gpu_utilization", 96.0, "%"),
        ("one.gpu_power", 281.5, "W"),
        ("one.gpu_temperature", 71.0, "°C"),
        ("one.gpu_memory", 14012.0, "MiB"),
    ]
    line = verify_throughput.gpu_line(found, "one")
    assert line == "one: GPU: utilization 96.0 %, power 281.5 W, temperature 71.0 °C, memory 14012.0 MiB"
    (absent,) = verify_throughput.gpu_checks("one", runs(3), "no NVIDIA GPU")
    assert absent.ok and verify_throughput.gpu_line([absent], "one") == "one: GPU: no NVIDIA GPU"


# --- a whole run, with a gateway and a host that say what a test wants ---


class FakeGateway:
    """Serves the preset that was asked for last, each at its own speed.

    `gpu` is what is seen of a card in a run; it becomes 1 °C cooler by each. Without it there is none.
    """

    def __init__(self) -> None:
        self.gpu: dict[str, Any] = {}
        self.watch = GpuWatch()
        self.keys: set[str | None] = set()
        self.active: str | None = "two"
        self.speed = {"one": 100.0, "two": 100.0}
        self.refused: set[str] = set()
        self.asked: list[str] = []
        self.trial_from = 1000  # requests

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        preset = body["model"]
        self.keys.add(request.headers.get("authorization"))
        self.asked.append(f"{request.url.path} {preset}")
        if preset in self.refused:
            return httpx.Response(503, json={"error": {"message": f"{preset} does not start"}})
        self.active = preset
        if request.url.path == "/tokenize":
            return httpx.Response(200, json={"tokens": body["content"].split()})
        if self.gpu:
            self.gpu["temperature_c"] -= 1
            self.watch.add(time.monotonic(), dict(self.gpu))
        timings = {
            "cache_n": 0,
            "prompt_n": 1550,
            "prompt_per_second": 500.0,
            "predicted_n": body["n_predict"],
            "predicted_per_second": self.speed[preset],
        }
        return httpx.Response(200, json={"timings": timings}, headers={ALONE: "7"})


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeGateway:
    """A box whose two presets have floors; what goes over ssh is answered here."""
    fake = FakeGateway()
    expect = {"generation_tok_s": {"target": 90.0, "floor": 60.0}}
    presets = {name: {**preset, "expect": expect} for name, preset in VARIABLES["llama_presets"].items()}
    host = Host("box", frozenset({"llm_servers"}), {**VARIABLES, "llama_presets": presets})
    client = httpx.Client

    def asked(_host: Host, _request: object, *, become: bool) -> dict[str, Any]:
        found = seen()
        found["status"]["active"] = fake.active
        found["status"] |= {"on_trial": True} if len(fake.asked) >= fake.trial_from else {}
        return {"llm": found}

    @contextmanager
    def reached(*_: object) -> Iterator[str]:
        yield "http://box"

    @contextmanager
    def watched(_: Host) -> Iterator[GpuWatch]:
        fake.watch = GpuWatch()
        fake.watch.add(0.0, dict(fake.gpu) or {"absent": True})
        yield fake.watch

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(verify_throughput, "load", lambda *_, **__: [host, Host("other")])
    monkeypatch.setattr(verify_throughput, "ask", asked)
    monkeypatch.setattr(verify_throughput, "reach", reached)
    monkeypatch.setattr(verify_throughput, "watched", watched)
    monkeypatch.setattr("scripts._measure.PAUSE_S", 0.0)
    monkeypatch.setattr(
        httpx,
        "Client",
        lambda **options: client(transport=httpx.MockTransport(fake), **options),
    )
    return fake


RUN_ALL = ["--inventory", "inventory/lab"]


def test_every_preset_is_measured_and_the_former_one_serves_again(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "report.json"
    assert verify_throughput.main([*RUN_ALL, "--json", str(file)]) == 0
    assert gateway.active == "two"
    shown = capsys.readouterr()
    assert "box: one short 5/5: prefill 500.0 tok/s of 1550 tokens, generation 100.0 tok/s" in shown.err
    rows = [line.split()[:4] for line in shown.out.splitlines()]
    assert ["box", "two", "prefill_deep", "500.0"] in rows and "no NVIDIA GPU" in shown.out
    report = json.loads(file.read_text())
    assert report["ok"] and [host["host"] for host in report["hosts"]] == ["box"]
    named = {check["name"]: check for check in report["hosts"][0]["checks"]}
    assert named["one.measured"]["value"] == 2 * RUNS
    assert all(set(check) == {"name", "ok", "value", "unit", "limit", "detail"} for check in named.values())
    kept = History.of(Path("inventory/lab"), "box").runs()
    assert len(kept) == 4 * RUNS
    assert {(run.preset, run.shape) for run in kept} == {
        (p, s) for p in ("one", "two") for s in ("short", "deep")
    }
    assert kept[0].release == Path(RELEASE).name and kept[0].driver == "none"
    for name in ("one", "two"):
        picture = next(line for line in shown.out.splitlines() if line.endswith(f"box-{name}.png"))
        assert Path(picture.removeprefix("chart: ")).read_bytes().startswith(b"\x89PNG")


def test_a_floor_that_is_missed_is_exit_code_1_with_preset_figure_and_floor(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.speed["two"] = 59.0
    assert verify_throughput.main(RUN_ALL) == 1
    out = capsys.readouterr().out
    assert "box: two.generation = 59.0 tok/s, wanted 60.0 tok/s: " in out and "one.generation =" not in out


def test_a_slowdown_since_earlier_runs_is_exit_code_1(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    only = [*RUN_ALL, "--preset", "one"]
    for _ in range(BASELINE_LEAST // RUNS + 1):
        assert verify_throughput.main(only) == 0
    gateway.speed["one"] = 90.0
    assert verify_throughput.main(only) == 1
    assert "slower -10.0%" in capsys.readouterr().out


CARD = {
    "driver": "580.95.05",
    "utilization_percent": 96.0,
    "power_w": 281.5,
    "temperature_c": 60.0,
    "memory_mib": 14012.0,
}


def test_what_the_card_did_is_kept_with_its_run_and_shown(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMBOX_KEY", "k")
    gateway.gpu = dict(CARD)
    assert verify_throughput.main([*RUN_ALL, "--preset", "one"]) == 0
    assert gateway.keys == {"Bearer k"}
    kept = History.of(Path("inventory/lab"), "box").runs()
    assert {run.driver for run in kept} == {"580.95.05"}
    seen = [dict(run.gpu or {}) for run in kept]
    heat = [gpu.pop("temperature_c") for gpu in seen]
    assert heat == [58.0 - run for run in range(2 * RUNS)], "the first run was warm-up"
    assert seen == [{"utilization_percent": 96.0, "power_w": 281.5, "memory_mib": 14012.0}] * (2 * RUNS)
    line = "box: one: GPU: utilization 96.0 %, power 281.5 W, temperature 53.5 °C, memory 14012.0 MiB"
    assert line in capsys.readouterr().out


def test_a_new_driver_begins_a_new_past(gateway: FakeGateway) -> None:
    """It is no fault of the box what another driver makes of it."""
    only = [*RUN_ALL, "--preset", "one"]
    gateway.gpu = dict(CARD)
    for _ in range(BASELINE_LEAST // RUNS + 1):
        assert verify_throughput.main(only) == 0
    gateway.speed["one"] = 90.0
    gateway.gpu["driver"] = "590.10"
    assert verify_throughput.main(only) == 0
    gateway.gpu["driver"] = CARD["driver"]
    assert verify_throughput.main(only) == 1


def test_only_the_presets_that_were_named(gateway: FakeGateway) -> None:
    assert verify_throughput.main([*RUN_ALL, "--preset", "two"]) == 0
    assert {one.split()[1] for one in gateway.asked} == {"two"}


def test_an_unknown_preset_is_refused_before_anything_is_measured(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify_throughput.main([*RUN_ALL, "--preset", "three"]) == 2
    assert "--preset three: no such preset; give one of one, two" in capsys.readouterr().err
    assert gateway.asked == []


def test_a_preset_that_cannot_be_measured_fell_short_and_the_others_are_measured(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.refused.add("one")
    assert verify_throughput.main(RUN_ALL) == 1
    out = capsys.readouterr().out
    assert "box: one.measured = 0 runs, wanted 10 runs: HTTP 503: one does not start" in out
    assert "two.generation" not in out and out.count(" two ") == 4


def test_what_was_off_is_switched_off_again(gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway.active = None
    commands: list[str] = []

    def ssh(_: Host, command: str) -> list[str]:
        commands.append(command)
        return [sys.executable, "-c", ""]

    monkeypatch.setattr(Host, "ssh", ssh)
    assert verify_throughput.main([*RUN_ALL, "--preset", "one"]) == 0
    assert commands == ["sudo -n -u llm lmswitch off"]


@pytest.mark.parametrize("words", [["--preset", "one"], []], ids=["one preset", "the last one served before"])
def test_an_interruption_goes_back_too(
    words: list[str], gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verify_throughput, "kept", interrupted)
    with pytest.raises(KeyboardInterrupt):
        verify_throughput.main([*RUN_ALL, *words])
    assert gateway.active == "two"


def test_a_last_preset_that_is_never_woken_is_no_way_back(
    gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its slots may be too small for the prompt: then the one before it is left serving."""

    def too_small(box: verify_throughput.Box, preset: str, tell: verify_throughput.Tell) -> Any:
        if preset == "two":
            return [], []
        return measured(box, preset, tell)

    measured = verify_throughput.measure_preset
    monkeypatch.setattr(verify_throughput, "measure_preset", too_small)
    verify_throughput.main(RUN_ALL)
    assert gateway.asked[-1] == "/tokenize two" and gateway.active == "two"


@pytest.mark.parametrize(("requests", "kept"), [(0, 0), (3, 0), (4, 1), (6, 3)])
def test_runs_of_what_is_on_trial_are_not_kept(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str], requests: int, kept: int
) -> None:
    """Its flags or its release are not those that the box's own past is of."""
    gateway.trial_from = requests
    assert verify_throughput.main([*RUN_ALL, "--preset", "two"]) == 1
    assert len(History.of(Path("inventory/lab"), "box").runs()) == kept
    said = capsys.readouterr()
    assert "a measurement tries other flags or releases; to end it: systemctl" in said.out + said.err


def test_a_host_that_cannot_be_asked_is_exit_code_2(
    gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise Unreachable("no route to host")

    monkeypatch.setattr(verify_throughput, "ask", unreachable)
    assert verify_throughput.main([*RUN_ALL, "--json", "-"]) == 2
    assert json.loads(capsys.readouterr().out)["hosts"][0]["error"] == "no route to host"


def test_a_box_whose_state_is_unknown_is_not_touched(
    gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verify_throughput, "ask", lambda *_, **__: {"llm": {"status": None}})
    assert verify_throughput.main(RUN_ALL) == 2
    assert "lmswitch status --json gave no answer" in capsys.readouterr().out
    assert gateway.asked == []


def test_an_inventory_without_an_llm_box_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verify_throughput, "load", lambda *_, **__: [Host("other")])
    assert verify_throughput.main(RUN_ALL) == 2
    assert "none of the hosts is in the group llm_servers" in capsys.readouterr().err


# --- the chart ---


def test_the_chart_has_a_panel_for_each_figure_and_marks_a_new_release() -> None:
    made = [*runs(3), *[replace(run, release="new", generation_tok_s=90.0) for run in runs(3)]]
    generation, prefill = _history_chart.panels(EXPECT, made)
    assert generation.breaks == [3] and len(generation.values) == 6
    assert generation.lines == [(90.0, "median"), (100.0, "target"), (60.0, "floor")]
    assert prefill.lines[1:] == [(500.0, "target")]
    assert generation.title.startswith("generation, short prompt of 1550 tokens, 6 runs, 2026-11-22")
    deep = [replace(run, shape="deep") for run in made]
    assert [len(panel.lines) for panel in _history_chart.panels(EXPECT, [*made, *deep])] == [3, 2, 1, 1]
    with pytest.raises(ValueError, match="at least one run"):
        _history_chart.draw("x", EXPECT, [])
