"""A server that says what a test wants: paths to answers, on a port of the loopback, in a thread.

An answer is `(status, value)`, `(status, value, headers)`, or a function of the request that returns one;
bytes are sent as they are. What was asked is kept in `asked`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, Any] | tuple[int, Any, dict[str, str]] | Callable[[Any], Any]


class ScriptedLlm:
    """Answers until it is closed; a path that is not listed is 404."""

    def __init__(self, answers: Mapping[str, Answer], port: int = 0) -> None:
        self.answers = dict(answers)
        self.asked: list[tuple[str, str, Any]] = []
        self.headers: list[dict[str, str]] = []
        script = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer(None)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self._answer(json.loads(body or b"null"))

            def _answer(self, body: Any) -> None:
                script.asked.append((self.command, self.path, body))
                script.headers.append({name.lower(): value for name, value in self.headers.items()})
                answer = script.answers.get(self.path, (404, {"error": "no such path"}))
                if callable(answer):
                    answer = answer(body)
                status, value, *more = answer
                raw = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(raw)))
                for name, text in (more[0] if more else {}).items():
                    self.send_header(name, text)
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._http.daemon_threads = True
        self.port: int = self._http.server_address[1]
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._http.shutdown()
        self._http.server_close()

    def __enter__(self) -> ScriptedLlm:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def models(*entries: dict[str, Any]) -> Answer:
    """An answer to /v1/models."""
    return 200, {"object": "list", "data": list(entries)}


def gateway(*, context: int = 98304, build: str = "b11434-abc") -> dict[str, Answer]:
    """An llmbox gateway whose preset `coder` serves, and is all that Claude Code needs."""
    return {
        "/v1/models": models(
            {"id": "coder", "owned_by": "llmbox", "aliases": ["c"], "context": context, "state": "active"},
            {"id": "gemma4", "owned_by": "llmbox", "aliases": ["g"], "context": context, "state": "stopped"},
        ),
        "/props": (200, {"default_generation_settings": {"n_ctx": context}, "build_info": build}),
        "/v1/messages": called(),
    }


def called(*, name: str = "report", cached: int | None = 120) -> Answer:
    """Every request is answered with a call of the tool, and the second one finds the first in the cache."""

    def answer(body: Any) -> Answer:
        usage: dict[str, Any] = {"input_tokens": 10, "output_tokens": 5}
        if cached is not None:
            usage["cache_read_input_tokens"] = cached if body and len(body.get("messages", [])) > 1 else 0
        block = {"type": "tool_use", "id": "t1", "name": name, "input": {"state": "ready"}}
        return 200, {"type": "message", "role": "assistant", "content": [block], "usage": usage}

    return answer


def says(text: str) -> Answer:
    """Every request is answered with text."""
    return 200, {"type": "message", "content": [{"type": "text", "text": text}], "usage": {"input_tokens": 1}}
