"""The gateway's own paths, and what it refuses, over real sockets."""

from __future__ import annotations

import hashlib
import http.client
import json
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from llmbox.errors import UsageError
from llmbox.gateway import app
from llmbox.gateway.prompt_cache import masked
from llmbox.gateway.refusals import Refusal
from llmbox.gateway.requests import ROUTES, read_body
from llmbox.presets import PresetsFile

from tests.unit.gateway_process import Forge, Gateway, preset, running
from tests.unit.stub_llama_server import StubLlamaServer

CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
KEY = "Bearer secret"
KEYS = [{"name": "ann", "sha256": hashlib.sha256(b"secret").hexdigest(), "presets": ["gemma"]}]


@pytest.fixture(scope="module")
def forge() -> Iterator[Forge]:
    forge = Forge()
    yield forge
    forge.close()


@pytest.fixture(scope="module")
def shared(
    tmp_path_factory: pytest.TempPathFactory, forge: Forge
) -> Iterator[tuple[Gateway, StubLlamaServer]]:
    """One gateway for the tests that leave it as it is."""
    folder = tmp_path_factory.mktemp("gateway")
    stub = StubLlamaServer(folder / "server.sock")
    with running(forge, folder) as gateway:
        yield gateway, stub
    stub.close()


@pytest.fixture
def gateway(shared: tuple[Gateway, StubLlamaServer]) -> Gateway:
    return shared[0]


@pytest.fixture
def stub(shared: tuple[Gateway, StubLlamaServer]) -> StubLlamaServer:
    return shared[1]


