"""The gateway as an ASGI application, and `llmbox-gateway`, which runs it on systemd's sockets."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvloop
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route as OwnRoute
from starlette.routing import Router
from starlette.types import ASGIApp

from llmbox.errors import LlmboxError, UsageError
from llmbox.gateway import control, server, settings
from llmbox.gateway.accounts import Accounts
from llmbox.gateway.audit import Audit, Entry
from llmbox.gateway.board import Board, Box
from llmbox.gateway.metrics import CONTENT_TYPE, Metrics
from llmbox.gateway.prompt_cache import Guard
from llmbox.gateway.refusals import Refusal
from llmbox.gateway.relay import Receive, Relay, Reply, Scope, Send
from llmbox.gateway.requests import ROUTES, protocol_of
from llmbox.gateway.settings import Settings
from llmbox.gateway.upstream import Upstream
from llmbox.presets import PresetsFile, presets_path
from llmbox.presets import load as load_presets

PATH_LIMIT = 100  # characters of a path that are repeated
FREE = ("/health", "/v1/health")  # for whoever asks whether the gateway lives
USAGE = """\
The gateway of the LLM box: one endpoint in front of all presets, which holds requests while one starts.
systemd starts it with its sockets (llm-gateway.socket); it takes no options."""
FILES = f"""\
It reads {settings.SETTINGS_FILE} and presets.json (LLMBOX_GATEWAY and LLMBOX_PRESETS name other files).
SIGTERM ends it when everything that it has accepted is answered.
Exit codes: 0 done, 1 failed, 2 bad usage."""
# Why nothing answers, in the phases in which nothing does.
REASONS = {
    "starting": "the gateway has not looked at the box yet",
    "loading": "a preset is loading",
    "draining": "running requests finish before another preset starts",
    "held": "lmswitch is switching",
    "stopped": "no preset is active; start one with: lmswitch PRESET",
}

log = logging.getLogger(__name__)


class Gateway:
    """Answers on the gateway's own paths, passes llama-server's to the relay, refuses every other."""

    def __init__(
        self,
        presets: PresetsFile,
        limits: Settings,
        board: Board,
        upstream: Upstream,
        accounts: Accounts,
        audit: Audit,
    ) -> None:
        self.presets = presets.exclusive
        self.metrics = Metrics(board, accounts, upstream, [preset.name for preset in self.presets])
        self.board = board
        self.accounts = accounts
        names = [(preset.name, list(preset.aliases)) for preset in self.presets]
        guard = Guard({preset.name: preset.command[0] for preset in presets.exclusive})
        contexts = {preset.name: preset.context for preset in self.presets}
        self.relay = Relay(board, upstream, limits, names, accounts, audit, self.metrics, guard, contexts)
        own = {
            "/health": self._health,
            "/v1/health": self._health,
            "/ready": self._ready,
            "/models": self._models,
            "/v1/models": self._models,
            "/metrics": self._metrics,
        }
        routes = [OwnRoute(path, answer) for path, answer in own.items()]
        self._own: ASGIApp = Router(routes, redirect_slashes=False)
        self._methods = {path: ["GET", "HEAD"] for path in own}
        for method, path in ROUTES:
            self._methods.setdefault(path, []).append(method)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        # As it was sent: a path that only equals a known one after decoding is another path.
        path = scope["raw_path"].decode("latin-1")
        try:
            route = ROUTES.get((scope["method"], path))
            if route:
                await self.relay.serve(route, scope, receive, send)
                return
            self._check(path, scope)
            await self._own(scope, receive, send)  # type: ignore[arg-type]
        except Refusal as refusal:
            self._record(path, scope, refusal)
            await Reply(send, protocol_of(path)).refuse(refusal)
        except Exception:
            log.exception("%s %s", scope["method"], path)
            # uvicorn closes the connection instead when a response has begun.
            failed = Refusal(500, "the gateway failed; the reason is in: journalctl --user -u llm-gateway")
            await Reply(send, protocol_of(path)).refuse(failed)

    def _record(self, path: str, scope: Scope, refusal: Refusal) -> None:
        """Write down what was refused here, as the relay does with its own: a guessed key must be seen."""
        client = scope.get("client")
        entry = Entry(path, client[0] if client else "", error=refusal.message)
        if path not in self._methods:  # whatever stands there, a key perhaps
            entry.path, entry.error = "(unknown)", refusal.message.partition(":")[0]
        entry.end(refusal.status)
        self.metrics.observe(entry)
        self.relay.audit.write(entry)

    def _check(self, path: str, scope: Scope) -> None:
        """Raise Refusal for a path or method that is not the gateway's own, and for who may not ask."""
        if path not in FREE:
            client = scope.get("client")
            self.accounts.identify(scope["headers"], client[0] if client else "")
        methods = self._methods.get(path)
        if methods is None:
            raise Refusal(
                404, f"no such path: {path[:PATH_LIMIT]}; there are: {', '.join(sorted(self._methods))}"
            )
        if scope["method"] not in methods:
            allowed = ", ".join(methods)
            raise Refusal(405, f"{path} takes {allowed}, not {scope['method']}", {"Allow": allowed})

    async def _health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _ready(self, _: Request) -> Response:
        board = self.board
        if board.serving and not board.blocked:
            return JSONResponse({"status": "ready", "preset": board.serving.preset})
        reason = board.blocked or REASONS.get(board.phase, "")
        if board.phase == "failed" and board.failed and not board.blocked:
            reason = max(board.failed.values())[1]
        body = {"status": "unavailable", "phase": board.phase, "reason": reason}
        return JSONResponse(body, status_code=503, headers={"Retry-After": "5"})

    async def _models(self, _: Request) -> Response:
        models = [
            {
                "id": preset.name,
                "object": "model",
                "type": "model",  # this and display_name: for clients that speak Anthropic
                "display_name": preset.name,
                "created": 0,
                "owned_by": "llmbox",
                "aliases": preset.aliases,
                "context": preset.context,
                "state": self._state(preset.name),
                "description": preset.description,
            }
            for preset in self.presets
        ]
        return JSONResponse({"object": "list", "data": models, "has_more": False})

    def _state(self, preset: str) -> str:
        board = self.board
        if board.serving and board.serving.preset == preset:
            return "active"
        if board.phase == "loading" and board.target == preset:
            return "loading"
        if any(lease.preset == preset for lease in board.leases):
            return "draining"
        return "failed" if preset in board.failed else "stopped"

    async def _metrics(self, _: Request) -> Response:
        return Response(await self.metrics.render(), headers={"Content-Type": CONTENT_TYPE})


