"""The gateway on a real host: nothing is lost while presets are switched and killed, and it is restarted."""

from __future__ import annotations

import asyncio
import json
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from lab.config import from_environment
from lab.throttle import slow_reads
from scripts._traffic import Sent, Traffic, chat, run_clients
from tests import support

Host = Callable[..., support.Run]
CLIENTS = 8
SEED = 20261122
REASON = "error: this preset cannot load"
PATIENCE_S = 240
STOP_BAR_S = 1.0
PARTS = {"prefetch", "drain", "stop", "load", "ready"}
SLOW_BYTES_PER_S = 50_000_000
# On the box, with the gateway's Python: waits for a phase of the board, then kills the server of a model.
KILL_IN_PHASE = """
import os, pathlib, signal, sys, time
from llmbox.gateway.client import ask_status

runtime, phase, *models = sys.argv[1:]
deadline = time.monotonic() + 120
killed = False
while not killed:
    assert time.monotonic() < deadline, f"the board was never {phase} with a server of {models}"
    time.sleep(0.005)
    if (ask_status(pathlib.Path(runtime)) or {}).get("phase") != phase:
        continue
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\\0")
        except OSError:
            continue
        if words[0].endswith(b"/llama-server") and any(model.encode() in words for model in models):
            os.kill(int(process.name), signal.SIGKILL)
            killed = True
"""
EVICT = """
import os, sys

file = os.open(sys.argv[1], os.O_RDONLY)
os.fsync(file)
os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
"""


class Box:
    """lab-llm behind its gateway."""

    def __init__(self, on_host: Host, hostvars: dict[str, Any]) -> None:
        self.on_host = on_host
        self.wanted = support.expected()
        self.url = self.wanted.url(hostvars["ansible_host"])
        self.first, self.second, *_ = self.wanted.names("user")
        user = self.wanted.user
        self.manager = f"sudo -u {user} XDG_RUNTIME_DIR=/run/user/$(id -u {user}) systemctl --user"

    def run(self, command: str, timeout: float = 120) -> support.Run:
        """A shell command as the sudo user; it must succeed."""
        return self.on_host(support.LLM, command, timeout=timeout).check()

    def lmswitch(self, *words: str) -> str:
        """lmswitch as the LLM user."""
        return self.run(f"sudo -u {self.wanted.user} lmswitch {' '.join(words)}").stdout

    def chat(self, model: str | None = None, *, stream: bool = False, tokens: int = 4) -> Sent:
        """One chat from this machine."""

        async def one() -> Sent:
            async with httpx.AsyncClient(base_url=self.url, timeout=PATIENCE_S, trust_env=False) as client:
                return await chat(client, model, stream=stream, tokens=tokens)

        return asyncio.run(one())

    def active(self) -> str | None:
        """The preset that serves."""
        active: str | None = json.loads(self.lmswitch("status", "--json"))["active"]
        return active

    def last_switch(self) -> tuple[str, str, dict[str, float]]:
        """From where to where it went, and the seconds of its parts, as a person is shown it."""
        shown = self.lmswitch("status")
        found = re.search(r"^  switched +(\S+) to (\S+): (.+)$", shown, re.MULTILINE)
        assert found, shown
        parts = re.findall(r"(\w+) ([0-9.]+) s", found[3])
        return found[1], found[2], {name: float(seconds) for name, seconds in parts}

    def kill_server(self) -> None:
        """SIGKILL for llama-server, and nothing else."""
        self.run("sudo pkill -KILL -x llama-server")

    def model(self, preset: str) -> str:
        """The path of its model's file."""
        known = json.loads(self.run(f"cat {self.wanted.presets_json}").stdout)["presets"]
        return str(known[preset]["model_path"])

    def python(self, program: str, *words: str) -> None:
        """A program as root, with the Python of the box's own tools."""
        self.on_host(
            support.LLM, f"sudo /opt/llmbox/bin/python -I - {' '.join(words)}", stdin=program, timeout=180
        ).check()

    def kill_in_phase(self, phase: str, *presets: str) -> None:
        """SIGKILL for the server of one of the presets as soon as the gateway's board is in this phase."""
        uid = self.run(f"id -u {self.wanted.user}").stdout.strip()
        self.python(KILL_IN_PHASE, f"/run/user/{uid}", phase, *map(self.model, presets))

    def restart_gateway(self) -> None:
        """As an update does it."""
        self.run(f"{self.manager} restart llm-gateway.service")


