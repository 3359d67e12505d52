"""What answers at an address: its kind, its version, its models and the context that each really has.

One table says for every kind what Claude Code can expect of it and what to set where it falls short.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from local_claude.errors import EXIT_DENIED, EXIT_WRONG_SERVER, LocalClaudeError, one_line, shown
from local_claude.wire import Reply, Server, Trouble

APPLE_CONTEXT = 4096
MAX_MODELS = 1000
MAX_NAME = 200


class Model(NamedTuple):
    """One model of a server. `context` is in tokens, None where the server does not say."""

    name: str
    context: int | None = None
    aliases: tuple[str, ...] = ()
    ready: bool = False
    note: str = ""


class Kind(NamedTuple):
    """What is known of a kind of server."""

    name: str
    title: str
    messages: bool | None  # speaks Anthropic's /v1/messages: yes, no, or ask it
    forces_tools: bool  # honours tool_choice, and parses what it forces as any other call
    caches: bool  # says how much of a prompt it found in its cache
    context_fix: str
    tools_fix: str


KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            "gateway",
            "an llmbox gateway",
            messages=True,
            forces_tools=True,
            caches=True,
            context_fix="choose a preset with `agent: true`, or raise its `context` in the inventory",
            tools_fix="set `jinja: true` in the preset, and use a model and template that know tools",
        ),
        Kind(
            "llama",
            "a llama-server",
            messages=True,
            forces_tools=True,
            caches=True,
            context_fix="start it with --ctx-size 65536 --parallel 1 and --fit off, or by --context 65536",
            tools_fix="start it with --jinja, and with a template that knows tools (--chat-template-file)",
        ),
        Kind(
            "lmstudio",
            "LM Studio",
            messages=None,
            forces_tools=False,
            caches=False,
            context_fix="load it with more: lms load MODEL --context-length 65536",
            tools_fix="use LM Studio 0.4.1 or newer and a model that is marked for tool use",
        ),
        Kind(
            "ollama",
            "Ollama",
            messages=None,
            forces_tools=False,
            caches=False,
            context_fix="set OLLAMA_CONTEXT_LENGTH=65536 for `ollama serve` and start it again",
            tools_fix="use a model that was trained for tools (`ollama show MODEL` lists the capability)",
        ),
        Kind(
            "vllm",
            "vLLM",
            messages=None,
            forces_tools=False,  # by a grammar, which needs neither its switch for tools nor its parser
            caches=False,
            context_fix="start it with --max-model-len 65536",
            tools_fix="start it with --enable-auto-tool-choice and the model family's --tool-call-parser",
        ),
        Kind(
            "apfel",
            "apfel (Apple Intelligence)",
            messages=False,
            forces_tools=False,
            caches=False,
            context_fix="Apple's model has 4096 tokens and no more: chat only",
            tools_fix="none: its context has no room for tools",
        ),
        Kind(
            "openai",
            "a server with OpenAI's API",
            messages=None,
            forces_tools=False,
            caches=False,
            context_fix="raise its context to 65536 tokens",
            tools_fix="look up in its manual how tool calls are parsed",
        ),
    )
}


class Found(NamedTuple):
    """A server that was recognised."""

    server: Server
    kind: Kind
    version: str
    models: tuple[Model, ...]

    @property
    def title(self) -> str:
        """`LM Studio 0.4.2 at http://127.0.0.1:1234`."""
        return f"{self.kind.title}{f' {self.version}' if self.version else ''} at {self.server.url}"


def identify(server: Server) -> Found:
    """What answers there. Raises Trouble when nothing does, LocalClaudeError when it is of no use."""
    reply = server.get("/v1/models")
    if reply.status in (401, 403):
        raise denied(server, reply)
    listed = _list(reply, "data")
    owners = {str(entry.get("owned_by", "")) for entry in listed}
    if "llmbox" in owners:
        return _gateway(server, listed)
    if any(entry.get("id") == "apple-foundationmodel" for entry in listed):
        return _apfel(server)
    if "llamacpp" in owners:
        return _llama(server, listed)
    if "vllm" in owners or any("max_model_len" in entry for entry in listed):
        return _vllm(server, listed)
    for recognise in (_lmstudio, _ollama):
        found = recognise(server)
        if found is not None:
            return found
    if reply.status == 200 and isinstance(reply.data, dict) and isinstance(reply.data.get("data"), list):
        return Found(server, KINDS["openai"], "", _models(listed))
    raise _useless(server, reply)


def denied(server: Server, reply: Reply) -> LocalClaudeError:
    """The refusal of a server that wants a key."""
    has = "refuses the key in LLMBOX_KEY" if server.key else "wants a key"
    return LocalClaudeError(
        EXIT_DENIED,
        f"{server.url} {has} ({reply.status}: {reply.message})",
        "export LLMBOX_KEY=... (an llmbox gateway: `ssh llm@HOST llmbox-key new NAME` makes one)",
    )


def speaks_messages(found: Found) -> bool:
    """Whether Claude Code can talk to it directly."""
    if found.kind.messages is not None:
        return found.kind.messages
    # Without a body it is refused for its shape where the path exists.
    reply = found.server.post("/v1/messages", {})
    unknown = reply.status in (404, 405, 501) or "Unexpected endpoint" in reply.text
    return not unknown


def context_of(found: Found, model: Model) -> int | None:
    """The context this model really has now; asks again what only a loaded model tells."""
    if found.kind.name == "ollama" and model.context is None:
        return _ollama_context(found.server, model.name)
    return model.context


def _useless(server: Server, reply: Reply) -> LocalClaudeError:
    content = reply.headers.get("content-type", "").split(";")[0] or "nothing"
    if reply.status in (301, 302, 307, 308):
        target = shown(reply.headers.get("location", ""))
        return LocalClaudeError(
            EXIT_WRONG_SERVER, f"{server.url} sends elsewhere, to {target}", "give that address with --host"
        )
    if reply.status >= 500:
        return LocalClaudeError(
            EXIT_WRONG_SERVER,
            f"{server.url} answers {reply.status} to /v1/models: {reply.message}",
            "look into the server's own log",
        )
    return LocalClaudeError(
        EXIT_WRONG_SERVER,
        f"{server.url} speaks HTTP but is no LLM server (/v1/models: {reply.status}, {shown(content)})",
        "correct --host or --port",
    )


def _list(reply: Reply, key: str) -> list[dict[str, Any]]:
    """The list of objects under `key`, empty where the answer has another shape."""
    found = reply.data.get(key) if reply.status == 200 and isinstance(reply.data, dict) else None
    listed = found if isinstance(found, list) else []
    return [entry for entry in listed[:MAX_MODELS] if isinstance(entry, dict)]


def _object(reply: Reply) -> dict[str, Any]:
    return reply.data if reply.status == 200 and isinstance(reply.data, dict) else {}


def _number(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _text(value: object) -> str:
    """A name as it may go to a terminal; one that would do something there is of no use as a name either."""
    return one_line(value) if isinstance(value, str) and 0 < len(value) <= MAX_NAME else ""


def _named(entries: list[dict[str, Any]], key: str = "id") -> Iterator[tuple[str, dict[str, Any]]]:
    for entry in entries:
        if name := _text(entry.get(key)):
            yield name, entry


def _models(entries: list[dict[str, Any]]) -> tuple[Model, ...]:
    return tuple(Model(name) for name, _ in _named(entries))


def _quietly(ask: Callable[[], Reply]) -> dict[str, Any]:
    """The object of a side question, empty where it gets no answer: the main one counts."""
    try:
        return _object(ask())
    except Trouble:
        return {}


def _properties(server: Server) -> tuple[str, int | None]:
    """Build and context per slot of a running llama-server."""
    properties = _quietly(lambda: server.get("/props"))
    settings = properties.get("default_generation_settings")
    context = _number(settings.get("n_ctx")) if isinstance(settings, dict) else None
    return _text(properties.get("build_info")), context


def _gateway(server: Server, listed: list[dict[str, Any]]) -> Found:
    models = []
    active = any(entry.get("state") == "active" for entry in listed)
    # The server itself knows what it really has; asking it starts nothing.
    version, real = _properties(server) if active else ("", None)
    for name, entry in _named(listed):
        context = _number(entry.get("context"))
        ready = entry.get("state") == "active"
        if ready:
            context = min(filter(None, (context, real)), default=None)
        aliases = entry.get("aliases")
        names = tuple(_text(alias) for alias in aliases) if isinstance(aliases, list) else ()
        models.append(Model(name, context, names, ready, _text(entry.get("description"))))
    return Found(server, KINDS["gateway"], version, tuple(models))


def _llama(server: Server, listed: list[dict[str, Any]]) -> Found:
    version, context = _properties(server)
    models = tuple(Model(name, context, ready=True) for name, _ in _named(listed))
    return Found(server, KINDS["llama"], version, models)


def _vllm(server: Server, listed: list[dict[str, Any]]) -> Found:
    version = _text(_quietly(lambda: server.get("/version")).get("version"))
    models = (Model(name, _number(entry.get("max_model_len")), ready=True) for name, entry in _named(listed))
    return Found(server, KINDS["vllm"], version, tuple(models))


def _apfel(server: Server) -> Found:
    health = _quietly(lambda: server.get("/health"))
    context = _number(health.get("context_window")) or APPLE_CONTEXT
    model = Model("apple-foundationmodel", context, ready=True)
    return Found(server, KINDS["apfel"], _text(health.get("version")), (model,))


def _lmstudio(server: Server) -> Found | None:
    """LM Studio since 0.4 by its own list of models, older ones by the list before that."""
    listed = _list(server.get("/api/v1/models"), "models")
    if any("loaded_instances" in entry for entry in listed):
        return Found(server, KINDS["lmstudio"], "", tuple(_lmstudio_models(listed)))
    older = _list(server.get("/api/v0/models"), "data")
    if not any("max_context_length" in entry for entry in older):
        return None
    models = tuple(
        Model(
            name,
            _number(entry.get("loaded_context_length")),
            ready=entry.get("state") == "loaded",
            note="" if entry.get("state") == "loaded" else "not loaded",
        )
        for name, entry in _named(older)
        if entry.get("type") != "embeddings"
    )
    return Found(server, KINDS["lmstudio"], "", models)


def _lmstudio_models(listed: list[dict[str, Any]]) -> Iterator[Model]:
    for name, entry in _named(listed, "key"):
        if entry.get("type") == "embedding":
            continue
        instances = entry.get("loaded_instances")
        instances = [one for one in instances if isinstance(one, dict)] if isinstance(instances, list) else []
        if not instances:
            yield Model(name, note="not loaded")
        for instance in instances:
            config = instance.get("config")
            context = _number(config.get("context_length")) if isinstance(config, dict) else None
            yield Model(_text(instance.get("id")) or name, context, ready=True)


def _ollama(server: Server) -> Found | None:
    version = _text(_object(server.get("/api/version")).get("version"))
    listed = _list(server.get("/api/tags"), "models") if version else []
    if not version:
        return None
    loaded = {name: _number(entry.get("context_length")) for name, entry in _ollama_loaded(server)}
    models = tuple(Model(name, loaded.get(name), ready=name in loaded) for name, _ in _named(listed, "name"))
    return Found(server, KINDS["ollama"], version, models)


def _ollama_loaded(server: Server) -> Iterator[tuple[str, dict[str, Any]]]:
    return _named(_list(server.get("/api/ps"), "models"), "name")


def _ollama_context(server: Server, model: str) -> int | None:
    """What a model that is not loaded would get: its own num_ctx, otherwise only the server knows."""
    described = _quietly(lambda: server.post("/api/show", {"model": model}))
    for line in str(described.get("parameters", "")).splitlines():
        words = line.split()
        if len(words) == 2 and words[0] == "num_ctx" and words[1].isdigit():
            return int(words[1])
    return None
