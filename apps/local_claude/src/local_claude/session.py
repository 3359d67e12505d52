"""One session: find or start the server, check it, write the settings, become claude."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from local_claude import checks, environment, launch, options, servers
from local_claude.backends import BACKENDS, LOCAL, Backend
from local_claude.errors import EXIT_NO_MODEL, EXIT_WRONG_SERVER, LocalClaudeError, shown
from local_claude.options import Options
from local_claude.servers import Found, Model
from local_claude.wire import Trouble, parse_server, unreachable

LISTED = 12


def run(wanted: Options) -> int:
    """Carry out one command line. Returns only for --print-env and --dry-run; raises LocalClaudeError."""
    folder = options.config_dir()
    environment.check_folder(folder, Path.home())
    environment.prepare_folder(folder)
    own = {"CLAUDE_CONFIG_DIR": str(folder)}
    if not wanted.needs_server:
        launch.Launch(launch.compose_plain(launch.find_claude(), wanted.claude), own).go()
    program = Path("claude") if wanted.print_env else launch.find_claude()
    given, words = environment.take_settings(wanted.claude)

    found = find(wanted)
    model = choose_model(found, wanted)
    chat_only = wanted.chat_only or found.kind.name == "apfel"
    context = look(found, model, wanted, folder, chat_only=chat_only)

    key = found.server.key
    variables = environment.variables(found.server.url, key, model.name, context, chat_only=chat_only)
    variables = environment.kept(variables, os.environ)
    for line in environment.overriding(folder, Path.cwd(), variables, key):
        say(line, wanted)
    around = environment.past_proxies(found.server.host, os.environ)
    if around:
        say(f"a proxy is set in the environment: {found.server.host} goes past it", wanted)
    settings = environment.settings_file(folder, variables, given)
    shared = not chat_only and not wanted.print_env and launch.knows(program, launch.SHARED_PROMPT, folder)
    command = launch.compose(program, settings, words, chat_only=chat_only, shared_prompt=shared)
    start = launch.Launch(command, {**own, **variables, **around})
    if not (wanted.print_env or wanted.dry_run):
        start.go()
    print(start.shell(), flush=True)
    return 0


def find(wanted: Options) -> Found:
    """The server that a backend means, recognised. Raises LocalClaudeError."""
    backend = BACKENDS[wanted.backend]
    server = parse_server(wanted.host or LOCAL, wanted.port, backend.port, os.environ.get("LLMBOX_KEY", ""))
    try:
        found = servers.identify(server)
        direct = servers.speaks_messages(found)
    except Trouble as trouble:
        raise unreachable(server, trouble, backend.to_start) from None
    check_kind(backend, found)
    if not direct:
        raise LocalClaudeError(
            EXIT_WRONG_SERVER, f"{found.title} does not speak Anthropic's API", "update the server"
        )
    return found


def check_kind(backend: Backend, found: Found) -> None:
    """Refuse a server of another kind than the backend says."""
    if backend.kinds and found.kind.name not in backend.kinds:
        names = [each.name for each in BACKENDS.values() if found.kind.name in each.kinds and not each.starts]
        raise LocalClaudeError(
            EXIT_WRONG_SERVER,
            f"{found.server.url} is {found.kind.title}, not what --backend {backend.name} means",
            f"--backend {' or '.join([*names, 'remote'])}, or another --port",
        )


def choose_model(found: Found, wanted: Options) -> Model:
    """The model to use: the one that is named, the only one, or the one that a person picks."""
    names = ", ".join(shown(model.name) for model in found.models[:LISTED])
    names += f" and {len(found.models) - LISTED} more" if len(found.models) > LISTED else ""
    if wanted.model is not None:
        model = checks.find_model(found, wanted.model)
        if model is None:
            raise LocalClaudeError(
                EXIT_NO_MODEL,
                f"{found.server.url} has no model {shown(wanted.model)}",
                f"one of {names or 'none'}",
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
    raise LocalClaudeError(EXIT_NO_MODEL, f"{found.title} has several models", f"--model with one of {names}")


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


def look(found: Found, model: Model, wanted: Options, folder: Path, *, chat_only: bool) -> int | None:
    """All checks, a line each; returns the context. Raises LocalClaudeError at the first that fails."""
    context = servers.context_of(found, model)
    if wanted.skip_checks:
        return context
    say(f"{model.name} on {found.title}", wanted)
    results = [checks.context(found, context, chat_only=chat_only)]
    judge(results, wanted)
    if chat_only:
        return context
    kept = checks.Kept(folder)
    key = checks.Kept.key(found, model.name)
    earlier = None if wanted.recheck else kept.find(key)
    if earlier is None:
        say("checking tool calls and prompt cache (once for each server, model and version) ...", wanted)
        earlier = checks.round_trip(found, model.name)
        kept.keep(key, earlier)
    judge(earlier, wanted)
    return context if context is not None else servers.context_of(found, model)


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