@pytest.fixture
def box(on_host: Host, lab_hostvars: dict[str, dict[str, Any]]) -> Box:
    """The LLM box, its first preset serving."""
    box = Box(on_host, lab_hostvars[support.LLM])
    box.lmswitch(box.first)
    return box


@pytest.fixture
def broken(box: Box) -> Iterator[str]:
    """A preset whose server dies as soon as it has started."""
    folder = f"{box.wanted.home}/.config/systemd/user/llama-{box.second}.service.d"
    box.run(
        f"sudo -u {box.wanted.user} mkdir -p {folder} && printf '[Service]\\nExecStart=\\n"
        f'ExecStart=/bin/sh -c "sleep 0.3; echo {REASON} >&2; exit 7"\\n\''
        f" | sudo -u {box.wanted.user} tee {folder}/50-test.conf >/dev/null && {box.manager} daemon-reload"
    )
    yield box.second
    box.run(f"sudo rm -rf {folder}; {box.manager} daemon-reload")
    box.restart_gateway()  # it would not try this preset again for a while


class Clients:
    """Traffic in a thread of its own, while the test makes trouble."""

    def __init__(self, url: str, models: list[str | None], pause_s: float = 0.0) -> None:
        self.traffic = Traffic()
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(
                run_clients(
                    url,
                    self.traffic,
                    models,
                    clients=CLIENTS,
                    until=self._stop.is_set,
                    pause_s=pause_s,
                    seed=SEED,
                )
            )
        )

    def __enter__(self) -> Clients:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(PATIENCE_S)
        print(self.traffic.summary())

    def wait_for(self, count: int) -> None:
        """Wait until so many requests have ended."""
        deadline = time.monotonic() + PATIENCE_S
        while len(self.traffic.sent) < count:
            assert time.monotonic() < deadline, f"{len(self.traffic.sent)} of {count} requests had ended"
            time.sleep(0.05)


class Asking:
    """One request for a preset, in a thread of its own."""

    def __init__(self, box: Box, preset: str) -> None:
        self._told: list[Sent] = []
        self._thread = threading.Thread(target=lambda: self._told.append(box.chat(preset)))
        self._thread.start()

    def answer(self) -> Sent:
        """What became of it."""
        self._thread.join(PATIENCE_S)
        (told,) = self._told
        return told


def lost(traffic: Traffic) -> str:
    """What failed, for a person."""
    return "\n".join(
        f"{one.took:.1f} s, {one.status}, stream={one.stream}: {one.error}" for one in traffic.failed
    )


