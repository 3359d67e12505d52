"""What Claude Code is told: environment variables, and the same in a file that no other settings override."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from local_claude.errors import EXIT_SETTINGS, EXIT_USAGE, LocalClaudeError, shown
from local_claude.wire import Server

PLACEHOLDER = "local-claude"  # a server without keys takes any word, but not none
REQUEST_TIMEOUT_MS = 1_800_000  # a long prompt on a slow machine: half an hour
MAX_OUTPUT = 16384
# Claude Code takes no smaller window for compaction, and warns when it is told one; without it, it takes
# CLAUDE_CODE_MAX_CONTEXT_TOKENS. It keeps free the longest answer and 13000 tokens (2.1.330: /context).
COMPACT_FLOOR = 100_000
MANAGED = (
    "/etc/claude-code/managed-settings.json",
    "/Library/Application Support/ClaudeCode/managed-settings.json",
)
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
PAST_PROXIES = ("NO_PROXY", "no_proxy")
# What a session leaves behind when it does not end well, or cannot remove because claude has its place.
OF_SESSIONS = ("settings-*.json", "litellm-*.yaml", "*.log")
KEPT_S = 24 * 3600
MODEL_VARIABLES = (
    "ANTHROPIC_MODEL",
    "ANTHROPIC_DEFAULT_OPUS_MODEL",
    "ANTHROPIC_DEFAULT_SONNET_MODEL",
    "ANTHROPIC_DEFAULT_HAIKU_MODEL",
    "ANTHROPIC_DEFAULT_FABLE_MODEL",
    "CLAUDE_CODE_SUBAGENT_MODEL",
)
# What fills the prompt and is of no use to a local model, or differs between two directories ahead of what
# does not. The user's own value stays.
SLIM = {
    "CLAUDE_CODE_DISABLE_AUTO_MEMORY": "1",
    "CLAUDE_CODE_DISABLE_BUNDLED_SKILLS": "1",
    "CLAUDE_CODE_DISABLE_WORKFLOWS": "1",
    "CLAUDE_CODE_DISABLE_CRON": "1",
    "CLAUDE_CODE_DISABLE_ARTIFACT": "1",
}
# Keeps claude from asking anybody by itself. What it is told to ask it still asks: `update`, say.
QUIET = {
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "CLAUDE_CODE_DISABLE_OFFICIAL_MARKETPLACE_AUTOINSTALL": "1",  # the line above leaves it on
    "CLAUDE_CODE_ENABLE_TELEMETRY": "",  # OpenTelemetry, to whatever host the shell or a project names
    "DISABLE_AUTOUPDATER": "1",
}
# Below the home folder claude takes the CLAUDE.md and the rules of ~/.claude for those of the project.
EXCLUDES, INSTRUCTIONS = "claudeMdExcludes", ("CLAUDE.md", "rules/**")
# Settings that no variable stands for: WebFetch asks Anthropic about the name of each host that it goes to.
# What a helper prints is sent beside the token: the key of another server, which this one may even prefer.
HELPER = "apiKeyHelper"
SETTINGS = {"skipWebFetchPreflight": True, HELPER: ""}
# With --bare the token does not count. In ANTHROPIC_API_KEY claude would ask about it, and keep a part of it.
CHAT_SETTINGS = {HELPER: "printenv ANTHROPIC_AUTH_TOKEN"}
# Each of these sends requests, or what is in them, somewhere else. Blank counts as not set.
BLANK = (
    "ANTHROPIC_API_KEY",
    "ANTHROPIC_CUSTOM_HEADERS",
    "ANTHROPIC_SMALL_FAST_MODEL",
    "ANTHROPIC_UNIX_SOCKET",
    "CLAUDE_CODE_API_BASE_URL",
    "CLAUDE_CODE_OAUTH_TOKEN",
    "CLAUDE_CODE_USE_ANTHROPIC_AWS",
    "CLAUDE_CODE_USE_ANTHROPIC_GOOGLE_CLOUD",
    "CLAUDE_CODE_USE_BEDROCK",
    "CLAUDE_CODE_USE_FOUNDRY",
    "CLAUDE_CODE_USE_GATEWAY",
    "CLAUDE_CODE_USE_MANTLE",
    "CLAUDE_CODE_USE_VERTEX",
)


def variables(url: str, key: str, model: str, context: int) -> dict[str, str]:
    """The variables for one server and model."""
    found = {
        "ANTHROPIC_BASE_URL": url,
        "ANTHROPIC_AUTH_TOKEN": key or PLACEHOLDER,
        **dict.fromkeys(MODEL_VARIABLES, model),
        **dict.fromkeys(BLANK, ""),
        **QUIET,
        "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
        "API_TIMEOUT_MS": str(REQUEST_TIMEOUT_MS),
        "API_FORCE_IDLE_TIMEOUT": "0",
        "CLAUDE_STREAM_IDLE_TIMEOUT_MS": str(REQUEST_TIMEOUT_MS),
        "CLAUDE_STREAM_FIRST_BYTE_TIMEOUT_MS": str(REQUEST_TIMEOUT_MS),
        **SLIM,
        "CLAUDE_CODE_MAX_CONTEXT_TOKENS": str(context),
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(max(512, min(MAX_OUTPUT, context // 8))),
    }
    if context >= COMPACT_FLOOR:
        found["CLAUDE_CODE_AUTO_COMPACT_WINDOW"] = str(context)
    return found


def kept(wanted: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, str]:
    """`wanted`, with the user's own choice where it is a matter of taste."""
    return {**wanted, **{name: environment[name] for name in SLIM if name in environment}}


