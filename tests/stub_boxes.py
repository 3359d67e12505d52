"""Gateways of LLM boxes, played: both protocols, and answers that the last message asks for. No model is in.

`leak`, `empty`, `unparsed`, `call`, `malformed`: what the word says, the first time only with `once`; `slow`:
a stream whose words come apart; `think`: THINK_S before the first one; `die`: the connection breaks in the
middle; `refuse`: 503; `too long`: 400. Anything else is answered with words, and everything is by a box
called `cloud`.
"""

from __future__ import annotations

import json
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PAUSE_S = 0.05
THINK_S = 10.0
_lock, _said = threading.Lock(), set[str]()


@dataclass
class StubBox:
    """A running one: where, and what it was asked."""

    name: str
    url: str
    preset: str
    asked: list[dict[str, Any]] = field(default_factory=list)
    left: list[str] = field(default_factory=list)  # what somebody asked for and did not wait for
    place: ThreadingHTTPServer | None = None

    def fall_silent(self) -> list[socket.socket]:
        """As with its power cut: no connection is taken or refused, while what is returned stays open."""
        assert self.place is not None
        self.place.shutdown()
        waiting: list[socket.socket] = []
        while not waiting or select.select([], [waiting[-1]], [], 0.2)[1]:
            waiting.append(socket.socket())
            waiting[-1].setblocking(False)
            waiting[-1].connect_ex(self.place.server_address)
        return waiting

    def die(self) -> None:
        """Close the port; connections that are open break."""
        assert self.place is not None
        self.place.dead = True  # type: ignore[attr-defined]
        self.place.shutdown()
        self.place.server_close()


@contextmanager
def stub_box(name: str, preset: str = "coder", port: int = 0) -> Iterator[StubBox]:
    """A gateway on a port of this machine."""
    place = ThreadingHTTPServer(("127.0.0.1", port), _Handler)
    place.daemon_threads = True
    box = StubBox(name, f"http://127.0.0.1:{place.server_address[1]}", preset, place=place)
    place.box, place.dead = box, False  # type: ignore[attr-defined]
    threading.Thread(target=place.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield box
    finally:
        if not place.dead:  # type: ignore[attr-defined]
            box.die()


def wish(request: dict[str, Any]) -> str:
    """The text of the last message."""
    content = request["messages"][-1]["content"]
    return content if isinstance(content, str) else " ".join(part.get("text", "") for part in content)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def parse_request(self) -> bool:
        """No connection that was open outlives the box."""
        understood = super().parse_request()
        self.close_connection |= self.server.dead  # type: ignore[attr-defined]
        return understood and not self.server.dead  # type: ignore[attr-defined]

    def do_GET(self) -> None:
        box: StubBox = self.server.box  # type: ignore[attr-defined]
        self._json({"status": "ready", "preset": box.preset, "build_info": f"b1-{box.name}"})

    def do_POST(self) -> None:
        box: StubBox = self.server.box  # type: ignore[attr-defined]
        request = json.loads(self.rfile.read(int(self.headers.get("content-length") or 0)) or b"{}")
        asked = wish(request)
        with _lock:
            first = asked not in _said
            _said.add(asked)
        box.asked.append(request)
        if ("once" in asked and not first) or box.name == "cloud":
            asked = "fine"
        words, arguments = f"hello from {box.name}", None
        if "leak" in asked:
            words = "I am done <unused49> here."
        elif "empty" in asked:
            words = ""
        elif "unparsed" in asked:
            words = '<tool_call>{"name": "Write", "arguments": {}}</tool_call>'
        elif "malformed" in asked:
            words, arguments = "", '{"file_path": '
        elif "call" in asked:
            words, arguments = "", '{"file_path": "a"}'
        if "think" in asked and self._left():
            box.left.append(asked)
            self.close_connection = True
            return
        if "refuse" in asked:
            self._json({"error": {"message": "not ready", "type": "server_error"}}, 503)
            return
        if "too long" in asked:
            self._json({"error": {"message": "exceeds the context", "type": "invalid_request_error"}}, 400)
            return
        messages = self.path.startswith("/v1/messages")
        if not request.get("stream"):
            self._json(_message(words, arguments) if messages else _completion(words, arguments))
            return
        events = list(_events(words, arguments) if messages else _chunks(words, arguments))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        for number, event in enumerate(events):
            if self.server.dead or ("die" in asked and number == len(events) // 2):  # type: ignore[attr-defined]
                self.connection.close()
                return
            head = f"event: {event['type']}\n" if messages else ""
            self.wfile.write(f"{head}data: {json.dumps(event)}\n\n".encode())
            self.wfile.flush()
            if "slow" in asked:
                time.sleep(PAUSE_S)
        if not messages:
            self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def _left(self) -> bool:
        """Read a long prompt; whether the other side has gone meanwhile."""
        gone, _, _ = select.select([self.connection], [], [], THINK_S)
        return bool(gone) and not self.connection.recv(1, socket.MSG_PEEK)

    def _json(self, content: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Silent."""


_USAGE = {"prompt_tokens": 50, "completion_tokens": 10, "total_tokens": 60}
_TOKENS = {"input_tokens": 50, "output_tokens": 10}


def _completion(words: str, arguments: str | None) -> dict[str, Any]:
    calls = [{"id": "c1", "type": "function", "function": {"name": "Write", "arguments": arguments}}]
    message = {"role": "assistant", "content": words or None, **({"tool_calls": calls} if arguments else {})}
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if arguments else "stop"}
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [choice],
        "usage": _USAGE,
    }


def _chunks(words: str, arguments: str | None) -> Iterator[dict[str, Any]]:
    def chunk(delta: dict[str, Any], end: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": end}
        return {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}

    yield chunk({"role": "assistant", "content": ""})
    for word in words.split(" ") if words else []:
        yield chunk({"content": f"{word} "})
    if arguments:
        call = {
            "index": 0,
            "id": "c1",
            "type": "function",
            "function": {"name": "Write", "arguments": arguments},
        }
        yield chunk({"tool_calls": [call]})
    yield chunk({}, "tool_calls" if arguments else "stop")
    yield {**chunk({}), "choices": [], "usage": _USAGE}


def _message(words: str, arguments: str | None) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "text", "text": words}] if words else []
    if arguments:
        given = json.loads(arguments) if arguments.endswith("}") else {}
        content.append({"type": "tool_use", "id": "t1", "name": "Write", "input": given})
    stop = "tool_use" if arguments else "end_turn"
    message = {"id": "m1", "type": "message", "role": "assistant", "model": "m", "content": content}
    return {**message, "stop_reason": stop, "stop_sequence": None, "usage": _TOKENS}


def _events(words: str, arguments: str | None) -> Iterator[dict[str, Any]]:
    yield {"type": "message_start", "message": {**_message("", None), "stop_reason": None}}
    if words:
        yield {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
        for word in words.split(" "):
            delta = {"type": "text_delta", "text": f"{word} "}
            yield {"type": "content_block_delta", "index": 0, "delta": delta}
        yield {"type": "content_block_stop", "index": 0}
    if arguments:
        block = {"type": "tool_use", "id": "t1", "name": "Write", "input": {}}
        yield {"type": "content_block_start", "index": 0, "content_block": block}
        delta = {"type": "input_json_delta", "partial_json": arguments}
        yield {"type": "content_block_delta", "index": 0, "delta": delta}
        yield {"type": "content_block_stop", "index": 0}
    end = {"stop_reason": "tool_use" if arguments else "end_turn", "stop_sequence": None}
    yield {"type": "message_delta", "delta": end, "usage": _TOKENS}
    yield {"type": "message_stop"}
