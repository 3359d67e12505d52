"""A server that looks like llama-server from the gateway: HTTP on a UNIX socket, in a thread of the tests.

A request may say in its body how it is answered:
`"stub": {"delay": s before the head, "tokens": n, "interval": s between two, "die_after": n tokens,
"padding": bytes beside each, or beside a whole answer}`.
"""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any


class StubLlamaServer:
    """Answers until it is closed; `bodies` are those that came, `given_up` counts clients gone too early."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bodies: list[bytes] = []
        self.heads: list[str] = []
        self.given_up = 0
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._started.wait(5)

    def close(self) -> None:
        """Stop listening and drop every connection."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = asyncio.start_unix_server(self._answer, self.path, backlog=512)
        self._loop.run_until_complete(server)
        self._started.set()
        self._loop.run_forever()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            fields = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
            body = await reader.readexactly(int(fields.get("content-length", 0)))
            self.heads.append(head)
            self.bodies.append(body)
            asked = json.loads(body or b"{}")
            gone = asyncio.ensure_future(reader.read(1))
            reply = asyncio.ensure_future(self._reply(head.split(" ")[1], asked, writer))
            await asyncio.wait({gone, reply}, return_when=asyncio.FIRST_COMPLETED)
            # Either may notice first: the reader, or a write that finds nobody.
            if not reply.done() or isinstance(reply.exception(), ConnectionError):
                self.given_up += 1
            reply.cancel()
            gone.cancel()
        except (asyncio.IncompleteReadError, ConnectionError, RuntimeError):
            pass
        finally:
            writer.close()

    async def _reply(self, path: str, asked: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        orders = asked.get("stub", {})
        await asyncio.sleep(orders.get("delay", 0))
        if not asked.get("stream"):
            body = whole(path, asked)
            head = "HTTP/1.1 200 OK\r\nServer: llama.cpp\r\nContent-Type: application/json; charset=utf-8\r\n"
            writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
            await writer.drain()
            return
        writer.write(
            b"HTTP/1.1 200 OK\r\nServer: llama.cpp\r\nContent-Type: text/event-stream\r\n"
            b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
        )
        padding = b": " + b"x" * orders["padding"] + b"\n\n" if "padding" in orders else b""
        for number, token in enumerate(events(path, orders.get("tokens", 3))):
            event = token + padding
            if number == orders.get("die_after"):
                writer.transport.abort()
                return
            writer.write(b"%x\r\n%s\r\n" % (len(event), event))
            await writer.drain()
            await asyncio.sleep(orders.get("interval", 0))
        writer.write(b"0\r\n\r\n")
        await writer.drain()


def whole(path: str, asked: dict[str, Any]) -> bytes:
    """An answer that is not streamed; it repeats what was asked, so that answers cannot be mixed up."""
    told: dict[str, Any] = {"path": path, "echo": asked.get("messages"), "usage": {"completion_tokens": 3}}
    if padding := asked.get("stub", {}).get("padding"):
        told["padding"] = "x" * padding
    return json.dumps(told).encode()


def events(path: str, tokens: int) -> list[bytes]:
    """The events of a stream, in the shape of the path's protocol."""
    if path.startswith("/v1/messages"):
        data: list[dict[str, Any]] = [{"type": "message_start", "message": {"usage": {"input_tokens": 5}}}]
        data += [
            {"type": "content_block_delta", "delta": {"type": "text_delta", "text": f"wörd{number} "}}
            for number in range(tokens)
        ]
        data += [{"type": "message_delta", "usage": {"output_tokens": tokens}}, {"type": "message_stop"}]
        return [f"event: {each['type']}\ndata: {json.dumps(each)}\n\n".encode() for each in data]
    chunks = [
        {"object": "chat.completion.chunk", "choices": [{"delta": {"content": f"wörd{number} "}}]}
        for number in range(tokens)
    ]
    last = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": tokens}}
    lines = [json.dumps(each, ensure_ascii=False) for each in (*chunks, last)]
    return [f"data: {each}\n\n".encode() for each in (*lines, "[DONE]")]
