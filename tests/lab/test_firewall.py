"""Role firewall on real hosts: the declared ports on the declared networks only, and nobody locked out.

The lab's client host gets the rules: it may have open ports of the test's own. They are tried from a second
lab host, and from network namespaces inside the first that stand for a tailnet and for somebody's network.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from lab.config import from_environment
from tests import support

Host = Callable[..., support.Run]

HOST, NEIGHBOUR = support.CLIENT, support.LLM
# SSH, the gateway's, the OCR service's, one that nobody declared; the test listens on all but the first.
PORTS = (22, 1234, 8091, 9999)
LISTENERS = "llmbox-test-listeners"
FORMER = "/run/llmbox-firewall/former.nft"
LISTEN = f"""
import asyncio
async def main():
    async def close(reader, writer): writer.close()
    for port in {PORTS[1:]}: await asyncio.start_server(close, None, port)
    await asyncio.Event().wait()
asyncio.run(main())
"""
# Tries all ports of all addresses at once: {address: [ports that answer]}.
TRY = f"""
import asyncio, json, sys
async def one(address, port):
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(address, port), 2)
    except (OSError, asyncio.TimeoutError):
        return None
    writer.close()
    return port
async def main():
    found = {{}}
    for address in sys.argv[1:]:
        answers = await asyncio.gather(*(one(address, port) for port in {PORTS}))
        found[address] = [port for port in answers if port]
    print(json.dumps(found))