def past_proxies(
    host: str, folder: Path, project: Path, given: Mapping[str, Any]
) -> tuple[dict[str, str], str]:
    """Variables that keep a proxy from getting between claude and the server, and where one is set."""
    sources: dict[str, Mapping[str, str]] = {
        "the environment": os.environ,
        "--settings": _strings(given.get("env")),
        **{str(path): _env_of(path) for path in (*managed(), *beside(folder, project))},
    }
    where = next((name for name, env in sources.items() if any(map(env.get, PROXIES))), "")
    if not where:
        return {}, ""
    return no_proxies(host, sources.values()), where


def no_proxies(host: str, around: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Variables with which a program asks this host past a proxy, beside those that it asks so already."""
    listed = [name for env in around for no in PAST_PROXIES for name in _names(env.get(no, ""))]
    return dict.fromkeys(PAST_PROXIES, ",".join(dict.fromkeys([*listed, host])))


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def check_folder(folder: Path, home: Path) -> None:
    """Refuse a folder that is the user's own, whatever links lead there. Raises LocalClaudeError."""
    own = (home / ".claude").resolve()
    there = folder.resolve()
    if there == own or own in there.parents or there == home.resolve():
        raise LocalClaudeError(
            EXIT_SETTINGS, f"{folder} is your own folder of settings", "set LOCAL_CLAUDE_DIR to another one"
        )


def check_project(project: Path, home: Path) -> None:
    """Refuse a project whose `.claude` is the user's own: it would be read, and written to. Raises
    LocalClaudeError.
    """
    own = home / ".claude"
    if own.is_dir() and (project / ".claude").resolve() == own.resolve():
        raise LocalClaudeError(
            EXIT_SETTINGS,
            f"the .claude of {project} is your own folder of settings",
            "cd to a project, or to a new folder",
        )


def prepare_folder(folder: Path) -> None:
    """Make the folder; a first start in it asks no questions about an account. Raises LocalClaudeError."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder / ".claude.json"
        if not state.exists():
            write(state, {"hasCompletedOnboarding": True})
    except OSError as error:
        raise LocalClaudeError(
            EXIT_SETTINGS,
            f"{error.filename or folder} cannot be written ({error.strerror})",
            "make it yours, or set LOCAL_CLAUDE_DIR to a folder that is",
        ) from None


def write(path: Path, content: object) -> None:
    """Write JSON that only the user can read, whole or not at all. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1, sort_keys=True)
            file.write("\n")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def own_instructions(home: Path) -> list[str]:
    """Patterns of what the user tells their own claude, also where a link leads to it."""
    own = home / ".claude"
    return [f"{place}/{name}" for place in dict.fromkeys((own, own.resolve())) for name in INSTRUCTIONS]


