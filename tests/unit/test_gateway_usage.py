"""What the relay tells accounts, log and figures of a request: with a llama-server behind a real socket."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from llmbox.gateway.accounts import Accounts
from llmbox.gateway.audit import Audit
from llmbox.gateway.board import Board, Moved, Seen
from llmbox.gateway.metrics import Metrics
from llmbox.gateway.relay import Relay
from llmbox.gateway.requests import ROUTES
from llmbox.gateway.upstream import Upstream

from tests.unit.gateway_settings import settings

KEY = "llmbox-key-of-alice"
ROUTE = ROUTES["POST", "/v1/chat/completions"]
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


class Box:
    """Serves `coder`, for good."""

    async def look(self) -> Seen:
        return Seen("ready", "coder", 1)

    async def gone(self, pid: int) -> None:
        await asyncio.Event().wait()

    async def switch(self, preset: str) -> Moved:
        raise NotImplementedError

    async def stop(self) -> None:
        raise NotImplementedError

    async def prefetch(self, preset: str) -> None:
        raise NotImplementedError


class Place:
    """A relay with one key, over a llama-server that gives one answer."""

    def __init__(self, path: Path, **fields: Any) -> None:
        digest = hashlib.sha256(KEY.encode()).hexdigest()
        keys = path / "keys.json"
        keys.write_text(json.dumps({"version": 1, "keys": [{"name": "alice", "sha256": digest, **fields}]}))
        limits = settings()
        self.accounts = Accounts.load(keys, path / "usage.json", [], lambda: 1e9)
        self.audit = Audit(path / "audit.jsonl", 10**6, 1)
        self.board = Board({"coder": 4, "tiny": 1}, limits, Box())
        self.upstream = Upstream(str(path / "llama.sock"))
        self.metrics = Metrics(self.board, self.accounts, self.upstream, ["coder", "tiny"])
        presets: list[tuple[str, list[str]]] = [("coder", []), ("tiny", [])]
        self.relay = Relay(
            self.board, self.upstream, limits, presets, self.accounts, self.audit, self.metrics
        )
        self.served = 0

    @asynccontextmanager
    async def llama(self, answer: Answer) -> AsyncIterator[None]:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.served += 1
            await reader.readuntil(b"\r\n\r\n")
            try:
                await answer(writer)
                await writer.drain()
            except OSError:
                pass
            finally:
                writer.close()

        server = await asyncio.start_unix_server(serve, self.upstream.path)
        moving = asyncio.create_task(self.board.run())
        try:
            async with asyncio.timeout(10):
                yield
        finally:
            moving.cancel()
            server.close()

    async def ask(self, body: dict[str, Any], *, stays: bool = True) -> tuple[int, bytes]:
        """Status and body of an answer; a client that does not stay leaves once its request is sent."""
        sent: list[dict[str, Any]] = []
        given = iter([{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}])

        async def receive() -> dict[str, Any]:
            message = next(given, None)
            if message is None and stays:
                await asyncio.Event().wait()
            return message or {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        scope = {
            "headers": [(b"x-api-key", KEY.encode())],
            "client": ("192.168.1.7", 5),
            "query_string": b"",
        }
        await self.relay.serve(ROUTE, scope, receive, send)
        status = sent[0]["status"] if sent else 0
        return status, b"".join(message.get("body", b"") for message in sent)

    def logged(self) -> list[dict[str, Any]]:
        return [json.loads(text) for text in self.audit.path.read_text().splitlines()]


def whole(status: bytes, body: bytes) -> Answer:
    async def answer(writer: asyncio.StreamWriter) -> None:
        head = b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        writer.write(head % (status, len(body)) + body)

    return answer


async def endless(writer: asyncio.StreamWriter) -> None:
    writer.write(STREAM_HEAD)
    while True:
        writer.write(b'data: {"choices": []}\n\n')
        await writer.drain()
        await asyncio.sleep(0.0005)


def test_streams_side_by_side_share_the_budget(tmp_path: Path) -> None:
    async def test() -> None:
        place = Place(tmp_path, tokens_per_minute=100)
        async with place.llama(endless):
            answers = await asyncio.gather(*(place.ask({"stream": True}) for _ in range(3)))
            events = sum(body.count(b'"choices"') for _, body in answers)
            assert 100 <= events <= 130  # all three together, but for what one read brings
            for _, body in answers:
                assert b"used up its tokens_per_minute (100)" in body.split(b"\n\n")[-2]
            assert [told["status"] for told in place.logged()] == [429] * 3
            status, _ = await place.ask({"stream": True})
            assert (status, place.served) == (429, 3)
        assert place.accounts.breaches["tokens_per_minute"] == 4

    asyncio.run(test())


def test_what_the_server_counted_is_what_is_spent(tmp_path: Path) -> None:
    async def answer(writer: asyncio.StreamWriter) -> None:
        last = {"timings": {"prompt_n": 40, "cache_n": 60, "predicted_n": 7, "predicted_per_second": 12.5}}
        writer.write(STREAM_HEAD + b"data: {}\n\n" * 20 + b"data: " + json.dumps(last).encode() + b"\n\n")

    async def test() -> None:
        place = Place(tmp_path, tokens_per_minute=1000)
        async with place.llama(answer):
            await place.ask({"stream": True, "model": "coder"})
        assert place.accounts.identify([(b"x-api-key", KEY.encode())], "").tokens_left() == 1000 - 47
        told = place.logged()[0]
        assert (told["key"], told["client"], told["wanted"]) == ("alice", "192.168.1.7", "coder")
        assert (told["prompt_tokens"], told["cached_tokens"], told["generated_tokens"]) == (100, 60, 7)
        assert (told["generation_tok_s"], told["stream"], told["status"]) == (12.5, True, 200)
        assert told["seconds"] > 0

    asyncio.run(test())


def test_a_key_does_not_reach_a_foreign_preset_by_naming_none(tmp_path: Path) -> None:
    async def test() -> None:
        place = Place(tmp_path, presets=["tiny"])
        async with place.llama(whole(b"200 OK", b"{}")):
            for body in ({}, {"model": "unheard of"}, {"model": "coder"}):
                status, said = await place.ask(body)
                assert status == 403 and b"may not use the preset coder" in said
        assert (place.served, place.board.in_flight, place.board.queued) == (0, 0, 0)
        assert [told["status"] for told in place.logged()] == [403] * 3

    asyncio.run(test())


def test_the_words_of_a_request_do_not_come_back_into_the_log(tmp_path: Path) -> None:
    quoted = b'{"error": {"message": "cannot parse: my secret diary"}}'

    async def test() -> None:
        place = Place(tmp_path)
        async with place.llama(whole(b"400 Bad Request", quoted)):
            assert await place.ask({"prompt": "my secret diary"}) == (400, quoted)
        assert place.logged()[0]["error"] == "llama-server refused it"
        assert "diary" not in place.audit.path.read_text()
        page = (await place.metrics.render()).decode()
        assert f'llmbox_requests_total{{preset="coder",route="{ROUTE.path}",status="400"}} 1.0' in page

    asyncio.run(test())


def test_tokens_used_up_meanwhile_stop_what_waits(tmp_path: Path) -> None:
    async def test() -> None:
        place = Place(tmp_path, tokens_per_minute=100)
        place.board.slots["coder"] = 1
        async with place.llama(
            whole(b"200 OK", b'{"usage": {"prompt_tokens": 90, "completion_tokens": 10}}')
        ):
            answers = await asyncio.gather(*(place.ask({}) for _ in range(3)))
        assert [status for status, _ in answers] == [200, 429, 429]
        assert (place.served, place.board.in_flight) == (1, 0)

    asyncio.run(test())


def test_a_client_that_left_is_logged_as_499(tmp_path: Path) -> None:
    async def hang(_: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    async def test() -> None:
        place = Place(tmp_path)
        async with place.llama(hang):
            await place.ask({}, stays=False)
        assert [(told["status"], told["error"]) for told in place.logged()] == [(499, "the client went away")]

    asyncio.run(test())
