"""Power: the magic packet, what a machine is seen to do, the wait with its one line for each way it ends."""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from llama_common import power
from llama_common.power import Seen, State, Until, Watched, message, watch
from llama_common.roles import RoleVariables

from plugins.action import power_state
from plugins.modules import magic_packet
from tests.support import ROOT, PlaybookRun, ansible_playbook

MAC = "02:00:5e:10:00:01"


def test_a_magic_packet_to_the_byte() -> None:
    address = b"\x02\x00\x5e\x10\x00\x01"
    assert magic_packet.packet(MAC) == b"\xff\xff\xff\xff\xff\xff" + address * 16
    assert magic_packet.packet(MAC.upper().replace(":", "-")) == magic_packet.packet(MAC)
    for wrong in ("", "02:00:5e:10:00", "02:00:5e:10:00:01:02", "no"):
        with pytest.raises(ValueError):
            magic_packet.packet(wrong)


@pytest.mark.parametrize(
    ("seen", "state"),
    [
        (Seen("SSH-2.0-OpenSSH_9.2p1 Debian-2"), "linux"),
        (Seen("SSH-2.0-OpenSSH_for_Windows_9.5"), "windows"),
        (Seen("", 445), "windows"),
        (Seen("", None, True), "up"),
        (Seen("HTTP/1.1 400", None, True), "up"),
        (Seen(), "silent"),
    ],
)
def test_what_is_seen(seen: Seen, state: State) -> None:
    assert seen.state == state


class World:
    """A machine that goes through STATES, each for some seconds, on a clock of the test's own."""

    def __init__(self, *states: tuple[State, float], awake_after: int = 0) -> None:
        self.states, self.now, self.packets, self.awake_after = list(states), 0.0, 0, awake_after

    def look(self) -> State:
        if self.awake_after and self.packets >= self.awake_after:
            return "linux"
        passed = 0.0
        for state, seconds in self.states:
            passed += seconds
            if self.now < passed:
                return state
        return self.states[-1][0]

    def wake(self) -> None:
        self.packets += 1

    def pause(self, seconds: float) -> None:
        self.now += seconds

    def watch(self, until: Until, timeout_s: float, *, mac: bool = True, **options: Any) -> Watched:
        wake: Callable[[], None] | None = self.wake if mac else None
        return watch(
            self.look, until, timeout_s, wake=wake, clock=lambda: self.now, pause=self.pause, **options
        )


def test_a_machine_that_is_awake_is_not_woken() -> None:
    assert World(("linux", 1)).watch("linux", 60) == Watched("linux", 0.0, 0)


def test_a_sleeping_machine_gets_a_packet_now_and_then_until_it_answers() -> None:
    ended = World(("silent", 1), awake_after=3).watch("linux", 60, wake_interval_s=10)
    assert ended.state == "linux" and ended.packets == 3 and 20 <= ended.seconds <= 24


def test_nothing_is_tried_without_end() -> None:
    world = World(("silent", 1))
    ended = world.watch("linux", 60, wake_interval_s=10)
    assert ended.state == "silent" and ended.packets == 6 and ended.seconds == 60
    assert World(("silent", 1)).watch("linux", 0) == Watched("silent", 0.0, 0), "one look, no packet"


def test_windows_ends_the_wait_unless_it_is_being_restarted() -> None:
    assert World(("windows", 1)).watch("linux", 180) == Watched("windows", 30.0, 0)
    assert World(("windows", 1)).watch("linux", 20).seconds == 20
    assert World(("windows", 1)).watch("linux", 0).seconds == 0, "one look, where nothing is waited for"
    restarted = World(("windows", 20), ("silent", 10), ("linux", 1))
    assert restarted.watch("linux", 60, mac=False, through_windows=True).state == "linux"
    assert World(("linux", 10), ("silent", 20), ("windows", 1)).watch("windows", 60).state == "windows"


def test_a_linux_whose_samba_is_up_before_its_sshd_is_no_windows() -> None:
    booting = World(("silent", 4), ("windows", 20), ("up", 2), ("windows", 20), ("linux", 1))
    assert booting.watch("linux", 180).state == "linux"


