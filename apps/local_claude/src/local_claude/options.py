"""The command line: which words are the wrapper's own, and which begin claude's."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from local_claude.backends import BACKENDS, DEFAULT
from local_claude.errors import CODES, EXIT_SETTINGS, EXIT_USAGE, LocalClaudeError, shown

MAX_MODEL_NAME = 200
CONTEXT_FLOOR = 32768
# Commands and options of claude that ask no model. What is none of them is a prompt, or begins a session.
NEED_NO_SERVER = frozenset(
    [
        *("--version", "-v", "--help", "-h", "doctor", "install", "update", "upgrade"),
        *("mcp", "plugin", "plugins", "auth", "setup-token", "project", "purge"),
        # Sessions in the background have their settings already.
        *("attach", "logs", "respawn", "stop", "kill", "rm"),
    ]
)

DESCRIPTION = """Run Claude Code on a local model. Finds the server, checks that it can carry an agent, and
becomes claude with the right environment and settings; your own ~/.claude is never touched."""


class Option(NamedTuple):
    """One option of the wrapper. Without a metavar it is a switch."""

    flags: tuple[str, ...]
    help: str
    metavar: str = ""


OPTIONS = (
    Option(("--backend",), f"{', '.join(BACKENDS)} (default {DEFAULT})", "B"),
    Option(("--host",), "the server's name, address or URL; for remote-llama where ssh goes", "H"),
    Option(("--port",), "the server's port", "P"),
    Option(("--model",), "model, preset or alias; for llama and remote-llama also a GGUF file", "M"),
    Option(("--preset",), "llama, remote-llama: context, KV cache and flags from this preset", "NAME"),
    Option(("--context",), "llama, remote-llama: tokens of context (default 65536)", "TOKENS"),
    Option(("--draft",), "llama, remote-llama: auto, none, or a GGUF file (default auto)", "D"),
    Option(("--chat-only",), "no tools: for a context below 32768 tokens, or a model that calls none"),
    Option(("--skip-checks",), "start without looking at context, tool calls and prompt cache"),
    Option(("--recheck",), "do not trust results of earlier checks"),
    Option(("--print-env",), "print the environment as lines for a shell, and end"),
    Option(("--dry-run",), "do all checks, print environment and command, and end"),
    Option(("--quiet",), "say nothing when all is well"),
    Option(("-h", "--help"), "this text (claude's own: local-claude -- --help)"),
)
_BY_FLAG = {flag: option for option in OPTIONS for flag in option.flags}


class Options(NamedTuple):
    """A parsed command line; `claude` are the words that go to claude as they are."""

    backend: str = DEFAULT
    host: str | None = None
    port: int | None = None
    model: str | None = None
    preset: str | None = None
    context: int | None = None
    draft: str = "auto"
    chat_only: bool = False
    skip_checks: bool = False
    recheck: bool = False
    print_env: bool = False
    dry_run: bool = False
    quiet: bool = False
    help: bool = False
    doctor: bool = False
    claude: tuple[str, ...] = ()

    @property
    def needs_server(self) -> bool:
        """Whether claude will talk to a model."""
        return not (self.claude and self.claude[0] in NEED_NO_SERVER)

    @property
    def interactive(self) -> bool:
        """Whether a person sits there who may be asked."""
        printing = any(word in {"-p", "--print"} for word in self.claude)
        return not printing and sys.stdin.isatty() and sys.stderr.isatty()


def split(words: list[str]) -> tuple[list[str], bool, list[str]]:
    """The wrapper's own words, whether `doctor` is among them, and claude's.

    Claude's begin with the first that is not its own, or behind `--`.
    """
    own = list(words)
    doctor = False
    at = 0
    while at < len(own):
        word = own[at]
        if word == "--":
            return own[:at], doctor, own[at + 1 :]
        if word == "doctor" and not doctor:
            doctor = bool(own.pop(at))
            continue
        option = _BY_FLAG.get(word.partition("=")[0] if word.startswith("--") else word)
        if option is None:
            break
        at += 2 if option.metavar and "=" not in word else 1
    return own[:at], doctor, own[at:]


def parse(words: list[str]) -> Options:
    """The command line. Raises LocalClaudeError when it cannot be meant."""
    own, doctor, rest = split(words)
    if doctor and rest:
        raise LocalClaudeError(EXIT_USAGE, f"doctor takes no {shown(rest[0])}", "see: local-claude --help")
    found = _values(own)
    found |= {name: _number(name, found[name]) for name in ("port", "context") if name in found}
    options = Options(**found, doctor=doctor, claude=tuple(rest))
    if options.backend not in BACKENDS:
        raise LocalClaudeError(
            EXIT_USAGE, f"--backend {shown(options.backend)} is none", f"one of {', '.join(BACKENDS)}"
        )
    if options.model is not None:
        _check_name("--model", options.model)
    _check_combination(options)
    return options


def usage() -> str:
    """The text of --help."""
    lines = [f"  {backend.name:<13} {backend.summary}" for backend in BACKENDS.values()]
    codes = [f"  {code:>3}  {meaning}" for code, meaning in CODES.items()]
    return "\n".join(
        [
            "usage: local-claude [doctor] [options] [--] [CLAUDE ARGS]",
            "",
            DESCRIPTION,
            "",
            "options:",
            *map(_listed, OPTIONS),
            "",
            "backends:",
            *lines,
            "",
            "`local-claude doctor [options]` looks at everything in turn and says what to mend.",
            "The first word that is none of these options, or what follows `--`, begins claude's arguments.",
            "",
            "environment:",
            "  LLMBOX_KEY                        the server's key",
            "  LOCAL_CLAUDE_DIR                  the folder of settings (~/.claude-local)",
            "  LOCAL_CLAUDE_MODELS               the folder of GGUF files (~/models/gguf)",
            "  LOCAL_CLAUDE_LLAMA_SERVER         the llama-server to start",
            "  LOCAL_CLAUDE_PRESETS              the file of presets",
            "  LOCAL_CLAUDE_REMOTE_MODELS        remote-llama: the folder of GGUF files there",
            "  LOCAL_CLAUDE_REMOTE_LLAMA_SERVER  remote-llama: the llama-server there",
            "  LOCAL_CLAUDE_LITELLM              the litellm for a server with only OpenAI's API",
            "",
            "exit codes: those of claude, and",
            *codes,
        ]
    )


def config_dir(environment: Mapping[str, str] = os.environ) -> Path:
    """The folder that takes the place of ~/.claude. Raises LocalClaudeError."""
    return expanded("LOCAL_CLAUDE_DIR", environment.get("LOCAL_CLAUDE_DIR") or "~/.claude-local")


def expanded(variable: str, text: str) -> Path:
    """The path in a variable, `~` read as a shell does. Raises LocalClaudeError."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise LocalClaudeError(
            EXIT_SETTINGS, f"{variable}: there is no {shown(text)}", "name it by its whole path"
        ) from None


