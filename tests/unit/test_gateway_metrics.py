"""The page for Prometheus: read back by its own parser, llama-server's part over a real UNIX socket."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from llmbox.gateway import metrics as module
from llmbox.gateway.accounts import Accounts
from llmbox.gateway.audit import Entry
from llmbox.gateway.board import Board, Moved, Seen
from llmbox.gateway.metrics import FETCH_LIMIT, Metrics
from llmbox.gateway.refusals import Refusal
from llmbox.gateway.requests import ROUTES
from llmbox.gateway.upstream import Upstream
from llmbox.gateway.usage import Usage
from prometheus_client.parser import text_string_to_metric_families

from tests.unit.gateway_settings import settings

# As llama-server writes them (tools/server/server-context.cpp).
LLAMA = (
    b"# HELP llamacpp:prompt_tokens_total Number of prompt tokens processed.\n"
    b"# TYPE llamacpp:prompt_tokens_total counter\n"
    b"llamacpp:prompt_tokens_total 1234\n"
    b"# HELP llamacpp:requests_processing Number of requests processing.\n"
    b"# TYPE llamacpp:requests_processing gauge\n"
    b"llamacpp:requests_processing 1"
)
Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


class Box:
    """Serves at once whatever preset it is told to, but `bad`."""

    def __init__(self) -> None:
        self.seen = Seen("ready", "coder", 1)

    async def look(self) -> Seen:
        return self.seen

    async def refusal(self, preset: str) -> str:
        return ""

    async def gone(self, pid: int) -> None:
        await asyncio.Event().wait()

    async def switch(self, preset: str) -> Moved:
        if preset == "bad":
            return Moved(False, "it is bad")
        self.seen = Seen("ready", preset, self.seen.pid + 1)
        return Moved(True, parts={"stop": 0.5, "load": 2.0})

    async def unload(self, preset: str) -> None:
        raise NotImplementedError

    async def prefetch(self, preset: str) -> None:
        pass


class Place:
    """Metrics of a board, whose llama-server listens on a socket in `path`."""

    def __init__(self, path: Path) -> None:
        keys = path / "keys.json"
        keys.write_text(json.dumps({"version": 1, "keys": []}))
        self.accounts = Accounts.load(keys, path / "usage.json", [], lambda: 1e9)
        self.board = Board({"coder": 1, "tiny": 1}, settings(), Box())
        self.socket = str(path / "llama.sock")
        self.metrics = Metrics(self.board, self.accounts, Upstream(self.socket), ["coder", "tiny"])

    async def page(self) -> str:
        return (await self.metrics.render()).decode()

    @asynccontextmanager
    async def llama(self, answer: Answer) -> Any:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.asked = await reader.readuntil(b"\r\n\r\n")
            await answer(writer)
            writer.close()

        server = await asyncio.start_unix_server(serve, self.socket)
        try:
            yield
        finally:
            server.close()


def says(body: bytes, status: bytes = b"200 OK") -> Answer:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        await writer.drain()

    return answer


def samples(page: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample of the page; one that is there twice is an error, as it is for Prometheus."""
    found: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found, key
            found[key] = sample.value
    return found


def value(page: str, name: str, **labels: str) -> float | None:
    return samples(page).get((name, tuple(sorted(labels.items()))))


def lint(page: str) -> None:
    """What `promtool check metrics` looks at."""
    assert page.endswith("\n")
    types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", page, re.MULTILINE))
    helps = re.findall(r"^# HELP (\S+) \S", page, re.MULTILINE)
    assert len(re.findall("^# TYPE", page, re.MULTILINE)) == len(types) == len(helps) == len(set(helps))
    assert set(helps) == set(types)
    for name, kind in types.items():
        assert re.fullmatch(r"(llmbox|process)_[a-z_]+|llamacpp:[a-z_]+", name)
        assert (kind == "counter") == name.endswith("_total")
        assert not re.search(r"(milli|micro)?seconds_.*seconds|_ms\b|_count$|_sum$|_bucket$", name)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(10):
            await test()

    asyncio.run(limited())


