"""The layers that protect the GPU of an OCR box: each one that is missing is named by its check."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ocr_pipeline import gpu, gpu_check
from ocr_pipeline.servers import Server
from ocr_pipeline.stages import Deadline

from scripts import verify_health
from scripts._ocr_box import OcrBox
from tests.support import ROOT

VARIABLES: dict[str, Any] = {
    "ocr_service_user": "ocr",
    "ocr_service_path": "/opt/ocr",
    "ocr_service_state_dir": "/var/lib/ocr",
    "ocr_service_workers": 2,
    "ocr_service_host": "::1",
    "ocr_service_port": 8091,
    "ocr_service_competing_units": ["comfyui.service", "gdm.service"],
    "llama_presets_gpu_memory_mib": 12227,
}
BOX = OcrBox.of(VARIABLES)


def started(*units: str) -> str:
    """As `systemctl show --value --property=ExecStartPre` prints it."""
    return "\n".join(
        f"{{ path=/usr/bin/systemctl ; argv[]=/usr/bin/systemctl stop {unit} ; ignore_errors=yes ; pid=0 }}"
        for unit in units
    )


SEEN: dict[str, Any] = {
    "persistence": {"UnitFileState": "enabled", "ActiveState": "active"},
    "check": {"gpu_lock": "/var/lib/ocr/gpu.lock", "semaphore": "", "hang": ""},
    "before_start": 2 * [started("comfyui.service", "gdm.service")],
}


def short(
    seen: dict[str, Any], box: OcrBox = BOX, given: Sequence[str] = ("quiet", "pcie_aspm=off")
) -> dict[str, str]:
    """The checks that fall short, and what they say."""
    return {one.name: one.detail for one in verify_health.ocr_checks(box, seen, given) if not one.ok}


def test_a_box_with_all_layers_is_well() -> None:
    assert short(SEEN) == {}
    names = [one.name for one in verify_health.ocr_checks(BOX, SEEN, ["pcie_aspm=off"])]
    assert names == ["gpu_semaphore", "gpu_hang_error", "competing_units", "persistence", "kernel_pcie_aspm"]


@pytest.mark.parametrize("given", [["quiet"], ["pcie_aspm=force"], []])
def test_a_bus_that_may_sleep_is_named(given: list[str]) -> None:
    found = short(SEEN, given=given)
    assert list(found) == ["kernel_pcie_aspm"] and "gpu_host_kernel_parameters" in found["kernel_pcie_aspm"]


def test_a_service_that_is_not_ready_says_why() -> None:
    ready = verify_health.ocr_ready_check(BOX, verify_health.Answers(ready=200))
    away = verify_health.ocr_ready_check(BOX, verify_health.Answers(ready=503, failure="HTTP 503: no worker"))
    gone = verify_health.ocr_ready_check(BOX, verify_health.Answers(failure="ConnectError: refused"))
    assert (ready.ok, away.ok, gone.ok) == (True, False, False)
    assert away.detail == "GET /ready on [::1]:8091: HTTP 503: no worker"


@pytest.mark.parametrize(
    ("path", "value", "name"),
    [
        (("persistence",), None, "persistence"),
        (("persistence", "ActiveState"), "inactive", "persistence"),
        (("persistence", "UnitFileState"), "disabled", "persistence"),
        (("check", "semaphore"), "gpu_lock is empty: …", "gpu_semaphore"),
        (("check", "gpu_lock"), "/tmp/gpu.lock", "gpu_semaphore"),
        (("check", "hang"), "a hang is told as DeadlineError", "gpu_hang_error"),
        (("before_start", 1), started("gdm.service"), "competing_units"),
        (("before_start", 0), "", "competing_units"),
        (("before_start", 0), started("comfyui.service.d", "gdm.service"), "competing_units"),
        (("before_start",), [], "competing_units"),
    ],
)
def test_a_layer_that_is_missing_is_named(path: tuple[Any, ...], value: Any, name: str) -> None:
    seen = copy.deepcopy(SEEN)
    place = seen
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    assert short(seen).keys() == {name} and short(seen)[name]


def test_a_program_that_says_nothing_lacks_both_of_its_layers() -> None:
    assert short({**SEEN, "check": None}).keys() == {"gpu_semaphore", "gpu_hang_error"}


def test_a_box_without_a_card_needs_the_layers_of_its_program_only() -> None:
    box = OcrBox.of({**VARIABLES, "llama_presets_gpu_memory_mib": 0})
    assert short({**SEEN, "persistence": None}, box, ["quiet"]) == {}


# --- what the program says of itself ---


def test_turns_are_taken(tmp_path: Path) -> None:
    lock = str(tmp_path / "gpu.lock")
    assert gpu_check.semaphore(lock) == ""
    with gpu.turn(lock, Deadline(1)):
        assert gpu_check.semaphore(lock) == "", "a worker has it"
    assert "empty" in gpu_check.semaphore("")
    assert "No such file" in gpu_check.semaphore(str(tmp_path / "nowhere" / "gpu.lock"))


def test_a_lock_that_locks_nobody_out_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def everybody(_path: str, _deadline: Deadline) -> Iterator[None]:
        yield

    monkeypatch.setattr(gpu, "turn", everybody)
    assert "two had the GPU at once" in gpu_check.semaphore(str(tmp_path / "gpu.lock"))


def test_a_hang_is_told_as_one() -> None:
    assert gpu_check.hang() == ""


def test_a_hang_that_is_told_as_slowness_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Server, "answers", lambda _self: True)
    assert gpu_check.hang() == "a hang is told as DeadlineError"


def test_it_prints_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tmp_path / "pipeline.json"
    settings.write_text(json.dumps({"gpu_lock": str(tmp_path / "gpu.lock")}))
    monkeypatch.setattr("sys.argv", ["gpu_check", str(settings)])
    assert gpu_check.main() == 0
    assert json.loads(capsys.readouterr().out) == {
        "gpu_lock": str(tmp_path / "gpu.lock"),
        "semaphore": "",
        "hang": "",
    }
    settings.write_text("gpu_lock: relative")
    assert gpu_check.main() == 2


def test_the_drop_in_stops_units_as_the_check_expects() -> None:
    assert (
        "ExecStartPre=+-/usr/bin/systemctl stop {{ unit }}"
        in (ROOT / "roles/ocr_service/tasks/main.yml").read_text()
    )
