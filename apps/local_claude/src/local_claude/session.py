"""One session: find or start the server, check it, write the settings, become claude."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from local_claude import checks, environment, launch, options, servers
from local_claude.backends import BACKENDS, LOCAL, Backend
from local_claude.errors import (
    EXIT_DENIED,
    EXIT_NO_MODEL,
    EXIT_SETTINGS,
    EXIT_UNREACHABLE,
    EXIT_WRONG_SERVER,
    LocalClaudeError,
    shown,
)
from local_claude.options import Options
from local_claude.servers import Found, Model
from local_claude.wire import Server, Trouble, parse_server, unreachable

if TYPE_CHECKING:
    from local_claude.keeping import Kept

LISTED = 12
# What is assumed where a server does not say: Claude Code would assume a million.
ASSUMED_CONTEXT = options.CONTEXT_FLOOR


def run(wanted: Options) -> int:
    """Carry out one command line. Returns only for --print-env and --dry-run; raises LocalClaudeError."""
    folder = options.config_dir()
    environment.check_folder(folder, Path.home())
    environment.prepare_folder(folder)
    own = {"CLAUDE_CONFIG_DIR": str(folder)}
    if not wanted.needs_server:
        plain = launch.compose_plain(launch.find_claude(), wanted.claude)
        launch.Launch(plain, own | environment.QUIET).go()
    if not wanted.print_env:
        environment.check_project(here(), Path.home())
    program = Path("claude") if wanted.print_env else launch.find_claude()
    if wanted.dry_run and BACKENDS[wanted.backend].starts in {"llama", "ssh"}:
        from local_claude import started

        print("\n".join(started.planned(wanted)), flush=True)
        return 0
    given, words = environment.take_settings(wanted.claude)

    with stopped_unless_claude_runs() as kept:
        found = find(wanted, folder, kept)
        what = kept[0].order.what if kept else ""
        model = choose_model(found, wanted)
        chat_only = wanted.chat_only or found.kind.name == "apfel"
        found = in_front(found, model, wanted, folder, kept)
        context = look(found, model, wanted, folder, what, chat_only=chat_only)

        server = found.server
        variables = environment.kept(
            environment.variables(server.url, server.key, model.name, context or ASSUMED_CONTEXT),
            os.environ,
        )
        project = here()
        around, where = environment.past_proxies(server.host, folder, project, given)
        if around:
            say(f"a proxy is set in {where}: {server.host} goes past it", wanted)
        variables |= around
        for line in environment.overriding(folder, project, variables, server):
            say(line, wanted)
        if wanted.print_env:
            print(launch.exports(own | variables), flush=True)
            return 0
        settings = environment.settings_file(
            folder, variables, given, home=Path.home(), chat_only=chat_only, printed=wanted.dry_run
        )
        shared = not chat_only and launch.knows(program, launch.SHARED_PROMPT, folder)
        command = launch.compose(program, settings, words, chat_only=chat_only, shared_prompt=shared)
        start = launch.Launch(command, own | variables)
        if not wanted.dry_run:
            start.go()
        print(start.shell(), flush=True)
    return 0


def here() -> Path:
    """The directory that claude works in. Raises LocalClaudeError where it was removed."""
    try:
        return Path.cwd()
    except OSError as error:
        raise LocalClaudeError(
            EXIT_SETTINGS, f"the directory that this is typed in is gone ({error.strerror})", "cd to another"
        ) from None


@contextmanager
def stopped_unless_claude_runs() -> Iterator[list[Kept]]:
    """A list of servers that are stopped, the last first, when claude does not take this process's place."""
    kept: list[Kept] = []
    try:
        yield kept
    finally:
        for one in reversed(kept):
            one.stop()


def find(wanted: Options, folder: Path, kept: list[Kept]) -> Found:
    """The server that a backend means, started where it is to be. Raises LocalClaudeError."""
    backend = BACKENDS[wanted.backend]
    if backend.starts in {"llama", "ssh"}:
        from local_claude import started

        start = started.here if backend.starts == "llama" else started.there
        one, server = start(wanted, folder, lambda text: say(text, wanted))
        kept.append(one)
        return recognise(server, backend)
    try:
        return identified(wanted)
    except LocalClaudeError as error:
        if backend.starts != "apfel" or error.code != EXIT_UNREACHABLE or wanted.host:
            raise
        from local_claude import started

        one, server = started.apple(folder, lambda text: say(text, wanted))
        kept.append(one)
        return recognise(server, backend)


def identified(wanted: Options) -> Found:
    """The server that runs already. Raises LocalClaudeError."""
    backend = BACKENDS[wanted.backend]
    key = os.environ.get("LLMBOX_KEY", "")
    if not (key.isascii() and key.isprintable()):
        raise LocalClaudeError(
            EXIT_DENIED, "LLMBOX_KEY holds what is in no key: a line break, say", "export it anew"
        )
    return recognise(parse_server(wanted.host or LOCAL, wanted.port, backend.port, key), backend)


