"""The router's door: what of LiteLLM's hundreds of paths is there at all."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from llm_router.health import State, Watch
from llm_router.ledger import Settings
from llm_router.serve import PATHS, SILENT_MS, Door, impatient

from tests.stub_boxes import stub_box


def sent(
    folder: Path, scope: dict[str, Any], boxes: Sequence[dict[str, str]] = ()
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The request as it got to LiteLLM, empty where it did not, and what was answered without it."""
    inside: list[Any] = []
    answered: list[Any] = []

    async def inner(scope: Any, _receive: Any, _send: Any) -> None:
        inside.append(scope)

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        answered.append(message)

    keys = [{"name": "me", "sha256": hashlib.sha256(b"k1").hexdigest()}]
    models = [{"name": "coder", "context": 98304}, {"name": "chat", "context": 4096}]
    settings = Settings.model_validate(
        {"version": 1, "keys": keys, "models": models, "boxes": boxes, "state_dir": str(folder)}
    )
    watch = Watch(settings.boxes, 5)
    watch.states = {
        "gone": State(alive=False, preset="chat"),
        "idle": State(),
        **dict.fromkeys(("two", "one", "more"), State(preset="coder")),
    }
    door = Door(inner, settings, watch, lambda _: None)
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
    name = inside["headers"].pop()
    assert inside["headers"] == kept
    assert name[0] == b"x-litellm-call-id" and len(name[1]) == 32, "the router's own, another one each time"


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
    [
        ([], 401),
        ([(b"x-api-key", b"k1")], 200),
        ([(b"authorization", b"Bearer k2")], 401),
        # Claude Code shows a key that it has from somewhere else beside the one that it was given for here.
        ([(b"x-api-key", b"sk-ant"), (b"authorization", b"Bearer k1")], 200),
        ([(b"x-api-key", b"k1"), (b"authorization", b"Bearer ")], 200),
        ([(b"x-api-key", b"k1"), (b"authorization", b"Bearer of-another-proxy")], 200),
        ([(b"x-api-key", b"k1"), (b"authorization", b"Basic YTpi")], 200),
        ([(b"authorization", b"bearer  k1 ")], 200),
        ([(b"authorization", b"k1")], 401),
    ],
)
@pytest.mark.parametrize(("path", "word"), [("/v1/models", "coder"), ("/props", "build_info")])
def test_what_the_router_tells_is_for_known_keys(
    path: str, word: str, headers: list[tuple[bytes, bytes]], status: int, tmp_path: Path
) -> None:
    inside, (head, body) = sent(tmp_path, {"type": "http", "path": path, "headers": headers})
    assert (inside, head["status"]) == ({}, status)
    assert (word in str(body["body"])) == (status == 200)


def told(folder: Path, path: str, boxes: Sequence[dict[str, str]] = ()) -> Any:
    scope = {"type": "http", "path": path, "headers": [(b"x-api-key", b"k1")]}
    return json.loads(sent(folder, scope, boxes)[1][1]["body"])


def test_models_come_with_their_context_and_whether_a_box_serves_them(tmp_path: Path) -> None:
    """What local-claude needs to know of a model before it starts a session on it."""
    found = [(one["id"], one["context"], one["state"]) for one in told(tmp_path, "/v1/models")["data"]]
    assert found == [("coder", 98304, "active"), ("chat", 4096, "stopped")]


def test_the_builds_of_the_boxes_are_asked_of_their_gateways(tmp_path: Path) -> None:
    """local-claude keeps the results of its checks by them, and does not wait for a box that is asleep."""
    played = {"two": "two", "one": "one", "more": "two", "gone": "gone", "idle": "idle", "unknown": "unknown"}
    with ExitStack() as stack:
        boxes = [
            {"name": name, "url": stack.enter_context(stub_box(build)).url} for name, build in played.items()
        ]
        assert told(tmp_path, "/props", boxes) == {"build_info": "b1-one, b1-two"}


@pytest.mark.parametrize("leaves", ["while it waits", "in the middle", "when it has all", "never"])
def test_nobody_works_for_a_client_that_is_gone(leaves: str, tmp_path: Path) -> None:
    """A box would read a prompt of 30,000 tokens for nobody, and the next turn go to another one."""
    told: list[str] = []
    ended: list[str] = []
    named: list[bytes] = []
    gone = asyncio.Event()
    messages: list[dict[str, Any]] = [
        {"type": "http.request", "body": b"{", "more_body": True},
        {"type": "http.request", "body": b"}"},
    ]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop(0)
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        if leaves == "in the middle":
            gone.set()

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        named.append(dict(scope["headers"])[b"x-litellm-call-id"])
        body = b""
        while (message := await receive()).get("more_body"):
            body += message["body"]
        assert body + message["body"] == b"{}"
        try:
            if leaves == "while it waits":
                gone.set()
                await asyncio.sleep(60)
            await send({"type": "http.response.start", "status": 200})
            if leaves == "in the middle":
                await asyncio.sleep(60)
            await send({"type": "http.response.body", "body": b"x"})
            if leaves == "when it has all":
                gone.set()
            await asyncio.sleep(0.05)  # what LiteLLM does after an answer
            ended.append("whole")
        except asyncio.CancelledError:
            ended.append("broken off")
            raise

    settings = Settings.model_validate({"version": 1, "state_dir": str(tmp_path)})
    door = Door(inner, settings, Watch([], 5), told.append)
    scope = {"type": "http", "path": "/v1/messages", "headers": []}
    asyncio.run(asyncio.wait_for(door(scope, receive, send), 10))
    left = leaves in ("while it waits", "in the middle")
    assert ended == ["broken off" if left else "whole"]
    assert told == ([named[0].decode()] if left else [])


def test_an_error_of_litellm_s_is_still_one(tmp_path: Path) -> None:
    async def inner(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("no")

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(60)
        return {}

    async def send(_: Any) -> None: ...

    settings = Settings.model_validate({"version": 1, "state_dir": str(tmp_path)})
    door = Door(inner, settings, Watch([], 5), print)
    with pytest.raises(RuntimeError, match="no"):
        asyncio.run(door({"type": "http", "path": "/v1/messages", "headers": []}, receive, send))


def test_health_is_for_everybody(tmp_path: Path) -> None:
    inside, (head, body) = sent(tmp_path, {"type": "http", "path": "/health"})
    assert (inside, head["status"], json.loads(body["body"])) == ({}, 200, {"status": "ok"})


def test_a_box_that_acknowledges_nothing_is_given_up() -> None:
    make = impatient(lambda: lambda address: socket.socket(*address[:2]))()
    with make((socket.AF_INET, socket.SOCK_STREAM)) as made:
        assert made.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == SILENT_MS == 25_000
