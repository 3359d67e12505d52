"""The router's door: what of LiteLLM's hundreds of paths is there at all."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from llm_router.ledger import Settings
from llm_router.serve import PATHS, Door


def sent(folder: Path, scope: dict[str, Any]) -> tuple[bool, list[dict[str, Any]]]:
    """Whether it got to LiteLLM, and what was answered without it."""
    inside: list[Any] = []
    answered: list[Any] = []

    async def inner(scope: Any, _receive: Any, _send: Any) -> None:
        inside.append(scope)

    async def receive() -> dict[str, Any]:
        return {}

    async def send(message: Any) -> None:
        answered.append(message)

    keys = [{"name": "me", "sha256": hashlib.sha256(b"k1").hexdigest()}]
    settings = {"version": 1, "keys": keys, "models": ["coder"], "state_dir": str(folder)}
    door = Door(inner, Settings.model_validate(settings))
    asyncio.run(door({"headers": [], "path": "/", **scope}, receive, send))
    return bool(inside), answered


@pytest.mark.parametrize("path", sorted(PATHS))
def test_what_is_for_clients_gets_through(path: str, tmp_path: Path) -> None:
    assert sent(tmp_path, {"type": "http", "path": path}) == (True, [])


def test_start_and_end_get_through(tmp_path: Path) -> None:
    assert sent(tmp_path, {"type": "lifespan"}) == (True, [])


@pytest.mark.parametrize(
    "path", ["/", "/key/generate", "/ui", "/v1/messages/", "/V1/messages", "//v1/messages"]
)
def test_everything_else_is_not_there(path: str, tmp_path: Path) -> None:
    inside, (head, _) = sent(tmp_path, {"type": "http", "path": path})
    assert (inside, head["status"]) == (False, 404)


@pytest.mark.parametrize("path", [*sorted(PATHS), "/v1/realtime"])
def test_a_websocket_is_closed_at_once(path: str, tmp_path: Path) -> None:
    """LiteLLM has some, and the hooks that count, check and write down see none of what goes through them."""
    assert sent(tmp_path, {"type": "websocket", "path": path}) == (
        False,
        [{"type": "websocket.close", "code": 1008}],
    )


@pytest.mark.parametrize(
    ("headers", "status"),
    [([], 401), ([(b"x-api-key", b"k1")], 200), ([(b"authorization", b"Bearer k2")], 401)],
)
def test_the_list_of_models_is_for_known_keys(
    headers: list[tuple[bytes, bytes]], status: int, tmp_path: Path
) -> None:
    inside, (head, body) = sent(tmp_path, {"type": "http", "path": "/v1/models", "headers": headers})
    assert (inside, head["status"]) == (False, status)
    assert ("coder" in str(body["body"])) == (status == 200)


def test_health_is_for_everybody(tmp_path: Path) -> None:
    inside, (head, body) = sent(tmp_path, {"type": "http", "path": "/health"})
    assert (inside, head["status"], json.loads(body["body"])) == (False, 200, {"status": "ok"})
