"""What the scripts make of an inventory that Ansible really reads. No host is asked."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from scripts import fleet, render_docs
from scripts._inventory import InventoryUnreadable, load
from scripts._llm_box import LlmBox
from scripts.fleet import Row
from tests import support


def test_it_comes_templated_and_with_the_roles_defaults() -> None:
    host = next(one for one in load(support.LAB_INVENTORY) if one.name == support.LLM)
    assert "llm_servers" in host.groups
    assert not [name for name, value in host.variables.items() if "{{" in str(value)]
    assert LlmBox.of(host.variables).names()
    assert not [name for name in host.variables if "token" in name]


def test_a_limit_that_matches_nothing_is_said() -> None:
    with pytest.raises(InventoryUnreadable, match="nowhere"):
        load(support.LAB_INVENTORY, limit="nowhere")


def test_the_docs_preset_table_is_the_inventory_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert render_docs.main(["--check"]) == 0, capsys.readouterr().err


def test_a_box_whose_data_cannot_be_worked_out_is_a_row_beside_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hosts.yml").write_text(
        "all: {hosts: {well: {}, wrong: {llama_cpp_root: '{{ nowhere }}'}}}\n"
    )
    monkeypatch.setattr(fleet, "ask", lambda hosts, _requests: [Row(host.name, True) for host in hosts])
    assert fleet.main(["--inventory", str(tmp_path)]) == 2
    _, *rows, empty, reason = capsys.readouterr().out.splitlines()
    assert sorted(tuple(line.split()[:3]) for line in rows) == [("well", "-", "-"), ("wrong", "-", "refused")]
    assert empty == "" and reason.startswith("wrong: refused: ") and "'nowhere' is undefined" in reason
    with pytest.raises(InventoryUnreadable, match="'nowhere' is undefined"):
        load(tmp_path)


def test_the_fleet_screen_has_a_row_for_a_host_that_does_not_answer(tmp_path: Path) -> None:
    hosts = "all: {hosts: {nobody: {ansible_host: 127.0.0.1, ansible_port: 9}}}\n"
    (tmp_path / "hosts.yml").write_text(hosts)
    done = support.run(sys.executable, "scripts/fleet.py", "--inventory", tmp_path, timeout=60)
    assert done.rc == 2, done.tail()
    assert "unreachable" in done.stdout
    assert "Traceback" not in done.stderr
