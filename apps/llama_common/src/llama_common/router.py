"""What a router needs, worked out from the presets of all LLM boxes: LiteLLM's list of models, and more.

Each user preset of each box is there twice: under its name in OpenAI's protocol, and under `NAME@messages`
in Anthropic's, so that a request reaches the gateway in the protocol in which it came. Boxes that have a
preset of the same name share its requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from ipaddress import ip_address
from typing import Any, Final

from pydantic import ValidationError

from llama_common.fields import Address
from llama_common.presets import Preset
from llama_common.problems import HIDDEN, Problem

MESSAGES: Final = "@messages"
CLOUD: Final = "cloud"
"""The name of the model in the cloud; no preset may have it while there is one."""

DEFAULT_LISTEN: Final = ("0.0.0.0:1234",)
UNUSED_KEY: Final = "none"


class RouterProblem(Exception):
    """What cannot be routed; the message is one line."""


def base_url(address: str, listen: Sequence[str]) -> str:
    """Where other machines reach the gateway of a box; "" when only the box itself does."""
    fronts = [Address.parse(one) for one in listen]
    front = next((front for front in fronts if not ip_address(front.host).is_loopback), None)
    if front is None:
        return ""
    host = address if ip_address(front.host).is_unspecified else front.host
    return f"http://[{host}]:{front.port}" if ":" in host else f"http://{host}:{front.port}"


def router_problems(
    boxes: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
) -> Iterator[tuple[str, Problem]]:
    """What is wrong with a router beside the boxes there are, each with the box that it is about, or "".

    `boxes` are {name, address, listen, presets}.
    """
    names = [str(box["name"]) for box in boxes]
    for name in options["box_keys"]:
        if name not in names:
            known = ", ".join(names) or "none"
            path = ("litellm_router_box_keys", str(name))
            yield "", Problem(path, HIDDEN, "is no host of llm_servers", f"name one of {known}")
    cloud = str(options["cloud_model"])
    if cloud and not options["cloud_key"]:
        fix = "set litellm_router_cloud_key from Ansible Vault"
        yield "", Problem(("litellm_router_cloud_model",), cloud, "has no key", fix)
    for name, box in zip(names, boxes, strict=True):
        listen = list(box["listen"] or DEFAULT_LISTEN)
        if not base_url(name, listen):
            message = "can be reached from the box itself only, and a router is to use it"
            yield name, Problem(("llm_gateway_listen",), listen, message, f"add an address of {name}")
        if cloud and CLOUD in _user_presets(box):
            message = f"is what the router's cloud model {cloud} is called"
            yield name, Problem(("llama_presets", CLOUD), "…", message, "give the preset another name")


def router_files(boxes: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> dict[str, Any]:
    """`config.yaml` and `router.json`. `boxes` are {name, address, listen, presets}. Raises RouterProblem."""
    for name, problem in router_problems(boxes, options):
        raise RouterProblem(problem.line(name or "routers"))
    keys, cloud = dict(options["box_keys"]), str(options["cloud_model"])
    models: list[dict[str, Any]] = []
    listed: list[dict[str, Any]] = []
    contexts: dict[str, int] = {}
    for box in boxes:
        url = base_url(str(box["address"]), list(box["listen"] or DEFAULT_LISTEN))
        key = str(keys.get(box["name"]) or "")
        listed.append({"name": box["name"], "url": url, "key": key})
        for preset in _user_presets(box):
            context = _context(str(box["name"]), preset, box["presets"][preset])
            contexts[preset] = min(context, contexts.get(preset, context))
            models += _of_preset(str(box["name"]), preset, url, key or UNUSED_KEY)
    if cloud:
        models += _of_cloud(cloud, str(options["cloud_api_base"]), str(options["cloud_key"]))
    return {"config.yaml": _litellm(models, options), "router.json": _settings(listed, contexts, options)}


def _user_presets(box: Mapping[str, Any]) -> list[str]:
    return [str(name) for name, data in box["presets"].items() if data.get("scope", "user") == "user"]


def _context(box: str, name: str, data: Mapping[str, Any]) -> int:
    try:
        return Preset.model_validate(data).context_per_slot
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        path = ("llama_presets", name, *(str(part) for part in first["loc"]))
        fix = "correct it; playbooks/validate.yml says more"
        raise RouterProblem(Problem(path, HIDDEN, first["msg"], fix).line(box)) from None


def _of_preset(box: str, preset: str, url: str, key: str) -> list[dict[str, Any]]:
    return [
        {
            "model_name": f"{preset}{suffix}",
            "litellm_params": {"model": f"{provider}/{preset}", "api_base": base, "api_key": key},
            "model_info": {"id": f"{box}/{preset}{suffix}", "box": box},
        }
        for suffix, provider, base in (("", "openai", f"{url}/v1"), (MESSAGES, "anthropic", url))
    ]


def _of_cloud(model: str, api_base: str, key: str) -> list[dict[str, Any]]:
    params = {"model": model, **({"api_base": api_base} if api_base else {}), "api_key": key}
    return [
        {
            "model_name": f"{CLOUD}{suffix}",
            "litellm_params": params,
            "model_info": {"id": f"{CLOUD}{suffix}", "cloud": True},
        }
        for suffix in ("", MESSAGES)
    ]


def _litellm(models: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model_list": list(models),
        "litellm_settings": {
            "callbacks": ["llm_router.hook.router_hook"],
            "request_timeout": options["request_timeout"],
            "drop_params": True,
            "telemetry": False,
            "turn_off_message_logging": True,
        },
        "router_settings": {
            "routing_strategy": "simple-shuffle",  # among those that the hook leaves
            "num_retries": options["retries"],
            # The hook chooses among the boxes that live, and none twice for a request.
            "disable_cooldowns": True,
        },
        "general_settings": {"custom_auth": "llm_router.hook.authenticate"},
    }


def _settings(
    boxes: Sequence[Mapping[str, Any]], contexts: Mapping[str, int], options: Mapping[str, Any]
) -> dict[str, Any]:
    same = (
        *("listen", "keys", "tool_retries", "hold_size", "hold_seconds", "health_interval", "stop_seconds"),
        *("log_max_size", "log_keep", "egress_content", "state_dir"),
    )
    chosen = {name: options[name] for name in same}
    cloud = CLOUD if options["cloud_model"] else ""
    # A request may come to any box that has the preset: what all of them have room for.
    models = [{"name": name, "context": context} for name, context in contexts.items()]
    return {"version": 1, "boxes": list(boxes), "models": models, "cloud": cloud, **chosen}
