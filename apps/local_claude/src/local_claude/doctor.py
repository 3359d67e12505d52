"""`local-claude doctor`: everything in the order in which it goes wrong, nothing is started, nothing is kept.

Loaded? Context? Tool calls? Does it stop in the middle of an edit? Does it invent files? Then what this
machine is good for. Exit code: 0 all is well, otherwise that of the first check that failed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from local_claude import checks, environment, launch, lmstudio, machine, servers, session
from local_claude.backends import BACKENDS, Backend
from local_claude.checks import Result
from local_claude.errors import EXIT_TOOLS, LocalClaudeError, shown
from local_claude.options import Options
from local_claude.servers import Found, Model
from local_claude.wire import Trouble

LINES = 40
EDIT_TOKENS = 2048
BUFFER = 13_000  # what Claude Code keeps free besides the longest answer
PROMPT = 12_000  # its instructions and tools with the wrapper's settings; about 27K without
ROOM = 6_000
PATH = {"type": "string", "description": "path of the file"}
WRITE = {
    "name": "Write",
    "description": "Write a file.",
    "input_schema": {
        "type": "object",
        "properties": {"file_path": PATH, "content": {"type": "string"}},
        "required": ["file_path", "content"],
    },
}
READ = {
    "name": "Read",
    "description": "Read a file. A file must be read before it is edited.",
    "input_schema": {"type": "object", "properties": {"file_path": PATH}, "required": ["file_path"]},
}
EDIT = {
    "name": "Edit",
    "description": "Replace old_string by new_string in a file that has been read.",
    "input_schema": {
        "type": "object",
        "properties": {"file_path": PATH, "old_string": {"type": "string"}, "new_string": {"type": "string"}},
        "required": ["file_path", "old_string", "new_string"],
    },
}


def run(wanted: Options) -> int:
    """Look at everything in turn and print a line for each."""
    code = 0
    try:
        for result in results(wanted):
            print(result.line, flush=True)
            code = code or (result.code if result.state == "fail" else 0)
    except LocalClaudeError as error:
        print(Result("server", "fail", error.problem, error.fix).line, flush=True)
        code = code or error.code
    here = machine.this_machine()
    row = machine.recommend(here)
    print(f"     this machine: {here.name}, {here.memory_gib:.0f} GiB ({row['machine']})")
    print(f"     recommended: {row['model']}, context {row['context']}, {row['backend']}: {row['verdict']}")
    return code


def results(wanted: Options) -> Iterator[Result]:
    """The checks, one after the other. Raises LocalClaudeError where nothing further can be looked at."""
    yield _claude()
    if BACKENDS[wanted.backend].starts in {"llama", "ssh"}:
        yield from _startable(wanted)
        return
    found = session.identified(wanted)
    yield Result("server", "ok", found.title)
    model = session.choose_model(found, wanted)
    known = machine.of_model(model.name)
    yield Result("model", "ok", f"{model.name}{f' ({known})' if known else ''}")
    if found.kind.name == "lmstudio" and found.server.local:
        yield from lmstudio.traps()
    backend = BACKENDS[wanted.backend]
    if not session.speaks_messages(found, backend):
        yield Result(
            "protocol",
            "warn",
            f"{found.kind.title} does not speak Anthropic's API: LiteLLM goes in front of it",
            "look whether it is installed: litellm --version",
        )
        return
    yield from _working(found, model, backend, chat_only=wanted.chat_only)


def _working(found: Found, model: Model, backend: Backend, *, chat_only: bool) -> Iterator[Result]:
    """From here on the model works, which takes as long as it does."""
    trip = checks.round_trip(found, model.name)  # loads the model, where that is still to be done
    tokens = servers.context_of(session.recognise(found.server, backend), model)
    context = checks.context(found, tokens, chat_only=chat_only)
    yield context
    if tokens is not None:
        yield Result("context", "ok", machine.of_context(tokens))
    yield from trip
    if any(result.state == "fail" for result in trip) or chat_only:
        return
    if tokens is not None:
        yield _room(tokens)
    yield _edit(found, model)
    yield _invents(found, model)


def _claude() -> Result:
    try:
        program = launch.find_claude()
    except LocalClaudeError as error:
        return Result("claude", "fail", error.problem, error.fix, error.code)
    return Result("claude", "ok", str(program))


def _startable(wanted: Options) -> Iterator[Result]:
    """A server that is not running yet: what would be started."""
    from local_claude import started

    for line in started.planned(wanted):
        yield Result("would start", "ok", line)


def _room(tokens: int) -> Result:
    """What is left for the work itself."""
    output = int(environment.variables("", "", "", tokens)["CLAUDE_CODE_MAX_OUTPUT_TOKENS"])
    left = tokens - output - BUFFER - PROMPT
    detail = f"about {max(0, left)} tokens are left for files and answers before Claude Code compacts"
    if left < ROOM:
        return Result("stops in mid-edit", "warn", detail, "more context: 65536 are recommended")
    return Result("stops in mid-edit", "ok", detail)


def _edit(found: Found, model: Model) -> Result:
    """Is a longer file written to its end?"""
    name = "stops in mid-edit"
    ask = f"Write the file numbers.txt with {LINES} lines: the numbers from 1 to {LINES}, one in each line."
    body = _body(model, ask, [WRITE], EDIT_TOKENS) | {"tool_choice": {"type": "tool", "name": "Write"}}
    data = _asked(found, body)
    call = _call(data)
    given = (call or {"input": {}}).get("input")
    if data.get("stop_reason") == "max_tokens":
        detail = f"the answer was cut after {EDIT_TOKENS} tokens: the model does not end its turn"
        return Result(name, "warn", detail, "look at the template and its end tokens, or take another model")
    if not isinstance(given, dict):  # arguments that the server could not parse, and passed on as they came
        return Result(name, "warn", "the call of a tool came back damaged", found.kind.tools_fix)
    content = str(given.get("content", ""))
    if f"{LINES}" not in content.split():
        return Result(
            name, "warn", f"a file of {LINES} lines came as {shown(content[-40:])}", found.kind.tools_fix
        )
    return Result(name, "ok", f"a file of {LINES} lines came whole")


def _invents(found: Found, model: Model) -> Result:
    """Does it read a file before it edits it?"""
    name = "invents files"
    ask = "The file notes.txt has a spelling mistake somewhere. Correct it."
    data = _asked(found, _body(model, ask, [READ, EDIT], EDIT_TOKENS))
    call = _call(data)
    if call is None:
        return Result(
            name, "warn", "it called no tool where it should have read a file", found.kind.tools_fix
        )
    if call.get("name") != "Read":
        return Result(
            name,
            "warn",
            "it edits a file that it has not read",
            'a line in CLAUDE.md ("read a file before you edit it"), or a model that was trained for tools',
        )
    return Result(name, "ok", "it reads a file before it edits it")


def _body(model: Model, ask: str, tools: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    return {
        "model": model.name,
        "max_tokens": tokens,
        "system": "You are an agent that works on files with tools.",
        "messages": [{"role": "user", "content": ask}],
        "tools": tools,
    }


def _asked(found: Found, body: dict[str, Any]) -> dict[str, Any]:
    try:
        reply = found.server.post("/v1/messages", body, checks.ANSWER_TIMEOUT_S)
    except Trouble as trouble:
        raise LocalClaudeError(
            EXIT_TOOLS, f"{found.server.url} gave no answer: {trouble}", "look into the server's own log"
        ) from None
    return reply.data if reply.status == 200 and isinstance(reply.data, dict) else {}


def _call(data: dict[str, Any]) -> dict[str, Any] | None:
    """The first tool call of an answer."""
    content = data.get("content")
    blocks = content if isinstance(content, list) else []
    return next((one for one in blocks if isinstance(one, dict) and one.get("type") == "tool_use"), None)