def test_requests_are_counted_by_route_preset_and_status(tmp_path: Path) -> None:
    async def test() -> None:
        place = Place(tmp_path)
        done = Entry("/v1/messages", preset="coder", wanted="coder", waited_s=3.0, usage=Usage(100, 60, 20))
        for status in (200, 200, 429):
            done.end(status)
            place.metrics.observe(done)
        held = Entry("/v1/messages", wanted="tiny", waited_s=1.0)
        held.end(503)
        stranger = Entry("/v1/messages")  # it never joined the queue
        stranger.end(401)
        for one in (held, stranger):
            place.metrics.observe(one)
        page = await place.page()
        lint(page)
        count = "llmbox_requests_total"
        assert value(page, count, route="/v1/messages", preset="coder", status="200") == 2
        assert value(page, count, route="/v1/messages", preset="coder", status="429") == 1
        assert value(page, count, route="/v1/messages", preset="tiny", status="503") == 1
        assert value(page, "llmbox_prompt_tokens_total", preset="coder") == 300
        assert value(page, "llmbox_prompt_cached_tokens_total", preset="coder") == 180
        assert value(page, "llmbox_generated_tokens_total", preset="coder") == 60
        assert value(page, "llmbox_hold_seconds_count") == 4
        assert value(page, "llmbox_hold_seconds_sum") == 10
        assert value(page, "llmbox_hold_seconds_bucket", le="2.5") == 1
        assert value(page, "llmbox_hold_seconds_bucket", le="5.0") == 4
        assert "_created" not in page

    run(test)


def test_what_clients_send_never_becomes_a_label(tmp_path: Path) -> None:
    async def test() -> None:
        place = Place(tmp_path)
        chance = random.Random(1)  # noqa: S311
        for number in range(500):
            odd = Entry(
                chance.choice([f"/x{number}", "/props", 'a"\n}']),
                key=f"key{number}",
                client=f"10.0.0.{number}",
                wanted=chance.choice([None, f"wanted{number}", "tiny"]),
                preset=chance.choice([None, f"preset{number}", "coder"]),
                waited_s=chance.choice([0.0, 1e9]),
                usage=Usage(-5, chance.choice([None, 10**400]), chance.choice([None, 3])),
                status=chance.choice([0, 200, 404, -1, 10**9]),
                error=f"error{number}",
            )
            place.metrics.observe(odd)
        page = await place.page()
        lint(page)
        found = [dict(labels) for name, labels in samples(page) if name == "llmbox_requests_total"]
        assert {labels["route"] for labels in found} == {"/props", "other"}
        assert {labels["preset"] for labels in found} == {"", "tiny", "coder"}
        assert {labels["status"] for labels in found} == {"200", "404", "other"}

    run(test)


def test_every_route_keeps_its_name(tmp_path: Path) -> None:
    async def test() -> None:
        place = Place(tmp_path)
        for _, path in ROUTES:
            place.metrics.observe(Entry(path, status=200))
        page = await place.page()
        for _, path in ROUTES:
            assert value(page, "llmbox_requests_total", route=path, preset="", status="200") == 1

    run(test)


def test_the_queue_the_active_preset_and_the_switches_are_told(tmp_path: Path) -> None:
    async def test() -> None:
        place = Place(tmp_path)
        board = place.board
        board.slots["bad"] = 1
        moving = asyncio.create_task(board.run())
        first = board.ask("coder", "a", slot=True)
        lease = await first.granted
        waiting = board.ask("coder", "a", slot=True)
        page = await place.page()
        assert value(page, "llmbox_queued_requests") == 1
        assert value(page, "llmbox_in_flight_requests") == 1
        assert value(page, "llmbox_active_preset_info", preset="coder") == 1
        board.release(lease)
        board.release(await waiting.granted)
        other, late = board.ask("tiny", "a", slot=True), board.ask("tiny", "a", slot=False)
        board.release(await other.granted)
        board.release(await late.granted)
        assert (first.switch, other.switch, late.switch) == ("", "caused", "waited")
        with pytest.raises(Refusal):
            await board.ask("bad", "a", slot=True).granted
        page = await place.page()
        lint(page)
        assert value(page, "llmbox_active_preset_info", preset="coder") is None
        assert value(page, "llmbox_switches_total", preset="tiny", outcome="ok") == 1
        assert value(page, "llmbox_switches_total", preset="bad", outcome="failed") == 1
        for part in ("prefetch", "drain", "stop", "load", "ready"):
            assert value(page, "llmbox_switch_seconds_count", preset="tiny", part=part) == 1
        assert value(page, "llmbox_switch_seconds_sum", preset="tiny", part="stop") == 0.5
        assert value(page, "llmbox_switch_seconds_sum", preset="tiny", part="load") == 2
        moving.cancel()

    run(test)


