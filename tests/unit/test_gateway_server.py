"""The gateway's server over real sockets: what it bounds, and that stopping it loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from llmbox.errors import UsageError
from llmbox.gateway import server
from llmbox.gateway.settings import Settings

from tests.unit.gateway_process import FILES, SETTINGS, Forge, Gateway, running
from tests.unit.stub_llama_server import StubLlamaServer, events

CHAT = "/v1/chat/completions"
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(scope="module")
def forge() -> Iterator[Forge]:
    forge = Forge()
    yield forge
    forge.close()


@pytest.fixture
def stub(tmp_path: Path) -> Iterator[StubLlamaServer]:
    stub = StubLlamaServer(tmp_path / "server.sock")
    yield stub
    stub.close()


@pytest.fixture
def gateway(forge: Forge, tmp_path: Path, stub: StubLlamaServer) -> Iterator[Gateway]:
    with running(forge, tmp_path) as gateway:
        yield gateway


def connect(gateway: Gateway) -> socket.socket:
    return socket.create_connection(("127.0.0.1", gateway.port), timeout=15)


def read_all(sock: socket.socket) -> bytes:
    """Everything until the end of the connection; a reset is an error."""
    parts = []
    while part := sock.recv(65536):
        parts.append(part)
    return b"".join(parts)


def read_answer(sock: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """One answer with a Content-Length."""
    answer = http.client.HTTPResponse(sock)
    answer.begin()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()


def refused(sock: socket.socket) -> tuple[int, str]:
    """Status and message of an error after which the connection ends, in OpenAI's shape."""
    status, headers, body = read_answer(sock)
    assert headers["connection"] == "close" and sock.recv(1) == b""
    error = json.loads(body)["error"]
    assert error["code"] == status and error["type"]
    return status, error["message"]


def chat(**fields: Any) -> bytes:
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}], **fields}).encode()
    return f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to pass"
        time.sleep(0.005)


# --- the bounds ---


def test_a_header_of_a_million_bytes_is_refused(gateway: Gateway) -> None:
    with connect(gateway) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nX: " + b"x" * 1_000_000 + b"\r\n\r\n")
        assert refused(sock)[0] == 431


@pytest.mark.parametrize(("size", "status"), [(60_000, 200), (70_000, 431)])
def test_the_limit_of_a_head_that_comes_in_one_piece(gateway: Gateway, size: int, status: int) -> None:
    with connect(gateway) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nX: " + b"x" * size + b"\r\n\r\n")
        assert read_answer(sock)[0] == status


def test_many_small_headers_count_as_one_large_one(gateway: Gateway) -> None:
    with connect(gateway) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\n" + b"A: b\r\n" * 20_000)
        assert refused(sock)[0] == 431


def test_a_slow_head_is_refused_in_time_though_bytes_keep_coming(gateway: Gateway) -> None:
    began = time.monotonic()
    with connect(gateway) as sock:
        sock.settimeout(0.05)
        for byte in HEALTH[:-1] * 100:
            with contextlib.suppress(TimeoutError):
                if sock.recv(1, socket.MSG_PEEK):
                    break
            sock.sendall(bytes([byte]))
        sock.settimeout(15)
        assert refused(sock) == (408, "the headers were not complete after 0.4 s")
    assert 0.35 < time.monotonic() - began < 15


