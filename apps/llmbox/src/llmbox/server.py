"""A client of llama-server: health, context and work in flight, over TCP or a UNIX socket."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import httpx

from llmbox.wait_ready import reachable

TIMEOUT_S = 1.0


class LlamaServer:
    """The llama-server at a listen address: `host:port`, or the absolute path of a UNIX socket."""

    def __init__(self, listen: str, timeout_s: float = TIMEOUT_S) -> None:
        if listen.startswith("/"):
            transport, base = httpx.HTTPTransport(uds=listen, verify=False), "http://localhost"
        else:
            host, port = reachable(listen)
            transport = httpx.HTTPTransport(verify=False)
            base = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self._http = httpx.Client(transport=transport, base_url=base, timeout=timeout_s, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def health(self) -> str:
        """`ok`, `loading` (503 while the model is read), or `silent` (no answer of a llama-server)."""
        try:
            status = self._http.get("/health").status_code
        except httpx.HTTPError:
            return "silent"
        return {200: "ok", 503: "loading"}.get(status, "silent")

    def context(self) -> int | None:
        """Tokens of context the server really has, perhaps less than asked for; None when it does not say."""
        properties = self._json("/props")
        settings = properties.get("default_generation_settings", {}) if isinstance(properties, dict) else {}
        context = settings.get("n_ctx") if isinstance(settings, dict) else None
        return context if isinstance(context, int) else None

    def in_flight(self) -> int:
        """Requests being worked on now; 0 when the server does not say."""
        slots = self._json("/slots")
        if not isinstance(slots, list):
            return 0
        return sum(1 for slot in slots if isinstance(slot, dict) and slot.get("is_processing"))

    def canary(self) -> str:
        """Have it generate a few tokens, none of them from a cache. Returns "", or why it did not."""
        prompt = {"prompt": "1 2 3 4", "n_predict": 4, "temperature": 0, "cache_prompt": False}
        try:
            reply = self._http.post("/completion", json=prompt)
            generated = reply.json().get("tokens_predicted") if reply.status_code == 200 else None
        except (httpx.HTTPError, ValueError, AttributeError) as error:
            return f"{type(error).__name__}: {error}"
        if not generated:
            return f"HTTP status {reply.status_code}, {generated or 'no'} tokens"
        return ""

    def _json(self, path: str) -> Any:
        try:
            reply = self._http.get(path)
            return reply.json() if reply.status_code == 200 else None
        except (httpx.HTTPError, ValueError):
            return None
