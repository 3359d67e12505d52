"""Role tailscale: what it does in each state that tailscaled can be in, with a stand-in of its program."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from roles.tailscale.library import tailscale_status as module
from tests.support import ROOT, PlaybookRun, ansible_playbook

# Each look finds the next state, the last one stays; no state is no answer.
PROGRAM = """#!/bin/sh
# Stands in for tailscale in tests: no network, no login.
cd {folder}
case $1 in
status)
  read -r state < states || { echo 'failed to connect to local tailscaled' >&2; exit 1; }
  [ "$(wc -l < states)" = 1 ] || sed -i 1d states
  printf '{"BackendState": "%s"}' "$state" ;;
up) echo "$*" >> ups; [ -e refuses ] && { echo 'not now' >&2; exit 1; }; echo Running > states ;;
esac
"""


def stand_in(folder: Path, *states: str) -> None:
    program = folder / "tailscale"
    program.write_text(PROGRAM.replace("{folder}", str(folder)))
    program.chmod(0o755)
    (folder / "states").write_text("".join(f"{state}\n" for state in states))


def connect(
    folder: Path, *states: str, check: bool = False, refuses: bool = False
) -> tuple[PlaybookRun, list[str]]:
    """What the role does on a host in these states, without a key; and each `tailscale up`."""
    stand_in(folder, *states)
    if refuses:
        (folder / "refuses").touch()
    task = {
        "name": "Connect",
        "ansible.builtin.include_role": {"name": "tailscale", "tasks_from": "connect.yml"},
    }
    play = {
        "hosts": "all",
        "gather_facts": False,
        "environment": {"PATH": f"{folder}:{os.environ['PATH']}"},
        "tasks": [task],
    }
    (folder / "play.yml").write_text(yaml.safe_dump([play]))
    (folder / "inventory.yml").write_text(yaml.safe_dump({"all": {"hosts": {"box": {}}}}))
    given = {"ansible_connection": "local", "ansible_become": False, "tailscale_login_timeout": 5}
    words = ("-e", json.dumps(given), *(["--check"] if check else []))
    done = ansible_playbook(folder / "play.yml", *words, inventory=folder / "inventory.yml", timeout=120)
    ups = folder / "ups"
    return done, ups.read_text().splitlines() if ups.exists() else []


@pytest.mark.parametrize(
    ("states", "ups", "changed"),
    [
        (["NoState", "Starting", "Running"], [], 0),  # as after a boot: it is not logged out
        (["Stopped"], ["up"], 1),  # `tailscale down`: logged in, so that no key is needed
    ],
)
def test_a_box_that_is_logged_in_needs_no_key(
    tmp_path: Path, states: list[str], ups: list[str], changed: int
) -> None:
    done, told = connect(tmp_path, *states)
    assert (done.check().changed, told) == (changed, ups)


@pytest.mark.parametrize(
    ("states", "says"),
    [
        (["NoState", "NeedsLogin"], "is not logged in to its tailnet and tailscale_auth_key is empty; fix: "),
        (["Starting"], "is still Starting after 5 s; fix: journalctl --unit tailscaled"),
    ],
)
def test_what_lacks_is_told(tmp_path: Path, states: list[str], says: str) -> None:
    done, ups = connect(tmp_path, *states)
    assert done.rc != 0 and ups == []
    assert says in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("states", "says"),
    [
        (["Running"], ""),
        (["Stopped"], ""),
        (["NeedsLogin"], ""),
        (["NeedsMachineAuth"], "waits for approval in its tailnet; fix: approve it in the admin console"),
        (["NoState"], "is still NoState after 5 s; fix: "),
        (["InUseOtherUser"], "is in the state InUseOtherUser; fix: "),
        ([], "failed to connect to local tailscaled; fix: systemctl status tailscaled"),
    ],
)
def test_each_state_is_told_with_its_own_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, states: list[str], says: str
) -> None:
    stand_in(tmp_path, *states)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = module.fault(*module.look(), 5)
    assert says in found and bool(says) == bool(found)
    assert "\n" not in found


def test_a_host_without_the_program_gives_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert module.look()[0] == ""


def test_a_box_that_does_not_come_back_is_told(tmp_path: Path) -> None:
    done, ups = connect(tmp_path, "Stopped", refuses=True)
    assert done.rc != 0 and ups == ["up"]
    assert "tailscale up: not now; fix: " in " ".join(done.stdout.split())


@pytest.mark.parametrize("states", [["Stopped"], ["Starting"]])
def test_a_dry_run_neither_waits_nor_connects(tmp_path: Path, states: list[str]) -> None:
    done, ups = connect(tmp_path, *states, check=True)
    assert ups == [] and done.check()


def test_the_specification_repeats_the_defaults() -> None:
    role = ROOT / "roles/tailscale"
    specs = yaml.safe_load((role / "meta/argument_specs.yml").read_text())
    options = specs["argument_specs"]["main"]["options"]
    defaults = yaml.safe_load((role / "defaults/main.yml").read_text())
    assert {name: option["default"] for name, option in options.items()} == defaults