def test_a_slow_body_is_refused_in_time(gateway: Gateway) -> None:
    with connect(gateway) as sock:
        sock.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{{".encode())
        status, message = refused(sock)
    assert status == 408 and "body" in message


@pytest.mark.parametrize(
    "sent",
    [
        b"hello\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /h\xc3\xa4lth HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET /health HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"CONNECT example.org:443 HTTP/1.1\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_not_http_is_refused(gateway: Gateway, sent: bytes) -> None:
    with connect(gateway) as sock:
        sock.sendall(sent)
        assert refused(sock)[0] == 400


def test_nonsense_behind_a_good_request_does_not_cost_its_answer(gateway: Gateway) -> None:
    with connect(gateway) as sock:
        sock.sendall(chat(stub={"delay": 0.1}) + b"nonsense\r\n\r\n")
        answer = read_all(sock)
    assert answer.startswith(b"HTTP/1.1 200 ") and answer.count(b"HTTP/1.1") == 1


def test_a_wrong_body_behind_a_good_request_does_not_spoil_its_answer(gateway: Gateway) -> None:
    behind = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n".encode()
    with connect(gateway) as sock:
        sock.sendall(chat(stream=True, stub={"tokens": 5, "interval": 0.05}) + HEALTH)
        assert sock.recv(20)
        sock.sendall(behind)
        answer = read_all(sock)
    assert b"[DONE]" in answer and answer.endswith(b'{"status":"ok"}') and b"400" not in answer


def test_requests_without_end_on_a_connection_take_no_memory(gateway: Gateway, stub: StubLlamaServer) -> None:
    before = gateway.memory()
    with connect(gateway) as sock:
        sock.sendall(chat(stub={"delay": 1}) + b"GET /health HTTP/1.1\r\n\r\n" * 10_000)
        answer = read_all(sock)
    assert answer.count(b"HTTP/1.1 200 ") == 1 + server.PIPELINE_LIMIT
    assert gateway.memory() - before < 5_000_000


def test_a_hundred_megabytes_are_refused_unread(gateway: Gateway) -> None:
    before = gateway.memory()
    size = 100_000_000
    with connect(gateway) as sock:
        sock.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n".encode())
        piece = memoryview(bytes(1_000_000))
        for _ in range(100):
            sock.sendall(piece)
        status, message = refused(sock)
    assert status == 413 and str(size) in message
    assert gateway.memory() - before < 5_000_000


def test_a_hundred_megabytes_without_a_length_are_refused_at_the_limit(gateway: Gateway) -> None:
    before = gateway.memory()
    with connect(gateway) as sock:
        sock.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        piece = b"F4240\r\n" + bytes(1_000_000) + b"\r\n"
        for _ in range(100):
            sock.sendall(piece)
        assert refused(sock)[0] == 413
    assert gateway.memory() - before < 10_000_000


@pytest.mark.parametrize("piece", [b"A: b\r\n", b"x" * 64])
def test_trailers_without_end_are_refused(gateway: Gateway, piece: bytes) -> None:
    before = gateway.memory()
    with connect(gateway) as sock:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        sock.sendall(head.encode() + b"2\r\n{}\r\n0\r\nT: ")
        with contextlib.suppress(ConnectionError):
            for _ in range(20):
                sock.sendall(piece * 16_384)
        with contextlib.suppress(ConnectionError):
            assert refused(sock)[0] == 431
    assert gateway.memory() - before < 10_000_000


def test_small_chunks_are_fine_and_a_trailer_is_nobody_s(gateway: Gateway, stub: StubLlamaServer) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "x" * 30_000}]}).encode()
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
    with connect(gateway) as sock:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        sock.sendall(head + chunks + b"0\r\nX-Trailer: a\r\n\r\n")
        assert read_answer(sock)[0] == 200
    assert "x-trailer" not in stub.heads[-1].lower()