def test_breaches_and_the_process_are_told(tmp_path: Path) -> None:
    async def test() -> None:
        place = Place(tmp_path)
        place.accounts.book.breach("alice", "tokens_per_day", 5, 10)
        page = await place.page()
        assert value(page, "llmbox_key_budget_breaches_total", budget="tokens_per_day") == 1
        assert value(page, "llmbox_key_budget_breaches_total", budget="requests_per_day") == 0
        assert (value(page, "process_resident_memory_bytes") or 0) > 1e6
        assert "alice" not in page

    run(test)


# --- llama-server's own figures ---


def test_the_figures_of_llama_server_follow_the_gateways(tmp_path: Path) -> None:
    async def test() -> None:
        place = Place(tmp_path)
        place.board.serving = Seen("ready", "coder", 1)
        async with place.llama(says(LLAMA)):
            page = await place.page()
        lint(page)
        assert place.asked.startswith(b"GET /metrics HTTP/1.1\r\n")
        assert value(page, "llamacpp:prompt_tokens_total") == 1234
        assert value(page, "llmbox_llama_server_up") == 1
        own, foreign = page.split("\n# --- llama-server's own figures, as it tells them ---\n")
        assert "llamacpp" not in own and "llmbox" not in foreign

    run(test)


async def hang(_: asyncio.StreamWriter) -> None:
    await asyncio.sleep(3600)


async def trickle(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + LLAMA[:50])
    await asyncio.sleep(3600)


async def slam(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


@pytest.mark.parametrize(
    "answer",
    [
        says(LLAMA, b"503 Service Unavailable"),
        says(b'{"error": {"code": 501}}', b"501 Not Implemented"),
        says(b""),
        says(b"<html>"),
        says(b"\xff\xfe"),
        says(LLAMA + b"\nllamacpp:x{a="),
        says(LLAMA + b'\nllamacpp:x{a="b} 1'),
        says(LLAMA + b"\nllamacpp:x one"),
        says(LLAMA + b"\nllmbox_llama_server_up 1"),
        says(b"# comment\n"),
        says(LLAMA + b"\n#" + b" " * FETCH_LIMIT),
        slam,
        hang,
        trickle,
    ],
)
def test_figures_that_do_not_come_whole_are_left_out(
    tmp_path: Path, answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FETCH_TIMEOUT_S", 0.1)

    async def test() -> None:
        place = Place(tmp_path)
        place.board.serving = Seen("ready", "coder", 1)
        async with place.llama(answer):
            page = await place.page()
        lint(page)
        assert value(page, "llmbox_llama_server_up") == 0
        assert "llamacpp" not in page

    run(test)


@pytest.mark.parametrize("seed", range(20))
def test_no_damage_on_the_way_breaks_the_page(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311

    async def test() -> None:
        place = Place(tmp_path)
        place.board.serving = Seen("ready", "coder", 1)
        body = bytearray(LLAMA)
        for _ in range(5):
            body[chance.randrange(len(body))] = chance.randrange(256)
        async with place.llama(says(bytes(body))):
            samples(await place.page())

    run(test)


def test_a_server_that_is_not_ready_is_not_asked(tmp_path: Path) -> None:
    async def test() -> None:
        place = Place(tmp_path)
        place.asked = b""
        async with place.llama(says(LLAMA)):
            page = await place.page()
        assert place.asked == b""
        assert value(page, "llmbox_llama_server_up") == 0

    run(test)


def test_a_socket_that_is_not_there_is_a_server_that_is_down(tmp_path: Path) -> None:
    async def test() -> None:
        place = Place(tmp_path)
        place.board.serving = Seen("ready", "coder", 1)
        assert value(await place.page(), "llmbox_llama_server_up") == 0

    run(test)


def test_who_went_at_once_has_waited_for_no_time(tmp_path: Path) -> None:
    async def test() -> None:
        place = Place(tmp_path)
        place.metrics.observe(Entry("/v1/messages", preset="coder", status=200))
        assert value(await place.page(), "llmbox_hold_seconds_count") == 1

    run(test)


def test_a_scrape_leaves_no_connection_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FETCH_TIMEOUT_S", 0.1)

    async def test() -> None:
        place, left = Place(tmp_path), asyncio.Event()
        place.board.serving = Seen("ready", "coder", 1)

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nx")
            await writer.drain()
            with suppress(ConnectionError):
                await reader.read(1)
            left.set()

        server = await asyncio.start_unix_server(serve, place.socket)
        await place.page()
        async with asyncio.timeout(2):
            await left.wait()
        server.close()

    run(test)
