"""The gateway's control socket: how lmswitch asks it to hold the requests while it switches, and how it does.

JSON, one object a line. `{"do": "status"}` is answered with the figures of the queue. `{"do": "hold",
"preset": NAME}` is answered with the figures once a second while the present server is drained, and with
`{"held": true}` when it is; from then on requests wait until the connection closes, however that happens.
Before that lmswitch may say how it went: `{"ok": BOOL, "parts": {NAME: SECONDS}}`. `{"do": "block", "reason":
TEXT}` has every request refused with the reason, `{"do": "unblock"}` ends that: the GPU guard takes the card
out of service.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from typing import Any

from llmbox.gateway.board import Board
from llmbox.gateway.client import line

LINE_LIMIT = 4096
TICK_S = 1.0


async def serve(board: Board, listener: socket.socket) -> asyncio.Server:
    """Answer on the control socket."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            asked = json.loads(await reader.readline() or b"{}")
            if asked.get("do") == "status":
                writer.write(line(status(board)))
            elif asked.get("do") == "hold" and isinstance(asked.get("preset"), str | None):
                await _hold(board, asked.get("preset"), reader, writer)
            elif asked.get("do") in ("block", "unblock"):
                board.block(str(asked.get("reason") or "") if asked["do"] == "block" else "")
                writer.write(line({"blocked": bool(board.blocked)}))
            else:
                writer.write(line({"error": "do: status, hold, block or unblock"}))
            await writer.drain()
        except (OSError, ValueError, AttributeError):
            pass  # whoever asked has gone, or never meant us
        finally:
            writer.close()

    # Python 3.13 removes the path of a socket that it closes; this one is systemd's, for the next gateway.
    kept: dict[str, Any] = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}
    return await asyncio.start_unix_server(answer, sock=listener, limit=LINE_LIMIT, **kept)


async def _hold(
    board: Board, preset: str | None, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    said = asyncio.ensure_future(reader.readline())  # nothing when the connection is closed
    held = asyncio.Event()

    async def hold() -> None:
        async with board.hold(preset) as switched:
            held.set()
            writer.write(line({"held": True}))
            if ended := json.loads(await said or b"{}"):
                switched(bool(ended["ok"]), {part: float(taken) for part, taken in ended["parts"].items()})

    holding = asyncio.ensure_future(hold())
    try:
        while not holding.done() and (held.is_set() or not said.done()):
            if not held.is_set():
                writer.write(line(status(board)))
            waiting: set[asyncio.Future[Any]] = {holding} if held.is_set() else {said, holding}
            await asyncio.wait(waiting, timeout=TICK_S, return_when=asyncio.FIRST_COMPLETED)
    finally:
        said.cancel()
        holding.cancel()
        await asyncio.gather(said, holding, return_exceptions=True)


def status(board: Board) -> dict[str, Any]:
    """The figures of the queue."""
    return {
        "phase": board.phase,
        "queued": board.queued,
        "in_flight": board.in_flight,
        "last_switch": board.last_switch,
    }