def test_a_body_that_nobody_will_read_ends_the_connection(gateway: Gateway) -> None:
    with connect(gateway) as sock:
        sock.sendall(b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 500000\r\n\r\n" + bytes(400_000))
        assert refused(sock)[0] == 404


def test_an_offer_to_upgrade_is_left_aside(gateway: Gateway) -> None:
    with connect(gateway) as sock:
        for protocol in ("h2c", "websocket"):
            upgrade = f"\r\nConnection: Upgrade\r\nUpgrade: {protocol}\r\n\r\n".encode()
            sock.sendall(chat().replace(b"\r\n\r\n", upgrade, 1))
            assert read_answer(sock)[0] == 200


def test_a_body_is_never_taken_for_another_request(gateway: Gateway) -> None:
    with connect(gateway) as sock:
        sock.sendall(b"POST /x HTTP/1.1\r\nConnection: upgrade\r\nContent-Length: 40\r\nUpgr")
        time.sleep(0.05)  # in one piece or in two: both must hold
        sock.sendall(b"ade: h2c\r\n\r\n")
        with contextlib.suppress(OSError):
            sock.sendall(HEALTH)
        answer = read_all(sock)
    assert answer.count(b"HTTP/1.1") == 1 and answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 404 "))


def test_connections_beyond_the_limit_are_told_so_at_once(
    forge: Forge, tmp_path: Path, stub: StubLlamaServer
) -> None:
    with running(forge, tmp_path, max_connections=3) as gateway, contextlib.ExitStack() as stack:
        held = [stack.enter_context(connect(gateway)) for _ in range(3)]
        for sock in held:
            sock.sendall(HEALTH)
            assert read_answer(sock)[0] == 200
        with connect(gateway) as surplus:
            status, headers, body = read_answer(surplus)
            assert status == 503 and headers["retry-after"] == "2" and b"3 connections" in body
            assert surplus.recv(1) == b""
        held.pop().close()

        def free() -> bool:
            with connect(gateway) as sock:
                sock.sendall(HEALTH)
                return read_answer(sock)[0] == 200

        until(free)


def test_a_thousand_connections_at_once(forge: Forge, tmp_path: Path, stub: StubLlamaServer) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))

    async def one(port: int) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(chat())
            answer = await reader.readuntil(b"\r\n\r\n")
            return int(answer.split(b" ")[1])
        finally:
            writer.close()

    async def all_of_them(port: int) -> list[int]:
        return await asyncio.gather(*(one(port) for _ in range(1000)))

    with running(forge, tmp_path, hold_timeout=30.0, max_connections=300) as gateway:
        statuses = asyncio.run(all_of_them(gateway.port))
        assert len(statuses) == 1000 and set(statuses) <= {200, 429, 503}
        assert statuses.count(200) >= 250
        assert gateway.memory() < 90_000_000
        with connect(gateway) as sock:
            sock.sendall(HEALTH)
            assert read_answer(sock)[0] == 200


def test_five_hundred_idle_connections_while_others_are_served(gateway: Gateway) -> None:
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(connect(gateway)) for _ in range(500)]
        with connect(gateway) as sock:
            for _ in range(20):
                sock.sendall(chat())
                assert read_answer(sock)[0] == 200
        for sock in idle:
            sock.sendall(HEALTH)
        assert all(read_answer(sock)[0] == 200 for sock in idle)
        assert gateway.memory() < 90_000_000


def test_a_connection_is_kept_and_says_nothing_of_its_server(gateway: Gateway) -> None:
    with connect(gateway) as sock:
        for _ in range(3):
            sock.sendall(chat())
            status, headers, _ = read_answer(sock)
            assert status == 200 and "connection" not in headers and "uvicorn" not in str(headers)


def test_a_client_that_is_gone_without_a_word_is_probed_for(gateway: Gateway) -> None:
    listener = gateway.listener  # what is set on it holds for the connections that it accepts
    assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == server.KEEPALIVE_PROBE_S


def test_a_connection_that_says_nothing_is_closed_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "KEEP_ALIVE_S", 0.15)

    async def app(_: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    async def closed(sent: bytes) -> bool:
        """Whether the connection ends in time after these bytes."""
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        writer.write(sent)
        try:
            async with asyncio.timeout(1.5):
                await reader.read()
            return True
        except TimeoutError:
            return False
        finally:
            writer.close()

    async def go() -> list[bool]:
        settings = Settings.model_validate({**SETTINGS, **dict.fromkeys(FILES, str(tmp_path))})
        web = server.Server(app, settings, lambda: False)
        web.config.load()
        web.lifespan = web.config.lifespan_class(web.config)
        await web.startup([listener])
        results = await asyncio.gather(*(closed(sent) for sent in (b"", b"\r\n", HEALTH, HEALTH + b"\r\n")))
        await web.shutdown([listener])
        return results

    listener = socket.create_server(("127.0.0.1", 0))
    assert all(asyncio.run(go()))


# --- streams ---


@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
def test_a_stream_passes_through_byte_by_byte(gateway: Gateway, path: str) -> None:
    client = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=15)
    client.request("POST", path, json.dumps({"stream": True, "stub": {"tokens": 50}}))
    answer = client.getresponse()
    assert answer.status == 200 and answer.getheader("content-type") == "text/event-stream"
    assert answer.read() == b"".join(events(path, 50))
    client.close()


