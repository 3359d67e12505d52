"""One request from its body to its last byte: identify, queue, send, replay once, say plainly what failed."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

from llmbox.gateway.accounts import Account, Accounts
from llmbox.gateway.audit import Audit, Entry
from llmbox.gateway.board import Board, Lease, Ticket
from llmbox.gateway.metrics import Metrics
from llmbox.gateway.prompt_cache import Guard
from llmbox.gateway.refusals import Protocol, Refusal, error_body, error_event
from llmbox.gateway.requests import ALONE, Asked, Route, read_body
from llmbox.gateway.settings import Settings
from llmbox.gateway.upstream import Answer, Lost, Upstream
from llmbox.gateway.usage import WHOLE_BYTES, Tail, usage_of

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

COMMENT_INTERVAL_S = 5.0
LOOK_INTERVAL_S = 1.0  # how often a waiting request asks whether it is overdue
LARGE_BODY = 64 * 1024  # bytes; a smaller body is read in a few milliseconds at most
ANSWER_LIMIT = 64 * 1024 * 1024  # bytes of an answer that is not streamed
PIECE = 256 * 1024  # bytes of one that are always kept, and of a larger one that its client takes at a time
BYTES_PER_TOKEN = 4  # of a request's body, about, for a prompt that no answer tells the tokens of
REMEMBERED = 1000  # fingerprints of requests that were there at two crashes
NOT_READY = b"Loading model"  # llama-server's 503 while it loads

log = logging.getLogger(__name__)


class ClientGone(Exception):
    """The client closed its connection."""


class Reply:
    """What goes to one client. A stream may begin before its answer does: the client then keeps waiting."""

    def __init__(self, send: Send, protocol: Protocol) -> None:
        self._send = send
        self.protocol = protocol
        self.status = 0
        self.begun = False
        self.forwarded = False  # some of the server's answer went out: from here on nothing is replayed

    async def comment(self, text: str) -> None:
        """Tell a waiting stream something that its protocol ignores."""
        if not self.begun:
            await self.begin(200, [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")])
        await self._body(b": " + text.encode() + b"\n\n", more=True)

    async def begin(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Send the head."""
        self.status, self.begun = status, True
        await self._send({"type": "http.response.start", "status": status, "headers": list(headers)})

    async def forward(self, chunk: bytes) -> None:
        """Pass a piece of the server's stream on; what only keeps the connection alive is no answer yet."""
        self.forwarded = self.forwarded or any(
            line and not line.startswith(b":") for line in chunk.splitlines()
        )
        await self._body(chunk, more=True)

    async def finish(self, last: bytes = b"") -> None:
        """End the response."""
        await self._body(last, more=False)

    async def whole(self, status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> None:
        """Send a whole response."""
        length = (b"content-length", str(len(body)).encode())
        await self.begin(status, [*headers, length])
        for start in range(0, max(1, len(body)), PIECE):  # each waits until the client has taken most of it
            await self._body(body[start : start + PIECE], more=start + PIECE < len(body))

    async def refuse(self, refusal: Refusal) -> None:
        """Say no: as a response when none has begun, as an error event of the stream otherwise."""
        if self.begun:
            self.status = refusal.status
            await self._body(error_event(self.protocol, refusal), more=False)
            return
        headers = [(name.lower().encode(), value.encode()) for name, value in refusal.headers.items()]
        body = error_body(self.protocol, refusal)
        await self.whole(refusal.status, [(b"content-type", b"application/json"), *headers], body)

    async def _body(self, body: bytes, *, more: bool) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": more})


class Bodies:
    """Reads bodies of requests and of answers, and bounds the memory that all of them take together.

    The requests of one client may take half of it, so that they lock nobody else out.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.share = max(settings.max_body, settings.max_buffered // 2)
        self.buffered = 0
        self._of: Counter[str] = Counter()  # bytes of requests by address; none stays at 0

    async def read(self, scope: Scope, receive: Receive, client: str) -> bytes:
        """The whole body. Raises Refusal (408, 413, 429, 503), ClientGone; `give_back` its size when done."""
        limit = self.settings.max_body
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
        if length.isdigit() and int(length) > limit:
            raise self._too_large(int(length))
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.settings.request_timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    part = message.get("body", b"")
                    size += len(part)
                    self.buffered += len(part)
                    self._of[client] += len(part)
                    parts.append(part)
                    if size > limit:
                        raise self._too_large(size)
                    if self._of[client] > self.share:
                        said = f"your requests that wait fill {self.share} bytes; try again later"
                        raise Refusal(429, said, {"Retry-After": "5", "Connection": "close"})
                    if self.buffered > self.settings.max_buffered:
                        raise self._full({"Connection": "close"})
                    if not message.get("more_body"):
                        return parts[0] if len(parts) == 1 else b"".join(parts)
        except TimeoutError:
            self.give_back(size, client)
            raise Refusal(
                408,
                f"the body was not complete after {self.settings.request_timeout:g} s",
                {"Connection": "close"},
            ) from None
        except BaseException:
            self.give_back(size, client)
            raise

    async def read_answer(self, answer: Answer) -> bytes:
        """The whole answer. Raises Refusal (502, 503) or Lost; `give_back_answer` its length when done.

        Its first PIECE has always room: what most clients ask for is not refused for others' large answers.
        """
        parts: list[bytes] = []
        size = 0
        try:
            async for chunk in answer.chunks():
                before = _beyond(size)
                size += len(chunk)
                self.buffered += _beyond(size) - before
                parts.append(chunk)
                if size > ANSWER_LIMIT:
                    said = f"the answer is larger than {ANSWER_LIMIT} bytes, which is what the gateway keeps"
                    raise Refusal(502, f"{said}; ask for less at once")
                if self.buffered > self.settings.max_buffered:
                    raise self._full({})
        except BaseException:
            self.give_back_answer(size)
            raise
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def give_back(self, size: int, client: str) -> None:
        """A body is not kept any longer."""
        self.buffered -= size
        self._of[client] -= size
        if not self._of[client]:
            del self._of[client]

    def give_back_answer(self, size: int) -> None:
        """An answer is not kept any longer."""
        self.buffered -= _beyond(size)

    def _full(self, headers: Mapping[str, str]) -> Refusal:
        said = f"requests that wait and answers fill {self.settings.max_buffered} bytes; try again later"
        return Refusal(503, said, {"Retry-After": "5", **headers})

    def _too_large(self, size: int) -> Refusal:
        return Refusal(
            413, f"the body has {size} bytes; the limit is {self.settings.max_body}", {"Connection": "close"}
        )


def _beyond(size: int) -> int:
    return max(0, size - PIECE)


class Relay:
    """Passes requests to the preset that they need."""

    def __init__(
        self,
        board: Board,
        upstream: Upstream,
        settings: Settings,
        presets: list[tuple[str, list[str]]],
        accounts: Accounts,
        audit: Audit,
        metrics: Metrics,
        guard: Guard | None = None,
        contexts: Mapping[str, int] | None = None,
    ) -> None:
        self.board = board
        self.upstream = upstream
        self.settings = settings
        self.presets = presets
        self.accounts = accounts
        self.audit = audit
        self.metrics = metrics
        self.guard = guard or Guard({})
        self.contexts = contexts or {}
        self.bodies = Bodies(settings)
        self._suspects: OrderedDict[str, None] = OrderedDict()
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="body")
        self._readings: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def _read(self, body: bytes, client: str) -> Asked:
        """What a body asks for. A large one takes seconds, in which others are served: see read_body."""
        if len(body) <= LARGE_BODY:
            return read_body(body)
        reading = self._readings.setdefault(client, asyncio.Lock())
        async with reading:  # one of each client, so that nobody's many are before everybody's
            return await asyncio.get_running_loop().run_in_executor(self._reader, read_body, body)

    async def serve(self, route: Route, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        reply = Reply(send, route.protocol)
        client = scope.get("client")
        entry = Entry(path=route.path, client=client[0] if client else "")
        size = 0
        try:
            account = self.accounts.identify(scope["headers"], entry.client)
            entry.key = account.name
            account.admit()
            body = await self.bodies.read(scope, receive, entry.client)
            size = len(body)
            asked = await self._read(body, entry.client) if route.reads_body else Asked()
            entry.stream = asked.stream and route.streams
            await self._answer(route, scope, receive, body, asked, account, reply, entry)
        except Refusal as refusal:
            entry.error = entry.error or refusal.message
            await reply.refuse(refusal)
        except ClientGone:
            entry.error = "the client went away"
            reply.status = 499
        finally:
            self.bodies.give_back(size, entry.client)
            entry.end(reply.status or 500)
            self.metrics.observe(entry)
            self.audit.write(entry, body if size and self.settings.audit_content else b"")

    async def _answer(
        self,
        route: Route,
        scope: Scope,
        receive: Receive,
        body: bytes,
        asked: Asked,
        account: Account,
        reply: Reply,
        entry: Entry,
    ) -> None:
        preset = self.settings.preset_named(asked.model, self.presets)
        entry.wanted = preset
        alone = route.slot and any(name == ALONE for name, _ in scope["headers"])
        if alone:
            account.check_measuring()
        if preset is not None:  # whatever is active then is checked when it starts
            account.check(preset)
        gone = asyncio.ensure_future(_disconnected(receive))
        ticket = self.board.ask(
            preset, account.name, slot=route.slot, alone=alone, may_use=account.may_use, reads=route.reads
        )
        try:
            while True:
                lease = await self._turn(ticket, reply, gone, stream=entry.stream)
                entry.preset, entry.waited_s = lease.preset, lease.granted - ticket.arrived
                try:
                    account.start(lease.preset)
                    await self._exchange(lease, route, scope, body, asked, account, reply, entry, gone)
                    return
                except Lost as lost:
                    ticket = self._after_loss(lease, lost, body, reply)
                finally:
                    self.board.release(lease)
        finally:
            gone.cancel()
            self.board.leave(ticket)
            entry.switch = ticket.switch
            if entry.preset is None:
                entry.waited_s = self.board.clock() - ticket.arrived

    async def _turn(self, ticket: Ticket, reply: Reply, gone: asyncio.Future[None], *, stream: bool) -> Lease:
        """Wait until it is this request's turn. Raises Refusal, ClientGone."""
        clock = self.board.clock
        next_comment = ticket.arrived + self.settings.commit_after
        while not ticket.granted.done():
            now = clock()
            until = min(LOOK_INTERVAL_S, max(0.0, next_comment - now)) if stream else LOOK_INTERVAL_S
            waiting: set[asyncio.Future[Any]] = {ticket.granted, gone}
            await asyncio.wait(waiting, timeout=until, return_when=asyncio.FIRST_COMPLETED)
            if ticket.granted.done():
                break
            if gone.done():
                raise ClientGone
            if self.board.overdue(ticket):
                raise self._overdue(ticket)
            if stream and clock() >= next_comment:
                next_comment = clock() + COMMENT_INTERVAL_S
                await reply.comment(self._position(ticket))
        try:
            return ticket.granted.result()
        except Refusal as refusal:
            refusal.headers.update(self.board.queue_headers(ticket))
            raise

    async def _exchange(
        self,
        lease: Lease,
        route: Route,
        scope: Scope,
        body: bytes,
        asked: Asked,
        account: Account,
        reply: Reply,
        entry: Entry,
        gone: asyncio.Future[None],
    ) -> None:
        """Send the request and pass the answer on. Raises Lost, Refusal (the lease was ended), ClientGone."""
        me = asyncio.current_task()
        assert me is not None
        lease.abort = partial(_cancel, me)

        def leave(_: asyncio.Future[None]) -> None:
            if not gone.cancelled():
                lease.end(Refusal(499, "the client went away"))

        gone.add_done_callback(leave)
        answer: Answer | None = None
        try:
            if lease.ended:
                raise lease.ended
            query = scope["query_string"]
            target = route.path + (f"?{query.decode('latin-1')}" if query else "")
            if route.protocol == "anthropic":
                body = self.guard.applied(lease.preset, body)
            answer = await self.upstream.send(route.method, target, scope["headers"], body)
            await self._pass_on(answer, route, lease, asked, account, reply, entry)
            if answer.status < 400:
                self._charge_prompt(route, lease, body, asked, account, entry)
        except Refusal:
            if reply.forwarded or (answer and answer.status < 400 and lease.ended is None):
                # Its tokens were used up in the middle of the answer, or the answer is too large to keep.
                self._charge_prompt(route, lease, body, asked, account, entry)
            raise
        except asyncio.CancelledError:
            if lease.ended is None:
                raise
            me.uncancel()
            if gone.done():
                self._charge_prompt(route, lease, body, asked, account, entry)
                raise ClientGone from None
            raise lease.ended from None
        finally:
            gone.remove_done_callback(leave)
            lease.abort = lambda: None
            if answer:
                answer.close()

    async def _pass_on(
        self,
        answer: Answer,
        route: Route,
        lease: Lease,
        asked: Asked,
        account: Account,
        reply: Reply,
        entry: Entry,
    ) -> None:
        waited = (b"x-queue-wait-ms", str(round(entry.waited_s * 1000)).encode())
        named = [(b"x-llmbox-preset", lease.preset.encode())]
        if lease.ticket.alone:
            named.append((ALONE, b"%d" % lease.pid))  # whose first request may have been this one
        streams = any(
            name == b"content-type" and value.startswith(b"text/event-stream")
            for name, value in answer.headers
        )
        if not streams:
            body = await self.bodies.read_answer(answer)
            try:
                if answer.status == 503 and NOT_READY in body:
                    raise Lost("it is loading still", sent=False)
                entry.usage = usage_of(body)
                account.spend(entry.usage.total)
                partly = asked.several and len(body) > WHOLE_BYTES
                if route.streams and answer.status < 400 and (entry.usage.generated is None or partly):
                    account.spend(len(body) // BYTES_PER_TOKEN)
                if answer.status >= 400:
                    entry.error = "llama-server refused it"  # its own words may quote the request
                if reply.begun:  # the stream has begun with comments, and the server says no
                    if answer.status < 400:
                        raise Refusal(502, "llama-server did not stream its answer")
                    raise Refusal(answer.status, _message(body))
                self.board.release(lease)  # a client that takes its answer slowly needs no slot for that
                await reply.whole(answer.status, [*answer.headers, waited, *named], body)
            finally:
                self.bodies.give_back_answer(len(body))
            return
        if not reply.begun:
            await reply.begin(answer.status, [*answer.headers, waited, *named])
        tail = Tail()
        counted = 0
        try:
            async for chunk in answer.chunks():
                tail.add(chunk)
                await reply.forward(chunk)
                # As they come, so that the streams of one key cannot each use what is left.
                account.spend(tail.events - counted)
                counted = tail.events
                left = account.tokens_left()
                if left is not None and left < 0:
                    raise Refusal(429, account.exhausted())
            await reply.finish()
        finally:
            entry.usage = tail.usage()
            if entry.usage.generated is None:
                entry.usage.generated = tail.events
            # Of several choices the figures are of one; what was sent counts in any case.
            account.spend(max(0, entry.usage.total - counted))

    def _charge_prompt(
        self, route: Route, lease: Lease, body: bytes, asked: Asked, account: Account, entry: Entry
    ) -> None:
        """Charge an estimate of a prompt that was read, where the answer did not tell all of its tokens."""
        estimate, told = len(body) // BYTES_PER_TOKEN, entry.usage.prompt
        if not route.slot:
            return
        if asked.several:
            account.spend(max(0, estimate - (told or 0)))
        elif told is None:
            account.spend(min(estimate, self.contexts.get(lease.preset, estimate)))

    def _after_loss(self, lease: Lease, lost: Lost, body: bytes, reply: Reply) -> Ticket:
        """What follows when the server went away under a request. Raises Refusal, or gives a new ticket."""
        self.board.lost(lease)
        if reply.forwarded or lease.ticket.alone:  # sent again, a measurement would be another one
            raise Refusal(502, f"the preset {lease.preset} stopped in the middle of this answer ({lost})")
        if not lost.sent:
            return self.board.again(lease, counts=False)
        fingerprint = hashlib.sha256(body).hexdigest()[:16]
        if lease.ticket.losses or fingerprint in self._suspects:
            self._suspects[fingerprint] = None
            self._suspects.move_to_end(fingerprint)
            while len(self._suspects) > REMEMBERED:
                self._suspects.popitem(last=False)
            log.error("request %s was with %s at two crashes: not sent again", fingerprint, lease.preset)
            raise Refusal(
                502,
                f"the preset {lease.preset} went down twice with this request; it is not sent a third time",
            )
        log.warning("request %s lost its server (%s); sending it once more", fingerprint, lost)
        return self.board.again(lease)

    def _position(self, ticket: Ticket) -> str:
        return f"queue position {self.board.position(ticket)}, estimate {self.board.estimate_s(ticket):.0f} s"

    def _overdue(self, ticket: Ticket) -> Refusal:
        what = f"the preset {ticket.preset}" if ticket.preset else "a preset"
        why = f"{what} was not ready within hold_timeout ({self.settings.hold_timeout:g} s)"
        if ticket.alone:
            why = f"{what} was not free for a measurement within a quarter of hold_timeout"
        return Refusal(
            503,
            why,
            {"Retry-After": "30", **self.board.queue_headers(ticket)},
        )


def _cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()


async def _disconnected(receive: Receive) -> None:
    """Return when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _message(body: bytes) -> str:
    """The message in an error body of llama-server, or the body's beginning."""
    with suppress(ValueError, KeyError, TypeError):
        return str(json.loads(body)["error"]["message"])
    return body[:200].decode(errors="replace")
