"""Power on real hosts: the magic packet on the wire, a host that is off and woken, one that stays gone.

A lab host has no network card that wakes it: what presses its power button is this test, and only when it has
seen the packet.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from lab.config import from_environment
from tests import support

Host = Callable[..., support.Run]

MAC = "02:00:5e:10:00:01"
MAGIC = b"\xff" * 6 + bytes.fromhex(MAC.replace(":", "")) * 16
PORT = 9
ETH_P_ALL, ETH_P_IP, UDP = 0x0003, 0x0800, 17
BROADCAST_MAC = b"\xff" * 6
WAIT_S = 60.0


def magic_frames(bridge: str, until: threading.Event) -> Iterator[tuple[bytes, str, bytes]]:
    """Each UDP packet to the port that passes the bridge: (MAC and IP it goes to, what it carries)."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as wire:
        wire.bind((bridge, 0))
        wire.settimeout(0.2)
        while not until.is_set():
            try:
                frame = wire.recv(2048)
            except TimeoutError:
                continue
            if struct.unpack("!H", frame[12:14])[0] != ETH_P_IP or frame[14 + 9] != UDP:
                continue
            start = 14 + (frame[14] & 0x0F) * 4
            _, port, length = struct.unpack("!HHH", frame[start : start + 6])
            if port == PORT:
                yield frame[:6], socket.inet_ntoa(frame[30:34]), frame[start + 8 : start + length]


class Watcher:
    """Sees what passes the bridge, and calls `seen` at the first magic packet."""

    def __init__(self, seen: Callable[[], object] = lambda: None) -> None:
        self.frames: list[tuple[bytes, str, bytes]] = []
        self._end = threading.Event()
        self._seen = seen
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watcher:
        self._thread.start()
        time.sleep(0.3)
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(WAIT_S)

    def _watch(self) -> None:
        for frame in magic_frames(from_environment().bridge, self._end):
            self.frames.append(frame)
            if len(self.frames) == 1:
                self._seen()


def lab(*words: str) -> support.Run:
    return support.run(support.BIN / "python", "-m", "lab", *words, timeout=180)


def play(
    folder: Path, action: str, host: str = support.CLIENT, *, timeout: float = 300, **variables: object
) -> support.PlaybookRun:
    """The real playbook, on one host of the lab that its groups may not name."""
    (play,) = yaml.safe_load((support.ROOT / "playbooks/power.yml").read_text())
    play["hosts"] = host
    file = folder / "power.yml"
    file.write_text(yaml.safe_dump([play]))
    given = {"power_action": action, "power_mac": MAC, "power_windows_ports": [445], **variables}
    return support.ansible_playbook(file, "-e", json.dumps(given), timeout=timeout)


@pytest.fixture
def client_up(on_host: Host) -> Iterator[None]:
    """The client host runs again afterwards."""
    yield
    lab("start", "client").check()


def test_the_magic_packet_on_the_wire_wakes_a_host_that_is_off(client_up: None, tmp_path: Path) -> None:
    del client_up
    here = from_environment()
    broadcast = here.subnet.replace(".0/24", ".255")
    neighbour = here.host(support.LLM)
    their_mac = support.on_host(support.LLM, "cat /sys/class/net/host0/address").check().stdout.strip()
    lab("poweroff", "client").check()

    # Broadcast, and unicast: to a host that is up, as only that one can be resolved here.
    with Watcher(lambda: lab("start", "client")) as wire:
        woken = play(
            tmp_path,
            "wake",
            power_wake_addresses=[broadcast, neighbour.address],
            power_wake_timeout=120,
            power_wake_interval=60,
        ).check()
    assert woken.changed == 1
    unicast = bytes.fromhex(their_mac.replace(":", ""))
    assert wire.frames == [(BROADCAST_MAC, broadcast, MAGIC), (unicast, neighbour.address, MAGIC)]


@pytest.mark.long
def test_a_host_that_stays_gone_is_one_line_in_time(tmp_path: Path, on_host: Host) -> None:
    del on_host
    nobody = from_environment().subnet.replace(".0/24", ".99")
    began = time.monotonic()
    done = play(
        tmp_path,
        "wake",
        ansible_host=nobody,
        power_wake_addresses=[nobody.replace(".99", ".255")],
        power_wake_timeout=10,
        power_wake_interval=5,
    )
    assert done.rc != 0 and "is gone: no answer to" in done.stdout and "magic packets for" in done.stdout
    assert time.monotonic() - began < WAIT_S


@pytest.mark.long
def test_a_box_is_powered_off_and_woken_with_what_it_served(tmp_path: Path, on_host: Host) -> None:
    """With lmswitch, on the box that serves: the preset is stopped, remembered, started, and generates."""
    preset = support.expected().names("user")[0]
    on_host(support.LLM, f"sudo -u llm lmswitch {preset}", timeout=180).check()
    broadcast = from_environment().subnet.replace(".0/24", ".255")
    play(tmp_path, "off", support.LLM).check()
    try:
        with Watcher(lambda: lab("start", "llm")):
            play(tmp_path, "wake", support.LLM, power_wake_addresses=[broadcast]).check()
    finally:
        lab("start", "llm")
    status = json.loads(on_host(support.LLM, "sudo -u llm lmswitch status --json", timeout=60).check().stdout)
    assert status["active"] == preset and status["state"] == "ready"
    asleep = play(tmp_path, "sleep", support.LLM)
    assert asleep.rc != 0 and f"{preset} serves again" in asleep.stdout, (
        "a lab host cannot suspend, and says so"
    )
