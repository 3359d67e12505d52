"""Requests of Claude Code differ in a word at the head of the system prompt, and must not for the cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from llmbox.gateway import prompt_cache
from llmbox.gateway.prompt_cache import AFTER, BEFORE, NAMES, Guard, masked, masks_by_itself, programs_of

HEAD = "x-anthropic-billing-header: cc_version=2.1.330.e51; cc_entrypoint=cli; cch={};You are Claude Code"


def request(cch: str, *, blocks: bool) -> bytes:
    text = HEAD.format(cch)
    system = [{"type": "text", "text": text}, {"type": "text", "text": "more"}] if blocks else text
    return json.dumps(
        {"model": "x", "system": system, "messages": [{"role": "user", "content": "cch=a5145;"}]}
    ).encode()


@pytest.mark.parametrize("blocks", [True, False])
def test_requests_that_differ_in_it_become_the_same(blocks: bool) -> None:
    one, other = masked(request("a5145", blocks=blocks)), masked(request("0f00d", blocks=blocks))
    assert one == other and b"cch=fffff;You" in one
    assert json.loads(one)["messages"][0]["content"] == "cch=a5145;"
    assert len(one) == len(request("a5145", blocks=blocks))


@pytest.mark.parametrize(
    "body",
    [
        b'{"system": "You are Claude Code"}',
        b'{"messages": [{"role": "user", "content": "x-anthropic-billing-header: cch=a5145;"}]}',
        b'{"system": "You. x-anthropic-billing-header: cch=a5145;"}',
        b'{"system": "x-anthropic-billing-header: cch=too-long-for-it;"}',
        b"",
    ],
)
def test_every_other_body_passes_byte_by_byte(body: bytes) -> None:
    assert masked(body) == body


def test_a_body_is_looked_at_only_about_the_names_of_the_header() -> None:
    """From every "system" of a hostile one, the expression would go on for a second."""
    quoted = b'{"messages": ["x-anthropic-billing-header"], ' + request("a5145", blocks=True)[1:]
    assert b"cch=fffff;" in masked(quoted)
    space = b'"' + b"x" * max(BEFORE, AFTER) + b'"'
    names = space + b',"x-anthropic-billing-header"' * NAMES + b"," + space
    behind = b'{"messages": [' + names + b"], " + request("a5145", blocks=False)[1:]
    assert b"cch=fffff;" in masked(behind), "Claude Code's system prompt follows the messages"
    many = behind[:-1] + b', "tools": [' + names + b"]}"
    assert masked(many) == many, "so many on both sides are nobody's"
    far = b'{"system":' + b" " * (BEFORE + 1) + request("a5145", blocks=False).partition(b'"system":')[2]
    assert masked(far) == far


def test_a_build_that_masks_is_known_by_its_files(tmp_path: Path) -> None:
    server = tmp_path / "llama-server"
    server.write_bytes(b"\x7fELF" + bytes(5000))
    (tmp_path / "libllama-server-impl.so").write_bytes(
        bytes(5000) + b"x-anthropic-billing-header:" + bytes(10)
    )
    (tmp_path / "libggml-cuda.so").write_bytes(b"x-anthropic-billing-header")
    (tmp_path / "libempty.so").touch()
    assert masks_by_itself(programs_of(server))
    (tmp_path / "libllama-server-impl.so").write_bytes(bytes(5000))
    assert not masks_by_itself(programs_of(server))


def test_only_presets_whose_build_needs_it_get_a_changed_body(tmp_path: Path) -> None:
    commands = {}
    for build, content in (("new", b"x-anthropic-billing-header:"), ("old", b"nothing")):
        (tmp_path / build).mkdir()
        (tmp_path / build / "llama-server").write_bytes(content)
        commands[build] = str(tmp_path / build / "llama-server")
    guard = Guard({**commands, "gone": str(tmp_path / "gone/llama-server")})
    body = request("a5145", blocks=True)
    assert guard.applied("new", body) is body
    assert guard.applied("old", body) == masked(body) != body
    assert guard.applied("gone", body) == masked(body)
    assert guard.applied("unheard of", body) is body


def test_a_build_that_cannot_be_read_is_looked_at_once_and_masked_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unreadable(_: object) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(prompt_cache, "masks_by_itself", unreadable)
    guard = Guard({"old": "/opt/old/llama-server"})
    body = request("a5145", blocks=True)
    for _ in range(2):
        assert guard.applied("old", body) == masked(body)
    assert [record.getMessage() for record in caplog.records] == [
        "/opt/old/llama-server cannot be read (Permission denied): its prompts are masked"
    ]
