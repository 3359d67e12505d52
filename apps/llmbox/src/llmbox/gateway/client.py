"""How lmswitch and gpu-guard talk to the gateway (llmbox.gateway.control), without asyncio: a slow import."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llmbox.errors import LlmboxError

SOCKET = "llmbox/control.sock"  # in the user's runtime directory
ANSWER_TIMEOUT_S = 5.0
BLOCK_TIMEOUT_S = 1.0  # whoever blocks has a server to stop


def ask_status(runtime: Path) -> dict[str, Any] | None:
    """The gateway's figures; None when no gateway answers."""
    connection = _connect(runtime)
    if connection is None:
        return None
    with connection:
        try:
            connection.sendall(line({"do": "status"}))
            found = json.loads(connection.makefile("rb").readline() or b"null")
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None


def set_blocked(runtime: Path, reason: str) -> bool:
    """Have the gateway refuse every request, with this reason, or ("") serve again. False: none answers."""
    connection = _connect(runtime, BLOCK_TIMEOUT_S)
    if connection is None:
        return False
    asked = {"do": "block", "reason": reason} if reason else {"do": "unblock"}
    with connection:
        try:
            connection.sendall(line(asked))
            found = json.loads(connection.makefile("rb").readline() or b"null")
        except (OSError, ValueError):
            return False
    return isinstance(found, dict) and found.get("blocked") == bool(reason)


@contextmanager
def requests_held(
    runtime: Path, preset: str | None, on_tick: Callable[[Mapping[str, Any]], None]
) -> Iterator[Callable[[bool, Mapping[str, float]], None]]:
    """Have the gateway hold all requests during the body, once what runs has been drained.

    `on_tick` gets its figures meanwhile. The body tells it how the switch went: whether it is done, and the
    seconds of its parts. Without a gateway there is nothing to hold. Raises LlmboxError when one is there
    and does not answer.
    """
    connection = _connect(runtime)
    if connection is None:
        yield lambda _ok, _parts: None
        return

    def switched(ok: bool, parts: Mapping[str, float]) -> None:
        with suppress(OSError):  # it was stopped meanwhile
            connection.sendall(line({"ok": ok, "parts": dict(parts)}))

    with connection:
        try:
            connection.sendall(line({"do": "hold", "preset": preset}))
            for told in connection.makefile("rb"):
                said = json.loads(told)
                if said.get("held"):
                    break
                on_tick(said)
        except TimeoutError:
            raise LlmboxError(
                f"the gateway did not answer in {ANSWER_TIMEOUT_S:.0f} s; "
                "look with: journalctl --user -u llm-gateway"
            ) from None
        except (OSError, ValueError):
            pass  # it was stopped meanwhile: nothing stands in front any longer
        yield switched


def _connect(runtime: Path, timeout_s: float = ANSWER_TIMEOUT_S) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(timeout_s)
    try:
        connection.connect(str(runtime / SOCKET))
    except OSError:
        connection.close()
        return None
    return connection


def line(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"
