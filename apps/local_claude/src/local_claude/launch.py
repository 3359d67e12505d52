"""Becoming claude: where the program is, what it is given, and the last step."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from local_claude import environment
from local_claude.errors import EXIT_NO_CLAUDE, EXIT_USAGE, LocalClaudeError

CHAT_ONLY = ("--bare", "--tools", "", "--strict-mcp-config")
# Keeps what differs between directories out of the head of the prompt: the cache holds it for all of them.
SHARED_PROMPT = "--exclude-dynamic-system-prompt-sections"
HELP_TIMEOUT_S = 20
STARTED = "LOCAL_CLAUDE_STARTED"  # for itself: its number, and what it has become until now
PLACES = (
    "~/.local/bin/claude",
    "~/.claude/local/claude",
    "/opt/homebrew/bin/claude",
    "/usr/local/bin/claude",
)


class Launch(NamedTuple):
    """A program to become: its words, and what is added to the environment."""

    command: tuple[str, ...]
    variables: Mapping[str, str]

    def shell(self) -> str:
        """The same as lines for a shell."""
        return f"{exports(self.variables)}\n{shlex.join(self.command)}"

    def go(self) -> NoReturn:
        """Become it: from here on exit code and signals are claude's own. Raises LocalClaudeError."""
        sys.stdout.flush()
        sys.stderr.flush()
        program = self.command[0]
        try:
            mark = {STARTED: os.pathsep.join((str(os.getpid()), *_started(), program))}
            os.execve(program, self.command, {**os.environ, **self.variables, **mark})  # noqa: S606 - no shell is wanted
        except OSError as error:
            if error.errno == errno.E2BIG:
                raise LocalClaudeError(
                    EXIT_USAGE, "its arguments are too long for this system", "put the text into a file"
                ) from None
            raise LocalClaudeError(
                EXIT_NO_CLAUDE,
                f"{program} cannot be run ({error.strerror})",
                "type: npm install -g @anthropic-ai/claude-code",
            ) from None


def exports(variables: Mapping[str, str]) -> str:
    """Lines for a shell that set them. A key is named, not shown."""
    return "\n".join(_export(name, value) for name, value in variables.items())


def _export(name: str, value: str) -> str:
    if name != "ANTHROPIC_AUTH_TOKEN" or value == environment.PLACEHOLDER:
        return f"export {name}={shlex.quote(value)}"
    if value == os.environ.get("LLMBOX_KEY"):
        return f'export {name}="${{LLMBOX_KEY:?}}"'  # says so in a shell that has none
    return f"# {name} was of a server that was started for this, and has ended"


def find_claude(path: str | None = None) -> Path:
    """The program. Raises LocalClaudeError when it is not installed."""
    searched = (os.environ.get("PATH", os.defpath) if path is None else path).split(os.pathsep)
    on_path = (shutil.which("claude", path=folder) for folder in searched if folder)
    places = (Path(place).expanduser() for place in PLACES)
    usual = (str(place) for place in places if os.access(place, os.X_OK))
    why = "claude is not on PATH"
    for found in filter(None, (*on_path, *usual)):
        if not _is_this_program(found) and found not in _started():
            return Path(found)
        why = f"{found} is local-claude itself, and claude is nowhere else on PATH"
    raise LocalClaudeError(EXIT_NO_CLAUDE, why, "type: npm install -g @anthropic-ai/claude-code")


def _started() -> list[str]:
    """What this very process was before: a script called claude that starts this with its defaults."""
    pid, *programs = os.environ.get(STARTED, "").split(os.pathsep)
    return programs if pid == str(os.getpid()) else []


def _is_this_program(found: str) -> bool:
    """Whether it is a link to the program that runs: it would become itself for ever."""
    try:
        return Path(found).samefile(sys.argv[0])
    except OSError:
        return False


def compose(
    program: Path, settings: Path | None, words: Sequence[str], *, chat_only: bool, shared_prompt: bool
) -> tuple[str, ...]:
    """The command line of claude: the wrapper's options first, so that the caller's come later and win."""
    command = [str(program)]
    if settings is not None:
        command += ["--settings", str(settings)]
    if chat_only:
        command += CHAT_ONLY
    elif shared_prompt:
        command.append(SHARED_PROMPT)
    return (*command, *words)


def compose_plain(program: Path, words: Sequence[str]) -> tuple[str, ...]:
    """The command line of a claude that asks no model."""
    return (str(program), *words)


def knows(program: Path, option: str, folder: Path) -> bool:
    """Whether this claude has the option. It is asked once for each version of the program."""
    try:
        real = program.resolve()
        status = real.stat()
        key = f"{real} {status.st_size} {status.st_mtime_ns}"
    except OSError:
        return False
    file = folder / "local-claude" / "claude-options.json"
    kept = environment.read_object(file)
    if kept.get("program") == key and isinstance(kept.get("help"), str):
        return option in kept["help"].split()
    import subprocess  # not at every start

    from local_claude import keeper

    me = os.getpid()
    try:
        asked = subprocess.run(
            [str(program), "--help"],
            capture_output=True,
            text=True,
            timeout=HELP_TIMEOUT_S,
            check=False,
            stdin=subprocess.DEVNULL,
            preexec_fn=lambda: keeper.die_with(me),
            env={**os.environ, "CLAUDE_CONFIG_DIR": str(folder), **environment.QUIET},
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    words = " ".join(sorted({word for word in asked.stdout.split() if word.startswith("--")}))
    with contextlib.suppress(OSError):
        environment.write(file, {"program": key, "help": words})
    return option in words.split()
