"""A relay with everything around it, over a llama-server that a test plays behind a real socket."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

from llmbox.gateway.accounts import Accounts
from llmbox.gateway.audit import Audit
from llmbox.gateway.board import Board
from llmbox.gateway.metrics import Metrics
from llmbox.gateway.relay import Relay
from llmbox.gateway.requests import ROUTES
from llmbox.gateway.upstream import Upstream

from tests.unit.fake_box import FakeBox
from tests.unit.gateway_settings import settings

PATIENCE_S = 10
KEY = "llmbox-key-of-alice"
ADDRESS = "192.168.1.7"
OPENAI, ANTHROPIC = ROUTES["POST", "/v1/chat/completions"], ROUTES["POST", "/v1/messages"]
Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


class Told(NamedTuple):
    """What a client was told; 0 when nothing."""

    status: int
    headers: dict[bytes, bytes]
    body: bytes


class Place:
    """A relay over a box whose server gives one answer after the other, the last one for ever.

    `presets` and their slots; the first one serves unless there is a `box`. With `key`, the fields of alice's
    entry in the keys file, it is she who asks, from ADDRESS; without it somebody on the machine itself.
    """

    def __init__(
        self,
        path: Path,
        *answers: Answer,
        presets: Mapping[str, int] | None = None,
        box: FakeBox | None = None,
        key: dict[str, Any] | None = None,
        **changed: object,
    ) -> None:
        slots = dict(presets or {"a": 1, "b": 1})
        sha256 = hashlib.sha256(KEY.encode()).hexdigest()
        keys = [] if key is None else [{"name": "alice", "sha256": sha256, **key}]
        (path / "keys.json").write_text(json.dumps({"version": 1, "keys": keys}))
        self.client = ("127.0.0.1", []) if key is None else (ADDRESS, [(b"x-api-key", KEY.encode())])
        limits = settings(**changed)
        self.box = box or FakeBox(next(iter(slots)))
        self.answers = list(answers)
        self.bodies: list[bytes] = []
        self.heads: list[bytes] = []
        self.accounts = Accounts.load(path / "keys.json", path / "usage.json", [], lambda: 1e9)
        self.audit = Audit(path / "audit.jsonl", 10**6, 1)
        self.board = Board(slots, limits, self.box)
        self.upstream = Upstream(str(path / "llama.sock"))
        self.metrics = Metrics(self.board, self.accounts, self.upstream, list(slots))
        names: list[tuple[str, list[str]]] = [(name, []) for name in slots]
        self.relay = Relay(self.board, self.upstream, limits, names, self.accounts, self.audit, self.metrics)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The server and the board."""

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = await reader.readuntil(b"\r\n\r\n")
            self.heads.append(head)
            length = next(line for line in head.split(b"\r\n") if line.startswith(b"content-length:"))
            self.bodies.append(await reader.readexactly(int(length[15:])))
            answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            try:
                await answer(writer)
                await writer.drain()
            except OSError:
                pass
            finally:
                writer.close()

        server = await asyncio.start_unix_server(serve, self.upstream.path)
        moving = asyncio.create_task(self.board.run())
        reviving = asyncio.create_task(self._revive())
        try:
            async with asyncio.timeout(PATIENCE_S):
                yield
        finally:
            moving.cancel()
            reviving.cancel()
            server.close()

    async def _revive(self) -> None:
        """What systemd does."""
        while True:
            await asyncio.sleep(0.02)
            self.box.coming = False

    async def ask(
        self,
        body: dict[str, Any],
        route: Any = OPENAI,
        *more: tuple[bytes, bytes],
        leaves: asyncio.Event | None = None,
    ) -> Told:
        """One request with `more` headers; the client goes away when `leaves` says so."""
        sent: list[dict[str, Any]] = []
        given = iter([{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}])

        async def receive() -> dict[str, Any]:
            message = next(given, None)
            if message is None:
                await (leaves or asyncio.Event()).wait()
            return message or {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        address, headers = self.client
        scope = {"headers": [*headers, *more], "client": (address, 5), "query_string": b""}
        await self.relay.serve(route, scope, receive, send)
        if not sent:
            return Told(0, {}, b"")
        assert leaves or not sent[-1].get("more_body"), "the answer has no end"
        kinds = ["http.response.start"] + ["http.response.body"] * (len(sent) - 1)
        assert [one["type"] for one in sent] == kinds
        assert all(one["more_body"] for one in sent[1:-1]), "it went on behind its end"
        return Told(
            sent[0]["status"], dict(sent[0]["headers"]), b"".join(one.get("body", b"") for one in sent)
        )

    def logged(self) -> list[dict[str, Any]]:
        """The log of requests."""
        return [json.loads(text) for text in self.audit.path.read_text().splitlines()]
