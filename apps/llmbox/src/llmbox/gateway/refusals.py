"""What a client is told when its request cannot be served, in the words of the protocol that it speaks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Literal

Protocol = Literal["openai", "anthropic", "llama"]

# Error types as the Anthropic API names them: https://docs.anthropic.com/en/api/errors
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
# ... and as llama-server names them (tools/server/server-common.cpp, format_error_response).
_OPENAI_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "unavailable_error",
}


class Refusal(Exception):
    """A request that gets no answer of a model: the HTTP status, one line for a person, response headers."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = dict(headers or {})


def error_object(protocol: Protocol, refusal: Refusal) -> dict[str, object]:
    """The protocol's own error object."""
    fault = 400 <= refusal.status < 500
    if protocol == "anthropic":
        kind = _ANTHROPIC_TYPES.get(refusal.status) or ("invalid_request_error" if fault else "api_error")
        return {"type": "error", "error": {"type": kind, "message": refusal.message}}
    kind = _OPENAI_TYPES.get(refusal.status) or ("invalid_request_error" if fault else "server_error")
    return {"error": {"message": refusal.message, "type": kind, "param": None, "code": refusal.status}}


def error_body(protocol: Protocol, refusal: Refusal) -> bytes:
    """The body of a response that carries the refusal."""
    return json.dumps(error_object(protocol, refusal)).encode()


def error_event(protocol: Protocol, refusal: Refusal) -> bytes:
    """The refusal as an event of a stream that has begun already.

    The blank line before it ends an event that a lost server may have left unfinished.
    """
    data = error_body(protocol, refusal)
    name = b"event: error\n" if protocol == "anthropic" else b""
    return b"\n\n" + name + b"data: " + data + b"\n\n"