def test_one_silent_look_is_not_yet_asleep() -> None:
    assert World(("linux", 4), ("silent", 1)).watch("silent", 120, mac=False) == Watched("silent", 14.0, 0)
    lost = World(("linux", 4), ("silent", 3), ("linux", 1))
    assert lost.watch("silent", 60, mac=False) == Watched("linux", 60.0, 0)
    at_the_end = World(("linux", 58), ("silent", 1))
    assert at_the_end.watch("silent", 60, mac=False) == Watched("silent", 68.0, 0)
    assert World(("linux", 58), ("silent", 4), ("linux", 1)).watch("silent", 60, mac=False).state == "linux"


@pytest.mark.parametrize(
    ("until", "watched", "mac", "words"),
    [
        ("linux", Watched("linux", 21.0, 3), MAC, "magic packets sent: 3 (21 s)"),
        ("linux", Watched("silent", 180.0, 18), MAC, "is gone: no answer to 18 magic packets for 02:00"),
        ("linux", Watched("silent", 0.0), MAC, "fix: -e power_action=wake"),
        ("linux", Watched("silent", 180.0), "", "set power_mac"),
        ("linux", Watched("windows", 0.0), MAC, "runs Windows; fix: restart it there"),
        ("linux", Watched("up", 180.0, 1), MAC, "look at its screen"),
        ("silent", Watched("linux", 120.0), MAC, "did not go to sleep or off"),
        ("windows", Watched("linux", 300.0), MAC, "did not start Windows"),
        ("windows", Watched("silent", 300.0), MAC, "power_windows_ports"),
        ("any", Watched("silent", 0.0), "", "box: silent: asleep, off or gone"),
        ("any", Watched("windows", 0.0), "", "box: runs Windows"),
    ],
)
def test_one_line_for_each_end(until: Until, watched: Watched, mac: str, words: str) -> None:
    said = message("box", until, watched, mac)
    assert words in said and "\n" not in said and "box" in said
    assert until == "any" or watched.state == until or "fix: " in said


@pytest.fixture
def server() -> Iterator[Callable[[bytes], int]]:
    """Listeners on loopback that greet with what they are given; returns the port of each."""
    listeners: list[socket.socket] = []

    def greet(listener: socket.socket, said: bytes) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connection.sendall(said)
            connection.close()

    def start(said: bytes) -> int:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)
        threading.Thread(target=greet, args=(listener, said), daemon=True).start()
        port: int = listener.getsockname()[1]
        return port

    yield start
    for listener in listeners:
        listener.close()


def test_a_real_look(server: Callable[[bytes], int], monkeypatch: pytest.MonkeyPatch) -> None:
    linux, windows = server(b"SSH-2.0-OpenSSH_9.2\r\n"), server(b"SSH-2.0-OpenSSH_for_Windows_9.5\r\n")
    smb = server(b"")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = closed.getsockname()[1]
    here = "127.0.0.1"
    assert power_state.seen(here, linux, here, [smb]).state == "linux"
    assert power_state.seen(here, windows, here, []).state == "windows"
    assert power_state.seen(here, nobody, here, [nobody, smb]).windows_port == smb
    monkeypatch.setattr(power_state, "pings", lambda _address: False)
    assert power_state.seen(here, nobody, here, [nobody]).state == "silent"
    monkeypatch.setattr(power_state, "pings", lambda _address: True)
    assert power_state.seen(here, nobody, here, [nobody]).state == "up"


LMSWITCH = """#!/bin/sh
echo "lmswitch $*" >> {log}
case $1 in
sleep) echo '{{"ok": true, "changed": true, "message": "it slept"}}' ;;
resume)
    if [ ! -e {log}.busy ]; then
        touch {log}.busy
        echo '{{"ok": false, "message": "another switch is under way"}}'
        exit 3
    fi
    echo '{{"ok": true, "changed": true, "message": "coder is ready, and generates"}}' ;;
*) echo '{{"ok": true, "changed": true, "message": "off: stopped coder"}}' ;;
esac
"""


