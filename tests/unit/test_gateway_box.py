"""The gateway's box over a service manager and servers that a test plays behind real sockets."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from llmbox import gate
from llmbox.gateway import box as box_module
from llmbox.gateway.board import Busy, Seen
from llmbox.gateway.box import SystemdBox, choose, newcomer
from llmbox.lock import held
from llmbox.prefetch import Prefetched
from llmbox.presets import PresetsFile
from llmbox.systemd import Systemd, UnitState

from tests.unit.fake_manager import FakeManager
from tests.unit.gateway_process import preset
from tests.unit.test_llmbox_wait_ready import Server

A, B = "llama-a.service", "llama-b.service"
NEVER_S = 60.0


class Place:
    """A runtime directory with a service manager, and the socket of whatever server runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.listen = folder / "server.sock"
        self.listeners: list[socket.socket] = []
        self.manager = FakeManager(folder, begin=lambda unit: self.serve(503, 503, 200) if unit else None)
        presets = {
            name: preset(
                self.listen, unit=f"llama-{name}.service", model_files=[str(folder / f"{name}.gguf")]
            )
            for name in "ab"
        }
        self.file = PresetsFile.model_validate({"version": 1, "user": "llm", "presets": presets})
        self.box = SystemdBox(self.file, Systemd(folder), folder)

    def serve(self, *statuses: int) -> Server:
        """Another server on the path, in the former one's place."""
        self.listen.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.listen))
        listener.listen()
        self.listeners.append(listener)
        return Server(listener, list(statuses))

    def close(self) -> None:
        """End it all."""
        self.manager.close()
        for listener in self.listeners:
            listener.close()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """A place where nothing runs."""
    made = Place(tmp_path)
    yield made
    made.close()


def test_a_switch_is_over_when_the_new_server_answers_and_the_old_one_is_not_asked(place: Place) -> None:
    place.manager.active = A
    place.manager.slow[B] = 60.0  # systemd's own wait takes its time
    old = place.serve(200)
    began = time.monotonic()
    moved = asyncio.run(place.box.switch("b"))
    assert time.monotonic() - began < 30, "it waited for the job"
    assert moved.ok and moved.seen == Seen("ready", "b", place.manager.pid)
    assert set(moved.parts) == {"stop", "load", "ready"}
    assert old.asked == 0, "a connection delays the end of the old server"


def test_a_server_that_was_there_before_is_no_newcomer(place: Place) -> None:
    nothing = newcomer(str(place.listen))
    assert not nothing()
    old = place.serve(200)
    answers = newcomer(str(place.listen))
    assert not answers() and old.asked == 0
    place.serve(503, 200)
    assert [answers(), answers()] == [False, True]
    assert nothing()


