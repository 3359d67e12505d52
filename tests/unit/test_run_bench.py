"""The benchmark's arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts import bench

RECAP = """PLAY RECAP *****
lab-llm   : ok=21   changed=0    unreachable=0    failed=0    skipped=7    rescued=0    ignored=0
localhost : ok=1    changed=0    unreachable=0    failed=0    skipped=0    rescued=0    ignored=0
"""


def test_only_tasks_that_ran_are_counted() -> None:
    assert bench.executed(RECAP) == {"lab-llm": 21, "localhost": 1}


def test_a_run_that_changed_something_is_no_measurement() -> None:
    with pytest.raises(bench.NoMeasurement, match="changed lab-llm"):
        bench.executed(RECAP.replace("changed=0", "changed=1", 1))
    for fault in ("failed", "unreachable"):
        with pytest.raises(bench.NoMeasurement, match="failed on lab-llm"):
            bench.executed(RECAP.replace(f"{fault}=0", f"{fault}=1", 1))


@pytest.mark.parametrize("recap", ["", "PLAY RECAP *****\n", RECAP.replace("lab-llm  ", "localhost")])
def test_a_run_without_hosts_is_no_measurement(recap: str) -> None:
    with pytest.raises(bench.NoMeasurement, match="on no host of the inventory; fix: "):
        bench.executed(recap)


@pytest.mark.parametrize("ran", ["nowhere", "localhost alone"])
def test_nothing_is_written_about_nothing(
    ran: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    local = "PLAY RECAP *****\nlocalhost : ok=1    changed=0    unreachable=0    failed=0    skipped=0\n"
    monkeypatch.setattr(bench, "timed", lambda *_args: (1.0, local))
    inventory = tmp_path / "hosts.yml"
    if ran != "nowhere":
        inventory.write_text("all: {hosts: {}}\n")
    assert bench.main(["--inventory", str(inventory), "--output", str(tmp_path / "page")]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1
    assert not (tmp_path / "page").exists()


def test_the_stat_play_has_as_many_tasks() -> None:
    plays = json.loads(bench.stat_playbook({"a": 3, "localhost": 1}))
    assert [(play["hosts"], len(play["tasks"]), play["become"]) for play in plays] == [
        ("a", 3, True),
        ("localhost", 1, False),
    ]


def test_a_process_tree_has_all_descendants_and_nobody_else() -> None:
    assert sorted(bench.tree(10, {11: 10, 12: 11, 13: 1, 10: 1, 14: 12})) == [10, 11, 12, 14]


def test_the_page_says_what_was_measured_and_whether_the_bars_were_met() -> None:
    series = bench.Series(
        {bench.SITE: [10.0, 12.0, 11.0], bench.STAT: [5.0, 5.0, 5.0], bench.PING: [1.0, 1.0, 1.0]}
    )
    text = bench.page(
        series, {"a": 3}, bench.Memory(200_000_000, 100_000_000, 9), where="here", revision="abc", day="d"
    )
    assert "| site.yml, nothing to do | 10.0 s | 11.0 s | 12.0 s | 2.20 |" in text
    assert "2.20 x | **not met**" in text
    assert "11.0 s | met" in text
    assert "200 MB RSS, 100 MB PSS | met" in text


def test_memory_of_a_process_is_read() -> None:
    import os

    rss, pss = bench.sizes(os.getpid())
    assert rss >= pss > 1_000_000
    assert bench.sizes(2**22 + 1) == (0, 0)


class Near:
    """A host whose ssh is a shell of this machine."""

    name = "near"

    def ssh(self, command: str) -> list[str]:
        return ["sh", "-c", command]


@pytest.mark.parametrize(
    ("command", "timeout_s", "said"),
    [("exit 3", 30, "exit code 3"), ("sleep 60", 0.1, "not done after 0.1 s")],
)
def test_a_command_on_a_host_that_fails_is_no_measurement(command: str, timeout_s: float, said: str) -> None:
    host: Any = Near()
    assert bench.over_ssh(host, "cat", 30, input="through") == "through"
    with pytest.raises(bench.NoMeasurement, match=f"near: {said}: {command}"):
        bench.over_ssh(host, command, timeout_s)
