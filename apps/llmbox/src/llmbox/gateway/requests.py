"""Which requests the gateway knows, and what it reads in one: the model that it names, if it streams."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from llmbox.gateway.refusals import Protocol, Refusal

ALONE = b"x-llmbox-alone"  # the header of a measurement: no other request runs beside it
TOO_LONG = "the measurement took longer than half of hold_timeout"  # in the refusal that ends one
PARTS_LIMIT = 1_000_000
READ = ("model", "stream")  # what the gateway itself reads in a body
MODEL_NAME_LIMIT = 200  # characters; the longest name of a model in use is well below


@dataclass(frozen=True)
class Route:
    """A route of llama-server that is passed through.

    `slot`: it generates, so it takes one of the preset's slots.
    `streams`: its answer is a stream when the body asks for one; others ignore that.
    `reads_body`: its body is JSON, and may name a model.
    `reads`: it only reads what the server is; nothing is started for it, and it keeps nothing loaded.
    """

    method: str
    path: str
    protocol: Protocol
    slot: bool = True
    streams: bool = False
    reads_body: bool = True
    reads: bool = False


def _routes() -> dict[tuple[str, str], Route]:
    openai = ("/chat/completions", "/v1/chat/completions", "/v1/completions", "/responses", "/v1/responses")
    llama = ("/completion", "/completions", "/infill")
    vectors = ("/v1/embeddings", "/v1/rerank", "/v1/reranking")
    llama_vectors = ("/embedding", "/embeddings", "/rerank", "/reranking")
    counters = (
        "/tokenize",
        "/detokenize",
        "/apply-template",
        "/chat/completions/input_tokens",
        "/v1/chat/completions/input_tokens",
        "/responses/input_tokens",
        "/v1/responses/input_tokens",
    )
    routes = [
        *(Route("POST", path, "openai", streams=True) for path in openai),
        *(Route("POST", path, "llama", streams=True) for path in llama),
        *(Route("POST", path, "openai") for path in vectors),
        *(Route("POST", path, "llama") for path in llama_vectors),
        Route("POST", "/v1/messages", "anthropic", streams=True),
        Route("POST", "/v1/messages/count_tokens", "anthropic", slot=False),
        *(Route("POST", path, "llama", slot=False) for path in counters),
        Route("GET", "/props", "llama", slot=False, reads_body=False, reads=True),
    ]
    return {(route.method, route.path): route for route in routes}


ROUTES = _routes()


def protocol_of(path: str) -> Protocol:
    """In whose words an error about this path is told."""
    return "anthropic" if path.startswith("/v1/messages") else "openai"


@dataclass(frozen=True)
class Asked:
    """What a body asks for. `model` is None when it names none.

    `several`: it has a list of prompts, of which llama-server's figures may tell the last one alone.
    """

    model: str | None = None
    stream: bool = False
    several: bool = False


class _Pairs(dict[str, Any]):
    """A JSON object that remembers which of the keys that are READ it was given twice."""

    twice: frozenset[str] = frozenset()


def _pairs(pairs: list[tuple[str, Any]]) -> _Pairs:
    found = _Pairs(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        if twice := [key for key in READ if keys.count(key) > 1]:
            found.twice = frozenset(twice)
    return found


def _a_number(_: str) -> float:
    return 0.0


def read_body(body: bytes) -> Asked:
    """What the JSON body of a request asks for. Raises Refusal(400) for one that says no clear thing."""
    # Parsed, a value of two bytes takes a hundred and its time; in text these count as well.
    parts = sum(map(body.count, (b",", b"{", b"[")))
    if parts > PARTS_LIMIT:
        raise Refusal(413, f"the body has {parts} commas and brackets; the limit is {PARTS_LIMIT}")
    try:
        # Numbers mean nothing here. Read in C, a body of nothing else would hold up all other requests.
        found = json.loads(
            body.decode("utf-8"), object_pairs_hook=_pairs, parse_int=_a_number, parse_float=_a_number
        )
    except UnicodeDecodeError as error:
        raise Refusal(400, f"the body is not UTF-8: byte {error.start} is {body[error.start]:#04x}") from None
    except json.JSONDecodeError as error:
        raise Refusal(400, f"the body is not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise Refusal(400, "the body is not usable JSON: it is nested too deeply") from None
    if not isinstance(found, _Pairs):
        raise Refusal(400, f"the body must be a JSON object, not {_kind(found)}")
    # Another reader may take the other one of two: what is meant must not depend on who reads it.
    for key in READ:
        if key in found.twice:
            raise Refusal(400, f"the body has {key!r} twice; send it once")
    model, stream = found.get("model"), found.get("stream")
    if model is not None and not isinstance(model, str):
        raise Refusal(400, f"'model' must be a string, not {_kind(model)}")
    if model is not None and len(model) > MODEL_NAME_LIMIT:
        raise Refusal(400, f"'model' has {len(model)} characters; the limit is {MODEL_NAME_LIMIT}")
    if stream is not None and not isinstance(stream, bool):
        raise Refusal(400, f"'stream' must be true or false, not {_kind(stream)}")
    prompt = found.get("prompt")
    several = isinstance(prompt, list) and len(prompt) > 1 and isinstance(prompt[0], str | list)
    return Asked(model or None, bool(stream), several)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return next((name for kind, name in names.items() if isinstance(value, kind)), "a number")
