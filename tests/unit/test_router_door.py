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


def sent(folder: Path, scope: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The request as it got to LiteLLM, empty where it did not, and what was answered without it."""
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
    return inside[0] if inside else {}, answered


@pytest.mark.parametrize("path", sorted(PATHS))
def test_what_is_for_clients_gets_through(path: str, tmp_path: Path) -> None:
    inside, answered = sent(tmp_path, {"type": "http", "path": path})
    assert (inside["path"], answered) == (path, [])


def test_start_and_end_get_through(tmp_path: Path) -> None:
    inside, answered = sent(tmp_path, {"type": "lifespan"})
    assert (inside["type"], answered) == ("lifespan", [])


def test_no_header_steers_litellm(tmp_path: Path) -> None:
    """By x-litellm-call-id the hook knows a request: two of one name would be one line and one budget."""
    kept = [(b"x-api-key", b"k1"), (b"anthropic-version", b"2023-06-01")]
    steering = (b"x-litellm-call-id", b"X-LiteLLM-Timeout", b"litellm-enable-message-redaction")
    inside, _ = sent(
        tmp_path,
        {"type": "http", "path": "/v1/messages", "headers": [*kept, *((name, b"1") for name in steering)]},
    )
    assert inside["headers"] == kept


@pytest.mark.parametrize(
    "path", ["/", "/key/generate", "/ui", "/v1/messages/", "/V1/messages", "//v1/messages"]
)
def test_everything_else_is_not_there(path: str, tmp_path: Path) -> None:
    inside, (head, _) = sent(tmp_path, {"type": "http", "path": path})
    assert (inside, head["status"]) == ({}, 404)


@pytest.mark.parametrize("path", [*sorted(PATHS), "/v1/realtime"])
def test_a_websocket_is_closed_at_once(path: str, tmp_path: Path) -> None:
    """LiteLLM has some, and the hooks that count, check and write down see none of what goes through them."""
    assert sent(tmp_path, {"type": "websocket", "path": path}) == (
        {},
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
    assert (inside, head["status"]) == ({}, status)
    assert ("coder" in str(body["body"])) == (status == 200)


def test_health_is_for_everybody(tmp_path: Path) -> None:
    inside, (head, body) = sent(tmp_path, {"type": "http", "path": "/health"})
    assert (inside, head["status"], json.loads(body["body"])) == ({}, 200, {"status": "ok"})