def test_what_a_switch_would_be_refused_with_is_known_without_one(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.manager.active = A
    assert asyncio.run(place.box.refusal("b")) == ""
    monkeypatch.setattr(gate, "refusal", lambda wanted: f"{wanted.model} is of an unknown type")
    refused = asyncio.run(place.box.refusal("b"))
    assert refused.endswith("; a still serves") and "unknown type" in refused
    assert asyncio.run(place.box.switch("b")).reason == refused
    assert place.manager.active == A


def test_whoever_else_switches_is_waited_for(place: Place) -> None:
    with held(place.folder, "coder"), pytest.raises(Busy):
        asyncio.run(place.box.switch("b"))
    assert not place.manager.calls


def test_a_preset_that_is_ready_already_is_left_alone(place: Place) -> None:
    place.manager.active = A
    place.serve(200)
    moved = asyncio.run(place.box.switch("a"))
    assert moved.ok and moved.seen is None
    assert {call[0] for call in place.manager.calls} == {"ListUnitsByNames"}


def test_the_next_file_is_read_beside_the_present_one_s_and_no_longer_than_it_is_wanted(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, ended = threading.Event(), threading.Event()
    protected: list[Path] = []

    def read(path: Path, *, protect: list[Path], stop: Callable[[], bool]) -> Prefetched:
        protected.extend(protect)
        begun.set()
        deadline = time.monotonic() + 5
        while not stop() and time.monotonic() < deadline:
            time.sleep(0.005)
        if stop():
            ended.set()
        return Prefetched(0, 0, 0)

    async def body() -> None:
        assert (await place.box.switch("a")).ok
        reading = asyncio.ensure_future(place.box.prefetch("b"))
        await asyncio.to_thread(begun.wait, 5)
        reading.cancel()
        await asyncio.wait({reading})
        await asyncio.to_thread(ended.wait, 5)

    monkeypatch.setattr(box_module, "prefetch", read)
    asyncio.run(body())
    assert protected == [place.folder / "a.gguf"] and ended.is_set()


def look(place: Place) -> Seen:
    """As a gateway sees it that has just been started."""
    systemd = Systemd(place.folder)
    with mock.patch.object(systemd, "show", systemd.look):  # systemctl's longer answer says the same of these
        return asyncio.run(SystemdBox(place.file, systemd, place.folder).look())


def test_a_preset_whose_unit_is_up_and_that_does_not_answer_is_coming(place: Place) -> None:
    place.manager.active = A
    place.serve(503)
    assert look(place) == Seen("coming", "a")


@pytest.fixture
def unloaded(place: Place) -> Place:
    """A place where nobody used a."""
    place.manager.active = A
    asyncio.run(place.box.unload("a"))
    assert ("StopUnit", A, "replace") in place.manager.calls and place.manager.active == ""
    return place


def test_what_was_unloaded_is_known_to_the_next_gateway(unloaded: Place) -> None:
    assert look(unloaded) == Seen("down", unloaded="a")
    del unloaded.file.presets["a"]
    assert look(unloaded) == Seen("down"), "it is no preset any more"


@pytest.mark.parametrize("by_hand", [True, False])
def test_what_was_unloaded_is_forgotten_when_something_starts(unloaded: Place, by_hand: bool) -> None:
    if by_hand:
        unloaded.manager.active = B
        unloaded.serve(200)
        assert look(unloaded).state == "ready"
    else:
        asyncio.run(unloaded.box.switch("b"))
    unloaded.manager.active = ""
    assert look(unloaded) == Seen("down")


def test_a_gateway_that_ends_while_it_unloads_has_told_the_next_one(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ends() -> None:
        raise KeyboardInterrupt

    place.manager.active = A
    monkeypatch.setattr(place.box.switcher, "off", ends)
    with pytest.raises(KeyboardInterrupt):
        place.box._unload("a")
    place.manager.active = ""
    assert look(place) == Seen("down", unloaded="a")


UP = {"active": "active", "sub": "running", "main_pid": 7}
STARTS = {"active": "activating", "sub": "start-post"}
AGAIN = {"active": "activating", "sub": "auto-restart", "result": "signal"}
FAILED = {"active": "failed", "sub": "failed", "ending": "it exited with status 1"}


@pytest.mark.parametrize(
    ("a", "b", "seen"),
    [
        (UP, {}, Seen("ready", "a", 7)),
        (STARTS, UP, Seen("ready", "b", 7)),
        ({}, STARTS, Seen("coming", "b")),
        (AGAIN, {}, Seen("coming", "a")),
        (FAILED, STARTS, Seen("coming", "b")),
        ({**FAILED, "since_s": 2.0}, {**FAILED, "since_s": 1.0}, Seen("down", "a", 0, FAILED["ending"])),
        ({}, {}, Seen("down")),
    ],
)
def test_what_systemd_s_states_mean_for_requests(
    place: Place, a: dict[str, Any], b: dict[str, Any], seen: Seen
) -> None:
    states = {A: UnitState(A, **a), B: UnitState(B, **b)}
    assert choose(place.box.presets, states)[0] == seen
