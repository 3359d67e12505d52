"""What a person sees as one line, and the exit codes that go with it.

Claude Code ends with 0, 1 or, by a signal, above 128: what the wrapper refuses by itself lies between.
"""

from __future__ import annotations

import json

EXIT_USAGE = 2
EXIT_UNREACHABLE = 71
EXIT_WRONG_SERVER = 72
EXIT_DENIED = 73
EXIT_NO_MODEL = 74
EXIT_CONTEXT = 75
EXIT_TOOLS = 76
EXIT_CACHE = 77
EXIT_NOT_STARTED = 78
EXIT_SETTINGS = 79
EXIT_NO_CLAUDE = 127
EXIT_INTERRUPTED = 130

CODES = {
    EXIT_USAGE: "the command cannot be meant as typed",
    EXIT_UNREACHABLE: "no server answers there",
    EXIT_WRONG_SERVER: "something answers, but nothing that Claude Code can talk to",
    EXIT_DENIED: "the server wants a key, or another one",
    EXIT_NO_MODEL: "the model is not there, or several are and none was named",
    EXIT_CONTEXT: "the context is below what Claude Code needs",
    EXIT_TOOLS: "tool calls are not parsed",
    EXIT_CACHE: "the prompt cache does not work",
    EXIT_NOT_STARTED: "a server that should be started here did not start",
    EXIT_SETTINGS: "a file of settings is in the way or cannot be written",
    EXIT_NO_CLAUDE: "claude is not installed",
    EXIT_INTERRUPTED: "Ctrl-C before claude runs, or nobody reads what is printed",
}
SHOWN_CHARACTERS = 120


class LocalClaudeError(Exception):
    """What stops the start: its exit code, what is wrong and how to mend it, both in one line."""

    def __init__(self, code: int, problem: str, fix: str) -> None:
        super().__init__(f"{one_line(problem)}; fix: {one_line(fix)}")
        self.code = code
        self.problem = one_line(problem)
        self.fix = one_line(fix)


def one_line(text: str) -> str:
    """`text` without anything that could break the line or turn its direction."""
    return "".join(one if one.isprintable() else f"\\u{ord(one):04x}" for one in text.strip())


def shown(value: object) -> str:
    """A value of somebody else's as it may stand in a line: quoted, escaped, cut."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    text = text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"
    return one_line(text)
