"""What a gateway says when it does not do what it was asked for."""

from __future__ import annotations

import httpx

KEY_VARIABLE = "LLMBOX_KEY"


def refusal(reply: httpx.Response) -> str:
    """Why the gateway did not do it, in its own words where it has some, and the fix where there is one."""
    try:
        body = reply.json()
        said = body.get("reason") or body["error"]["message"]
    except (ValueError, KeyError, TypeError, AttributeError):
        said = reply.reason_phrase
    fix = f"; fix: {KEY_VARIABLE}=KEY in the environment" if reply.status_code == 401 else ""
    return f"HTTP {reply.status_code}: {said}{fix}".splitlines()[0]
