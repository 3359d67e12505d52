"""Can this server and model carry Claude Code? Each check is one line, and says how to mend what fails.

The round trip of a tool call, and the prompt cache that its second request must find, take as long as
the model does: their result is kept by server, model and version.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from local_claude import environment
from local_claude.errors import (
    EXIT_CACHE,
    EXIT_CONTEXT,
    EXIT_DENIED,
    EXIT_TOOLS,
    EXIT_WRONG_SERVER,
    LocalClaudeError,
    shown,
)
from local_claude.options import CONTEXT_FLOOR
from local_claude.servers import Found, Model
from local_claude.wire import Reply, Trouble

ANSWER_TIMEOUT_S = 600.0
CHECK_TOKENS = 256
KEPT_S = 30 * 24 * 3600
NEVER_S = 1e12  # no time of a clock; and above it numbers may not fit into a float
MAX_KEPT = 200
# Marks of chat templates: what llm_router.answers.LEAK holds, which is not installed where this is.
LEAKED = re.compile(
    r"<unused\d+>|<\|[a-z][a-z0-9_]{1,30}\|?>|<[a-z][a-z0-9_]{1,30}\|>|<\|\\?\"\|>"
    r"|<\uff5c[^\uff5c<>]{1,40}\uff5c>"
    r"|</?(?:start_of_turn|end_of_turn|tool_call|tool_response|function_calls|think|bos|eos)>"
    r"|<function=[\w.-]+>|</function>|<parameter=[\w.-]+>|<invoke name=\\?\"[\w.-]+\\?\">"
    r"|\[/?(?:INST|TOOL_CALLS|AVAILABLE_TOOLS|TOOL_RESULTS)\]"
)
UNPARSED = re.compile(r'"name"\s*:\s*"report"')  # a call that nobody took out of the text
TOOL = {
    "name": "report",
    "description": "Report that you are ready.",
    "input_schema": {
        "type": "object",
        "properties": {"state": {"type": "string", "enum": ["ready"], "description": "Always: ready"}},
        "required": ["state"],
    },
}
SYSTEM = (
    "You are checked before you go to work. You answer with a call of the tool `report`, whose argument "
    "`state` is the word ready. You write nothing else: no explanation, no greeting, no question. "
) * 3


class Result(NamedTuple):
    """One check: its name, `ok`, `warn` or `fail`, what was found, how to mend it, the exit code."""

    name: str
    state: str
    detail: str
    fix: str = ""
    code: int = 0

    @property
    def line(self) -> str:
        """The check in one line."""
        mark = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}[self.state]
        return f"{mark} {self.name}: {self.detail}{f'; fix: {self.fix}' if self.fix else ''}"

    @property
    def error(self) -> LocalClaudeError:
        """The check as a refusal."""
        return LocalClaudeError(self.code, f"{self.name}: {self.detail}", self.fix)


def context(found: Found, tokens: int | None, *, chat_only: bool) -> Result:
    """Is there room for Claude Code's own instructions and tools, about 27K tokens, and for the work?"""
    if tokens is None:
        return Result(
            "context",
            "warn",
            f"{found.kind.title} does not say how much it has; Claude Code needs {CONTEXT_FLOOR} tokens",
            found.kind.context_fix,
        )
    if tokens >= 2 * CONTEXT_FLOOR:
        return Result("context", "ok", f"{tokens} tokens")
    if tokens >= CONTEXT_FLOOR:
        return Result("context", "ok", f"{tokens} tokens ({2 * CONTEXT_FLOOR} are recommended)")
    if chat_only:
        return Result("context", "warn", f"{tokens} tokens: a chat, no agent (--chat-only)")
    return Result(
        "context",
        "fail",
        f"{tokens} tokens, below the {CONTEXT_FLOOR} that Claude Code needs with its tools",
        f"{found.kind.context_fix}; or --chat-only",
        EXIT_CONTEXT,
    )


def round_trip(found: Found, model: str, timeout_s: float = ANSWER_TIMEOUT_S) -> list[Result]:
    """Force a tool call, answer it, and see that it was parsed and that the second prompt found the first.

    Where forcing tells nothing of the calls that Claude Code will make, the model is only told to call.
    """
    first: dict[str, Any] = {
        "model": model,
        "max_tokens": CHECK_TOKENS,
        "system": SYSTEM,
        "messages": [{"role": "user", "content": "Report."}],
        "tools": [TOOL],
        **({"tool_choice": {"type": "tool", "name": "report"}} if found.kind.forces_tools else {}),
    }
    reply = _ask(found, first, timeout_s)
    tools = _judge_call(found, reply)
    if tools.state == "fail":
        return [tools]
    content = reply.data["content"]
    call = next((block for block in content if block.get("type") == "tool_use"), None)
    said: object = (
        [{"type": "tool_result", "tool_use_id": call.get("id", "1"), "content": "Noted. Report again."}]
        if call
        else "Report again."
    )
    second = {
        **first,
        "messages": [
            *first["messages"],
            {"role": "assistant", "content": content},
            {"role": "user", "content": said},
        ],
    }
    again = _ask(found, second, timeout_s)
    cache = _judge_cache(found, again)
    if cache.state == "fail":  # somebody else's request may have come between
        cache = _judge_cache(found, _ask(found, second, timeout_s))
    return [tools, cache]


