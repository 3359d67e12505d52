"""The program `llm-router`: LiteLLM's proxy behind a door that lets through what clients need, no more.

    llm-router --config config.yaml --settings router.json

LiteLLM answers hundreds of paths (administration, pages, logins). Only those of PATHS get to it, and
/health, /v1/models and /props are answered here. Exit codes: 0 stopped, 1 could not start, 2 bad usage.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import socket
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from llm_router.health import Watch
from llm_router.ledger import Ledger, Refused, Settings

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

SETTINGS = "LLM_ROUTER_SETTINGS"
COUNT = "/v1/messages/count_tokens"
CALL_ID = b"x-litellm-call-id"
MODELS, PROPERTIES = frozenset({"/v1/models", "/models"}), "/props"
PATHS = frozenset({"/v1/chat/completions", "/chat/completions", "/v1/messages", COUNT})
# LiteLLM fetches price lists, news and templates at its start otherwise.
QUIET = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_LOCAL_BLOG_POSTS": "True",
    "LITELLM_LOCAL_POLICY_TEMPLATES": "true",
    "LITELLM_TELEMETRY": "False",
    "DISABLE_ADMIN_UI": "True",
    "NO_DOCS": "True",
    "NO_REDOC": "True",
}


# A box whose power is cut says nothing: what waits there is lost after 25 s, and sent to another box.
# Keepalive sees it where all that was sent has been acknowledged. For the rest, and for a connection that
# is only begun, LiteLLM has no setting.
KEEPALIVE = {
    "AIOHTTP_SO_KEEPALIVE": "True",
    "AIOHTTP_TCP_KEEPIDLE": "10",
    "AIOHTTP_TCP_KEEPINTVL": "5",
    "AIOHTTP_TCP_KEEPCNT": "3",
}
SILENT_MS = 25_000
MakeSocket = Callable[[Any], socket.socket]


class Door:
    """Passes on the paths of clients, answers a few as a gateway does, and knows no other.

    `left` is told the name of a request whose client went away before its answer was whole.
    """

    def __init__(
        self, inner: Application, settings: Settings, watch: Watch, left: Callable[[str], None]
    ) -> None:
        self._inner = inner
        self._left = left
        self._settings = settings
        self._watch = watch
        self._ledger = Ledger(settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or the program's own start and end."""
        if scope["type"] == "lifespan":
            self._watch.begin()
            await self._inner(scope, receive, send)
        elif scope["type"] == "http" and scope["path"] in PATHS:
            await self._pass_on(scope, receive, send)
        elif scope["type"] == "http" and scope["path"] == "/health":
            await _answer(send, 200, b'{"status": "ok"}')
        elif scope["type"] == "http" and scope["path"] in (*MODELS, PROPERTIES):
            await self._tell(scope, send)
        elif scope["type"] == "http":
            await _answer(send, 404, b'{"error": {"message": "no such path on this router"}}')
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Have LiteLLM answer, as long as somebody waits for it: else a box would read a long prompt for
        nobody, and count as busy. LiteLLM itself looks whether the client is there when it sends something.
        """
        name = secrets.token_hex(16)
        headers = [*_for_litellm(scope["headers"]), (CALL_ID, name.encode())]
        messages: asyncio.Queue[MutableMapping[str, Any]] = asyncio.Queue(1)
        whole = False

        async def listen() -> None:
            while (message := await receive())["type"] != "http.disconnect":
                await messages.put(message)

        async def answer(message: MutableMapping[str, Any]) -> None:
            nonlocal whole
            whole |= message["type"] == "http.response.body" and not message.get("more_body")
            await send(message)

        answering = asyncio.ensure_future(self._inner({**scope, "headers": headers}, messages.get, answer))
        listening = asyncio.ensure_future(listen())
        try:
            await asyncio.wait((answering, listening), return_when=asyncio.FIRST_COMPLETED)
            if not answering.done() and not whole:
                answering.cancel()
                await asyncio.wait((answering,))  # however it ends: there is nobody to tell
                self._left(name)
            else:
                await answering
        finally:
            answering.cancel()
            listening.cancel()

    async def _tell(self, scope: Scope, send: Send) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            self._ledger.key(*shown_keys(headers))
        except Refused as error:
            await _answer(send, error.status, json.dumps({"error": {"message": str(error)}}).encode())
        else:
            told = self._list() if scope["path"] in MODELS else await self._properties()
            await _answer(send, 200, json.dumps(told).encode())

    def _list(self) -> dict[str, Any]:
        models = [
            {
                "id": model.name,
                "object": "model",
                "owned_by": "llmbox",
                "context": model.context,
                "state": "active" if self._watch.serves(model.name) else "stopped",
            }
            for model in self._settings.models
        ]
        return {"object": "list", "data": models}

    async def _properties(self) -> dict[str, Any]:
        return {"build_info": ", ".join(await self._watch.builds())}


def shown_keys(headers: Mapping[str, str]) -> list[str]:
    """The keys that a client shows, one of each protocol's header at most.

    Claude Code sends LLMBOX_KEY in `Authorization`, and beside it whatever else it has as x-api-key.
    """
    scheme, _, bearer = headers.get("authorization", "").strip().partition(" ")
    shown = (bearer.strip() if scheme.lower() == "bearer" else "", headers.get("x-api-key", "").strip())
    return [key for key in shown if key]


def _for_litellm(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """What a client's headers may tell LiteLLM: none of those that steer it.

    By CALL_ID the hook knows a request, so a client that chose it could take another one's place.
    """
    return [(name, value) for name, value in headers if b"litellm" not in name.lower()]


async def _answer(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def impatient(build: Callable[[], MakeSocket]) -> Callable[[], MakeSocket]:
    """What makes LiteLLM's sockets, so that they give up a peer that takes nothing for SILENT_MS."""

    def make(address: Any) -> socket.socket:
        made = build()(address)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENT_MS)
        return made

    return lambda: make


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Route requests to the LLM boxes of an inventory.")
    parser.add_argument("--config", type=Path, required=True, help="LiteLLM's configuration")
    parser.add_argument("--settings", type=Path, required=True, help="router.json")
    parser.add_argument("--check", action="store_true", help="look whether the settings can be read, and end")
    options = parser.parse_args(argv)
    try:
        settings = Settings.read(options.settings)
        host, _, port = settings.listen.rpartition(":")
        options.config.read_bytes()
    except (OSError, ValueError) as error:
        print(f"llm-router: {options.settings}: {' '.join(str(error).split())[:300]}", file=sys.stderr)
        return 1
    if options.check:
        return 0
    os.environ.update(QUIET | KEEPALIVE)
    os.environ[SETTINGS] = str(options.settings)
    os.environ["CONFIG_FILE_PATH"] = str(options.config)
    # LiteLLM wants one; it opens nothing here, and is another one at each start.
    os.environ["LITELLM_MASTER_KEY"] = f"sk-{secrets.token_hex(32)}"
    import uvicorn
    from litellm.llms.custom_httpx import http_handler  # type: ignore[import-not-found]
    from litellm.proxy.proxy_server import app  # type: ignore[import-not-found]

    from llm_router.hook import router_hook  # the same that LiteLLM finds by its name

    http_handler.build_aiohttp_keepalive_socket_factory = impatient(
        http_handler.build_aiohttp_keepalive_socket_factory
    )
    uvicorn.run(
        Door(app, settings, router_hook.watch, router_hook.left),
        host=host.strip("[]"),
        port=int(port),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=settings.stop_seconds,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