def _values(words: list[str]) -> dict[str, Any]:
    """What the wrapper's own words say, by option. By hand: argparse alone delays every start by 5 ms."""
    found: dict[str, Any] = {}
    rest = iter(words)
    for word in rest:
        flag, equals, value = word.partition("=") if word.startswith("--") else (word, "", "")
        option = _BY_FLAG[flag]
        if not option.metavar and equals:
            raise LocalClaudeError(EXIT_USAGE, f"{flag} takes no value", "see: local-claude --help")
        if option.metavar and not equals:
            value = next(rest, "-")
            if value.startswith("-"):
                raise LocalClaudeError(EXIT_USAGE, f"{flag} needs a value", "see: local-claude --help")
        name = option.flags[-1].lstrip("-").replace("-", "_")
        found[name] = value if option.metavar else True
    return found


def _listed(option: Option) -> str:
    """One option as --help shows it."""
    import textwrap  # not at every start

    lines = textwrap.wrap(option.help, 70)
    head = f"{', '.join(option.flags)} {option.metavar}"
    return "\n".join(f"  {head if number == 0 else '':<17} {line}" for number, line in enumerate(lines))


def _number(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text)):
        raise LocalClaudeError(EXIT_USAGE, f"--{name} {shown(text)} is no number", "write it in digits")
    return int(text)


def _check_name(flag: str, name: str) -> None:
    if not name or len(name) > MAX_MODEL_NAME or not name.isprintable():
        raise LocalClaudeError(
            EXIT_USAGE, f"{flag} {shown(name)} cannot be a name", "see what there is: local-claude doctor"
        )


def _check_combination(options: Options) -> None:
    starts = BACKENDS[options.backend].starts
    if options.backend == "remote-llama" and not options.host:
        raise LocalClaudeError(
            EXIT_USAGE, "remote-llama needs to know where", "--host, as you would write it for ssh"
        )
    if starts in {"llama", "ssh"}:
        if options.port is not None:
            raise LocalClaudeError(
                EXIT_USAGE, f"{options.backend} takes a free port by itself", "leave --port out"
            )
    elif options.preset or options.context:
        flag = "--preset" if options.preset else "--context"
        raise LocalClaudeError(
            EXIT_USAGE,
            f"{flag} goes with a llama-server that is started here",
            "--backend llama or remote-llama; a running server says its own context",
        )