def ask(
    gateway: Gateway, path: str, body: bytes | dict[str, Any] | None = None, method: str = "", **headers: str
) -> tuple[int, dict[str, str], Any]:
    """Status, headers and parsed body of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=15)
    content = json.dumps(body).encode() if isinstance(body, dict) else body
    connection.request(method or ("GET" if body is None else "POST"), path, content, headers)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    told = {name.lower(): value for name, value in answer.getheaders()}
    is_json = told.get("content-type", "").startswith("application/json")
    return answer.status, told, json.loads(text) if is_json and text else text


# --- the gateway's own paths ---


@pytest.mark.parametrize("path", ["/health", "/v1/health"])
def test_it_says_that_it_lives(gateway: Gateway, path: str) -> None:
    assert ask(gateway, path)[::2] == (200, {"status": "ok"})
    status, headers, body = ask(gateway, path, method="HEAD")
    assert (status, body) == (200, b"") and "server" not in headers


def test_it_says_which_preset_answers(gateway: Gateway) -> None:
    assert ask(gateway, "/ready")[::2] == (200, {"status": "ready", "preset": "gemma"})


def test_it_says_why_none_answers(forge: Forge, tmp_path: Path) -> None:
    with running(forge, tmp_path, {"preset": None}) as gateway:
        status, headers, body = ask(gateway, "/ready")
        assert status == 503 and headers["retry-after"]
        said = {"starting": "not looked at the box yet", "stopped": "start one with: lmswitch PRESET"}
        assert said[body["phase"]] in body["reason"]
        assert ask(gateway, "/health")[0] == 200


@pytest.mark.parametrize("path", ["/models", "/v1/models"])
def test_the_models_are_the_presets(gateway: Gateway, stub: StubLlamaServer, path: str) -> None:
    asked = len(stub.heads)
    status, _, body = ask(gateway, path)
    assert status == 200 and body["object"] == "list"
    gemma, smol = body["data"]
    expected = {"id": "gemma", "object": "model", "owned_by": "llmbox", "aliases": ["g"], "context": 4096}
    assert gemma.items() >= {**expected, "state": "active", "description": "a model"}.items()
    assert smol.items() >= {"id": "smol", "context": 2048, "state": "stopped"}.items()
    assert len(stub.heads) == asked  # llama-server is not asked


def test_a_preset_that_does_not_start_is_a_failed_model(forge: Forge, tmp_path: Path) -> None:
    with running(forge, tmp_path, {"failing": {"smol": "no such file"}}) as gateway:
        status, _, body = ask(gateway, CHAT, {"model": "s"})
        assert status == 503 and "no such file" in body["error"]["message"]
        states = {model["id"]: model["state"] for model in ask(gateway, "/v1/models")[2]["data"]}
        assert states == {"gemma": "active", "smol": "failed"}


def test_a_preset_that_loads_is_a_loading_model(forge: Forge, tmp_path: Path) -> None:
    with running(forge, tmp_path, {"load_s": 60.0}) as gateway, socket.socket() as sock:
        sock.settimeout(15)
        sock.connect(("127.0.0.1", gateway.port))
        body = b'{"model": "smol", "stream": true}'
        sock.sendall(f"POST {CHAT} HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        said = b""
        while b"queue position 1" not in said:
            said += sock.recv(1000)
        models = ask(gateway, "/v1/models")[2]["data"]
        assert {model["id"]: model["state"] for model in models}["smol"] == "loading"
        assert ask(gateway, "/ready")[2]["phase"] == "loading"


def test_the_figures_are_prometheus_s(gateway: Gateway) -> None:
    ask(gateway, CHAT, {})
    status, headers, body = ask(gateway, "/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain; version=0.0.4")
    assert b"llmbox_requests_total{" in body


def test_the_control_socket_answers(gateway: Gateway) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(15)
        sock.connect(str(gateway.folder / "control.sock"))
        sock.sendall(b'{"do": "status"}\n')
        assert json.loads(sock.makefile().readline())["phase"] == "ready"


def test_reading_what_there_is_does_not_count_as_use(forge: Forge, tmp_path: Path) -> None:
    stub = StubLlamaServer(tmp_path / "server.sock")
    with running(forge, tmp_path, idle_unload=0.5) as gateway:
        worked_until = time.monotonic() + 1
        while time.monotonic() < worked_until:
            assert ask(gateway, "/tokenize", {})[0] == 200
        assert "unloading it" not in gateway.log.read_text()
        deadline = time.monotonic() + 10
        while "unloading it" not in gateway.log.read_text() and time.monotonic() < deadline:
            for path in ("/props", "/v1/models", "/health", "/metrics", "/ready"):
                ask(gateway, path)
        assert "unloading it" in gateway.log.read_text()
        status, _, body = ask(gateway, "/props")
        assert status == 503 and "no preset is active" in body["error"]["message"]
        assert ask(gateway, "/ready")[0] == 503
        assert ask(gateway, CHAT, {})[0] == 200
    stub.close()


# --- what is not there ---


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v1",
        "/slots",
        "/v1/chat/completions/",
        "//v1/chat/completions",
        "/v1//chat/completions",
        "/v1/%63hat/completions",
        "/v1/chat%2Fcompletions",
        "/x/../v1/chat/completions",
        "/V1/chat/completions",
        "/%68ealth",
        "/health/",
        "/models/gemma",
    ],
)
def test_an_unknown_path_is_told_the_known_ones(gateway: Gateway, stub: StubLlamaServer, path: str) -> None:
    asked = len(stub.heads)
    for method in ("GET", "POST"):
        status, _, body = ask(gateway, path, b"" if method == "POST" else None, method)
        assert status == 404 and CHAT in body["error"]["message"] and "/health" in body["error"]["message"]
    assert len(stub.heads) == asked


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", CHAT, "POST"),
        ("OPTIONS", MESSAGES, "POST"),
        ("POST", "/health", "GET, HEAD"),
        ("DELETE", "/v1/models", "GET, HEAD"),
        ("HEAD", "/props", "GET"),
    ],
)
def test_the_wrong_method_is_told_the_right_one(gateway: Gateway, method: str, path: str, allow: str) -> None:
    status, headers, _ = ask(gateway, path, method=method)
    assert status == 405 and headers["allow"] == allow


def test_errors_are_in_the_protocol_of_the_path(gateway: Gateway) -> None:
    assert ask(gateway, CHAT)[2]["error"]["type"] == "invalid_request_error"
    anthropic = ask(gateway, MESSAGES)[2]
    assert anthropic["type"] == "error" and anthropic["error"]["type"] == "invalid_request_error"
    assert ask(gateway, "/v1/messages/batches")[2]["error"]["type"] == "not_found_error"


# --- what is passed on ---


@pytest.mark.parametrize("method_and_path", sorted(ROUTES), ids=" ".join)
def test_every_route_reaches_llama_server(
    gateway: Gateway, stub: StubLlamaServer, method_and_path: tuple[str, str]
) -> None:
    method, path = method_and_path
    body = b'{ "messages": "w\xc3\xb6rd", "a": 1,"a":2}' if method == "POST" else None
    status, headers, answer = ask(gateway, f"{path}?x=%2F", body, authorization="Bearer x", origin="app://x")
    assert status == 200 and answer["path"] == f"{path}?x=%2F"
    assert stub.bodies[-1] == (body or b"")
    assert "authorization" not in stub.heads[-1].lower() and "origin" not in stub.heads[-1].lower()
    assert headers["x-llmbox-preset"] == "gemma" and headers["x-queue-wait-ms"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"model": ', "not JSON"),
        (b'{"model": "\xff"}', "not UTF-8"),
        (b"[]", "must be a JSON object"),
        (b'{"model": ["gemma"]}', "'model' must be a string, not a list"),
        (b'{"model": "' + b"x" * 10_000 + b'"}', "10000 characters"),
        (b'{"model": "gemma", "model": "smol"}', "'model' twice"),
        (b'{"stream": true, "stream": false}', "'stream' twice"),
        (b'{"stream": "yes"}', "true or false"),
        (b"[" * 100_000, "nested"),
        (b"", "not JSON"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, MESSAGES])
def test_a_body_that_says_no_clear_thing_is_refused(
    gateway: Gateway, stub: StubLlamaServer, path: str, body: bytes, said: str
) -> None:
    asked = len(stub.bodies)
    status, _, answer = ask(gateway, path, body)
    assert status == 400 and said in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error" and len(stub.bodies) == asked


def test_numbers_are_not_read_in_one_go_in_which_nobody_else_is_served() -> None:
    """Python's own reader of numbers keeps the interpreter for seconds, and refuses those of 5000 digits."""
    assert read_body(b'{"model": "a", "n": [' + b"9" * 5000 + b", 1.5, NaN]}").model == "a"


