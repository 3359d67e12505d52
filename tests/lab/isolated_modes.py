"""Runs in a network without a way out: local-claude in each mode, and what became of the user's own files.

    isolated_modes.py local-claude MODES

MODES is JSON: a list of [name, kind of server that is played here or "", words of local-claude]. HOME is a
new folder. Prints a JSON object: `modes` (exit code, what it said, what it told), `left` (files of the user's
own that were changed, made or removed), `sessions` (how many Claude Code kept elsewhere, where SpecStory
would look for them below ~/.claude), `sent` (bytes for any other host), `udp` (datagrams, as questions to a
name server are). Where no server is played it needs the standard library alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

MODE_TIMEOUT_S = 400
OWN = {
    ".claude/settings.json": '{"env": {"ANTHROPIC_BASE_URL": "http://192.0.2.99"}}',
    ".claude/.credentials.json": '{"claudeAiOauth": {"accessToken": "mine"}}',
    ".claude.json": '{"numStartups": 7, "hasCompletedOnboarding": true}',
}


def says_hello(body: Any) -> Any:
    """Claude Code's requests are answered with one word; the check of tool calls with a call."""
    from tests.unit import scripted_llm

    if body and [tool["name"] for tool in body.get("tools", ())] == ["report"]:
        called: Any = scripted_llm.called()
        return called(body)
    message: dict[str, Any] = {
        "id": "m",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "stop_reason": "end_turn",
        "content": [{"type": "text", "text": "Hello."}],
        "usage": {"input_tokens": 1, "output_tokens": 1},
    }
    if not (body or {}).get("stream"):
        return 200, message
    events: list[dict[str, Any]] = [
        {"type": "message_start", "message": {**message, "content": [], "stop_reason": None}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hello."}},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 1}},
        {"type": "message_stop"},
    ]
    lines = "".join(f"event: {one['type']}\ndata: {json.dumps(one)}\n\n" for one in events)
    return 200, lines.encode(), {"Content-Type": "text/event-stream"}


def played(kind: str) -> Any:
    """A server of this kind, whose `port` local-claude is given."""
    from tests.unit import scripted_llm
    from tests.unit.test_local_claude_servers import KINDS

    return scripted_llm.ScriptedLlm(
        {**KINDS[kind][0], "/v1/messages": says_hello, "/v1/messages?beta=true": says_hello}
    )


def digests(home: Path) -> dict[str, str]:
    """What is the user's own, byte for byte."""
    files = [home / ".claude.json", *(path for path in (home / ".claude").rglob("*") if path.is_file())]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def counters(name: str) -> list[str]:
    """What the kernel counted in this network."""
    return Path(f"/proc/net/{name}").read_text().splitlines()


def main() -> None:
    """Go through the modes."""
    program, modes = sys.argv[1], json.loads(sys.argv[2])
    home = Path(os.environ["HOME"])
    for name, text in OWN.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
    (home / "project").mkdir()
    before = digests(home)
    found = {}
    for name, kind, words in modes:
        with played(kind) if kind else nullcontext() as server:
            done = subprocess.run(
                [program, *(["--port", str(server.port)] if server else []), *words, "-p", "Say hello."],
                cwd=home / "project",
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=MODE_TIMEOUT_S,
                check=False,
            )
        found[name] = [done.returncode, done.stdout.strip(), done.stderr[-2000:]]
    after = digests(home)
    project = re.sub("[^a-zA-Z0-9-]", "-", str((home / "project").resolve()))
    sent = next(line.split()[10] for line in counters("dev") if line.split()[0] == "out:")
    names, values = (line.split() for line in counters("snmp") if line.startswith("Udp:"))
    print(
        json.dumps(
            {
                "modes": found,
                "left": sorted(
                    path for path in before.keys() | after.keys() if before.get(path) != after.get(path)
                ),
                "sessions": len(list((home / ".claude-local/projects" / project).glob("*.jsonl"))),
                "sent": int(sent),
                "udp": int(values[names.index("OutDatagrams")]),
            }
        )
    )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main()
