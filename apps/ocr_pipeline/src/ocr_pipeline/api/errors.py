"""What a client is told when its request cannot be served: Google's error object, one line for a person."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil
from typing import Any

# google.rpc.Code by HTTP status, as Google's own clients read it.
STATUSES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    405: "UNIMPLEMENTED",
    408: "DEADLINE_EXCEEDED",
    409: "ABORTED",
    413: "INVALID_ARGUMENT",
    415: "INVALID_ARGUMENT",
    429: "RESOURCE_EXHAUSTED",
    499: "CANCELLED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
DOMAIN = "ocr-pipeline"


@dataclass(frozen=True)
class Queue:
    """Where a request stands: images before it, and the seconds until they are done (None: not known yet)."""

    position: int
    estimate_s: float | None = None


@dataclass(eq=False)
class Refusal(Exception):
    """A request that gets no reading. `reason` is for machines, `message` is one line for a person."""

    code: int
    reason: str
    message: str
    retry_after_s: float | None = None
    queue: Queue | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__(self.message)

    @property
    def status(self) -> str:
        """The name of the error in Google's terms."""
        return STATUSES.get(self.code) or ("INVALID_ARGUMENT" if 400 <= self.code < 500 else "INTERNAL")

    def body(self) -> dict[str, Any]:
        """The error object; `details` as google.rpc has them."""
        details: list[dict[str, Any]] = [
            {
                "@type": "type.googleapis.com/google.rpc.ErrorInfo",
                "reason": self.reason,
                "domain": DOMAIN,
                "metadata": self._metadata(),
            }
        ]
        if self.retry_after_s is not None:
            delay = f"{ceil(self.retry_after_s)}s"
            details.append({"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay})
        error = {"code": self.code, "message": self.message, "status": self.status, "details": details}
        return {"error": error}

    def _metadata(self) -> dict[str, str]:
        if self.queue is None:
            return {}
        told = {"queuePosition": str(self.queue.position)}
        if self.queue.estimate_s is not None:
            told["estimateSeconds"] = f"{self.queue.estimate_s:.0f}"
        return told

    def all_headers(self) -> dict[str, str]:
        """The answer's headers: Retry-After where a later attempt may succeed."""
        if self.retry_after_s is None:
            return dict(self.headers)
        return {**self.headers, "Retry-After": str(max(1, ceil(self.retry_after_s)))}


def invalid(reason: str, message: str, code: int = 400) -> Refusal:
    """A request that is wrong as it is: repeating it does not help."""
    return Refusal(code, reason, message)
