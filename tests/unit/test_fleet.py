"""The fleet screen: what it makes of what a box says, and its exit codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scripts import fleet
from scripts._inventory import Host
from scripts._llm_box import GATEWAY_UNITS, GROUP
from scripts.fleet import Row

COMMIT = "4ca1d6abe6fbc56a30072a4328cfbb554cbb5ecc"
READY = {"active": "coder", "state": "ready", "build": "upstream", "commit": COMMIT}


def seen(status: dict[str, Any] | None = READY, gpu: str | None = None) -> dict[str, Any]:
    units = {unit: {"ActiveState": "active"} for unit in GATEWAY_UNITS}
    llm = {"status": status, "disk": {"free": 3 * 2**30}, "gateway_units": units}
    return {"disk": {"free": 5 * 2**30}, "gpu": gpu, "llm": llm}


def without_gateway() -> dict[str, Any]:
    data = seen()
    data["llm"]["gateway_units"]["llm-gateway.service"]["ActiveState"] = "failed"
    return data


HOST = Host("box")


def test_a_box_that_serves() -> None:
    row = fleet.row(HOST, seen(gpu="NVIDIA GeForce RTX 4070 Ti SUPER, 14000, 16376, 61"))
    assert row.cells() == [
        "box", "coder", "ready", "upstream@4ca1d6abe", "RTX 4070 Ti SUPER 14000/16376 MiB 61 °C", "3.0 GiB",
    ]  # fmt: skip
    assert fleet.exit_code([row]) == 0


def test_a_box_that_is_off_is_well() -> None:
    row = fleet.row(HOST, seen({"active": None, "state": "stopped", "build": "", "commit": ""}))
    assert row.cells()[1:5] == ["-", "stopped", "-", "-"]
    assert fleet.exit_code([row]) == 0


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (seen({**READY, "state": "failed"}), "lmswitch logs"),
        (seen(None), "run site.yml"),
        (without_gateway(), "systemctl --user start llm-gateway.service"),
        (seen(gpu="hung: timeout after 5 s"), "nvidia-smi hung"),
        (seen(gpu="failed"), "nvidia-smi failed"),
    ],
)
def test_trouble_is_named_and_gives_1(data: dict[str, Any], word: str) -> None:
    row = fleet.row(HOST, data)
    assert word in row.trouble
    assert fleet.exit_code([row]) == 1
    assert fleet.screen([row]).splitlines()[-1] == f"box: {row.trouble}"


def test_a_box_without_models_shows_its_disk() -> None:
    row = fleet.row(HOST, {"disk": {"free": 5 * 2**30}, "gpu": None})
    assert row.cells() == ["box", "-", "-", "-", "-", "5.0 GiB"]


def test_an_unreachable_box_gives_2() -> None:
    rows = [fleet.row(HOST, seen()), Row("gone", False, trouble="no route to host")]
    assert fleet.exit_code(rows) == 2
    assert fleet.screen(rows).splitlines()[-1] == "gone: no route to host"
    assert rows[1].cells()[2] == "unreachable"


def test_pyinfra_gets_the_inventorys_key_and_pinned_host_keys() -> None:
    data = fleet.pyinfra_data(
        Host("box", frozenset(), {
            "ansible_host": "192.0.2.1", "ansible_port": 2222, "ansible_user": "ops",
            "ansible_ssh_private_key_file": "/k/id", "ansible_ssh_common_args":
            "-F /dev/null -oUserKnownHostsFile=/k/known -oStrictHostKeyChecking=yes"})
    )  # fmt: skip
    assert data == {
        "ssh_hostname": "192.0.2.1", "ssh_port": 2222, "ssh_user": "ops", "ssh_key": "/k/id",
        "ssh_known_hosts_file": "/k/known", "ssh_strict_host_key_checking": "yes",
        "ssh_config_file": "/dev/null",
    }  # fmt: skip
    assert fleet.pyinfra_data(HOST) == {"ssh_hostname": "box", "ssh_strict_host_key_checking": "yes"}


def test_a_box_whose_data_is_refused_is_a_row_beside_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    variables = {"llama_cpp_builds": {}, "gguf_models": {}, "llama_presets": {"x": {"build": "none"}}}
    hosts = [Host("wrong", frozenset({GROUP}), variables), Host("well"), Host("gone")]
    answers = {"well": Row("well", True, disk_free=2**30), "gone": Row("gone", False, trouble="no route")}
    monkeypatch.setattr(fleet, "load", lambda *_args, **_options: hosts)
    monkeypatch.setattr(fleet, "ask", lambda hosts, _requests: [answers[host.name] for host in hosts])
    assert fleet.main(["--inventory", "anything"]) == 2
    _, *rows, empty, reason, gone = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in rows] == ["wrong", "well", "gone"]
    assert rows[0].split() == ["wrong", "-", "refused", "-", "-", "-"]
    assert rows[1].endswith("1.0 GiB")
    assert empty == "" and reason.startswith("wrong: refused: inventory: llama_presets.x.")
    assert gone == "gone: no route"


def test_an_inventory_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert fleet.main(["--inventory", "inventory/nowhere"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_missing_ssh_key_is_a_row(tmp_path: Path) -> None:
    host = Host("box", frozenset(), {"ansible_ssh_private_key_file": str(tmp_path / "gone")})
    (found,) = fleet.ask_all([host])
    assert not found.reached and found.trouble.startswith(f"its ssh key {tmp_path}/gone is missing; fix:")
