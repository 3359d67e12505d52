"""Keys, budgets that halt on breach, logs that are turned over, and the door before LiteLLM."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from llm_router.health import State, Watch, look_at
from llm_router.ledger import DAY, Box, Ledger, Log, Refused, Settings
from llm_router.serve import Door, main


def settings(folder: Path, **more: Any) -> Settings:
    keys = [
        {"name": "free", "sha256": digest("k1")},
        {"name": "tight", "sha256": digest("k2"), "requests_per_minute": 2, "tokens_per_day": 100},
        {"name": "cloudy", "sha256": digest("k3"), "cloud": True, "cloud_tokens_per_day": 50},
    ]
    return Settings.model_validate({"version": 1, "keys": keys, "state_dir": str(folder), **more})


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


class Clock:
    now = 20_000 * DAY + 5.0

    def __call__(self) -> float:
        return self.now


def test_a_key_is_known_by_its_hash_only(tmp_path: Path) -> None:
    ledger = Ledger(settings(tmp_path))
    assert ledger.key("k1").name == "free"
    for shown in ("", "k9", digest("k1")):
        with pytest.raises(Refused) as refused:
            ledger.key(shown)
        assert (refused.value.status == 401 and shown not in str(refused.value)) or shown == ""
    assert digest("k1") not in repr(settings(tmp_path))


def test_budgets_halt_and_come_back(tmp_path: Path) -> None:
    clock = Clock()
    ledger = Ledger(settings(tmp_path), clock)
    tight = ledger.key("k2")
    ledger.admit(tight)
    ledger.admit(tight)
    with pytest.raises(Refused) as refused:
        ledger.admit(tight)
    assert refused.value.status == 429 and 0 < refused.value.retry_after <= 61
    clock.now += 61
    ledger.admit(tight)
    ledger.spend("tight", 100)
    again = Ledger(settings(tmp_path), clock)  # a restart forgets nothing of the day
    with pytest.raises(Refused, match="tokens_per_day = 100 is used up"):
        again.admit(tight)
    clock.now += DAY
    again.admit(tight)


def test_only_a_key_that_may_leaves_the_network_and_within_its_budget(tmp_path: Path) -> None:
    ledger = Ledger(settings(tmp_path), Clock())
    assert not ledger.may_leave(ledger.key("k1"))
    cloudy = ledger.key("k3")
    assert ledger.may_leave(cloudy)
    ledger.spend("cloudy", 500)
    assert ledger.may_leave(cloudy)
    ledger.spend("cloudy", 50, 50)
    assert not ledger.may_leave(cloudy)


def test_a_damaged_file_of_usage_is_begun_anew(tmp_path: Path) -> None:
    for content in ("", "[]", '{"tight": 1}', "{"):
        (tmp_path / "usage.json").write_text(content)
        Ledger(settings(tmp_path)).spend("free", 1)


def test_logs_are_turned_over_and_private(tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    log = Log(file, 200, 2)
    for number in range(30):
        log.write({"number": number, "text": "é" * 20})
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["requests.jsonl", "requests.jsonl.1", "requests.jsonl.2"]
    assert all(path.stat().st_mode & 0o077 == 0 and path.stat().st_size <= 300 for path in tmp_path.iterdir())
    assert json.loads(file.read_text().splitlines()[-1])["number"] == 29


def ask(door: Door, path: str, headers: dict[str, str] | None = None) -> httpx.Response:
    async def get() -> httpx.Response:
        transport = httpx.ASGITransport(door)
        async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
            return await client.get(path, headers=headers)

    return asyncio.run(get())


def test_the_door_knows_the_paths_of_clients_only(tmp_path: Path) -> None:
    passed: list[str] = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        passed.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"inner"})

    made = settings(tmp_path, models=[{"name": "coder", "context": 4096}])
    door = Door(inner, made, Watch(made.boxes, 5), print)
    for path in (
        "/ui",
        "/key/generate",
        "/model/info",
        "/config/update",
        "/v1/messages/../../key",
        "/",
        "//health",
    ):
        assert ask(door, path).status_code == 404, path
    assert passed == []
    assert ask(door, "/health").json() == {"status": "ok"}
    assert ask(door, "/v1/messages").text == "inner"
    assert ask(door, "/v1/models").status_code == 401
    listed = ask(door, "/v1/models", {"x-api-key": "k1"}).json()
    assert [model["id"] for model in listed["data"]] == ["coder"]
    assert ask(door, "/models", {"authorization": "Bearer k3"}).status_code == 200


def test_settings_that_cannot_be_read_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, config = tmp_path / "router.json", tmp_path / "config.yaml"
    arguments = ["--config", str(config), "--settings", str(file), "--check"]
    config.write_text("{}")
    for content in (
        "",
        '{"version": 2}',
        '{"version": 1, "state_dir": "/x", "keys": [{"name": "a", "sha256": "s3cr"}]}',
    ):
        file.write_text(content)
        assert main(arguments) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"llm-router: {file}: ") and "s3cr" not in line
    file.write_text('{"version": 1, "state_dir": "/x"}')
    assert main(arguments) == 0


def test_boxes_that_live_and_serve_come_first() -> None:
    watch = Watch([], 5)
    one, two, cloud = ({"model_info": {"box": name}} for name in ("one", "two", "cloud"))
    assert watch.choose([one, two], "coder") == [one, two]
    watch.states = {"one": State(preset="gemma"), "two": State(preset="coder")}
    assert watch.choose([one, two], "coder") == [two] and watch.choose([one, two], "other") == [one, two]
    watch.lost("two")
    assert watch.choose([one, two], "coder") == [one]
    watch.lost("one")
    assert watch.choose([one, two], "coder") == [one, two], "a watch that is wrong must not stop everything"
    assert watch.choose([cloud], "cloud") == [cloud]


def test_what_a_gateway_says(tmp_path: Path) -> None:
    seen: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(f"{request.url.path} {request.headers.get('authorization', '')}".strip())
        if request.url.host == "down":
            raise httpx.ConnectError("refused")
        if request.url.host == "sick" and request.url.path == "/health":
            return httpx.Response(500)
        if request.url.host == "idle" and request.url.path == "/ready":
            return httpx.Response(503, json={"reason": "nothing runs"})
        return httpx.Response(200, json={"status": "ready", "preset": "coder"})

    async def look() -> list[State]:
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
            boxes = [Box(name=name, url=f"http://{name}", key="g") for name in ("up", "down", "sick", "idle")]
            watch = Watch(boxes, 5)
            await watch.look(client)
            assert await look_at(client, boxes[0]) == watch.states["up"]
            return [watch.states[box.name] for box in boxes]

    gone = State(alive=False)
    assert asyncio.run(look()) == [State(preset="coder"), gone, gone, State()]
    assert "/health" in seen and "/ready Bearer g" in seen