def test_a_stream_is_not_held_back(gateway: Gateway) -> None:
    with connect(gateway) as sock:
        sock.sendall(chat(stream=True, stub={"tokens": 2, "interval": 10}))
        answer = http.client.HTTPResponse(sock)
        answer.begin()
        began = time.monotonic()
        assert b"w\xc3\xb6rd0" in answer.read1(65536) and time.monotonic() - began < 8


def test_a_stream_whose_server_dies_ends_with_an_error_event(gateway: Gateway) -> None:
    with connect(gateway) as sock:
        sock.sendall(chat(stream=True, stub={"tokens": 9, "die_after": 2}))
        _, _, body = read_answer(sock)
    assert b"w\xc3\xb6rd1" in body and b"[DONE]" not in body
    assert json.loads(body.strip().rsplit(b"data: ", 1)[1])["error"]["code"] == 502


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_generation(
    gateway: Gateway, stub: StubLlamaServer, stream: bool
) -> None:
    with connect(gateway) as sock:
        sock.sendall(chat(stream=stream, stub={"delay": 0 if stream else 9, "tokens": 99, "interval": 0.1}))
        if stream:
            assert sock.recv(100)
        until(lambda: stub.bodies)
    until(lambda: stub.given_up == 1)  # within a second, unless the machine has other things to do


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("behind", [HEALTH, b"nonsense\r\n\r\n"], ids=["request", "nonsense"])
@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "later"])
def test_a_client_that_sent_more_behind_its_request_and_goes_away_ends_its_generation(
    gateway: Gateway, stub: StubLlamaServer, stream: bool, behind: bytes, at_once: bool
) -> None:
    request = chat(stream=stream, stub={"delay": 0 if stream else 30, "tokens": 300, "interval": 0.1})
    with connect(gateway) as sock:
        sock.sendall(request + behind if at_once else request)
        if stream:
            assert sock.recv(100)
        until(lambda: stub.bodies)
        if not at_once:
            sock.sendall(behind)
            time.sleep(0.05)  # the gateway has read it
    until(lambda: stub.given_up == 1, 3)  # within a second, unless the machine has other things to do
    gateway.signal(signal.SIGTERM)
    assert gateway.wait() == 0
    assert "Traceback" not in gateway.log.read_text()


