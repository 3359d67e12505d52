"""HTTP on the sockets that systemd passes: uvicorn's server, with bounds and a stop that loses nothing."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import re
import select
import signal
import socket
import sys
import termios
from collections.abc import Callable, Generator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from llmbox.errors import UsageError
from llmbox.gateway.refusals import Refusal, error_body
from llmbox.gateway.settings import Settings
from llmbox.notify import notify

FIRST_FD = 3  # sd_listen_fds(3): passed sockets begin behind stderr
KEEP_ALIVE_S = 300  # longer than clients keep a connection, so that it is they who close it
HEAD_LIMIT = 64 * 1024  # bytes of request line and headers
BACKLOG = 2048
LINGER_S = 3.0  # for a client to take its refusal before a connection with unread bytes is reset
STOP_PATIENCE = 2  # times request_timeout, for clients to take in what was answered before a stop
LOOK_INTERVAL_S = 0.02  # between two looks at the connections that are open at a stop
TURNED_AWAY_LIMIT = 4096  # connections that are being told that there are too many
KEEPALIVE_PROBE_S = 60  # a client that is gone without a word is found after some of these
END_INTERVAL_S = 0.3  # between two looks whether a client has gone that is not read
PIPELINE_LIMIT = 16  # requests that a client may send before the answer of its first one is whole

_UPGRADE = re.compile(rb"\r\nUpgrade:", re.IGNORECASE)

log = logging.getLogger(__name__)


def passed_sockets(environ: MutableMapping[str, str] = os.environ) -> list[socket.socket]:
    """The listening sockets that systemd passed to this process. Raises UsageError when there is none."""
    count, pid = environ.pop("LISTEN_FDS", ""), environ.pop("LISTEN_PID", "")
    environ.pop("LISTEN_FDNAMES", None)
    if not count.isdigit() or int(count) == 0 or pid != str(os.getpid()):
        raise UsageError(
            "no socket was passed (LISTEN_FDS, LISTEN_PID): "
            "start the gateway with: systemctl --user start llm-gateway.socket llm-gateway.service"
        )
    sockets = [socket.socket(fileno=fd) for fd in range(FIRST_FD, FIRST_FD + int(count))]
    for sock in sockets:
        sock.set_inheritable(False)
        sock.setblocking(False)
    return sockets


def split(sockets: Sequence[socket.socket]) -> tuple[list[socket.socket], socket.socket | None]:
    """The sockets of the HTTP port, and the control socket. Raises UsageError when the port is missing."""
    http = [sock for sock in sockets if sock.family in (socket.AF_INET, socket.AF_INET6)]
    control = [sock for sock in sockets if sock.family == socket.AF_UNIX]
    if not http or len(control) > 1:
        raise UsageError(
            f"systemd passed {len(http)} TCP and {len(control)} UNIX sockets; llm-gateway.socket must have "
            "ListenStream= with the HTTP port, and at most one path (the control socket)"
        )
    return http, control[0] if control else None


class State(ServerState):
    """What all connections of a server share."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.draining = False
        self.turned_away = 0  # connections beyond max_connections that are still taking their 503