def test_a_body_of_a_million_values_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(Refusal, match="commas and brackets; the limit is 1000000") as refused:
        read_body(b'{"n": [' + b"{}," * 600_000 + b"{}]}")
    assert refused.value.status == 413


def test_a_model_of_null_is_whatever_runs(gateway: Gateway) -> None:
    assert ask(gateway, CHAT, b'{"model": null}')[0] == 200


def test_claude_code_s_prompts_are_masked_for_a_build_that_does_not_and_nobody_else_s(
    gateway: Gateway, stub: StubLlamaServer
) -> None:
    text = "x-anthropic-billing-header: cc_version=2; cch=a5145;You are Claude Code"
    body = json.dumps({"system": [{"type": "text", "text": text}], "messages": []}).encode()
    assert ask(gateway, MESSAGES, body)[0] == 200
    assert stub.bodies[-1] == masked(body) != body
    assert ask(gateway, CHAT, body)[0] == 200
    assert stub.bodies[-1] == body


def test_a_name_an_alias_or_a_pattern_starts_its_preset(forge: Forge, tmp_path: Path) -> None:
    stub = StubLlamaServer(tmp_path / "server.sock")
    with running(forge, tmp_path) as gateway:
        named = {"smol": "smol", "g": "gemma", "s": "smol", "claude-x": "gemma", "unknown": "gemma"}
        for model, name in named.items():
            status, headers, _ = ask(gateway, CHAT, {"model": model})
            assert (status, headers["x-llmbox-preset"]) == (200, name)
    stub.close()


# --- who may ask ---


def test_without_keys_this_is_said_loudly(gateway: Gateway) -> None:
    assert "WARNING: NO KEYS" in gateway.log.read_text()


def test_with_keys_everything_but_health_needs_one(forge: Forge, tmp_path: Path) -> None:
    stub = StubLlamaServer(tmp_path / "server.sock")
    with running(forge, tmp_path, keys=KEYS) as gateway:
        assert ask(gateway, "/health")[0] == 200
        for path in ("/ready", "/v1/models", "/metrics", "/props", "/nowhere"):
            assert ask(gateway, path)[0] == 401, path
        status, _, body = ask(gateway, MESSAGES, {})
        assert status == 401 and body["error"]["type"] == "authentication_error"
        for path in ("/ready", "/v1/models", "/metrics", "/props"):
            assert ask(gateway, path, authorization=KEY)[0] == 200, path
        assert ask(gateway, CHAT, {"model": "smol"}, authorization=KEY)[0] == 403
        assert ask(gateway, CHAT, {"model": "gemma"}, **{"x-api-key": "secret"})[0] == 200
        gateway.signal(signal.SIGTERM)
        assert gateway.wait() == 0
        audited = (tmp_path / "audit.jsonl").read_text()
        assert "secret" not in gateway.log.read_text() + audited
        entries = [json.loads(line) for line in audited.splitlines()]
        refused = {entry["path"] for entry in entries if entry["status"] == 401}
        assert refused >= {"/ready", "/v1/models", "/metrics", "/props", "(unknown)"}, "a guess must be seen"
    stub.close()