def upstream_path(presets: PresetsFile) -> str:
    """The socket that every preset of the box listens on. Raises UsageError when there is no such one."""
    paths = {preset.listen for preset in presets.exclusive}
    if len(paths) != 1 or not next(iter(paths)).startswith("/"):
        raise UsageError(
            f"{presets_path()}: listen = {', '.join(sorted(paths)) or 'nothing'}: the presets behind the "
            "gateway must all listen on the path of one socket; set llama_presets_listen and run the playbook"
        )
    return paths.pop()


def systemd_box(presets: PresetsFile) -> Box:
    """The box that this process runs on."""
    from llmbox.gateway.box import SystemdBox
    from llmbox.systemd import Systemd, runtime_dir

    runtime = runtime_dir()
    return SystemdBox(presets, Systemd(runtime), runtime)


async def run(
    presets: PresetsFile,
    limits: Settings,
    box: Box,
    http: list[socket.socket],
    control_socket: socket.socket | None,
) -> int:
    """Serve until SIGTERM has come and everything accepted is answered. Returns the exit code."""
    board = Board({preset.name: preset.parallel for preset in presets.exclusive}, limits, box)
    upstream = Upstream(upstream_path(presets))
    usage = Path(limits.state_dir) / "usage.json"
    accounts = Accounts.load(Path(limits.keys_file), usage, limits.networks, time.time)
    audit = Audit(Path(limits.audit_file), limits.audit_max_size, limits.audit_keep)
    gateway = Gateway(presets, limits, board, upstream, accounts, audit)
    web = server.Server(gateway, limits, lambda: bool(board.queued or board.in_flight))

    def ended(task: asyncio.Task[Any]) -> None:
        # Without the board every request would wait in vain, without the accounts no budget would be kept:
        # systemd starts the gateway anew.
        if not task.cancelled():
            log.critical("%s has failed", task.get_name(), exc_info=task.exception())
            web.should_exit = web.force_exit = True

    running = [
        asyncio.create_task(board.run(), name="the board"),
        asyncio.create_task(accounts.run(), name="the task of the accounts"),
    ]
    for task in running:
        task.add_done_callback(ended)
    controlling = await control.serve(board, control_socket) if control_socket else None
    try:
        await web.serve(http)
    finally:
        if controlling:
            controlling.close()
        failed = any(task.done() for task in running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        accounts.flush()
    return 1 if failed else 0


def main(argv: list[str] | None = None, make_box: Callable[[PresetsFile], Box] = systemd_box) -> int:
    """Entry point of the console script."""
    argparse.ArgumentParser(
        "llmbox-gateway",
        description=USAGE,
        epilog=FILES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells each look at /health
    try:
        http, control_socket = server.split(server.passed_sockets())
        presets = load_presets(presets_path())
        limits = settings.load(Path(os.environ.get("LLMBOX_GATEWAY") or settings.SETTINGS_FILE))
        limits.check(presets)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(run(presets, limits, make_box(presets), http, control_socket))
    except LlmboxError as error:
        print(f"llmbox-gateway: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