class Play:
    """The real role, here with stand-ins, as a box that goes on answering SSH whatever it is told."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.log = folder, folder / "log"
        self.program("lmswitch", LMSWITCH.format(log=self.log))
        inventory = {
            "llm_servers": {
                "hosts": {
                    "box": {
                        "ansible_connection": "local",
                        "ansible_become": False,
                        "ansible_host": "127.0.0.1",
                        "ansible_port": port,
                        "ansible_python_interpreter": sys.executable,
                        "llm_user_name": "llm",
                        "power_windows_ports": [],
                        "power_down_timeout": 1,
                        "power_windows_timeout": 1,
                    }
                }
            }
        }
        play = {
            "hosts": "llm_servers",
            "gather_facts": False,
            "roles": ["power"],
            "environment": {"PATH": f"{folder}:/usr/bin:/bin"},
        }
        (folder / "inventory.yml").write_text(yaml.safe_dump(inventory))
        (folder / "play.yml").write_text(yaml.safe_dump([play]))

    def program(self, name: str, text: str) -> None:
        place = self.folder / name
        place.write_text(text)
        place.chmod(0o755)

    def run(self, action: str) -> PlaybookRun:
        extra = json.dumps({"power_action": action, "_power_bootwin": str(self.folder / "bootwin")})
        inventory = self.folder / "inventory.yml"
        return ansible_playbook(self.folder / "play.yml", "-e", extra, inventory=inventory, timeout=120)

    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def box(tmp_path: Path, server: Callable[[bytes], int]) -> Play:
    return Play(tmp_path, server(b"SSH-2.0-OpenSSH_9.2\r\n"))


def test_a_box_that_does_not_go_to_sleep_serves_again(box: Play) -> None:
    (box.folder / "log.busy").touch()
    done = box.run("sleep")
    assert done.rc != 0 and "still answers SSH" in done.stdout and "coder is ready" in done.stdout
    assert box.calls() == ["lmswitch sleep --json", "lmswitch resume --json"]


def test_nothing_is_stopped_where_windows_cannot_start(box: Play) -> None:
    box.program("bootwin", f'#!/bin/sh\necho "bootwin $*" >> {box.log}\necho "no boot entry" >&2\nexit 1\n')
    done = box.run("windows")
    assert done.rc != 0 and "no boot entry" in done.stdout
    assert box.calls() == ["bootwin --dry-run"]


def test_a_box_whose_firmware_then_refuses_windows_serves_again(box: Play) -> None:
    refuses = '[ -n "$1" ] || { echo "the firmware refuses BootNext" >&2; exit 1; }'
    box.program("bootwin", f'#!/bin/sh\necho "bootwin $*" >> {box.log}\n{refuses}\n')
    (box.folder / "log.busy").touch()
    done = box.run("windows")
    assert done.rc != 0 and "the firmware refuses BootNext; coder is ready" in done.stdout
    assert box.calls() == [
        "bootwin --dry-run",
        "lmswitch off --keep --json",
        "bootwin ",
        "lmswitch resume --json",
    ]


def test_a_wake_waits_for_the_switch_that_is_under_way(box: Play) -> None:
    done = box.run("wake").check()
    assert done.changed == 1
    assert box.calls() == ["lmswitch resume --json"] * 2


def test_the_specification_repeats_the_defaults_and_knows_the_limits() -> None:
    specs = yaml.safe_load((ROOT / "roles/power/meta/argument_specs.yml").read_text())
    options = specs["argument_specs"]["main"]["options"]
    defaults = yaml.safe_load((ROOT / "roles/power/defaults/main.yml").read_text())
    assert {name: option["default"] for name, option in options.items()} == defaults
    roles = RoleVariables.of({"power": specs})
    assert roles.check({**defaults, "power_mac": MAC}) == []
    (wrong,) = roles.check({"power_mac": "02:00"})
    assert "MAC address" in wrong.message
    for action in options["power_action"]["choices"]:
        assert (ROOT / f"roles/power/tasks/{action}.yml").is_file()


def test_every_state_has_its_words() -> None:
    assert {"linux", "windows", "up", "silent"} == set(power._STATES)
