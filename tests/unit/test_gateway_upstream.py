"""One request to llama-server and its answer, whatever the server does: over a real UNIX socket."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import pytest
from llmbox.gateway.upstream import HIGH_WATER, Lost, Upstream

PATIENCE_S = 10
Server = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]
Test = Callable[[Upstream], Awaitable[None]]


def run(path: Path, server: Server, test: Test) -> None:
    """The test beside a server that gets the head of each request."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await server(await reader.readuntil(b"\r\n\r\n"), writer)
        finally:
            writer.close()

    async def body() -> None:
        upstream = Upstream(str(path / "llama.sock"))
        listening = await asyncio.start_unix_server(serve, upstream.path)
        async with asyncio.timeout(PATIENCE_S):
            await test(upstream)
        listening.close()

    asyncio.run(body())


def says(*said: bytes) -> Server:
    async def server(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.writelines(said)

    return server


async def whole(upstream: Upstream) -> bytes:
    """The body of the answer to a request."""
    answer = await upstream.send("GET", "/props", [], b"")
    try:
        return b"".join([chunk async for chunk in answer.chunks()])
    finally:
        answer.close()


def test_what_is_between_two_hops_is_not_passed_on(tmp_path: Path) -> None:
    heads: list[bytes] = []
    hop = [
        *(b"connection", b"content-length", b"host", b"keep-alive", b"proxy-authenticate", b"te", b"trailer"),
        *(b"proxy-authorization", b"transfer-encoding", b"upgrade", b"expect"),
    ]

    async def server(head: bytes, writer: asyncio.StreamWriter) -> None:
        heads.append(head)
        writer.write(
            b"HTTP/1.1 200 OK\r\nConnection: close\r\nKeep-Alive: timeout=5\r\nX-Kept: 1\r\n\r\nhello"
        )

    async def test(upstream: Upstream) -> None:
        answer = await upstream.send(
            "GET", "/props", [*((name, b"theirs") for name in hop), (b"x", b"y")], b""
        )
        assert (answer.status, answer.headers) == (200, [(b"x-kept", b"1")])
        answer.close()

    run(tmp_path, server, test)
    ours = b"host: localhost\r\nconnection: close\r\nx: y\r\ncontent-length: 0\r\n\r\n"
    assert heads == [b"GET /props HTTP/1.1\r\n" + ours]


def test_what_comes_before_the_answer_is_no_answer(tmp_path: Path) -> None:
    async def test(upstream: Upstream) -> None:
        answer = await upstream.send("GET", "/props", [], b"")
        assert (answer.status, answer.headers) == (200, [(b"x-kept", b"1")])
        assert [chunk async for chunk in answer.chunks()] == [b"hello"]

    early = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
    run(tmp_path, says(early, b"HTTP/1.1 200 OK\r\nX-Kept: 1\r\nContent-Length: 5\r\n\r\nhello"), test)


def test_without_a_length_the_end_of_the_connection_is_that_of_the_answer(tmp_path: Path) -> None:
    async def test(upstream: Upstream) -> None:
        assert await whole(upstream) == b"hello"

    run(tmp_path, says(b"HTTP/1.1 200 OK\r\n\r\nhello"), test)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b"", "closed the connection"),
        (b"HTTP/1.1 200 OK\r\n", "closed the connection"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\nX-Last: 1\r\n\r\nhello", "closed the connection"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", "closed the connection"),
        (b"SSH-2.0-OpenSSH\r\n", "not HTTP"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "not HTTP"),
    ],
)
def test_an_answer_that_does_not_come_whole_is_a_server_lost(tmp_path: Path, said: bytes, why: str) -> None:
    async def test(upstream: Upstream) -> None:
        with pytest.raises(Lost, match=why) as lost:
            await whole(upstream)
        assert lost.value.sent

    run(tmp_path, says(said), test)


def test_a_server_that_speaks_no_http_and_stays_is_left(tmp_path: Path) -> None:
    left = asyncio.Event()

    async def server(_: bytes, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while True:
                writer.write(b"SSH-2.0-OpenSSH\r\n")
                await writer.drain()
                await asyncio.sleep(0.001)
        left.set()

    async def test(upstream: Upstream) -> None:
        with pytest.raises(Lost, match="not HTTP"):
            await whole(upstream)
        await left.wait()

    run(tmp_path, server, test)


@pytest.mark.parametrize(
    "said", [b"HTTP/1.1 102 Processing\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n"], ids=["before", "in"]
)
def test_whoever_gives_up_leaves_the_server(tmp_path: Path, said: bytes) -> None:
    begun, left = asyncio.Event(), asyncio.Event()

    async def server(_: bytes, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while True:
                writer.write(said)
                await writer.drain()
                begun.set()
                await asyncio.sleep(0.001)
        left.set()

    async def test(upstream: Upstream) -> None:
        asking = asyncio.create_task(upstream.send("GET", "/props", [], b""))
        await begun.wait()
        if b"200" in said:
            (await asking).close()
        asking.cancel()
        await left.wait()

    run(tmp_path, server, test)


def test_where_nobody_listens_the_request_was_not_sent(tmp_path: Path) -> None:
    async def body() -> None:
        with pytest.raises(Lost, match="No such file") as lost:
            await Upstream(str(tmp_path / "nobody.sock")).send("GET", "/props", [], b"")
        assert not lost.value.sent

    asyncio.run(body())


def test_a_slow_reader_holds_its_server_up_and_gets_all_of_it(tmp_path: Path) -> None:
    size = 40 * HIGH_WATER
    sent = 0

    async def server(_: bytes, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        while sent < size:
            writer.write(bytes(HIGH_WATER))
            await writer.drain()
            sent += HIGH_WATER

    async def test(upstream: Upstream) -> None:
        answer = await upstream.send("GET", "/props", [], b"")
        before = -1
        while before != sent:
            before = sent
            await asyncio.sleep(0.05)
        assert sent < size / 2, "the gateway kept it"
        assert sum([len(chunk) async for chunk in answer.chunks()]) == size

    run(tmp_path, server, test)
