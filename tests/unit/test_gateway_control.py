"""How lmswitch has requests held and tells how its switch went, over the gateway's control socket."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from llmbox.gateway import client, control
from llmbox.gateway.board import Board

from tests.unit.fake_box import FakeBox
from tests.unit.gateway_settings import settings

PATIENCE_S = 10.0


class Place:
    """A board whose control socket lies in a runtime directory."""

    def __init__(self, runtime: Path) -> None:
        self.runtime = runtime
        self.box = FakeBox()
        (runtime / client.SOCKET).parent.mkdir()

    def run(self, lmswitch: Callable[[Board], Any], requests: int = 0) -> Board:
        """What this does in a thread, as the program does it in its process, beside `requests` for a."""

        async def body() -> Board:
            board = Board({"a": 1, "b": 1}, settings(), self.box)
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(self.runtime / client.SOCKET))
            listener.listen()
            server = await control.serve(board, listener)
            moving = asyncio.ensure_future(board.run())
            async with asyncio.timeout(PATIENCE_S):
                while board.phase != "ready":
                    await asyncio.sleep(0.001)
                for _ in range(requests):
                    board.ask("a", "k", slot=True)
                await asyncio.to_thread(lmswitch, board)
                while board.phase == "held":
                    await asyncio.sleep(0.001)
            moving.cancel()
            server.close()
            await asyncio.gather(moving, return_exceptions=True)
            return board

        return asyncio.run(body())


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A board where the preset a serves."""
    return Place(tmp_path)


@contextmanager
def held(place: Place, preset: str | None) -> Iterator[Callable[[bool, Mapping[str, float]], None]]:
    """All requests are held."""
    with client.requests_held(place.runtime, preset, lambda _figures: None) as switched:
        yield switched


def test_a_switch_by_hand_is_the_last_one(place: Place) -> None:
    def lmswitch(board: Board) -> None:
        with held(place, "b") as switched:
            assert board.phase == "held"
            place.box.become("b")
            switched(True, {"stop": 0.5, "load": 2.0, "ready": 2.5})

    board = place.run(lmswitch)
    told = board.last_switch
    assert (told["from"], told["to"], told["ok"]) == ("a", "b", True)
    assert isinstance(told["parts"], dict) and told["parts"].items() >= {"stop": 0.5, "ready": 2.5}.items()
    assert set(told["parts"]) == {"prefetch", "drain", "stop", "load", "ready"}
    assert board.switches == {("b", "ok"): 1} and board.load_s["b"] == 2.5


def test_what_stops_the_server_is_no_switch_to_a_preset(place: Place) -> None:
    def lmswitch(_: Board) -> None:
        with held(place, None) as switched:
            place.box.become(None)
            switched(True, {"stop": 0.5})

    board = place.run(lmswitch)
    assert (board.last_switch["from"], board.last_switch["to"]) == ("a", None) and not board.switches


def test_a_switch_by_hand_when_nothing_ran_came_from_nothing(place: Place) -> None:
    def lmswitch(_: Board) -> None:
        for preset in (None, "b"):
            with held(place, preset) as switched:
                place.box.become(preset)
                switched(True, {"ready": 1.0})

    board = place.run(lmswitch)
    assert board.last_switch == {"from": None, "to": "b", "ok": True, "parts": {"ready": 1.0}}


def test_whoever_says_nothing_has_switched_nothing(place: Place) -> None:
    def lmswitch(_: Board) -> None:
        with held(place, "b"):
            pass

    assert place.run(lmswitch).last_switch == {}


@pytest.mark.parametrize(
    "said", [b"no JSON", b'{"ok": true}', b'{"ok": true, "parts": {"x": "y"}}', b"x" * 9000]
)
def test_a_word_that_is_not_understood_ends_the_hold(place: Place, said: bytes) -> None:
    def lmswitch(_: Board) -> None:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(PATIENCE_S)
            connection.connect(str(place.runtime / client.SOCKET))
            connection.sendall(client.line({"do": "hold", "preset": "b"}))
            told = connection.makefile("rb")
            while not json.loads(told.readline()).get("held"):
                pass
            connection.sendall(said + b"\n")
            assert told.read() == b"", "it hung up"

    board = place.run(lmswitch)
    assert board.phase == "ready" and board.last_switch == {}


def test_an_lmswitch_that_dies_while_it_waits_lets_everybody_go_on_at_once(tmp_path: Path) -> None:
    async def body() -> None:
        board = Board({"a": 1, "b": 1}, settings(drain_timeout=600.0), FakeBox())
        path = str(tmp_path / "control.sock")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        server = await control.serve(board, listener)
        moving = asyncio.ensure_future(board.run())
        async with asyncio.timeout(PATIENCE_S):
            lease = await board.ask("a", "k", slot=True).granted
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(client.line({"do": "hold", "preset": "b"}))
            while json.loads(await reader.readline())["phase"] != "draining":
                pass
            writer.close()
            while board.phase != "ready":
                await asyncio.sleep(0.001)
            assert lease in board.leases and lease.ended is None
        moving.cancel()
        server.close()
        await asyncio.gather(moving, return_exceptions=True)

    asyncio.run(body())


def test_a_hold_for_what_is_no_name_is_refused(place: Place) -> None:
    def lmswitch(_: Board) -> None:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(PATIENCE_S)
            connection.connect(str(place.runtime / client.SOCKET))
            connection.sendall(client.line({"do": "hold", "preset": ["b"]}))
            assert b"error" in connection.makefile("rb").readline()

    assert place.run(lmswitch).phase == "ready"


def test_requests_are_held_for_as_long_as_the_switch_takes(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "TICK_S", 0.001)

    def lmswitch(board: Board) -> None:
        with held(place, "b") as switched:
            time.sleep(0.05)
            assert board.phase == "held"
            switched(True, {"ready": 1.0})

    assert place.run(lmswitch).switches == {("b", "ok"): 1}


def test_who_switches_is_told_of_the_queue_and_may_give_up(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "TICK_S", 0.01)
    told: list[Mapping[str, Any]] = []

    def tick(figures: Mapping[str, Any]) -> None:
        told.append(figures)
        if figures["phase"] == "draining":
            raise KeyboardInterrupt

    def lmswitch(board: Board) -> None:
        with pytest.raises(KeyboardInterrupt), client.requests_held(place.runtime, "b", tick):
            pytest.fail("the server was drained")
        began = time.monotonic()
        while board.phase != "ready":
            assert time.monotonic() - began < 2, "what runs is to be ended still"
            time.sleep(0.001)

    place.run(lmswitch, requests=2)
    assert told[-1] == {"phase": "draining", "queued": 1, "in_flight": 1, "last_switch": {}}


def test_whoever_asks_is_told_of_the_queue(place: Place) -> None:
    def status(_: Board) -> None:
        told = client.ask_status(place.runtime)
        assert told == {"phase": "ready", "queued": 2, "in_flight": 1, "last_switch": {}}

    place.run(status, requests=3)


def test_without_a_gateway_nothing_is_held(tmp_path: Path) -> None:
    with client.requests_held(tmp_path, "b", lambda _figures: None) as switched:
        switched(True, {})
    assert client.ask_status(tmp_path) is None


def test_the_guard_has_requests_refused_and_served_again(place: Place) -> None:
    def guard(board: Board) -> None:
        assert client.set_blocked(place.runtime, "the card is hot")
        assert board.blocked == "the card is hot"
        assert client.set_blocked(place.runtime, "")
        assert board.blocked == ""

    place.run(guard)
    assert not client.set_blocked(place.runtime, ""), "nobody answers any more"
