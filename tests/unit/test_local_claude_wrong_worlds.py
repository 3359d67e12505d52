"""local-claude in worlds that are broken: one line with cause and fix, a documented code, no traceback."""

from __future__ import annotations

import datetime
import json
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from local_claude import cli, environment, errors, options, wire
from local_claude.backends import BACKENDS

from tests.support import ROOT
from tests.unit import scripted_llm
from tests.unit.scripted_llm import Answer, ScriptedLlm
from tests.unit.test_local_claude import started
from tests.unit.test_local_claude import world as world  # the fixture
from tests.unit.test_local_claude_servers import KINDS

TIMEOUT_S = 0.3
Raw = Callable[[socket.socket], None]
Good = scripted_llm.gateway
MESSAGES = "/v1/messages"


def only(*entries: dict[str, Any]) -> dict[str, Answer]:
    """A server that has nothing but a list of models."""
    return {"/v1/models": scripted_llm.models(*entries)}


def cacheless() -> dict[str, Answer]:
    """A second turn never finds the first."""
    return Good() | {MESSAGES: scripted_llm.called(cached=0)}


def answering(answer: Answer) -> dict[str, Answer]:
    """A gateway whose model answers like this."""
    return Good() | {MESSAGES: answer}


# Each world: what the server answers, further words, the exit code, a part of the cause, a part of the fix.
WORLDS: dict[str, tuple[dict[str, Answer], tuple[str, ...], int, str, str]] = {
    "HTTP but no LLM": ({"/v1/models": (200, b"<html>hello</html>")}, (), 72, "is no LLM server", "--port"),
    "another shape": ({"/v1/models": (200, {"models": 5})}, (), 72, "is no LLM server", "--port"),
    "nothing but 404": ({}, (), 72, "404", "--port"),
    "a list of numbers": ({"/v1/models": (200, {"data": [1, None, "x"]})}, (), 74, "has no model", "load"),
    "nested without end": ({"/v1/models": (200, b"[" * 100_000)}, (), 72, "is no LLM server", "--port"),
    "500": ({"/v1/models": (500, {"error": "out of memory"})}, (), 72, "out of memory", "log"),
    "sends elsewhere": (
        {"/v1/models": (302, b"", {"Location": "https://login.example/"})},
        (),
        72,
        "https://login.example/",
        "--host",
    ),
    "wants a key": ({"/v1/models": (401, {"error": {"message": "no key"}})}, (), 73, "no key", "LLMBOX_KEY"),
    "a key for others": (
        answering((403, {"error": {"message": "not for laptop"}})),
        (),
        73,
        "not for laptop",
        "another model",
    ),
    "context 8K": (Good(context=8192), (), 75, "8192 tokens", "--chat-only"),
    "context 32767": (Good(context=32767), (), 75, "32767 tokens", "agent: true"),
    "prose for a call": (answering(scripted_llm.says("I would edit it")), (), 76, "I would edit it", "jinja"),
    "leaked template": (answering(scripted_llm.says("<unused24>{}")), (), 76, "leaks", "template"),
    "empty answer": (answering((200, {"content": []})), (), 76, "an empty answer", "jinja"),
    "damaged call": (answering(scripted_llm.called(name="\u202eoops\n")), (), 76, "damaged", "jinja"),
    "blocks that are none": (answering((200, {"content": ["Hi"]})), (), 72, "no message", "--backend"),
    "no message at all": (answering((200, {"choices": []})), (), 72, "no message", "--backend"),
    "422": (
        answering((422, {"detail": "thinking: Extra inputs are not permitted"})),
        (),
        72,
        "Extra inputs",
        "update",
    ),
    "does not load": (answering((503, {"error": {"message": "exit 1"}})), (), 76, "exit 1", "jinja"),
    "no prompt cache": (cacheless(), (), 77, "found nothing of the first", "--skip-checks"),
    "model missing": (Good(), ("--model", "qwen"), 74, 'has no model "qwen"', '"coder", "gemma4"'),
    "model with quotes": (Good(), ("--model", "a'\"`$(id)"), 74, r"a'\"`$(id)", "coder"),
    "model of two lines": (Good(), ("--model", "a\nrm -rf"), 2, r"a\nrm -rf", "doctor"),
    "two models": (only({"id": "a"}, {"id": "b"}), (), 74, "has several models", '"a", "b"'),
    "another kind": (Good(), ("--backend", "ollama"), 72, "an llmbox gateway", "--backend remote"),
    "OpenAI's API only": (only({"id": "a"}), (), 78, "LiteLLM", "pipx install"),
    "settings that are none": (Good(), ("--", "--settings", "{"), 2, "no JSON", "JSON"),
    "settings that are a list": (Good(), ("--", "--settings=/dev/null"), 2, "no JSON", "JSON"),
}