class Farewell:
    """A connection's transport, which `close` may first read off, and which a client cannot hold for ever.

    A socket closed with unread bytes is reset, and the reset destroys an answer that is not read yet. A
    client that takes in nothing of what waits for it is dropped after `patience` seconds.
    """

    def __init__(self, transport: asyncio.Transport, patience: float) -> None:
        self.transport = transport
        self.patience = patience
        self.write = transport.write
        self.get_extra_info = transport.get_extra_info
        self.abort = transport.abort
        self.unread = False
        self.lingering = False
        self._watch: asyncio.TimerHandle | None = None
        self._end_watch: asyncio.TimerHandle | None = None

    def pause_reading(self) -> None:
        """Read no further, and look instead whether the client goes away: only reading would tell."""
        self.transport.pause_reading()
        self._await_end()

    def resume_reading(self) -> None:
        """Read on."""
        if self._end_watch:
            self._end_watch.cancel()
            self._end_watch = None
        self.transport.resume_reading()

    def _await_end(self) -> None:
        if self._end_watch:
            self._end_watch.cancel()
        self._end_watch = asyncio.get_running_loop().call_later(END_INTERVAL_S, self._look_for_end)

    def _look_for_end(self) -> None:
        if self.transport.is_closing():
            return
        poll = select.poll()
        poll.register(self.get_extra_info("socket").fileno(), select.POLLRDHUP)
        if poll.poll(0):
            self.transport.abort()
        else:
            self._await_end()

    def is_closing(self) -> bool:
        """Whether nothing more can be said."""
        return self.lingering or self.transport.is_closing()

    def close(self) -> None:
        """Close, at once or after the client has had time to read."""
        if self.is_closing():
            return
        if not self.unread:
            self.transport.close()  # when the client has taken in what was written
            self.watch()
            return
        self.lingering = True
        self.transport.write_eof()
        self.resume_reading()
        asyncio.get_running_loop().call_later(LINGER_S, self.transport.abort)

    def watch(self) -> None:
        """From now on, while nothing more is written, look whether the client takes in what was."""
        self.forget()
        if self.transport.get_write_buffer_size():
            loop = asyncio.get_running_loop()
            self._watch = loop.call_later(self.patience, self._look, self._unsent())

    def forget(self) -> None:
        """Look no longer."""
        if self._watch:
            self._watch.cancel()
            self._watch = None

    def _unsent(self) -> int:
        """Bytes that the client has not taken: the transport's and the kernel's (tcp(7), SIOCOUTQ)."""
        kernels = bytearray(4)
        fcntl.ioctl(self.get_extra_info("socket").fileno(), termios.TIOCOUTQ, kernels)
        return self.transport.get_write_buffer_size() + int.from_bytes(kernels, sys.byteorder)

    def _look(self, unsent: int) -> None:
        if self._unsent() < unsent:
            self.watch()
        else:
            log.info("dropped a client that took nothing of its answer for %g s", self.patience)
            self.transport.abort()


class GatewayProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 with bounds on the head of a request, on idle and on surplus connections."""

    server_state: State
    _farewell: Farewell
    _heading = False  # the head of a request has begun and is not complete
    _head_size = 0
    _bodiless = 0  # bytes in a row behind the head that were no body: the framing of chunks, trailers
    _head_timer: asyncio.TimerHandle | None = None
    _wrong: Refusal | None = None
    _surplus = False
    _answered: Any = None  # the request that is being answered; `cycle` is the newest one
    _rest_ends = 0.0  # when a connection without a request is closed

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count the connection; turn it away at once when there are too many."""
        self._farewell = Farewell(transport, self.server_state.settings.request_timeout)
        super().connection_made(self._farewell)  # type: ignore[arg-type]
        state = self.server_state
        limit = state.settings.max_connections
        if len(self.connections) > limit:
            # Not among the connections: surplus ones must not keep others out, nor the server from stopping.
            self.connections.discard(self)
            self._surplus = True
            state.turned_away += 1
            if state.turned_away > TURNED_AWAY_LIMIT:
                transport.abort()
            else:
                message = f"all {limit} connections are taken; try again in 2 s"
                self._refuse(Refusal(503, message, {"Retry-After": "2"}))
            return
        if state.draining:
            self.timeout_keep_alive = state.settings.shutdown_grace  # type: ignore[assignment]
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._head_complete()
        self._unset_keepalive_if_required()
        self._farewell.forget()
        self.server_state.turned_away -= self._surplus
        super().connection_lost(exc)
        if self._answered and self._answered is not self.cycle and not self._answered.response_complete:
            self._end_cycle(self._answered)

    def pause_writing(self) -> None:
        """The client is slow: its answer waits, and so does what writes it."""
        super().pause_writing()
        self._farewell.watch()

    def resume_writing(self) -> None:
        """It has taken in most of that."""
        super().resume_writing()
        self._farewell.forget()

    def data_received(self, data: bytes) -> None:
        """Parse, and watch how long and how large the head of a request becomes."""
        if self._farewell.lingering:
            return
        resting, cycle = self._at_rest() and not self._heading, self.cycle
        # An offer that a server may leave aside, but the parser would take the body for another protocol.
        if resting and _UPGRADE.search(data, 0, HEAD_LIMIT):
            head, blank, body = data.partition(b"\r\n\r\n")
            data = _UPGRADE.sub(b"\r\nX-Upgrade:", head) + blank + body
        alone = resting or self._heading
        self._bodiless += len(data)
        super().data_received(data)
        if self._farewell.is_closing():
            return
        if not self._at_rest() and self.cycle.more_body and self._bodiless > HEAD_LIMIT:
            self._refuse(Refusal(431, f"the trailers behind the body are larger than {HEAD_LIMIT} bytes"))
        elif self._heading:
            # A piece that another request ends in does not count; the loop bounds its size.
            self._head_size += len(data) if alone and cycle is self.cycle else 0
            if self._head_size > HEAD_LIMIT:
                self._refuse(_head_too_large())
            elif self._head_timer is None:
                self._head_timer = self.loop.call_later(
                    self.server_state.settings.request_timeout, self._head_overdue
                )
        elif self._at_rest():
            self._await_request(anew=False)  # blank lines, which may come before a request, give no more time

    def on_message_begin(self) -> None:
        """A request begins."""
        if len(self.pipeline) >= PIPELINE_LIMIT:
            raise ValueError  # those before it are answered, then the connection ends
        super().on_message_begin()
        self._heading, self._head_size = True, 0

    def on_headers_complete(self) -> None:
        """The head is there: start the request."""
        self._head_complete()
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > HEAD_LIMIT:
            self._wrong = _head_too_large()
            raise ValueError  # the parser hands it to send_400_response
        if self.parser.should_upgrade():
            self._wrong = Refusal(400, "neither CONNECT nor an upgrade of the protocol is possible here")
            raise ValueError
        self._bodiless = 0
        super().on_headers_complete()
        if self.server_state.draining:
            self.cycle.keep_alive = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header; a trailer is nobody's."""
        if self._heading:
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        """Take in a piece of the body."""
        self._bodiless = 0
        super().on_body(body)

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._answered = cycle

        async def answer(scope: Any, receive: Any, send: Any) -> None:
            async def begin(message: Any) -> None:
                # Answered before its body was there: the rest is not worth reading for the next request.
                if cycle.more_body and not cycle.response_started:
                    cycle.keep_alive = False
                    self._farewell.unread = True
                await send(message)

            await app(scope, receive, begin)

        super()._start_asgi_task(cycle, answer)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP."""
        self._refuse(self._wrong or Refusal(400, "this is not a valid HTTP/1.1 request"))

    def on_response_complete(self) -> None:
        """Answer the next request, or wait for one."""
        super().on_response_complete()
        if self.timeout_keep_alive_task is not None:
            self._rest_ends = self.timeout_keep_alive_task.when()

    def shutdown(self) -> None:
        """Announce the end to the client; read an idle connection for `shutdown_grace` seconds more."""
        self.timeout_keep_alive = self.server_state.settings.shutdown_grace  # type: ignore[assignment]
        if self._at_rest():
            if not self._heading:
                self._await_request()
        elif not self.cycle.response_started:
            self.cycle.keep_alive = False
        # An answer under way has said that the connection stays: its client may send one request more.

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection, unless a request has reached this machine already."""
        self.timeout_keep_alive_task = None
        sock = self._farewell.get_extra_info("socket")
        poll = select.poll()
        poll.register(sock.fileno(), select.POLLIN)
        endless = self.loop.time() > self._rest_ends + LINGER_S  # blank lines, one after the other
        if not self._heading and (endless or not poll.poll(0)):
            self._farewell.close()

    def _at_rest(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _await_request(self, *, anew: bool = True) -> None:
        self._unset_keepalive_if_required()
        if anew:
            self._rest_ends = self.loop.time() + self.timeout_keep_alive
        self.timeout_keep_alive_task = self.loop.call_at(self._rest_ends, self.timeout_keep_alive_handler)

    def _head_complete(self) -> None:
        self._heading = False
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_overdue(self) -> None:
        seconds = self.server_state.settings.request_timeout
        self._refuse(Refusal(408, f"the headers were not complete after {seconds:g} s"))

    def _refuse(self, refusal: Refusal) -> None:
        """Answer what never became a request, and close."""
        self._head_complete()
        self._unset_keepalive_if_required()
        if self._farewell.is_closing():
            return
        self._farewell.unread = True
        if not self._at_rest():
            if self.pipeline and self.cycle.more_body:  # it never came to its turn: what is before it counts
                self.pipeline.popleft()
                self.cycle = self.pipeline[0][0] if self.pipeline else self._answered
            cycle = self.cycle
            if not cycle.more_body:  # the wrong bytes came behind a good request: answer that one, then close
                cycle.keep_alive = False
                self._farewell.pause_reading()
                return
            self._end_cycle(cycle)
            if cycle.response_started:
                self._farewell.close()
                return
        body = error_body("openai", refusal)
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
            **{name.lower(): value for name, value in refusal.headers.items()},
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self._farewell.write(STATUS_LINE[refusal.status] + head.encode() + b"\r\n" + body)
        self._farewell.close()

    @staticmethod
    def _end_cycle(cycle: Any) -> None:
        """Its client is told nothing more; what answers it learns that the client is gone."""
        cycle.disconnected = True
        cycle.message_event.set()


def _head_too_large() -> Refusal:
    return Refusal(431, f"the request line and headers are larger than {HEAD_LIMIT} bytes")


class Server(uvicorn.Server):
    """uvicorn's server: SIGTERM ends it when everything that was accepted has been answered.

    `busy` tells whether a request waits, or is with llama-server.
    """

    def __init__(self, app: Any, settings: Settings, busy: Callable[[], bool]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                loop="uvloop",
                http=GatewayProtocol,
                ws="none",
                lifespan="off",
                interface="asgi3",
                log_config=None,
                log_level="error",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_S,
            )
        )
        self.server_state: State = State(settings)
        self._busy = busy

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        for sock in sockets or []:  # connections inherit these
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_PROBE_S)
        await super().startup(sockets)
        notify("READY=1")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close our copies of the sockets, whose backlog stays with systemd, and answer what was accepted."""
        notify("STOPPING=1")
        for server in self.servers:
            server.close()
        for sock in sockets or []:
            sock.close()
        state = self.server_state
        state.draining = True
        for connection in list(state.connections):
            connection.shutdown()
        log.info("stopping: %d connections, %d requests", len(state.connections), len(state.tasks))
        await asyncio.sleep(0)  # a connection that was accepted in this turn of the loop is made now
        # Nobody is served on the port meanwhile: whoever is behind with its answer has so much more time.
        loop = asyncio.get_running_loop()
        patience = STOP_PATIENCE * state.settings.request_timeout
        behind_since: dict[Any, float] = {}
        while (state.connections or state.tasks) and not self.force_exit:
            now, busy = loop.time(), self._busy()
            behind_since = {
                connection: behind_since.get(connection, now)
                for connection in cast(set[GatewayProtocol], state.connections)
                if connection.flow.write_paused or not busy
            }
            for connection, since in behind_since.items():
                if now - since > patience:
                    log.warning("stopping: dropped a client that is behind with its answer")
                    connection.transport.abort()
            await asyncio.sleep(LOOK_INTERVAL_S)

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Stop on SIGTERM and SIGINT. uvicorn raises them again, and what follows the server never runs."""
        loop = asyncio.get_running_loop()
        signals = (signal.SIGTERM, signal.SIGINT)
        for number in signals:
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)
