#!/usr/bin/python3
"""Ansible module: the models that an Ollama has, by name and digest."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ansible.module_utils.basic import AnsibleModule  # type: ignore[import-untyped]

DOCUMENTATION = r"""
---
module: ollama_models
short_description: Pull the models that an Ollama lacks
description:
  - Waits until the server answers, and pulls each model that it lacks or has with another digest. One that
    came with another digest than the wanted one is deleted again.
  - Models that are not named are left alone.
options:
  url: {description: The server's base URL., type: str, required: true}
  models:
    description: "Models, C(name) and where wanted C(digest)."
    type: list
    elements: dict
    required: true
  start_timeout: {description: Seconds until it must answer., type: int, default: 60}
  stall_timeout: {description: Seconds without a sign of progress., type: int, default: 300}
author: [llmbox]
"""

EXAMPLES = r"""
- name: Have the model
  ollama_models:
    url: http://127.0.0.1:11434
    models: [{name: "qwen2.5:14b"}]
"""

RETURN = r"""
pulled: {description: Names of the models that were brought in., type: list, returned: always}
"""

MAX_LINE = 1024 * 1024
ANSWER_TIMEOUT_S = 30
# A proxy of the environment is for the world outside.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Refused(Exception):
    """Something is not as it must be; the text is one line for the person."""


def lines(
    url: str, path: str, timeout_s: float, body: Mapping[str, Any] | None = None, method: str | None = None
) -> Iterator[dict[str, Any]]:
    """The JSON objects of an answer, one a line. Raises OSError, ValueError."""
    request = urllib.request.Request(  # noqa: S310 - the role makes it http://
        url + path,
        None if body is None else json.dumps(body).encode(),
        {"Content-Type": "application/json"},
        method=method,
    )
    with OPENER.open(request, timeout=timeout_s) as answer:
        while line := answer.readline(MAX_LINE):
            if line.strip():
                found = json.loads(line)
                if not isinstance(found, dict):
                    raise ValueError("an answer that is no JSON object")
                yield found


def full_name(name: str) -> str:
    """A name with its tag, as the server lists it."""
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def present(url: str) -> dict[str, str]:
    """Digest by name. Raises OSError, ValueError."""
    listed = next(lines(url, "/api/tags", ANSWER_TIMEOUT_S), {}).get("models") or []
    return {
        str(model["name"]): str(model.get("digest", "")).removeprefix("sha256:")
        for model in listed
        if isinstance(model, dict) and model.get("name")
    }


def wait(url: str, timeout_s: float) -> dict[str, str]:
    """What it has, once it answers. Raises Refused."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return present(url)
        except (OSError, ValueError) as error:
            if time.monotonic() > deadline:
                raise Refused(
                    f"{url} did not answer within {timeout_s:.0f} s ({error});"
                    " look with: journalctl -u ollama"
                ) from None
            time.sleep(0.3)


def pull(url: str, name: str, stall_timeout_s: float) -> None:
    """Bring a model in. Raises Refused."""
    last: dict[str, Any] = {}
    try:
        for last in lines(url, "/api/pull", stall_timeout_s, {"model": name, "stream": True}):
            if "error" in last:
                break
    except urllib.error.HTTPError as error:
        with error:
            said = error.read(MAX_LINE).decode(errors="replace")
        last = {"error": f"HTTP {error.code} {' '.join(said.split())[:200]}"}
    except (OSError, ValueError) as error:
        last = {"error": f"{type(error).__name__}: {error}"}
    if last.get("status") != "success":
        reason = last.get("error") or f"it ended with {last.get('status', 'nothing')!r}"
        raise Refused(
            f"ollama_models: {name} was not pulled: {reason}; fix: correct its name, or run it again"
        )


def lacking(models: Sequence[Mapping[str, Any]], having: Mapping[str, str]) -> list[Mapping[str, Any]]:
    """The models that are not there, or are others than the wanted."""
    return [
        model
        for model in models
        if full_name(model["name"]) not in having or wrong(model, having[full_name(model["name"])])
    ]


def wrong(model: Mapping[str, Any], digest: str) -> bool:
    """Whether a model must have another digest than it has."""
    return bool(model.get("digest")) and str(model["digest"]).lower() != digest.lower()


def apply(wanted: Mapping[str, Any], check: bool) -> dict[str, Any]:
    """Compare, and unless this is a dry run, converge. Raises Refused, OSError, ValueError."""
    url, models = wanted["url"], wanted["models"]
    if check:
        try:
            missing = lacking(models, present(url))
        except (OSError, ValueError):  # a new host
            missing = list(models)
        return {"changed": bool(missing), "pulled": [model["name"] for model in missing]}
    missing = lacking(models, wait(url, wanted["start_timeout"]))
    for model in missing:
        pull(url, model["name"], wanted["stall_timeout"])
        digest = present(url).get(full_name(model["name"]), "")
        if wrong(model, digest):
            for _ in lines(url, "/api/delete", ANSWER_TIMEOUT_S, {"model": model["name"]}, "DELETE"):
                pass
            raise Refused(
                f"ollama_models: {model['name']} has the digest {digest or 'none'}, not {model['digest']},"
                " and was deleted again; fix: find out why, then correct its digest"
            )
    return {"changed": bool(missing), "pulled": [model["name"] for model in missing]}


def main() -> None:
    """Module entry point."""
    module = AnsibleModule(
        argument_spec={
            "url": {"type": "str", "required": True},
            "models": {"type": "list", "elements": "dict", "required": True},
            "start_timeout": {"type": "int", "default": 60},
            "stall_timeout": {"type": "int", "default": 300},
        },
        supports_check_mode=True,
    )
    try:
        result = apply(module.params, module.check_mode)
    except (Refused, OSError, ValueError) as error:
        module.fail_json(msg=str(error))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