def recognise(server: Server, backend: Backend) -> Found:
    """What answers there, which must be of a kind that the backend means. Raises LocalClaudeError."""
    try:
        found = servers.identify(server)
    except Trouble as trouble:
        raise unreachable(server, trouble, backend.to_start) from None
    if backend.kinds and found.kind.name not in backend.kinds:
        names = [each.name for each in BACKENDS.values() if found.kind.name in each.kinds]
        names = [name for name in names if BACKENDS[name].port]
        raise LocalClaudeError(
            EXIT_WRONG_SERVER,
            f"{found.server.url} is {found.kind.title}, not what --backend {backend.name} means",
            f"--backend {' or '.join([*names, 'remote'])}, or another --port",
        )
    return found


def speaks_messages(found: Found, backend: Backend) -> bool:
    """Whether Claude Code can talk to it directly. Raises LocalClaudeError."""
    try:
        return servers.speaks_messages(found)
    except Trouble as trouble:
        raise unreachable(found.server, trouble, backend.to_start) from None


def in_front(found: Found, model: Model, wanted: Options, folder: Path, kept: list[Kept]) -> Found:
    """The server itself, or LiteLLM in front of one that does not speak Anthropic's API."""
    if speaks_messages(found, BACKENDS[wanted.backend]):
        return found
    from local_claude import translator

    one, proxy = translator.start(found.server, model.name, folder, lambda text: say(text, wanted))
    kept.append(one)
    return found._replace(server=proxy, version="")


def choose_model(found: Found, wanted: Options) -> Model:
    """The model to use: the one that is named, the only one, or the one that a person picks."""
    started = BACKENDS[wanted.backend].starts in {"llama", "ssh"}
    if wanted.model is not None and not started:
        model = checks.find_model(found, wanted.model)
        if model is None:
            raise LocalClaudeError(
                EXIT_NO_MODEL,
                f"{found.server.url} has no model {shown(wanted.model)}",
                f"one of {_listed(found) or 'none'}",
            )
        return model
    if not found.models:
        raise LocalClaudeError(EXIT_NO_MODEL, f"{found.title} has no model", "load or download one first")
    if len(found.models) == 1:
        return found.models[0]
    ready = [model for model in found.models if model.ready]
    if wanted.interactive:
        return _ask_which(found, ready)
    if len(ready) == 1:
        return ready[0]
    raise LocalClaudeError(
        EXIT_NO_MODEL, f"{found.title} has several models", f"--model with one of {_listed(found)}"
    )


def _listed(found: Found) -> str:
    names = ", ".join(shown(model.name) for model in found.models[:LISTED])
    return f"{names} and {len(found.models) - LISTED} more" if len(found.models) > LISTED else names


def _ask_which(found: Found, ready: list[Model]) -> Model:
    from local_claude.choose import choose

    rows = [
        "  ".join(
            [
                f"{model.name:<28}",
                f"{f'{model.context} tokens' if model.context else '':>14}",
                "running" if model.ready else model.note,
            ]
        )
        for model in found.models
    ]
    first = found.models.index(ready[0]) if ready else 0
    picked = choose(f"Models of {found.title}", rows, first)
    if picked is None:
        raise LocalClaudeError(EXIT_NO_MODEL, "no model was chosen", "--model names one")
    return found.models[picked]


def look(
    found: Found, model: Model, wanted: Options, folder: Path, what: str, *, chat_only: bool
) -> int | None:
    """All checks, a line each; returns the context. Raises LocalClaudeError at the first that fails."""
    context = servers.context_of(found, model)
    if wanted.skip_checks:
        return context
    say(f"{model.name} on {found.title}", wanted)
    judge([checks.context(found, context, chat_only=chat_only)], wanted)
    if chat_only:
        return context
    kept = checks.Kept(folder)
    key = checks.Kept.key(found, model.name, what)
    # A model that is not loaded has no context yet: it is loaded by the check, and may have less than before.
    results = None if wanted.recheck or context is None else kept.find(key)
    fresh = results is None
    if results is None:
        often = "once for each server, model and version" if key else "every time: it tells no version"
        say(f"checking tool calls and prompt cache ({often}) ...", wanted)
        results = checks.round_trip(found, model.name)
    judge(results, wanted)
    context = context if context is not None else learned(found, model, wanted)
    if fresh:
        kept.keep(key, results)
    return context


def learned(found: Found, model: Model, wanted: Options) -> int | None:
    """The context that a server tells once the model is loaded. Raises LocalClaudeError below the floor."""
    try:
        again = checks.find_model(servers.identify(found.server), model.name)
    except (Trouble, LocalClaudeError):
        return None
    if again is None or again.context is None:
        return None
    judge([checks.context(found, again.context, chat_only=wanted.chat_only)], wanted)
    return again.context


def judge(results: list[checks.Result], wanted: Options) -> None:
    """Tell each result; raise LocalClaudeError at the first that fails."""
    for result in results:
        if result.state == "fail":
            raise result.error
        if result.state == "warn" or not wanted.quiet:
            print(f"local-claude: {result.line}", file=sys.stderr, flush=True)


def say(text: str, wanted: Options) -> None:
    """One line about what goes on."""
    if not wanted.quiet:
        print(f"local-claude: {text}", file=sys.stderr, flush=True)