def settings_file(
    folder: Path,
    wanted: Mapping[str, str],
    given: Mapping[str, Any],
    *,
    home: Path,
    chat_only: bool = False,
    printed: bool = False,
) -> Path:
    """Write the file for --settings and return its path. `given` is what the caller wanted there besides.

    Its name follows from its content and from this process, so that sessions side by side do not disturb each
    other. What is printed may go into a script: that file stays. A real key stays out of it: it is in the
    environment alone.
    """
    own = {name: value for name, value in wanted.items() if _may_lie_on_disk(name, value)}
    excluded = given.get(EXCLUDES)
    content = {
        **given,
        **SETTINGS,
        **(CHAT_SETTINGS if chat_only else {}),
        EXCLUDES: [*(excluded if isinstance(excluded, list) else ()), *own_instructions(home)],
        "env": {**_strings(given.get("env")), **own},
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    name = f"printed-{digest}" if printed else f"settings-{digest}-{os.getpid()}"
    path = folder / "local-claude" / f"{name}.json"
    try:
        write(path, content)
    except OSError as error:
        raise LocalClaudeError(
            EXIT_SETTINGS, f"{path} cannot be written ({error.strerror})", f"make {folder} yours"
        ) from None
    forget_ended(path.parent)
    return path


def forget_ended(place: Path) -> None:
    """Remove what sessions that have ended left: claude has the number of the local-claude that it replaced.

    Only what is a day old: a session in a container shares the folder perhaps, but not the numbers.
    """
    for pattern in OF_SESSIONS:
        for path in place.glob(pattern):
            with contextlib.suppress(OSError):
                old = time.time() - path.stat().st_mtime > KEPT_S
                if old and not _runs(path.stem.rpartition("-")[2]):
                    path.unlink()


def _runs(number: str) -> bool:
    """Whether this process runs; earlier versions wrote no number."""
    if not number.isdecimal():
        return False
    try:
        os.kill(int(number), 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def _may_lie_on_disk(name: str, value: str) -> bool:
    return name not in {"ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_API_KEY"} or value in {"", PLACEHOLDER}


def take_settings(words: tuple[str, ...]) -> tuple[dict[str, Any], list[str]]:
    """claude's own --settings out of its arguments, and the rest: claude takes the option once.

    Raises LocalClaudeError when what it names is not usable.
    """
    given: dict[str, Any] = {}
    rest: list[str] = []
    iterator = iter(words)
    for word in iterator:
        if word == "--":
            rest += [word, *iterator]
        elif word == "--settings":
            given |= _settings_of(next(iterator, ""))
        elif word.startswith("--settings="):
            given |= _settings_of(word.partition("=")[2])
        else:
            rest.append(word)
    return given, rest


def _settings_of(value: str) -> dict[str, Any]:
    try:
        text = value if value.lstrip().startswith("{") else Path(value).read_text(encoding="utf-8")
        found = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        why = getattr(error, "strerror", None) or "no JSON"
        raise LocalClaudeError(
            EXIT_USAGE, f"--settings {shown(value)}: {why}", "name a JSON file, or write the object itself"
        ) from None
    if not isinstance(found, dict):
        raise LocalClaudeError(EXIT_USAGE, f"--settings {shown(value)} is no object", "write {...}")
    return found


def managed() -> Iterator[Path]:
    """The settings of whoever manages this machine, which nothing overrides: a file, and more in a folder."""
    for name in MANAGED:
        yield Path(name)
        yield from sorted(Path(name).with_suffix(".d").glob("*.json"))


def beside(folder: Path, project: Path) -> tuple[Path, ...]:
    """The settings that claude reads besides, which those of --settings override."""
    return (
        folder / "settings.json",
        project / ".claude/settings.json",
        project / ".claude/settings.local.json",
    )


def overriding(folder: Path, project: Path, wanted: Mapping[str, str], server: Server) -> list[str]:
    """Lines about settings that are overridden. Raises LocalClaudeError for those that cannot be."""
    lines = []
    for path in managed():
        for variable, value in _env_of(path).items():
            if variable in PAST_PROXIES and variable in wanted and server.host not in _names(value):
                # It may mean the host in other words, a domain say.
                lines.append(
                    f"{path} sets {variable}, which nothing overrides; fix: if a proxy answers instead of "
                    f"the server, ask whoever manages this machine to add {server.host}"
                )
            elif variable not in PAST_PROXIES and value != wanted.get(variable, value):
                raise LocalClaudeError(
                    EXIT_SETTINGS,
                    f"{path} sets {variable}, which nothing overrides",
                    "ask whoever manages this machine to take it out",
                )
        if read_object(path).get(HELPER):
            raise LocalClaudeError(
                EXIT_SETTINGS,
                f"{path} sets {HELPER}, which nothing overrides",
                "ask whoever manages this machine to take it out",
            )
    for path in beside(folder, project):
        found = _env_of(path)
        both = sorted(
            name for name in found.keys() - PAST_PROXIES if found[name] != wanted.get(name, found[name])
        )
        if server.key and "ANTHROPIC_AUTH_TOKEN" in both:
            raise LocalClaudeError(
                EXIT_SETTINGS,
                f"{path} sets ANTHROPIC_AUTH_TOKEN, which would be sent instead of LLMBOX_KEY",
                "take it out of that file",
            )
        if read_object(path).get(HELPER):
            both.append(HELPER)
        if both:
            lines.append(f"{path} sets {', '.join(both)}: overridden for this session")
    return lines


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, empty where there is none or it cannot be read.

    As Claude Code reads it: past a byte order mark, and past bytes that are no text.
    """
    try:
        found = json.loads(path.read_bytes().decode("utf-8-sig", "replace"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _env_of(path: Path) -> dict[str, str]:
    """The `env` of a file of settings."""
    return _strings(read_object(path).get("env"))


def _strings(found: object) -> dict[str, str]:
    """Variables as claude sets them; none from what is no object."""
    return {str(name): str(value) for name, value in found.items()} if isinstance(found, dict) else {}
