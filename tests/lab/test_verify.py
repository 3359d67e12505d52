"""verify_health and fleet on the lab: content with a box that serves, and each fault named by its check."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support import CLIENT, LAB_INVENTORY, LLM, OCR, ROOT, Run, expected, run

pytestmark = pytest.mark.usefixtures("lab")

VERIFY = (
    sys.executable,
    str(ROOT / "scripts/verify_health.py"),
    "--inventory",
    str(LAB_INVENTORY),
    "--json",
    "-",
)
FLEET = (sys.executable, str(ROOT / "scripts/fleet.py"), "--inventory", str(LAB_INVENTORY), "--json")
OnHost = Callable[..., Run]


@pytest.fixture(scope="module")
def serving(on_host: OnHost) -> Iterator[str]:
    """A preset that serves; the one that did before comes back afterwards."""
    presets = json.loads(on_host(LLM, "sudo -u llm lmswitch list --json").check().stdout)["presets"]
    before = json.loads(on_host(LLM, "sudo -u llm lmswitch status --json").check().stdout)["active"]
    name = before or presets[0]["name"]
    on_host(LLM, f"sudo -u llm lmswitch {name}", timeout=240).check()
    yield name
    on_host(LLM, f"sudo -u llm lmswitch {before or 'off'}", timeout=240)


def report(answer: Run) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(answer.stdout)
    return data


def short(data: dict[str, Any], host: str = LLM) -> set[str]:
    """Names of the checks of a host that fell short."""
    checks = next(one["checks"] for one in data["hosts"] if one["host"] == host)
    return {check["name"] for check in checks if not check["ok"]}


def test_verification_is_content_with_a_box_that_serves(serving: str) -> None:
    answer = run(*VERIFY, timeout=180)
    data = report(answer)
    assert {one["host"] for one in data["hosts"]} == {LLM, OCR, CLIENT}
    assert short(data) == set()
    assert (answer.rc, data["ok"]) == (0, True)
    checks = {
        check["name"]: check for host in data["hosts"] if host["host"] == LLM for check in host["checks"]
    }
    assert checks["active_preset"]["value"] == serving
    assert checks["chat"]["value"]


def test_verification_names_what_fell_short(serving: str, on_host: OnHost) -> None:
    """A model file of another size and a stopped preset are found, each by its own check."""
    model = on_host(LLM, "sudo find ~llm/models/gguf -name '*.gguf' | sort | head -1").check().stdout.strip()
    size = on_host(LLM, f"sudo stat -c %s {model}").check().stdout.strip()
    on_host(LLM, "sudo -u llm lmswitch off", timeout=60).check()
    # Grown by a hole and cut back: nothing is written to the file, only its size and times change.
    on_host(LLM, f"sudo truncate -s +1 {model}").check()
    try:
        answer = run(*VERIFY, "--limit", LLM, timeout=180)
    finally:
        on_host(LLM, f"sudo truncate -s {size} {model}").check()
        on_host(LLM, f"sudo -u llm lmswitch {serving}", timeout=240).check()
    assert answer.rc == 1
    found = short(report(answer))
    nothing_serves = {"active_preset", "state", "llama_servers", "running_release", "health", "n_ctx"}
    assert found == {f"model_{model.rpartition('/')[2]}", *nothing_serves, "ready", "chat"}


def test_verification_and_fleet_name_a_gateway_that_is_down_and_who_has_its_port(
    serving: str, on_host: OnHost
) -> None:
    manager = "sudo -u llm XDG_RUNTIME_DIR=/run/user/$(id -u llm) systemctl --user"
    units = "llm-gateway.socket llm-gateway.service"
    port = expected().front.port
    on_host(LLM, f"{manager} stop {units}").check()
    try:
        thief = f"systemd-run --quiet --unit=thief python3 -m http.server {port}"
        on_host(LLM, f"sudo {thief}").check()
        answer = run(*VERIFY, "--limit", LLM, timeout=180)
        screen = run(*FLEET, "--limit", LLM, timeout=120)
    finally:
        on_host(LLM, f"sudo systemctl stop thief; {manager} start {units}").check()
    assert (answer.rc, screen.rc) == (1, 1)
    data = report(answer)
    assert short(data) == {"gateway_active", "gateway_port", "gateway_health", "ready", "chat"}
    checks = {check["name"]: check["detail"] for check in data["hosts"][0]["checks"]}
    assert f":{port} is held by thief.service" in checks["gateway_port"]
    assert "systemctl --user start llm-gateway" in json.loads(screen.stdout)["hosts"][0]["trouble"]


def test_a_host_that_does_not_answer_is_an_entry_with_an_error(tmp_path: Any) -> None:
    text = "all: {hosts: {nobody: {ansible_host: 127.0.0.1, ansible_port: 9}}}\n"
    (tmp_path / "hosts.yml").write_text(text)
    answer = run(*VERIFY[:3], str(tmp_path), "--json", "-", timeout=60)
    data = report(answer)
    assert (answer.rc, data["ok"]) == (2, False)
    assert "onnection refused" in data["hosts"][0]["error"]


def test_the_fleet_screen_shows_every_host(serving: str) -> None:
    answer = run(*FLEET, timeout=120)
    rows = {one["host"]: one for one in json.loads(answer.stdout)["hosts"]}
    assert answer.rc == 0, answer.tail()
    assert rows.keys() == {LLM, OCR, CLIENT}
    assert (rows[LLM]["preset"], rows[LLM]["state"]) == (serving, "ready")
    assert len(rows[LLM]["commit"]) == 40
    assert all(one["reached"] and one["disk_free"] > 0 for one in rows.values())