def stalled(gateway: Gateway, stream: bool = True, **stub: int) -> socket.socket:
    """The connection of a client that has asked for more than the kernel keeps for it, and does not read."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    sock.settimeout(15)
    sock.connect(("127.0.0.1", gateway.port))
    sock.sendall(chat(stream=stream, stub=stub or {"tokens": 300, "padding": 100_000}))
    return sock


def dropped(gateway: Gateway) -> bool:
    """Whether a client was dropped because it took nothing."""
    return "took nothing of its answer for 0.4 s" in gateway.log.read_text()


def test_a_client_that_stops_reading_its_stream_holds_nothing_for_long(
    gateway: Gateway, stub: StubLlamaServer
) -> None:
    with stalled(gateway):
        until(lambda: stub.given_up == 1)
        assert dropped(gateway) and gateway.memory() < 90_000_000
        with connect(gateway) as sock:
            sock.sendall(chat())
            assert read_answer(sock)[0] == 200


def test_a_whole_answer_that_nobody_takes_is_not_kept(gateway: Gateway) -> None:
    with stalled(gateway, stream=False, padding=30_000_000):
        until(lambda: dropped(gateway))


def test_large_answers_that_nobody_takes_fill_neither_slots_nor_memory(
    forge: Forge, tmp_path: Path, stub: StubLlamaServer
) -> None:
    with running(forge, tmp_path, request_timeout=60.0) as gateway, contextlib.ExitStack() as stack:
        for padding in [11_000_000] * 4 + [30_000_000] * 4:  # the first four fit, and there are four slots
            asked = len(stub.bodies)
            stack.enter_context(stalled(gateway, stream=False, padding=padding))
            until(lambda asked=asked: len(stub.bodies) > asked)  # type: ignore[misc]
        with connect(gateway) as sock:
            sock.sendall(chat())
            assert read_answer(sock)[0] == 200
        assert gateway.memory() < 200_000_000  # max_buffered is 50 MB


def test_a_client_that_stops_reading_does_not_hold_up_a_stop(gateway: Gateway, stub: StubLlamaServer) -> None:
    with stalled(gateway):
        until(lambda: stub.bodies)
        gateway.signal(signal.SIGTERM)
        assert gateway.wait() == 0


def test_a_client_that_reads_slowly_gets_all_of_its_stream(
    forge: Forge, tmp_path: Path, stub: StubLlamaServer
) -> None:
    with running(forge, tmp_path, request_timeout=1.5) as gateway, stalled(gateway) as sock:
        slow_until = time.monotonic() + 2
        last = b""
        while time.monotonic() < slow_until:  # less than the kernel waits for before it takes more
            last = sock.recv(20_000)
            time.sleep(0.05)
        while not last.endswith(b"0\r\n\r\n"):
            piece = sock.recv(1_000_000)
            assert piece, "the stream was cut off"
            last = last[-5:] + piece


def test_what_is_left_after_the_last_word_is_not_kept_for_ever() -> None:
    """A client takes some of it, and then nothing more."""
    left = [30, 30, 20, 20, 20, 20]  # what each look finds

    class Transport:
        write = pause_reading = resume_reading = None

        def __init__(self, sock: socket.socket, aborted: asyncio.Event) -> None:
            self.sock, self.abort = sock, aborted.set

        def get_extra_info(self, _: str) -> socket.socket:
            return self.sock

        def is_closing(self) -> bool:
            return False

        def close(self) -> None:
            pass

        def get_write_buffer_size(self) -> int:
            return left.pop(0)

    async def go() -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            aborted = asyncio.Event()
            farewell = server.Farewell(Transport(ours, aborted), 0.001)  # type: ignore[arg-type]
            farewell.close()
            async with asyncio.timeout(10):
                await aborted.wait()

    asyncio.run(go())
    assert not left  # the first look found that some was taken, the second nothing


# --- stopping ---


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_takes_its_answer_in_slowly_does_not_hold_up_a_stop(
    forge: Forge, tmp_path: Path, stub: StubLlamaServer, stream: bool
) -> None:
    with (
        running(forge, tmp_path, request_timeout=1.0) as gateway,
        stalled(gateway, stream=stream, padding=30_000_000) as sock,
    ):
        gateway.signal(signal.SIGTERM)
        gateway.await_state("STOPPING=1")
        deadline = time.monotonic() + 30  # half of what this pace would take
        with contextlib.suppress(ConnectionResetError):
            while sock.recv(20_000):
                assert time.monotonic() < deadline, "it is served still, and nobody else is"
                time.sleep(0.05)
        assert gateway.wait() == 0
        assert "dropped a client that is behind" in gateway.log.read_text()


@pytest.mark.parametrize("sent", [b"\r\n", b"\r\n" * 2000])
def test_blank_lines_keep_no_stopping_gateway_alive(gateway: Gateway, sent: bytes) -> None:
    with connect(gateway) as client:
        client.sendall(HEALTH)
        assert read_answer(client)[0] == 200
        gateway.signal(signal.SIGTERM)
        gateway.await_state("STOPPING=1")
        deadline = time.monotonic() + 20
        with pytest.raises(OSError, match=r"Broken pipe|reset"):
            while time.monotonic() < deadline:
                client.sendall(sent)
                time.sleep(0.01)
    assert gateway.wait() == 0


def test_sigterm_while_a_stream_runs_and_a_connection_is_idle(gateway: Gateway) -> None:
    with connect(gateway) as stream, connect(gateway) as idle, connect(gateway) as fresh:
        stream.sendall(chat(stream=True, stub={"tokens": 8, "interval": 0.05}))
        assert stream.recv(100)
        idle.sendall(HEALTH)
        assert read_answer(idle)[0] == 200
        gateway.signal(signal.SIGTERM)
        gateway.await_state("STOPPING=1")
        for sock in (idle, fresh):
            sock.sendall(chat())
            status, headers, _ = read_answer(sock)
            assert status == 200 and headers["connection"] == "close" and sock.recv(1) == b""
        assert b"[DONE]" in read_all(stream)  # and then its connection is read for a while, and closed
        assert gateway.wait() == 0


def test_the_client_of_a_running_stream_may_ask_once_more_after_sigterm(gateway: Gateway) -> None:
    with connect(gateway) as sock:
        sock.sendall(chat(stream=True, stub={"tokens": 3, "interval": 0.05}))
        assert sock.recv(20)
        gateway.signal(signal.SIGTERM)
        gateway.await_state("STOPPING=1")
        tail = b""
        while not tail.endswith(b"0\r\n\r\n"):
            tail += sock.recv(65536)
        sock.sendall(chat())
        status, headers, _ = read_answer(sock)
        assert status == 200 and headers["connection"] == "close"
    assert gateway.wait() == 0


def test_a_request_that_has_begun_to_arrive_outlives_the_grace(forge: Forge, tmp_path: Path) -> None:
    with running(forge, tmp_path, shutdown_grace=0.1, request_timeout=3.0) as gateway:
        with connect(gateway) as sock, connect(gateway) as idle:
            sock.sendall(HEALTH[:10])
            idle.sendall(HEALTH)
            assert read_answer(idle)[0] == 200
            gateway.signal(signal.SIGTERM)
            assert idle.recv(1) == b""  # the grace is over
            sock.sendall(HEALTH[10:])
            assert read_answer(sock)[0] == 200
        assert gateway.wait() == 0


def test_what_connects_while_the_gateway_is_down_is_answered_by_the_next(gateway: Gateway) -> None:
    gateway.signal(signal.SIGTERM)
    gateway.await_state("STOPPING=1")
    with connect(gateway) as sock:
        sock.sendall(chat())
        assert gateway.wait() == 0
        gateway.start()
        assert read_answer(sock)[0] == 200
    assert Path(gateway.folder / "control.sock").exists()


def test_twenty_restarts_under_eight_clients_lose_nothing(
    forge: Forge, tmp_path: Path, stub: StubLlamaServer
) -> None:
    stop = threading.Event()
    answered, failures = [0] * 8, list[str]()

    def client(number: int, port: int) -> None:
        """Clients without retries: the even ones keep their connection, every fourth one streams."""
        keeps, streams = number % 2 == 0, number % 4 < 2
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            while not stop.is_set():
                word = f"{number}-{answered[number]}"
                body = {"messages": word, "stream": streams, "stub": {"tokens": 3, "interval": 0.001}}
                connection.request("POST", CHAT, json.dumps(body))
                answer = connection.getresponse()
                content = answer.read().decode()
                assert answer.status == 200 and ("[DONE]" if streams else f'"{word}"') in content, content
                if not keeps or answer.getheader("connection") == "close":
                    connection.close()
                answered[number] += 1
        except Exception as error:
            failures.append(f"client {number}, request {answered[number]}: {error!r}")
        finally:
            connection.close()

    with running(forge, tmp_path) as gateway:
        clients = [threading.Thread(target=client, args=[number, gateway.port]) for number in range(8)]
        for thread in clients:
            thread.start()
        for _ in range(20):
            enough = sum(answered) + 8
            until(lambda enough=enough: failures or sum(answered) > enough)  # type: ignore[misc]
            gateway.signal(signal.SIGTERM)
            assert gateway.wait() == 0
            gateway.start()
        stop.set()
        for thread in clients:
            thread.join(5)
    assert not failures and min(answered) >= 20


@pytest.mark.parametrize(
    ("sent", "heading", "closes"), [(b"", False, True), (b"G", False, False), (b"", True, False)]
)
def test_an_idle_connection_is_not_closed_over_a_request_that_has_come(
    sent: bytes, heading: bool, closes: bool
) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(sent)
        protocol = server.GatewayProtocol.__new__(server.GatewayProtocol)
        farewell = mock.Mock(**{"get_extra_info.return_value": ours})
        protocol._heading, protocol._farewell, protocol.loop = heading, farewell, mock.Mock()
        protocol.loop.time.return_value = 0.0
        protocol.timeout_keep_alive_handler()
    assert farewell.close.called == closes


# --- what systemd passes ---


def test_without_a_passed_socket_it_says_how_it_is_started() -> None:
    command = [sys.executable, "-m", "llmbox.gateway.app"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "start the gateway with: systemctl --user start llm-gateway.socket" in done.stderr


@pytest.mark.parametrize("environ", [{}, {"LISTEN_FDS": "1", "LISTEN_PID": "1"}, {"LISTEN_FDS": "no"}])
def test_sockets_of_somebody_else_are_not_taken(environ: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=r"systemctl --user start llm-gateway.socket"):
        server.passed_sockets(environ)
    assert not environ


def test_the_port_and_the_control_socket_are_told_apart() -> None:
    four, six, unix = (socket.socket(family) for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX))
    with four, six, unix:
        assert server.split([unix, four, six]) == ([four, six], unix)
        assert server.split([four]) == ([four], None)
        for wrong in ([unix], [four, unix, unix]):
            with pytest.raises(UsageError, match=r"UNIX"):
                server.split(wrong)


def test_an_answer_that_takes_longer_than_the_patience_with_slow_clients_outlives_a_stop(
    forge: Forge, tmp_path: Path, stub: StubLlamaServer
) -> None:
    with running(forge, tmp_path) as gateway:  # request_timeout is 0.4 s, twice that the patience
        with connect(gateway) as sock:
            sock.sendall(chat(stub={"delay": 1.5}))
            until(lambda: stub.bodies)
            gateway.signal(signal.SIGTERM)
            status, headers, _ = read_answer(sock)
            assert status == 200 and headers["connection"] == "close" and sock.recv(1) == b""
        assert gateway.wait() == 0


def test_a_held_request_outlives_a_stop_for_as_long_as_its_preset_loads(
    forge: Forge, tmp_path: Path, stub: StubLlamaServer
) -> None:
    with running(forge, tmp_path, {"load_s": 1.5}) as gateway:
        with connect(gateway) as sock:
            sock.sendall(chat(model="smol"))
            time.sleep(0.1)
            gateway.signal(signal.SIGTERM)
            status, headers, _ = read_answer(sock)
            assert status == 200 and headers["connection"] == "close"
        assert gateway.wait() == 0


def serving(tmp_path: Path, **changed: object) -> server.Server:
    """A server of this process, whose application never gets a request."""
    settings = Settings.model_validate({**SETTINGS, **dict.fromkeys(FILES, str(tmp_path)), **changed})
    web = server.Server(lambda *_: None, settings, lambda: False)
    web.config.load()
    web.lifespan = web.config.lifespan_class(web.config)
    return web


def test_surplus_connections_are_told_so_again_and_again_but_not_any_number_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "TURNED_AWAY_LIMIT", 2)

    async def told(reader: asyncio.StreamReader) -> bool:
        try:
            async with asyncio.timeout(5):
                return b" 503 " in await reader.readline()
        except ConnectionError:
            return False

    async def body() -> None:
        web = serving(tmp_path, max_connections=1)
        listener = socket.create_server(("127.0.0.1", 0))
        place = listener.getsockname()
        await web.startup([listener])
        _, first = await asyncio.open_connection(*place)
        await asyncio.sleep(0.05)
        for _ in range(5):
            reader, writer = await asyncio.open_connection(*place)
            assert await told(reader)
            writer.close()
            await asyncio.sleep(0.05)
        many = [await asyncio.open_connection(*place) for _ in range(4)]
        assert [await told(reader) for reader, _ in many].count(True) == 2
        for _, writer in many:
            writer.close()
        first.close()
        await asyncio.sleep(0.05)
        await web.shutdown([listener])

    asyncio.run(body())


def test_a_client_that_was_refused_and_stays_is_closed_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "LINGER_S", 0.2)

    async def body() -> None:
        web = serving(tmp_path)
        listener = socket.create_server(("127.0.0.1", 0))
        await web.startup([listener])
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        writer.write(b"nonsense\r\n\r\n")
        assert b" 400 " in await reader.readline()
        await reader.read()
        with pytest.raises(ConnectionError):
            async with asyncio.timeout(5):
                while True:
                    writer.write(b"x")
                    await writer.drain()
                    await asyncio.sleep(0.02)
        await web.shutdown([listener])

    asyncio.run(body())