@pytest.fixture(autouse=True)
def own_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's own managed settings do not count."""
    monkeypatch.setattr(environment, "MANAGED", ())


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """The exit code and the last line, which names a fix."""
    code = cli.main(list(words))
    seen = capsys.readouterr()
    assert seen.out == "" and "Traceback" not in seen.err
    line = seen.err.splitlines()[-1]
    assert re.fullmatch(r"local-claude: .+; fix: .+", line) and line.isprintable(), line
    return code, line


@pytest.mark.parametrize("name", WORLDS)
def test_a_broken_world(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    answers, words, code, cause, fix = WORLDS[name]
    with ScriptedLlm(answers) as server:
        found, line = refused(capsys, "--port", str(server.port), *words)
    problem, _, remedy = line.partition("; fix: ")
    assert (found, cause in problem, fix in remedy) == (code, True, True), line
    assert code in errors.CODES


# --- servers that are not even HTTP ---


@pytest.fixture
def raw() -> Iterator[Callable[[Raw], int]]:
    """`raw(talk) -> port`: each connection is handed to `talk`."""
    opened: list[socket.socket] = []

    def serve(talk: Raw) -> int:
        listening = socket.create_server(("127.0.0.1", 0))
        opened.append(listening)

        def accept() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                opened.append(connection)
                threading.Thread(target=talk, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        port: int = listening.getsockname()[1]
        return port

    yield serve
    for one in opened:
        one.close()


def drip(connection: socket.socket) -> None:
    """A head, then a byte now and then for ever."""
    with connection:
        try:
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            while True:
                connection.sendall(b" ")
                threading.Event().wait(TIMEOUT_S / 4)
        except OSError:
            pass


def drip_head(connection: socket.socket) -> None:
    """A head that comes a byte at a time and has no end."""
    with connection:
        try:
            connection.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
            for _ in range(400):
                connection.sendall(b"x")
                threading.Event().wait(TIMEOUT_S / 30)
        except OSError:
            pass


def flood(connection: socket.socket) -> None:
    """More than anybody wants to read."""
    with connection:
        try:
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n")
            for _ in range(100):
                connection.sendall(b" " * 1_000_000)
        except OSError:
            pass


@pytest.mark.parametrize(
    ("talk", "cause"),
    [
        (lambda connection: None, "no answer within"),
        (drip, "no answer within"),
        (drip_head, "no answer within"),
        (flood, "larger than 8 MiB"),
        (lambda connection: connection.close(), "closes the connection"),
        (lambda connection: connection.sendall(b"SSH-2.0-OpenSSH\r\n\r\n") or connection.close(), "no HTTP"),
    ],
    ids=["hangs", "drips", "drips its head", "floods", "hangs up", "no HTTP"],
)
def test_a_port_with_something_else_behind_it(
    talk: Raw,
    cause: str,
    raw: Callable[[Raw], int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if cause == "no answer within":
        monkeypatch.setattr(wire, "LOOK_TIMEOUT_S", TIMEOUT_S)
        monkeypatch.setattr(wire.Server.get, "__defaults__", (TIMEOUT_S,))
    code, line = refused(capsys, "--port", str(raw(talk)))
    assert code == 71 and cause in line, line


def test_a_closed_port(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    code, line = refused(capsys, "--port", str(port))
    assert code == 71 and "nothing listens there" in line and "lmswitch" in line
    assert "lms server start" in refused(capsys, "--backend", "lmstudio", "--port", str(port))[1]


def test_an_unknown_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    code, line = refused(capsys, "--host", "ancalagonn")
    assert code == 71 and "the name is not known" in line and "--host" in line


def test_https_where_http_is_spoken(capsys: pytest.CaptureFixture[str]) -> None:
    with ScriptedLlm(Good()) as server:
        code, line = refused(capsys, "--host", f"https://127.0.0.1:{server.port}")
    assert code == 71 and "TLS" in line and "http://" in line


def test_a_certificate_that_nobody_signed(
    raw: Callable[[Raw], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(self_signed(tmp_path))

    def talk(connection: socket.socket) -> None:
        try:
            context.wrap_socket(connection, server_side=True)
        except OSError:
            connection.close()

    code, line = refused(capsys, "--host", f"https://127.0.0.1:{raw(talk)}")
    assert code == 71 and "TLS" in line and "SSL_CERT_FILE" in line


def self_signed(folder: Path) -> Path:
    """A key and a certificate that it signed itself, in one file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    file = folder / "self-signed.pem"
    file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    return file


# --- this machine ---


def test_a_key_that_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LLMBOX_KEY", "wrong-key")
    with ScriptedLlm({"/v1/models": (401, {"error": {"message": "unknown key"}})}) as server:
        code, line = refused(capsys, "--port", str(server.port))
    assert code == 73 and "refuses the key in LLMBOX_KEY" in line and "wrong-key" not in line


def test_claude_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], world: Path
) -> None:
    (world / "bin/claude").unlink()
    monkeypatch.setattr("local_claude.launch.PLACES", ())
    code, line = refused(capsys, "-p", "hi")
    assert code == 127 and "npm install -g @anthropic-ai/claude-code" in line


@pytest.mark.parametrize("where", ["on PATH", "in its usual place"])
def test_a_claude_that_is_local_claude_itself(
    where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], world: Path
) -> None:
    """It would become itself for ever. A link, of a link as pipx makes it; claude behind it is found."""
    real = world / "venv/local-claude"
    real.parent.mkdir()
    real.write_text("#!/bin/sh\n")
    real.chmod(0o755)
    (world / "links").mkdir()
    (world / "links/local-claude").symlink_to(real)
    link = world / "links/claude"
    link.symlink_to("local-claude")
    if where == "on PATH":
        monkeypatch.setenv("PATH", f"{link.parent}:{os.environ['PATH']}")
    places = (str(link),) if where == "in its usual place" else ()
    monkeypatch.setattr("local_claude.launch.PLACES", places)
    monkeypatch.setattr(sys, "argv", [str(link)])
    with ScriptedLlm(Good()) as server:
        became = started("--port", str(server.port), "-p", "hi")
        assert became.command[0] == str(world / "bin/claude")
        (world / "bin/claude").unlink()
        code, line = refused(capsys, "--port", str(server.port), "-p", "hi")
    assert code == 127 and f"{link} is local-claude itself" in line and "npm install" in line
    assert refused(capsys, "--", "-v")[0] == 127


@pytest.mark.parametrize("behind", [True, False])
def test_a_script_called_claude_that_starts_local_claude(behind: bool, world: Path) -> None:
    """The usual way to have defaults; it must not go round for ever."""
    (world / "real").mkdir()
    (world / "bin/claude").rename(world / "real/claude")
    (world / "real/claude").write_text("#!/bin/sh\nexit 7\n")
    with ScriptedLlm(Good()) as server:
        script = f'#!/bin/sh\nexec {sys.executable} -m local_claude.cli --port {server.port} "$@"\n'
        (world / "bin/claude").write_text(script)
        (world / "bin/claude").chmod(0o755)
        after = ":$HOME/real" if behind else ""
        done = typed(world, f"PATH=$PATH{after};", server.port, "-p x")
    if behind:
        assert done.returncode == 7, done.stderr
    else:
        assert done.returncode == 127 and "npm install" in done.stderr.splitlines()[-1], done.stderr


@pytest.mark.parametrize("way", ["itself", "a link", "inside"])
def test_the_user_s_own_folder_is_refused(
    way: str, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = world / ".claude"
    own.mkdir()
    (world / "link").symlink_to(own)
    monkeypatch.setenv(
        "LOCAL_CLAUDE_DIR", str({"itself": own, "a link": world / "link", "inside": own / "x"}[way])
    )
    code, line = refused(capsys, "-p", "hi")
    assert code == 79 and "your own folder of settings" in line and not any(own.iterdir())


@pytest.mark.parametrize("way", ["at home", "a link", "elsewhere", "nothing of theirs"])
def test_a_project_whose_settings_are_the_user_s_own_is_refused(
    way: str, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Typed at home: Claude Code would run the person's own hooks, and write down there what they allow."""
    if way != "nothing of theirs":
        (world / ".claude").mkdir(exist_ok=True)
    if way == "a link":
        (world / "project/.claude").symlink_to(world / ".claude")
    monkeypatch.chdir(world if way in ("at home", "nothing of theirs") else world / "project")
    with ScriptedLlm(Good()) as server:
        if way in ("elsewhere", "nothing of theirs"):
            started("--port", str(server.port), "-p", "hi")
            return
        code, line = refused(capsys, "--port", str(server.port), "-p", "hi")
    assert code == 79 and "is your own folder of settings; fix: cd to a project" in line


def test_a_file_where_the_folder_should_be(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (world / "claude-local").write_text("")
    code, line = refused(capsys, "-p", "hi")
    assert code == 79 and "LOCAL_CLAUDE_DIR" in line


def test_settings_of_a_project_are_overridden_and_told(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (world / "project/.claude").mkdir()
    settings = {"env": {"ANTHROPIC_BASE_URL": "https://elsewhere", "MINE": "1"}}
    (world / "project/.claude/settings.json").write_text(json.dumps(settings))
    with ScriptedLlm(Good()) as server:
        became = started("--port", str(server.port), "-p", "hi")
    told = capsys.readouterr().err
    assert "settings.json sets ANTHROPIC_BASE_URL: overridden" in told
    written = json.loads(Path(became.command[2]).read_text())
    assert written["env"]["ANTHROPIC_BASE_URL"] == f"http://127.0.0.1:{server.port}"


def test_settings_that_would_send_another_key(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMBOX_KEY", "mine")
    (world / "claude-local").mkdir()
    settings = {"env": {"ANTHROPIC_AUTH_TOKEN": "theirs"}}
    (world / "claude-local/settings.json").write_text(json.dumps(settings))
    with ScriptedLlm(Good()) as server:
        code, line = refused(capsys, "--port", str(server.port))
    assert code == 79 and "ANTHROPIC_AUTH_TOKEN" in line and "theirs" not in line


def test_managed_settings_that_nothing_overrides(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    managed = world / "managed.json"
    managed.write_text(json.dumps({"env": {"ANTHROPIC_BASE_URL": "https://company"}}))
    monkeypatch.setattr(environment, "MANAGED", (str(managed),))
    with ScriptedLlm(Good()) as server:
        code, line = refused(capsys, "--port", str(server.port))
    assert code == 79 and str(managed) in line


def test_managed_settings_in_the_folder_beside_that_file(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    managed = world / "managed-settings.d/50-company.json"
    managed.parent.mkdir()
    managed.write_text(json.dumps({"env": {"ANTHROPIC_MODEL": "theirs"}}))
    monkeypatch.setattr(environment, "MANAGED", (str(world / "managed-settings.json"),))
    with ScriptedLlm(Good()) as server:
        code, line = refused(capsys, "--port", str(server.port))
    assert code == 79 and f"{managed} sets ANTHROPIC_MODEL, which nothing overrides" in line


HELPER = json.dumps({"apiKeyHelper": "echo sk-theirs"})


@pytest.mark.parametrize(
    "place",
    ["project/.claude/settings.json", "project/.claude/settings.local.json", "claude-local/settings.json"],
)
@pytest.mark.parametrize("chat", [(), ("--chat-only",)], ids=["agent", "chat"])
def test_a_helper_for_another_key_is_overridden_and_told(
    chat: tuple[str, ...], place: str, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it prints would go to the server beside the key that is meant."""
    file = world / place
    file.parent.mkdir(exist_ok=True)
    file.write_text(HELPER)
    with ScriptedLlm(Good()) as server:
        became = started("--port", str(server.port), *chat, "-p", "hi", "--settings", HELPER)
    assert f"{file} sets apiKeyHelper: overridden for this session" in capsys.readouterr().err
    written = json.loads(Path(became.command[2]).read_text())["apiKeyHelper"]
    assert written == ("printenv ANTHROPIC_AUTH_TOKEN" if chat else "")


@pytest.mark.parametrize("place", ["managed-settings.json", "managed-settings.d/a.json"])
def test_a_managed_helper_for_another_key_is_refused(
    place: str, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = world / place
    file.parent.mkdir(exist_ok=True)
    file.write_text(HELPER)
    monkeypatch.setattr(environment, "MANAGED", (str(world / "managed-settings.json"),))
    with ScriptedLlm(Good()) as server:
        code, line = refused(capsys, "--port", str(server.port))
    assert code == 79 and f"{file} sets apiKeyHelper, which nothing overrides" in line
    assert "sk-theirs" not in line


PLACES = {
    "project": "project/.claude/settings.json",
    "project, own": "project/.claude/settings.local.json",
    "folder": "claude-local/settings.json",
    "managed": "managed-settings.json",
    "managed, folder": "managed-settings.d/a.json",
}


@pytest.mark.parametrize(
    "variable", ["HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy"]
)
@pytest.mark.parametrize("place", PLACES)
def test_a_proxy_in_a_file_of_settings_is_gone_past(
    place: str,
    variable: str,
    world: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Claude Code sets it for itself once it runs: what keeps it off must be where nothing overrides it."""
    file = world / PLACES[place]
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"env": {variable: "http://192.0.2.7:3128", "no_proxy": "a.example"}}))
    monkeypatch.setattr(environment, "MANAGED", (str(world / "managed-settings.json"),))
    monkeypatch.setenv("NO_PROXY", "b.example")
    with ScriptedLlm(Good()) as server:
        became = started("--port", str(server.port), "-p", "hi")
    told = capsys.readouterr().err.splitlines()
    assert f"local-claude: a proxy is set in {file}: 127.0.0.1 goes past it" in told
    written = json.loads(Path(became.command[2]).read_text())["env"]
    for name in ("NO_PROXY", "no_proxy"):
        assert written[name] == became.variables[name] == "b.example,a.example,127.0.0.1"
    warned = [line for line in told if f"{file} sets no_proxy, which nothing overrides; fix: " in line]
    assert bool(warned) == place.startswith("managed") and not any("overridden" in line for line in told)


@pytest.mark.parametrize(
    "before", [b"\xef\xbb\xbf", b'{"note": "\xe9", '], ids=["byte order mark", "latin-1"]
)
def test_settings_that_no_other_program_would_read_are_read_as_claude_does(
    before: bytes, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a colleague's editor wrote them: the prompt went to the proxy, and another key to the box."""
    file = world / "project/.claude/settings.json"
    file.parent.mkdir(exist_ok=True)
    rest = json.dumps({"env": {"HTTP_PROXY": "http://127.0.0.1:1"}}).encode()
    file.write_bytes(before + (rest if before.startswith(b"\xef") else rest[1:]))
    with ScriptedLlm(Good()) as server:
        became = started("--port", str(server.port), "-p", "x")
    assert f"a proxy is set in {file}" in capsys.readouterr().err
    assert "127.0.0.1" in became.variables["NO_PROXY"]


def test_a_proxy_in_settings_on_the_command_line() -> None:
    given = json.dumps({"env": {"HTTPS_PROXY": "http://192.0.2.7:3128"}})
    with ScriptedLlm(Good()) as server:
        became = started("--port", str(server.port), "-p", "hi", "--settings", given)
    assert json.loads(Path(became.command[2]).read_text())["env"]["NO_PROXY"] == "127.0.0.1"


def test_two_servers_want_one_port(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ollama and apfel have the same: the one that is there stays, and the other is not started beside it."""
    (world / "bin/apfel").write_text(f"#!/bin/sh\ntouch {world}/started\n")
    (world / "bin/apfel").chmod(0o755)
    with ScriptedLlm(KINDS["Ollama"][0]) as server:
        monkeypatch.setitem(BACKENDS, "apfel", BACKENDS["apfel"]._replace(port=server.port))
        code, line = refused(capsys, "--backend", "apfel")
        assert wire.Server("http", "127.0.0.1", server.port).get("/api/version").status == 200
    assert code == 72 and not (world / "started").exists()
    assert f"http://127.0.0.1:{server.port} is Ollama, not what --backend apfel means" in line
    assert "; fix: --backend ollama or remote, or another --port" in line


def test_a_proxy_is_gone_past(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "internal.example")
    with ScriptedLlm(Good()) as server:
        became = started("--port", str(server.port), "-p", "hi")
    assert became.variables["NO_PROXY"] == became.variables["no_proxy"] == "internal.example,127.0.0.1"
    assert "a proxy is set" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--skip-checks", "--chat-only"])
def test_a_small_context_can_be_insisted_on(flag: str) -> None:
    with ScriptedLlm(Good(context=8192)) as server:
        became = started("--port", str(server.port), flag, "-p", "hi")
    assert ("--bare" in became.command) == (flag == "--chat-only")
    assert became.variables["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == "8192"


# --- a shell as it should not be: typed for real, as Python itself would end with a traceback ---


# What the shell does before, what it adds to the command, the exit code, a part of the cause and of the fix.
SHELLS = {
    "directory gone": (
        "mkdir $HOME/x; cd $HOME/x; rmdir ../x;",
        "",
        79,
        "the directory that this is typed in is gone",
        "cd to another",
    ),
    "key of two lines": ("export LLMBOX_KEY='a\nb';", "", 73, "LLMBOX_KEY", "export it anew"),
    "key of no key's letters": ("export LLMBOX_KEY=schl\u00fcssel;", "", 73, "LLMBOX_KEY", "export it anew"),
    "folder of nobody": ("export LOCAL_CLAUDE_DIR='~nobody-here/x';", "", 79, "~nobody-here/x", "whole path"),
    "claude is no program": ("printf '\177ELF' > $HOME/bin/claude;", "", 127, "cannot be run", "npm install"),
    "claude's interpreter": (
        "echo '#!/nowhere' > $HOME/bin/claude;",
        "",
        127,
        "cannot be run",
        "npm install",
    ),
    "full disk": ("", "--print-env > /dev/full", 79, "No space left", "mend that"),
    "settings without end": (
        "python3 -c 'print(\"[\" * 90000)' > $HOME/deep;",
        "-p x --settings $HOME/deep",
        2,
        "no JSON",
        "name a JSON file",
    ),
}


def typed(world: Path, before: str, port: int, words: str) -> subprocess.CompletedProcess[str]:
    """A command of a shell."""
    return subprocess.run(
        ["sh", "-c", f'{before} exec "$0" -m local_claude.cli --port {port} {words}', sys.executable],
        env={**os.environ, "HOME": str(world), "PYTHONPATH": str(ROOT / "apps/local_claude/src")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("name", SHELLS)
def test_a_broken_shell(name: str, world: Path) -> None:
    before, words, code, cause, fix = SHELLS[name]
    with ScriptedLlm(Good()) as server:
        done = typed(world, before, server.port, words or "-p x")
    line = done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and re.fullmatch(r"local-claude: .+; fix: .+", line), done.stderr
    problem, _, remedy = line.partition("; fix: ")
    assert (done.returncode, cause in problem, fix in remedy) == (code, True, True), line


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_what_is_closed_is_no_reason(closed: str, world: Path) -> None:
    (world / "bin/claude").write_text("#!/bin/sh\nexit 7\n")
    with ScriptedLlm(Good()) as server:
        done = typed(world, "", server.port, closed)  # looks whether a person could be asked
    assert done.returncode == 7, done.stderr


def test_kept_files_that_are_damaged_are_no_reason(world: Path) -> None:
    kept = world / "claude-local/local-claude"
    kept.mkdir(parents=True)
    for name in ("checks.json", "claude-options.json"):
        (kept / name).write_text("[" * 90_000)
    (kept.parent / "settings.json").write_text("[" * 90_000)
    with ScriptedLlm(Good()) as server:
        done = typed(world, "", server.port, "-p x")
    assert done.returncode == 0 and "checking tool calls" in done.stderr, done.stderr


def test_every_code_is_documented() -> None:
    page = (ROOT / "docs/local-claude.md").read_text()
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    assert documented == set(errors.CODES)


def test_every_variable_is_in_the_help() -> None:
    sources = (ROOT / "apps/local_claude/src").rglob("*.py")
    read = {name for path in sources for name in re.findall(r'"(LOCAL_CLAUDE_[A-Z_]+)"', path.read_text())}
    read -= {"LOCAL_CLAUDE_PROXY_KEY", "LOCAL_CLAUDE_UPSTREAM_KEY", "LOCAL_CLAUDE_STARTED"}  # for ourselves
    assert read == set(re.findall(r"^  (LOCAL_CLAUDE_[A-Z_]+) ", options.usage(), re.MULTILINE))
