"""A server that speaks Anthropic's protocol and reads its answers from a script: it plays models, it is none.

One good model and eight bad ones. A script decides by what the request holds (how many tool results, and what
the last one says), so that the client may repeat a request. Requests without tools get a short answer.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MAIN = """from fastapi import FastAPI

app = FastAPI()


@app.get("/health")
def health() -> dict[str, str]:
    return {"status": "ok"}
"""
TEST = """from fastapi.testclient import TestClient

from main import app


def test_health() -> None:
    assert TestClient(app).get("/health").json()["status"] == "ok"
"""
PYTEST = {"command": "python -m pytest -q"}
_TOKENS = {"input_tokens": 900, "output_tokens": 40}

Block = dict[str, Any]


@dataclass(frozen=True)
class Said:
    """One answer: its blocks, why it ended, how it is cut."""

    blocks: tuple[Block, ...] = ()
    stop: str = "end_turn"
    status: int = 200
    cut: bool = False  # the last block's arguments break off in the middle


@dataclass(frozen=True)
class Asked:
    """What a script may know of a request: the step, the last tool result, and where the client works."""

    step: int
    last: str
    work: str


Script = Callable[[Asked], Said]


def text(words: str, stop: str = "end_turn") -> Said:
    """An answer in words."""
    return Said(({"type": "text", "text": words},), stop)


def call(name: str, arguments: Mapping[str, Any], words: str = "") -> Said:
    """An answer that calls a tool."""
    said: tuple[Block, ...] = ({"type": "text", "text": words},) if words else ()
    return Said((*said, {"type": "tool_use", "name": name, "input": dict(arguments)}), "tool_use")


def good(asked: Asked) -> Said:
    """Reads, writes, runs pytest, reads in its output what is wanted, patches, runs it again."""
    main, test, contract = (
        f"{asked.work}/{name}" for name in ("main.py", "test_health.py", "test_contract.py")
    )
    wanted = re.search(r"build-[0-9a-f]{8}", asked.last)
    steps: list[Callable[[], Said]] = [
        lambda: call("Read", {"file_path": contract}, "I look at what is there."),
        lambda: call("Write", {"file_path": main, "content": MAIN}),
        lambda: call("Write", {"file_path": test, "content": TEST}),
        lambda: call("Bash", {**PYTEST, "description": "Run the tests"}),
        lambda: call(
            "Edit",
            {
                "file_path": main,
                "old_string": '{"status": "ok"}',
                "new_string": f'{{"status": "ok", "build": "{wanted[0] if wanted else "unknown"}"}}',
            },
        ),
        lambda: call("Bash", {**PYTEST, "description": "Run the tests again"}),
        lambda: text("The service is there and all tests pass."),
    ]
    return steps[min(asked.step, len(steps) - 1)]()


def prose(_: Asked) -> Said:
    """Tells what it would do, and that it is done."""
    return text(f"I create main.py:\n```python\n{MAIN}```\nThen I run pytest: 2 passed. Done.")


def malformed(asked: Asked) -> Said:
    """Calls a tool with arguments of another shape, again and again, and gives up."""
    if asked.step >= 3:
        return text("I cannot write files here.")
    return call("Write", {"path": "main.py", "text": MAIN})


def leaked(asked: Asked) -> Said:
    """Does the work, with its template's tokens in files and words."""
    if asked.step == 1:
        return call("Write", {"file_path": f"{asked.work}/main.py", "content": f"{MAIN}<|im_end|>\n"})
    if asked.step == 2:
        return text('<tool_call>\n{"name": "Bash", "arguments": {"command": "pytest"}}\n</tool_call>')
    return good(asked)


def truncated(asked: Asked) -> Said:
    """Writes one file; the edit after it is cut off in the middle, each time it is asked."""
    if asked.step < 4:
        return good(asked)
    return Said((*good(Asked(4, asked.last, asked.work)).blocks,), "max_tokens", cut=True)


def wrong_path(asked: Asked) -> Said:
    """Writes into a folder that it made up."""
    if asked.step >= 3:
        return text("The files are written.")
    return call("Write", {"file_path": "/home/user/project/main.py", "content": MAIN})


