"""verify_throughput on the lab: real runs, alone on the server, beside clients that lose nothing by it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scripts import _measure, verify_throughput
from scripts._history import History
from scripts._inventory import Host
from scripts._llm_box import LlmBox
from scripts._traffic import clients_beside
from tests.support import LAB_INVENTORY, LLM, Run, expected_host

pytestmark = pytest.mark.usefixtures("lab")

OnHost = Callable[..., Run]
HIGH = 100_000.0


@pytest.fixture
def preset(on_host: OnHost, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The preset to measure, with runs so short that a slow machine ends them before their lease does."""
    for name, tokens in {
        "SHORT_TOKENS": 96,
        "SHORT_GENERATE": 16,
        "DEEP_TOKENS": 192,
        "DEEP_GENERATE": 8,
    }.items():
        monkeypatch.setattr(_measure, name, tokens)
    monkeypatch.setattr(verify_throughput, "RUNS", 3)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    before = json.loads(on_host(LLM, "sudo -u llm lmswitch status --json").check().stdout)["active"]
    yield "smol"
    on_host(LLM, f"sudo -u llm lmswitch {before or 'off'}", timeout=240)


def with_floor(floor: float) -> Host:
    """The LLM host with another floor under the generation of every preset: above, or below any real box."""
    host = expected_host()
    presets: dict[str, Any] = host.variables["llama_presets"]
    expect = {"generation_tok_s": {"target": HIGH, "floor": floor}}
    changed = {name: {**data, "expect": expect} for name, data in presets.items()}
    return replace(host, variables={**host.variables, "llama_presets": changed})


def verify(
    host: Host, preset: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit code, and the checks by name."""
    monkeypatch.setattr(verify_throughput, "load", lambda *_, **__: [host])
    argv = ["--inventory", str(LAB_INVENTORY), "--preset", preset, "--json", "-"]
    code = verify_throughput.main(argv)
    (report,) = json.loads(capsys.readouterr().out)["hosts"]
    assert report["error"] is None
    return code, {check["name"]: check for check in report["checks"]}


def test_runs_are_measured_beside_clients_that_lose_nothing(
    preset: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    host = with_floor(0.01)
    box = LlmBox.of(host.variables)
    with clients_beside(box.url(host.address), [preset], clients=2, pause_s=0.2) as traffic:
        code, checks = verify(host, preset, monkeypatch, capsys)
    assert code == 0, checks
    assert checks[f"{preset}.measured"]["value"] == 6
    assert checks[f"{preset}.gpu"]["detail"] == "no NVIDIA GPU: nvidia-smi is not installed"
    for name in ("generation", "prefill", "generation_deep", "prefill_deep"):
        assert checks[f"{preset}.{name}"]["value"] > 0
    runs = History.of(LAB_INVENTORY, LLM).runs()
    assert [run.shape for run in runs] == ["short"] * 3 + ["deep"] * 3
    assert {run.driver for run in runs} == {"none"} and len({run.release for run in runs}) == 1
    assert runs[0].release.startswith(box.commits()["tq3"])
    assert min(run.prompt_tokens for run in runs if run.shape == "deep") > 192
    print(traffic.summary())
    assert traffic.sent and not traffic.failed
    hold = float(host.variables["llm_gateway_hold_timeout"])
    assert max(one.waited_ms for one in traffic.sent) < 1000 * hold


def test_a_floor_that_no_box_reaches_is_exit_code_1_and_named(
    preset: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, checks = verify(with_floor(HIGH), preset, monkeypatch, capsys)
    assert code == 1
    assert [name for name, check in checks.items() if not check["ok"]] == [f"{preset}.generation"]
    short = checks[f"{preset}.generation"]
    assert (short["unit"], short["limit"]) == ("tok/s", HIGH) and 0 < short["value"] < HIGH
    assert f"llama_presets.{preset}.expect.generation_tok_s" in short["detail"]