@pytest.mark.parametrize(
    ("requests", "switches", "kills", "restarts"),
    [
        pytest.param(120, 2, 1, 3, id="sample"),
        pytest.param(2000, 10, 3, 20, id="whole", marks=pytest.mark.long),
    ],
)
def test_no_request_is_lost(box: Box, requests: int, switches: int, kills: int, restarts: int) -> None:
    trouble = ["switch"] * switches + ["kill"] * kills + ["restart"] * restarts
    random.Random(SEED).shuffle(trouble)  # noqa: S311  (a series to repeat, not a secret)
    presets = [box.first, box.second]
    by_hand = 0
    with Clients(box.url, [None]) as clients:
        for number, what in enumerate(trouble, 1):
            clients.wait_for(requests * number // (len(trouble) + 1))
            if what == "kill":
                clients.traffic.kill(box.kill_server)
            elif what == "restart":
                box.restart_gateway()
            else:
                presets.reverse()
                by_hand += 1
                if by_hand % 2:
                    box.lmswitch(presets[0])
                else:
                    named = box.chat(presets[0])
                    assert named.ok, named.error
        clients.wait_for(requests)
    traffic = clients.traffic
    assert not traffic.failed, lost(traffic)
    assert len([one for one in traffic.sent if one.ok]) >= requests * 0.98
    assert sum(1 for one in traffic.sent if not one.ok) <= kills * CLIENTS // 2, "every second client streams"


@pytest.mark.long
def test_no_request_is_lost_when_clients_want_different_presets(box: Box) -> None:
    with Clients(box.url, [box.first, box.second, None]) as clients:
        for number in range(3):
            clients.wait_for(40 + 80 * number)
            clients.traffic.kill(lambda: box.kill_in_phase("ready", box.first, box.second))
            clients.wait_for(80 + 80 * number)
            box.restart_gateway()
        clients.wait_for(300)
    traffic = clients.traffic
    assert not traffic.failed, lost(traffic)
    assert sum(1 for one in traffic.sent if not one.ok) <= 3 * CLIENTS // 2, "every second client streams"
    assert {one.model for one in traffic.sent if one.ok} == {box.first, box.second, None}


@pytest.mark.long
@pytest.mark.parametrize("phase", ["prefetching", "loading"])
def test_no_request_is_lost_when_a_server_dies_in_a_switch(box: Box, phase: str) -> None:
    """The old one while the next file is read from a slow disk; the new one while it loads."""
    lab = from_environment()
    host = lab.host(support.LLM)
    # Another file: one that the present server has mapped cannot be evicted.
    other = next(name for name in box.wanted.names("user") if box.model(name) != box.model(box.first))
    dies = box.first if phase == "prefetching" else other
    with slow_reads(lab, host, SLOW_BYTES_PER_S), Clients(box.url, [None]) as clients:
        clients.wait_for(10)
        box.python(EVICT, box.model(other))
        asking = Asking(box, other)
        clients.traffic.kill(lambda: box.kill_in_phase(phase, dies))
        named = asking.answer()
        clients.wait_for(len(clients.traffic.sent) + 20)
    assert not clients.traffic.failed, lost(clients.traffic)
    assert sum(1 for one in clients.traffic.sent if not one.ok) <= CLIENTS // 2
    if phase == "prefetching":
        assert named.ok and box.active() == other, named
    else:  # a preset that did not start: one 503, or it came up at its second start
        assert named.ok or named.status == 503, named
        assert box.active() in (box.first, other)


def test_a_preset_that_cannot_start_costs_one_request(box: Box, broken: str) -> None:
    with Clients(box.url, [None]) as clients:
        clients.wait_for(10)
        named = box.chat(broken)
        clients.wait_for(len(clients.traffic.sent) + 20)
    assert named.status == 503 and REASON in named.error, named
    assert not clients.traffic.failed, lost(clients.traffic)
    assert all(one.ok for one in clients.traffic.sent)
    assert box.active() == box.first


def test_a_request_asks_for_its_preset_by_name_and_by_alias(box: Box) -> None:
    alias = box.wanted.config.llama_presets[box.first].aliases[0]
    assert box.chat(box.second).ok
    assert box.active() == box.second
    assert box.chat("a-model-that-nobody-knows").ok
    assert box.active() == box.second
    assert box.chat(alias, stream=True).ok
    assert box.active() == box.first
    former, now, parts = box.last_switch()
    assert (former, now) == (box.second, box.first) and set(parts) == PARTS
    assert parts["stop"] < STOP_BAR_S, "nobody is connected to a server that is stopped"


def test_lmswitch_waits_for_what_runs_and_holds_what_comes(box: Box) -> None:
    with Clients(box.url, [None]) as clients:
        clients.wait_for(10)
        box.lmswitch(box.second)
        clients.wait_for(len(clients.traffic.sent) + 20)
    assert not clients.traffic.failed, lost(clients.traffic)
    assert all(one.ok for one in clients.traffic.sent)
    assert box.active() == box.second
    former, now, parts = box.last_switch()
    assert (former, now) == (box.first, box.second) and set(parts) == PARTS
    assert parts["stop"] < STOP_BAR_S


def test_lmswitch_reaches_the_gateway_after_its_restart(box: Box) -> None:
    """Python 3.13 removes the path of a UNIX socket that it closes; the control socket is systemd's."""
    box.restart_gateway()
    ask = "from llmbox.gateway.client import ask_status as ask; print(ask(pathlib.Path(sys.argv[1])))"
    python = f"sudo -u {box.wanted.user} /opt/llmbox/bin/python -I -c 'import pathlib, sys; {ask}'"
    told = box.run(f"{python} /run/user/$(id -u {box.wanted.user})").stdout
    assert "'queued': 0" in told


def test_llama_server_s_own_figures_are_relayed(box: Box) -> None:
    assert box.chat(box.first).ok
    page = httpx.get(f"{box.url}/metrics", timeout=60, trust_env=False).text
    figures = dict(line.rsplit(" ", 1) for line in page.splitlines() if line and not line.startswith("#"))
    assert figures["llmbox_llama_server_up"] == "1.0"
    assert float(figures["llamacpp:tokens_predicted_total"]) > 0
    assert figures[f'llmbox_active_preset_info{{preset="{box.first}"}}'] == "1.0"


def test_nothing_runs_and_the_client_is_told_how_to_start_one(box: Box) -> None:
    box.lmswitch("off")
    told = box.chat()
    assert told.status == 503 and "lmswitch" in told.error
    assert box.chat(box.first).ok, "a request that names a preset starts it"