def test_what_was_used_just_before_a_restart_counts_after_it(forge: Forge, tmp_path: Path) -> None:
    stub = StubLlamaServer(tmp_path / "server.sock")
    keys = [{**KEYS[0], "requests_per_day": 1}]
    with running(forge, tmp_path, keys=keys) as gateway:
        assert ask(gateway, CHAT, {}, authorization=KEY)[0] == 200
        gateway.signal(signal.SIGTERM)  # sooner than what was used is written in any case
        assert gateway.wait() == 0
        gateway.start()
        assert ask(gateway, CHAT, {}, authorization=KEY)[0] == 429
    stub.close()


def test_a_gateway_whose_board_fails_ends_so_that_systemd_starts_it_again(
    forge: Forge, tmp_path: Path
) -> None:
    with running(forge, tmp_path, {"failing": None}, hold_timeout=60.0) as gateway:  # its switch is a bug
        with socket.create_connection(("127.0.0.1", gateway.port)) as sock:
            body = b'{"model": "smol"}'
            sock.sendall(f"POST {CHAT} HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
            assert gateway.wait() == 1
        assert "CRITICAL: the board has failed" in gateway.log.read_text()


# --- the configuration ---


def test_presets_must_share_one_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    def file(*listens: str) -> PresetsFile:
        presets = {
            f"p{number}": preset(Path(listen), unit=f"llama-p{number}.service")
            for number, listen in enumerate(listens)
        }
        return PresetsFile.model_validate({"version": 1, "user": "llm", "presets": presets})

    assert app.upstream_path(file("/run/a.sock", "/run/a.sock")) == "/run/a.sock"
    for wrong in (["/run/a.sock", "/run/b.sock"], ["0.0.0.0:1234"], []):
        with pytest.raises(UsageError, match="llama_presets_listen"):
            app.upstream_path(file(*wrong))


def test_help_needs_no_socket(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        app.main(["--help"])
    assert ended.value.code == 0 and "LLMBOX_GATEWAY" in capsys.readouterr().out


def test_a_wrong_setting_is_one_line(forge: Forge, tmp_path: Path) -> None:
    gateway = Gateway(forge, tmp_path, {}, max_body=-1)
    try:
        gateway.launch()
        assert gateway.wait() == 2
        said = gateway.log.read_text()
        assert "max_body = -1: " in said and "llm_server.yml" in said and said.count("\n") == 1
    finally:
        gateway.close()


@pytest.fixture
def answering(tmp_path: Path) -> Iterator[StubLlamaServer]:
    """A llama-server for a gateway of a test's own."""
    stub = StubLlamaServer(tmp_path / "server.sock")
    yield stub
    stub.close()


def test_a_card_out_of_service_is_not_ready(forge: Forge, tmp_path: Path, answering: StubLlamaServer) -> None:
    def control(gateway: Gateway, **said: str) -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(15)
            sock.connect(str(gateway.folder / "control.sock"))
            sock.sendall(json.dumps(said).encode() + b"\n")
            assert json.loads(sock.makefile().readline())

    with running(forge, tmp_path) as gateway:
        control(gateway, do="block", reason="the card is hot")
        status, _, body = ask(gateway, "/ready")
        assert (status, body["reason"]) == (503, "the card is hot")
        control(gateway, do="unblock")
        assert ask(gateway, "/ready")[0] == 200


def test_a_key_in_a_path_is_in_no_log(forge: Forge, tmp_path: Path, answering: StubLlamaServer) -> None:
    with running(forge, tmp_path) as gateway:
        assert ask(gateway, "/llmbox-secret/v1/models")[0] == 404
        assert ask(gateway, "/llmbox-secret", b"{}")[0] == 404
        assert "secret" not in (tmp_path / "audit.jsonl").read_text() + gateway.log.read_text()


def test_health_needs_no_key(forge: Forge, tmp_path: Path, answering: StubLlamaServer) -> None:
    with running(forge, tmp_path, keys=KEYS) as gateway:
        assert [ask(gateway, path)[0] for path in ("/health", "/v1/health", "/ready")] == [200, 200, 401]


def test_new_keys_are_in_force_and_what_was_used_is_written_without_a_restart(
    forge: Forge, tmp_path: Path, answering: StubLlamaServer
) -> None:
    def until(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 15
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    with running(forge, tmp_path, keys=[{**KEYS[0], "requests_per_day": 5}]) as gateway:
        assert ask(gateway, CHAT, {}, authorization=KEY)[0] == 200
        until((tmp_path / "usage.json").exists)
        new = tmp_path / "new"
        new.write_text(json.dumps({"version": 1, "keys": [{**KEYS[0], "sha256": "0" * 64}]}))
        new.replace(tmp_path / "keys.json")
        until(lambda: ask(gateway, CHAT, {}, authorization=KEY)[0] == 401)