def _ask(found: Found, body: dict[str, Any], timeout_s: float) -> Reply:
    try:
        reply = found.server.post("/v1/messages", body, timeout_s)
    except Trouble as trouble:
        raise LocalClaudeError(
            EXIT_TOOLS,
            f"{found.server.url} gave no answer that calls a tool: {trouble}",
            "look into the server's own log; --skip-checks starts without this check",
        ) from None
    if reply.status in (401, 403):
        raise LocalClaudeError(
            EXIT_DENIED,
            f"{found.server.url} refuses this key for this model ({reply.status}: {reply.message})",
            "export LLMBOX_KEY=..., or choose another model",
        )
    if reply.status == 422 or "Extra inputs" in reply.text:
        raise LocalClaudeError(
            EXIT_WRONG_SERVER,
            f"{found.server.url} refuses fields that Claude Code sends ({reply.status}: {reply.message})",
            "update the server",
        )
    return reply


def _judge_call(found: Found, reply: Reply) -> Result:
    """Does the answer hold a tool call that was parsed, and nothing of the template?"""
    name, fix = "tool calls", found.kind.tools_fix
    if reply.status != 200:
        return Result(name, "fail", f"the server answers {reply.status}: {reply.message}", fix, EXIT_TOOLS)
    content = reply.data.get("content") if isinstance(reply.data, dict) else None
    blocks = content if isinstance(content, list) else []
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in blocks):
        return Result(
            name,
            "fail",
            f"the answer is no message of Anthropic's API: {shown(reply.text[:80])}",
            "correct --host, --port or --backend",
            EXIT_WRONG_SERVER,
        )
    text = "".join(str(block.get("text", "")) for block in blocks if block.get("type") == "text")
    leaked = LEAKED.search(text)
    calls = [block for block in blocks if block.get("type") == "tool_use"]
    if leaked:
        return Result(
            name, "fail", f"the template leaks into the answer: {shown(text[:60])}", fix, EXIT_TOOLS
        )
    if not calls:
        what = f"prose: {shown(text[:60])}" if text.strip() else "an empty answer"
        if not found.kind.forces_tools and not UNPARSED.search(text):
            detail = f"none came ({what}), which the model was told and not made to, so this proves little"
            return Result(name, "warn", detail, fix)
        return Result(name, "fail", f"a tool call came back as {what}", fix, EXIT_TOOLS)
    call = calls[0]
    if call.get("name") != "report" or not isinstance(call.get("input"), dict):
        return Result(name, "fail", f"the call came back damaged: {shown(call)}", fix, EXIT_TOOLS)
    return Result(name, "ok", f"a {'forced ' if found.kind.forces_tools else ''}call came back parsed")


def _judge_cache(found: Found, reply: Reply) -> Result:
    """Did the second prompt find the first one in the cache?"""
    name = "prompt cache"
    usage = reply.data.get("usage") if isinstance(reply.data, dict) else None
    timings = reply.data.get("timings") if isinstance(reply.data, dict) else None
    cached = usage.get("cache_read_input_tokens") if isinstance(usage, dict) else None
    if cached is None and isinstance(timings, dict):
        cached = timings.get("cache_n")
    if isinstance(cached, int) and cached > 0:
        return Result(name, "ok", f"a second turn found {cached} tokens of the first")
    if not found.kind.caches or cached is None or reply.status != 200:
        return Result(name, "warn", f"{found.kind.title} does not say whether it works")
    return Result(
        name,
        "fail",
        "a second turn found nothing of the first: every turn would read the whole prompt again",
        "llama-server: remove --no-cache-prompt, or use a build that can cache this model; or --skip-checks",
        EXIT_CACHE,
    )


class Kept:
    """Results of earlier round trips that passed, in one file that is no harm to lose."""

    def __init__(self, folder: Path, now: Callable[[], float] = time.time) -> None:
        self.path = folder / "local-claude" / "checks.json"
        self.now = now

    @staticmethod
    def key(found: Found, model: str, what: str = "") -> str:
        """Server, model and version; "" where the server does not tell its version: nothing is kept then.

        `what` stands for the address of a server that gets another port at each start.
        """
        if not found.version:
            return ""
        said = json.dumps([what or found.server.url, found.kind.name, found.version, model])
        return hashlib.sha256(said.encode()).hexdigest()[:32]

    def find(self, key: str) -> list[Result] | None:
        """What was found before, unless it is too old."""
        entry = self._all().get(key) if key else None
        if entry is None or not 0 <= self.now() - entry["at"] < KEPT_S:
            return None
        try:
            results = [Result(**result) for result in entry["results"]]
        except (KeyError, TypeError):
            return None
        return results if results and all(map(_passed, results)) else None

    def keep(self, key: str, results: list[Result]) -> None:
        """Remember results that let claude start. A disk that takes nothing is no reason not to."""
        if not key or any(result.state == "fail" for result in results):
            return
        entries = self._all() | {key: {"at": int(self.now()), "results": [one._asdict() for one in results]}}
        newest = sorted(entries, key=lambda one: entries[one].get("at", 0))[-MAX_KEPT:]
        try:
            environment.write(self.path, {one: entries[one] for one in newest})
        except OSError:
            return

    def _all(self) -> dict[str, Any]:
        found = environment.read_object(self.path)
        return {key: entry for key, entry in found.items() if _is_entry(entry)}


def _is_entry(entry: object) -> bool:
    """Whether it can be sorted by its age: a file that somebody else wrote is no reason to fail."""
    at = entry.get("at") if isinstance(entry, dict) else None
    return isinstance(at, int | float) and 0 <= at < NEVER_S


def _passed(result: Result) -> bool:
    """Whether it is one that is kept, in all its fields."""
    texts = (result.name, result.detail, result.fix)
    return all(isinstance(text, str) for text in texts) and result.state in ("ok", "warn")


def find_model(found: Found, wanted: str) -> Model | None:
    """The model of this name or alias."""
    for model in found.models:
        if wanted == model.name or wanted in model.aliases:
            return model
    return None