def empty(_: Asked) -> Said:
    """Says nothing."""
    return Said()


def loop(asked: Asked) -> Said:
    """Reads the same file for ever."""
    return call("Read", {"file_path": f"{asked.work}/test_contract.py"})


def refusing(_: Asked) -> Said:
    """A server that does not know the fields which the client sends."""
    return Said(status=422)


SCRIPTS: dict[str, Script] = {
    script.__name__: script
    for script in (good, prose, malformed, leaked, truncated, wrong_path, empty, loop, refusing)
}


@dataclass
class Server:
    """The running server: where it listens, and what it was asked."""

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)


@contextmanager
def serving(script: Script) -> Iterator[Server]:
    """A server on a free port of this machine that plays the script."""
    place = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    place.daemon_threads = True
    server = Server(f"http://127.0.0.1:{place.server_address[1]}")
    place.script, place.seen = script, server.requests  # type: ignore[attr-defined]
    thread = threading.Thread(target=place.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        place.shutdown()
        place.server_close()


def asked(request: Mapping[str, Any]) -> Asked:
    """What a script may know of a request."""
    results = [
        block
        for message in request.get("messages") or []
        for block in (message["content"] if isinstance(message.get("content"), list) else [])
        if block.get("type") == "tool_result"
    ]
    content = results[-1].get("content") if results else ""
    last = content if isinstance(content, str) else "\n".join(part.get("text", "") for part in content or [])
    work = re.search(r"[^\s\"\\]*/llmbox-agent-[^/\s\"\\]+/work", json.dumps(request))
    return Asked(len(results), last, work[0] if work else "")


def events(said: Said, number: int) -> Iterator[dict[str, Any]]:
    """An answer as the events of a stream."""
    message: dict[str, Any] = {
        "id": f"msg_{number:06d}",
        "type": "message",
        "role": "assistant",
        "model": "scripted",
    }
    empty_message = {**message, "content": [], "stop_reason": None, "stop_sequence": None, "usage": _TOKENS}
    yield {"type": "message_start", "message": empty_message}
    for index, block in enumerate(said.blocks):
        is_call = block["type"] == "tool_use"
        begun = (
            {**block, "id": f"toolu_{number:06d}{index}", "input": {}} if is_call else {**block, "text": ""}
        )
        yield {"type": "content_block_start", "index": index, "content_block": begun}
        if is_call:
            arguments = json.dumps(block["input"])
            if said.cut and index == len(said.blocks) - 1:
                arguments = arguments[: len(arguments) // 2]
            delta = {"type": "input_json_delta", "partial_json": arguments}
        else:
            delta = {"type": "text_delta", "text": block["text"]}
        yield {"type": "content_block_delta", "index": index, "delta": delta}
        yield {"type": "content_block_stop", "index": index}
    end: dict[str, Any] = {"stop_reason": said.stop, "stop_sequence": None}
    yield {"type": "message_delta", "delta": end, "usage": _TOKENS}
    yield {"type": "message_stop"}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(200, b"", "text/plain")

    def do_GET(self) -> None:
        self._answer(200, b"{}", "application/json")

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers.get("content-length") or 0)) or b"{}")
        if "count_tokens" in self.path:
            self._answer(200, b'{"input_tokens": 900}', "application/json")
            return
        seen: list[dict[str, Any]] = self.server.seen  # type: ignore[attr-defined]
        seen.append(request)
        said = self.server.script(asked(request)) if request.get("tools") else text("ok")  # type: ignore[attr-defined]
        if said.status != 200:
            error = {
                "type": "invalid_request_error",
                "message": "tools.0.custom: Extra inputs are not permitted",
            }
            body = json.dumps({"type": "error", "error": error}).encode()
            self._answer(said.status, body, "application/json")
            return
        told = list(events(said, len(seen)))
        stream = b"".join(f"event: {one['type']}\ndata: {json.dumps(one)}\n\n".encode() for one in told)
        self._answer(200, stream, "text/event-stream")

    def _answer(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Silent."""
