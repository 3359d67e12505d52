"""Two presets never run at once: sampled on the host every 10 ms, and as the journal tells it."""

from __future__ import annotations

import json
import random
import shlex
from collections.abc import Callable
from typing import Any

import pytest

from tests import support

SEED = 20261122
SWITCH_LIMIT_S = 60
STOPPED = "9d1aaa27d60140bd96365438aad20286"
STARTING = "7d4958e842da4a758f6c1cdc7b36dcc5"


def random_presets(names: list[str], count: int) -> list[str]:
    """A seeded series in which each preset differs from the one before."""
    chooser = random.Random(SEED)  # noqa: S311  (a series to repeat, not a secret)
    series: list[str] = []
    while len(series) < count:
        series.append(chooser.choice([name for name in names if name not in series[-1:]]))
    return series


def transitions(journal: str) -> list[tuple[int, str, str]]:
    """(monotonic µs, "stopped" or "starting", unit) of every preset unit in journalctl's JSON lines."""
    entries = [json.loads(line) for line in journal.splitlines()]
    words = {STOPPED: "stopped", STARTING: "starting"}
    return [
        (int(entry["__MONOTONIC_TIMESTAMP"]), words[entry["MESSAGE_ID"]], entry["USER_UNIT"])
        for entry in entries
        if entry.get("MESSAGE_ID") in words and str(entry.get("USER_UNIT", "")).startswith("llama-")
    ]


@pytest.mark.parametrize("count", [5, pytest.param(20, marks=pytest.mark.long)])
def test_never_two_servers(
    on_host: Callable[..., support.Run],
    lab_hostvars: dict[str, dict[str, Any]],
    count: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = list(lab_hostvars[support.LLM]["llama_presets"])
    series = random_presets(names, count)
    on_host(support.LLM, "sudo -u llm lmswitch off", timeout=SWITCH_LIMIT_S).check()
    since = on_host(support.LLM, "date +%s.%N").check().stdout.strip()

    loop = f"set -e; for preset in {shlex.join(series)}; do sudo -u llm lmswitch $preset; done"
    sampler = (support.ROOT / "tests/lab/process_sampler.py").read_text()
    sampled = on_host(
        support.LLM, f"sudo python3 - {shlex.quote(loop)}", timeout=count * SWITCH_LIMIT_S, stdin=sampler
    ).check()
    found = json.loads(sampled.stdout)
    with capsys.disabled():
        print(
            f"\n{count} switches: {found['samples']} samples, at most {found['most']} llama-server; interval "
            f"mean {found['mean_interval_ms']}, p99 {found['p99_interval_ms']}, "
            f"longest {found['longest_interval_ms']} ms"
        )

    assert found["returncode"] == 0, found["said"]
    assert found["most"] == 1, "two llama-server processes were seen at once"
    assert len(found["seen"]) == count
    assert found["p99_interval_ms"] < 20, f"the sampler was too slow to prove anything: {found}"

    journal = on_host(
        support.LLM,
        "sudo -u llm XDG_RUNTIME_DIR=/run/user/$(id -u llm) "
        f"journalctl --user --output=json --since=@{since}",
    ).check()
    events = transitions(journal.stdout)
    starts = [unit for _, what, unit in events if what == "starting"]
    assert starts == [f"llama-{name}.service" for name in series]
    up: str | None = None
    for moment, what, unit in sorted(events):
        if what == "stopped":
            assert unit == up, f"{unit} stopped at {moment} µs while {up} was up"
            up = None
        else:
            assert up is None, f"{unit} was started at {moment} µs, before {up} had stopped"
            up = unit