asyncio.run(main())
"""
# An end in the host, the other one in a namespace: (address of the host, of the namespace), IPv4 and IPv6.
NETWORKS = {
    "tailscale0": (("100.64.0.10", "100.64.0.99"), ("fd7a:115c:a1e0::10", "fd7a:115c:a1e0::99")),
    "stranger0": (("198.51.100.10", "198.51.100.99"), ("2001:db8::10", "2001:db8::99")),
}
PREFIX = {4: "/24", 6: "/64 nodad"}
LAN6 = ("fd5a:17::13", "fd5a:17::11")
CONFIRM_S = 10
REVERT_BAR_S = 60.0


class Place:
    """The host with the rules, and the ways to look at it from outside."""

    def __init__(self, on_host: Host, folder: Path) -> None:
        self.on_host = on_host
        self.playbook = folder / "play.yml"
        play = {"hosts": HOST, "become": True, "gather_facts": False, "roles": ["base", "firewall"]}
        self.playbook.write_text(yaml.safe_dump([play]))
        lab = from_environment()
        self.address = lab.host(HOST).address
        self.variables: dict[str, Any] = {
            "firewall_enabled": True,
            "firewall_networks": {
                "lan": {"addresses": [lab.subnet, "fd5a:17::/64"]},
                "tailnet": {"interface": "tailscale0"},
            },
            "firewall_ports": {"llm_gateway": [f"{self.address}:1234"], "ocr_service": ["[::]:8091"]},
            "firewall_allow": {"ssh": ["lan", "tailnet"], "llm_gateway": ["tailnet"], "ocr_service": ["lan"]},
            "firewall_confirm_timeout": CONFIRM_S,
        }

    def root(self, command: str, host: str = HOST) -> str:
        """A shell command as root; it must succeed."""
        return self.on_host(host, "sudo sh -e", stdin=command).check().stdout

    def play(self, *words: str, **changes: Any) -> support.PlaybookRun:
        """The role, with these variables in place of the sound ones."""
        variables = json.dumps({**self.variables, **changes})
        return support.ansible_playbook(self.playbook, *words, "-e", variables, timeout=200)

    def open_ports(self, way: str, *addresses: str, host: str = HOST) -> dict[str, list[int]]:
        """The ports that answer at each address; `way` is what runs the attempts where."""
        done = self.on_host(host, f"sudo {way} python3 - {' '.join(addresses)}", stdin=TRY).check()
        found: dict[str, list[int]] = json.loads(done.stdout)
        return found

    def table(self) -> str:
        """The table that is loaded; empty when there is none."""
        return self.on_host(HOST, "sudo nft list table inet llmbox").stdout


def setup_script() -> str:
    """Makes the two networks in the host."""
    lines = []
    for interface, families in NETWORKS.items():
        inside = f"ip -n ns-{interface}"
        lines += [
            f"ip netns add ns-{interface}",
            f"ip link add {interface} type veth peer name eth0 netns ns-{interface}",
            f"ip link set {interface} up; {inside} link set eth0 up",
        ]
        for version, (own, theirs) in zip(PREFIX, families, strict=True):
            lines.append(f"ip addr add {own}{PREFIX[version]} dev {interface}")
            lines.append(f"{inside} addr add {theirs}{PREFIX[version]} dev eth0")
    return "\n".join(lines)


@pytest.fixture
def place(on_host: Host, tmp_path: Path) -> Iterator[Place]:
    """The host with listeners and two networks more; afterwards as it was."""
    place = Place(on_host, tmp_path)
    listen = f"systemd-run --quiet --unit={LISTENERS} python3 -c '{LISTEN}'"
    own_address, neighbours = (f"ip addr add {address}{PREFIX[6]} dev host0" for address in LAN6)
    place.root("\n".join([setup_script(), own_address, listen]))
    place.root(neighbours, NEIGHBOUR)
    yield place
    place.play(firewall_enabled=False).check()
    assert not place.table()
    gone = [f"ip netns del ns-{interface}" for interface in NETWORKS]
    gone += [f"ip addr del {LAN6[0]}/64 dev host0", f"systemctl stop {LISTENERS}"]
    on_host(HOST, f"sudo sh -c '{'; '.join(gone)}'")  # what a boot has taken already is fine
    on_host(NEIGHBOUR, f"sudo ip addr del {LAN6[1]}/64 dev host0")


def look(place: Place) -> dict[str, list[list[int]]]:
    """What answers over each network, IPv4 first."""
    lan = place.open_ports("", place.address, LAN6[0], host=NEIGHBOUR)
    found = {"lan": list(lan.values())}
    for interface, families in NETWORKS.items():
        way = f"ip netns exec ns-{interface}"
        found[interface] = list(place.open_ports(way, *(own for own, _ in families)).values())
    return found


def test_only_declared_ports_answer_and_rules_that_cut_ssh_off_revert(place: Place) -> None:
    everything = [list(PORTS)] * 2
    assert look(place) == {"lan": everything, "tailscale0": everything, "stranger0": everything}
    assert place.play().check().changed >= 1
    declared = {"lan": [[22, 8091]] * 2, "tailscale0": [[22, 1234]] * 2, "stranger0": [[], []]}
    assert look(place) == declared
    loaded = place.table()
    assert place.play().check().changed == 0

    began = time.monotonic()
    done = place.play(
        firewall_networks={"lan": {"addresses": ["203.0.113.0/24"]}, "tailnet": {"interface": "x0"}}
    )
    took = time.monotonic() - began
    assert done.rc != 0 and "no new connection came through" in done.stdout
    assert "has its former rules again" in done.stdout
    assert place.table() == loaded
    # Ansible's own start included.
    print(support.keep_figures("firewall-revert", "rules that cut off SSH are undone", [took], REVERT_BAR_S))

    # Somebody opens a port by hand: the next run sees it, and mends it.
    place.root("nft add rule inet llmbox input tcp dport 9999 accept")
    assert place.play().check().changed == 1
    assert place.table() == loaded


@contextmanager
def started(words: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A program in a session of its own, which ends with the block."""
    process = subprocess.Popen(
        words,
        cwd=support.ROOT,
        env=support.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.long
def test_a_controller_that_dies_before_it_confirms_changes_nothing(place: Place) -> None:
    """The former rules, here none, come back by the host's own timer; no boot knows the new ones."""
    variables = {**place.variables, "firewall_confirm_timeout": 20}
    words = [str(support.BIN / "ansible-playbook"), "-i", str(support.LAB_INVENTORY), str(place.playbook)]
    # What the module writes just before it arms the timer: it goes on after that, whoever listens.
    place.root(f"rm -f {FORMER}")
    since = place.root("date +%s").strip()
    watching = f"sudo sh -c 'until test -e {FORMER}; do sleep 0.02; done'"
    watch = [str(support.BIN / "python"), "-m", "lab", "ssh", HOST, watching]
    with started(watch) as seen, started([*words, "-e", json.dumps(variables)]) as process:
        assert seen.wait(timeout=120) == 0 and process.poll() is None
        # Its workers have sessions of their own, and would go on.
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in (process.pid, *map(int, workers)):
            os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    undone = f"journalctl --since=@{since} --unit=llmbox-firewall-revert.service --output=cat"
    while "Deactivated successfully" not in place.root(undone):
        assert time.monotonic() - began < REVERT_BAR_S, "the former rules did not come back"
        time.sleep(0.5)
    assert not place.table()
    left = place.root("ls /etc/systemd/system/llmbox-firewall.service /etc/llmbox/firewall.nft 2>&1 || true")
    assert left.count("No such file") == 2


@pytest.mark.long
def test_the_rules_are_back_after_a_boot_and_another_firewall_is_refused(place: Place) -> None:
    place.play().check()
    loaded = place.table()
    support.run(support.BIN / "python", "-m", "lab", "reboot", HOST, timeout=180).check()
    assert place.table() == loaded
    place.root(
        "nft add table ip filter; "
        "nft add chain ip filter DOCKER-USER; "
        "nft 'add chain ip filter FORWARD { type filter hook forward priority 0; policy drop; }'"
    )
    try:
        done = place.play()
        assert done.rc != 0 and "Docker" in done.stdout and "fix: " in done.stdout
    finally:
        place.root("nft delete table ip filter")
