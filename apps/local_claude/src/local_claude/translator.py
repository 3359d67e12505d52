"""LiteLLM in front of a server that does not speak Anthropic's API: started for one session.

It lives in an environment of its own: nothing of it is imported here.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from local_claude import environment
from local_claude.backends import LOCAL
from local_claude.errors import EXIT_NOT_STARTED, EXIT_SETTINGS, LocalClaudeError
from local_claude.keeping import Kept, Order, answers, free_port
from local_claude.options import expanded
from local_claude.wire import Server

START_TIMEOUT_S = 300.0  # its first start compiles thousands of files
VERSION = "1.108.7"
# What the router has of the extra `proxy`, most of it imported at the start. Not the extra itself, to which
# litellm-enterprise belongs, under a commercial licence.
PROXY = (
    *(
        "apscheduler",
        "backoff",
        "cryptography",
        "expression",
        "fastapi",
        "fastapi-sso",
        "gunicorn",
        "hiredis",
    ),
    *("httpx2", "litellm-proxy-extras", "mcp", "orjson", "pyjwt", "pynacl", "python-multipart", "rich"),
    *("soundfile", "uvicorn", "uvloop", "websockets"),
)
FIX = (
    f"type: pipx install litellm=={VERSION} && pipx inject litellm {' '.join(PROXY)} "
    "(or set LOCAL_CLAUDE_LITELLM to the program)"
)
PLACES = (
    "~/.local/bin/litellm",
    "~/.local/share/pipx/venvs/litellm/bin/litellm",
    "/opt/llm-router/bin/litellm",  # where this machine is a router too
)
# What Claude Code sends and servers of OpenAI's shape answer with 422.
DROPPED = (
    "betas",
    "cache_control",
    "context_management",
    "metadata",
    "output_config",
    "prompt_cache_key",  # LiteLLM's own addition
    "reasoning_effort",
    "thinking",
)
# Nothing may ask the network: no table of prices, no telemetry.
SETTINGS = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    # Otherwise it asks for OpenAI's /v1/responses, which few local servers have.
    "LITELLM_USE_CHAT_COMPLETIONS_URL_FOR_ANTHROPIC_MESSAGES": "True",
    "LITELLM_LOCAL_ANTHROPIC_BETA_HEADERS": "True",
    "LITELLM_LOG": "ERROR",
    "LITELLM_TELEMETRY": "False",
    "DISABLE_ADMIN_UI": "True",
    "NO_DOCS": "True",
}


def find_program(given: Mapping[str, str] = os.environ) -> str:
    """The program. Raises LocalClaudeError when it is not installed."""
    named = given.get("LOCAL_CLAUDE_LITELLM")
    places = [named] if named else [shutil.which("litellm"), *PLACES]
    for place in places:
        program = expanded("LOCAL_CLAUDE_LITELLM", place or "/nowhere")
        if os.access(program, os.X_OK) and program.is_file():
            return str(program)
    raise LocalClaudeError(
        EXIT_NOT_STARTED, "this server needs LiteLLM in front of it, which is not installed", FIX
    )


def config(server: Server, model: str) -> dict[str, object]:
    """LiteLLM's configuration: one model, no key in it, fields taken out that the server would refuse."""
    return {
        "model_list": [
            {
                "model_name": model,
                "litellm_params": {
                    "model": f"openai/{model}",
                    "api_base": f"{server.url}/v1",
                    "api_key": "os.environ/LOCAL_CLAUDE_UPSTREAM_KEY",
                    "additional_drop_params": list(DROPPED),
                    "drop_params": True,
                },
            }
        ],
        "litellm_settings": {"drop_params": True, "telemetry": False, "num_retries": 0},
        "general_settings": {"master_key": "os.environ/LOCAL_CLAUDE_PROXY_KEY"},
    }


def start(server: Server, model: str, folder: Path, tell: Callable[[str], None]) -> tuple[Kept, Server]:
    """Start it and wait until it answers: its keeper, and where it listens. Raises LocalClaudeError."""
    program = find_program()
    place = folder / "local-claude" / f"litellm-{os.getpid()}.yaml"
    try:
        environment.write(place, config(server, model))  # JSON is YAML
    except OSError as error:
        raise LocalClaudeError(
            EXIT_SETTINGS, f"{place} cannot be written ({error.strerror})", f"make {folder} yours"
        ) from None
    key = f"sk-{secrets.token_hex(16)}"
    port = free_port()
    argv = (program, "--config", str(place), "--host", LOCAL, "--port", str(port), "--telemetry", "False")
    given = {
        **SETTINGS,
        **environment.no_proxies(server.host, [os.environ]),
        "LOCAL_CLAUDE_UPSTREAM_KEY": server.key or environment.PLACEHOLDER,
        "LOCAL_CLAUDE_PROXY_KEY": key,
    }
    kept = Kept(Order("LiteLLM", argv, given, place.with_suffix(".log"), remove=(place,)))
    proxy = Server("http", LOCAL, port, key)
    try:
        tell("starting LiteLLM, because the server does not speak Anthropic's API")
        kept.wait_ready(answers(proxy, "/health/liveliness"), START_TIMEOUT_S, tell, FIX)
    except BaseException:
        kept.stop()
        raise
    return kept, proxy
