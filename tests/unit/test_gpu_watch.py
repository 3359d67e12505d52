"""What is seen of the GPUs during a measurement: nvidia-smi's lines, a card that hangs, none at all."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from scripts import _gpu_sampler
from scripts._gpu_watch import GpuWatch, watched
from scripts._inventory import Host

# As `nvidia-smi --query-gpu=… --format=csv,noheader,nounits` prints a card that generates, then two.
ONE = "580.95.05, NVIDIA GeForce RTX 4070 Ti SUPER, 96, 281.47, 71, 14012, 16376\n"
TWO = ONE + "580.95.05, NVIDIA GeForce RTX 5070, 10, [N/A], 50, 1000, 12227\n"


def program(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An nvidia-smi that does what a shell script says."""
    file = folder / "nvidia-smi"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_one_card() -> None:
    assert _gpu_sampler.sample(ONE) == {
        "driver": "580.95.05",
        "name": "NVIDIA GeForce RTX 4070 Ti SUPER",
        "utilization_percent": 96.0,
        "power_w": 281.47,
        "temperature_c": 71.0,
        "memory_mib": 14012.0,
        "memory_total_mib": 16376.0,
    }


def test_two_cards_are_one_and_what_a_card_does_not_measure_is_left_out() -> None:
    found = _gpu_sampler.sample(TWO)
    assert (found["utilization_percent"], found["power_w"], found["temperature_c"]) == (53.0, 281.47, 71.0)
    assert (found["memory_mib"], found["memory_total_mib"]) == (15012.0, 28603.0)
    silent = _gpu_sampler.sample("580, X, [N/A], [N/A], [N/A], [N/A], [N/A]")
    assert silent["utilization_percent"] is silent["power_w"] is silent["temperature_c"] is None


@pytest.mark.parametrize("printed", ["", "No devices were found", "1, 2"])
def test_something_else_is_an_error(printed: str) -> None:
    assert "something else" in _gpu_sampler.sample(printed)["error"]


def test_a_card_that_hangs_or_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gpu_sampler, "TIMEOUT_S", 0.2)
    program(tmp_path, "exec sleep 30", monkeypatch)
    assert "hangs: no answer in 0.2 s" in _gpu_sampler.look()["error"]
    monkeypatch.setattr(_gpu_sampler, "TIMEOUT_S", 20.0)
    program(tmp_path, "echo 'Unable to determine the device handle'; exit 15", monkeypatch)
    assert _gpu_sampler.look()["error"] == (
        "nvidia-smi failed with exit code 15: Unable to determine the device handle"
    )


def test_without_the_program_there_is_no_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _gpu_sampler.look() == {"absent": True}


def test_what_is_told_of_a_run_is_what_was_seen_during_it() -> None:
    watch = GpuWatch()
    for moment, busy, heat in ((1.0, 0.0, 40.0), (2.0, 90.0, 70.0), (3.0, 100.0, 72.0), (4.0, 0.0, 71.0)):
        watch.add(moment, {"driver": "580", "utilization_percent": busy, "temperature_c": heat})
    expected = {"utilization_percent": 95.0, "power_w": None, "temperature_c": 72.0, "memory_mib": None}
    assert watch.during(1.5, 3.5) == expected
    assert watch.during(8.0, 9.0) is None
    assert (watch.driver, watch.trouble) == ("580", "")


@pytest.mark.parametrize(
    ("sample", "driver", "trouble"),
    [
        ({"absent": True}, "none", "no NVIDIA GPU: nvidia-smi is not installed"),
        ({"error": "nvidia-smi hangs"}, "unknown", "nvidia-smi hangs"),
        (None, "unknown", "nvidia-smi could not be run over ssh"),
    ],
)
def test_without_figures_it_is_said_why(sample: dict[str, object] | None, driver: str, trouble: str) -> None:
    watch = GpuWatch()
    if sample:
        watch.add(1.0, sample)
    assert (watch.driver, watch.trouble, watch.during(0.0, 2.0)) == (driver, trouble, None)


def test_the_sampler_runs_as_it_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes over ssh, run here; it ends with the body."""
    program(tmp_path, f"echo '{ONE.strip()}'", monkeypatch)
    monkeypatch.setattr(Host, "ssh", lambda self, command: ["sh", "-c", command])
    with watched(Host("box", variables={"ansible_python_interpreter": sys.executable})) as watch:
        assert watch.driver == "580.95.05"
        assert watch.trouble == ""
