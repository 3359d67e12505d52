"""tune_moe on the lab's CPU: real servers with other threads and batches, the box as it was afterwards."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts import _tuning, tune_moe
from scripts._search import Axis, Found, Measure, Setting
from scripts._traffic import clients_beside
from scripts._trial import TrialFailed, trial
from tests.support import LAB_INVENTORY, LLM, ROOT, Run, environment, expected, expected_host

pytestmark = pytest.mark.usefixtures("lab")

OnHost = Callable[..., Run]
PRESET = "smol"
DEPTH = 96
ARGUMENTS = ["--inventory", str(LAB_INVENTORY), "--limit", LLM, "--preset", PRESET]
BACK_S = 300
MOST_RUNS = 11  # of 14: the search needs 6 to 8, and of 20,000 noisy surfaces 9 made it need more than this
LARGE = "1000000000"  # tokens of context, for which no machine has the memory


def command(on_host: OnHost) -> list[str]:
    """What the one llama-server runs."""
    found = on_host(LLM, "sudo cat /proc/$(pgrep -o -x llama-server)/cmdline").check()
    return found.stdout.rstrip("\0").split("\0")


def left(on_host: OnHost) -> str:
    """What is left of a trial."""
    return on_host(LLM, "sudo find /run/user -name '*llmbox-trial.conf'").stdout.strip()


@pytest.fixture
def serving(on_host: OnHost, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """What the preset runs by itself; it serves."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(tune_moe, "DEEP_GENERATE", 16)  # a slow machine ends it before the lease does
    monkeypatch.setattr(_tuning, "RUNS", 1)
    before = json.loads(on_host(LLM, "sudo -u llm lmswitch status --json").check().stdout)["active"]
    on_host(LLM, f"sudo -u llm lmswitch {PRESET}", timeout=240).check()
    yield command(on_host)
    on_host(LLM, f"sudo -u llm lmswitch {before or 'off'}", timeout=240)


def tune(report: Path, *words: str) -> tuple[int, dict[str, Any]]:
    """Exit code and report."""
    code = tune_moe.main([*ARGUMENTS, "--depth", str(DEPTH), "--json", str(report), *words])
    return code, json.loads(report.read_text())


def test_threads_are_searched_beside_clients_that_lose_nothing(
    serving: list[str], on_host: OnHost, tmp_path: Path
) -> None:
    host, box = expected_host(), expected()
    with clients_beside(box.url(host.address), [PRESET], clients=1, pause_s=0.5) as traffic:
        code, report = tune(tmp_path / "report.json", "--axis", "threads=1,2")
    assert code == 0, report
    first = [point for point in report["points"] if not point["again"]]
    assert [point["outcome"] for point in first] == ["measured"] * 2
    assert {point["setting"]["threads"] for point in first} == {1, 2}
    assert all(len(point["generation"]) == 1 for point in first)
    assert traffic.sent and not traffic.failed, traffic.summary()
    hold = float(host.variables["llm_gateway_hold_timeout"])
    assert max(one.waited_ms for one in traffic.sent) < 1000 * hold
    assert command(on_host) == serving and left(on_host) == ""
    # A second run knows all of it.
    code, again = tune(tmp_path / "report.json", "--axis", "threads=1,2")
    assert code == 0 and again["points"] == report["points"]


@pytest.mark.long
def test_memory_that_does_not_suffice_is_told_apart(serving: list[str], on_host: OnHost) -> None:
    at = serving.index("--ctx-size")
    larger, unknown = [*serving[: at + 1], LARGE, *serving[at + 2 :]], [*serving, "--no-such-flag"]
    with trial(expected_host(), PRESET) as held:
        for words, memory in ((larger, True), (unknown, False)):
            with pytest.raises(TrialFailed) as raised:
                held.run(words)
            assert raised.value.out_of_memory is memory, raised.value.reason
    assert command(on_host) == serving


@pytest.mark.long
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT])
def test_the_box_goes_back_when_the_search_is_ended(
    serving: list[str], on_host: OnHost, signum: int, tmp_path: Path
) -> None:
    said = tmp_path / "said"
    with said.open("wb") as file:
        process = subprocess.Popen(
            [
                sys.executable,
                "scripts/tune_moe.py",
                *ARGUMENTS,
                "--depth",
                str(DEPTH),
                "--axis",
                "threads=1,2",
            ],
            cwd=ROOT,
            env=environment(XDG_STATE_HOME=str(tmp_path)),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        try:
            # The second setting is the other one: its server runs, or is about to.
            wait(lambda: b": 2: threads" in said.read_bytes() or process.poll() is not None)
            assert process.poll() is None, said.read_text()
            os.killpg(process.pid, signum)
            process.wait(BACK_S)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait(30)
    wait(lambda: left(on_host) == "" and command(on_host) == serving)
    assert json.loads(on_host(LLM, "sudo -u llm lmswitch status --json").stdout)["active"] == PRESET
    assert signum == signal.SIGKILL or process.returncode == 130


@pytest.mark.long
def test_the_search_beside_every_setting(
    serving: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads and batches together. How near it comes is printed: a lab on a busy machine proves no ratio.

    What it comes to where nothing disturbs is proven in tests/unit/test_search.py.
    """
    words = ["--axis", "threads=1,2", "--axis", "ubatch=32,64,128,256,512,768,1024"]
    code, report = tune(tmp_path / "report.json", *words)
    assert code == 0 and not any(point["outcome"] == "failed" for point in report["points"])

    def everywhere(axes: tuple[Axis, ...], start: Setting, measure: Measure) -> Found:
        names = [axis.name for axis in axes]
        settings = [
            dict(zip(names, values, strict=True))
            for values in itertools.product(*(axis.values for axis in axes))
        ]
        speeds = {json.dumps(setting): measure(setting) or 0.0 for setting in settings}
        best = max(speeds, key=speeds.__getitem__)
        return Found(json.loads(best), speeds[best], finished=True)

    monkeypatch.setattr(tune_moe, "search", everywhere)
    _, whole = tune(tmp_path / "report.json", *words)
    speeds = {str(point["setting"]): point["tok_s"] for point in whole["points"] if not point["again"]}
    run = sum(not point["again"] for point in report["points"])
    assert len(speeds) == 14 and run <= MOST_RUNS
    share = speeds[str(report["best"])] / max(speeds.values())
    print(f"{run} of 14 settings run, {share:.1%} of the exhaustive best")


def wait(until: Callable[[], bool]) -> None:
    """Fail unless it becomes true in time."""
    deadline = time.monotonic() + BACK_S
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.5)
