"""What Claude Code is told: environment variables, and the same in a file that no other settings override."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from local_claude.errors import EXIT_SETTINGS, EXIT_USAGE, LocalClaudeError, shown

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
# Settings that no variable stands for: WebFetch asks Anthropic about the name of each host that it goes to.
SETTINGS = {"skipWebFetchPreflight": True}
# With --bare the token does not count. In ANTHROPIC_API_KEY claude would ask about it, and keep a part of it.
CHAT_SETTINGS = {"apiKeyHelper": "printenv ANTHROPIC_AUTH_TOKEN"}
# Each of these sends requests, or what is in them, somewhere else. Blank counts as not set.
BLANK = (
    "ANTHROPIC_API_KEY",
    "ANTHROPIC_CUSTOM_HEADERS",
    "ANTHROPIC_SMALL_FAST_MODEL",
    "ANTHROPIC_UNIX_SOCKET",
    "CLAUDE_CODE_API_BASE_URL",
    "CLAUDE_CODE_OAUTH_TOKEN",
    "CLAUDE_CODE_USE_BEDROCK",
    "CLAUDE_CODE_USE_FOUNDRY",
    "CLAUDE_CODE_USE_VERTEX",
)


def variables(url: str, key: str, model: str, context: int) -> dict[str, str]:
    """The variables for one server and model."""
    found = {
        "ANTHROPIC_BASE_URL": url,
        "ANTHROPIC_AUTH_TOKEN": key or PLACEHOLDER,
        **dict.fromkeys(MODEL_VARIABLES, model),
        **dict.fromkeys(BLANK, ""),
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "CLAUDE_CODE_DISABLE_OFFICIAL_MARKETPLACE_AUTOINSTALL": "1",  # the line above leaves it on
        "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
        "DISABLE_AUTOUPDATER": "1",
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


def past_proxies(host: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that keep a proxy from getting between claude and the server; none where none is set."""
    if not any(environment.get(name) for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")):
        return {}
    present = environment.get("NO_PROXY") or environment.get("no_proxy") or ""
    listed = [name.strip() for name in present.split(",") if name.strip()]
    together = ",".join(dict.fromkeys([*listed, host]))
    return {"NO_PROXY": together, "no_proxy": together}


def check_folder(folder: Path, home: Path) -> None:
    """Refuse a folder that is the user's own, whatever links lead there. Raises LocalClaudeError."""
    own = (home / ".claude").resolve()
    there = folder.resolve()
    if there == own or own in there.parents or there == home.resolve():
        raise LocalClaudeError(
            EXIT_SETTINGS, f"{folder} is your own folder of settings", "set LOCAL_CLAUDE_DIR to another one"
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


def settings_file(
    folder: Path, wanted: Mapping[str, str], given: Mapping[str, Any], *, chat_only: bool = False
) -> Path:
    """Write the file for --settings and return its path. `given` is what the caller wanted there besides.

    Its name follows from its content, so that sessions side by side do not disturb each other. A real key
    stays out of it: it is in the environment alone.
    """
    own = {name: value for name, value in wanted.items() if _may_lie_on_disk(name, value)}
    theirs = given.get("env")
    content = {
        **given,
        **SETTINGS,
        **(CHAT_SETTINGS if chat_only else {}),
        "env": {**(theirs if isinstance(theirs, dict) else {}), **own},
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / "local-claude" / f"settings-{digest}.json"
    try:
        write(path, content)
    except OSError as error:
        raise LocalClaudeError(
            EXIT_SETTINGS, f"{path} cannot be written ({error.strerror})", f"make {folder} yours"
        ) from None
    return path


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


def overriding(folder: Path, project: Path, wanted: Mapping[str, str], key: str) -> list[str]:
    """Lines about settings that are overridden. Raises LocalClaudeError for those that cannot be."""
    for name in MANAGED:
        for variable, value in _env_of(Path(name)).items():
            if variable in wanted and value != wanted[variable]:
                raise LocalClaudeError(
                    EXIT_SETTINGS,
                    f"{name} sets {variable}, which nothing overrides",
                    "ask whoever manages this machine to take it out",
                )
    lines = []
    for path in (
        folder / "settings.json",
        project / ".claude/settings.json",
        project / ".claude/settings.local.json",
    ):
        found = _env_of(path)
        both = sorted(name for name in found if name in wanted and found[name] != wanted[name])
        if key and "ANTHROPIC_AUTH_TOKEN" in both:
            raise LocalClaudeError(
                EXIT_SETTINGS,
                f"{path} sets ANTHROPIC_AUTH_TOKEN, which would be sent instead of LLMBOX_KEY",
                "take it out of that file",
            )
        if both:
            lines.append(f"{path} sets {', '.join(both)}: overridden for this session")
    return lines


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, empty where there is none or it cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _env_of(path: Path) -> dict[str, str]:
    """The `env` of a file of settings."""
    found = read_object(path).get("env")
    return {str(name): str(value) for name, value in found.items()} if isinstance(found, dict) else {}
