"""Filters over the inventory's data: thin wrappers of llama_common, so that roles derive nothing in Jinja.

`variables` is a dict of llama_cpp_builds, gguf_models, llama_presets and, where they are set, of the other
variables that HostConfig names.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleFilterError  # type: ignore[import-untyped]

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "apps/llama_common/src"))

from llama_common import derive, router, units
from llama_common.plain import plain
from llama_common.presets import HostConfig
from llama_common.problems import InventoryError


def _derived(variables: Mapping[str, Any], function: Callable[[HostConfig], Any]) -> Any:
    """The result of `function` for checked data. Raises AnsibleFilterError with one line."""
    try:
        return function(HostConfig.load(plain(variables)))
    except InventoryError as error:
        raise AnsibleFilterError(str(error)) from None


def llama_builds(variables: Mapping[str, Any]) -> Any:
    """What to build: {name: {repo, commit, cmake_options}}."""
    return _derived(variables, derive.builds_plan)


def llama_models(variables: Mapping[str, Any]) -> Any:
    """What to install: [{name, used_by, files: [{file, url, path, sha256, size}]}]."""
    return _derived(variables, derive.models_plan)


def llama_presets_plan(
    variables: Mapping[str, Any],
    models_dir: str,
    releases_root: str = derive.DEFAULT_RELEASES_ROOT,
    listen: str | None = None,
    dialects: Mapping[str, str | None] | None = None,
) -> Any:
    """Every preset with its unit, command, address, model path and relations to other units."""
    return _derived(
        variables,
        lambda config: derive.presets_plan(
            config, models_dir=models_dir, releases_root=releases_root, listen=listen, dialects=dialects
        ),
    )


def llm_router_files(names: Sequence[str], hostvars: Mapping[str, Any], **options: Any) -> Any:
    """`config.yaml` and `router.json` of a router for the LLM boxes `names`."""
    boxes = [
        {
            "name": str(name),
            "address": str(hostvars[name].get("ansible_host") or name),
            "listen": plain(hostvars[name].get("llm_gateway_listen")),
            "presets": plain(hostvars[name].get("llama_presets") or {}),
        }
        for name in names
    ]
    try:
        return router.router_files(boxes, plain(options))
    except router.RouterProblem as error:
        raise AnsibleFilterError(str(error)) from None


def systemd_quote(argv: Sequence[str]) -> str:
    """A command line for ExecStart=."""
    try:
        return units.systemd_quote([str(argument) for argument in argv])
    except ValueError as error:
        raise AnsibleFilterError(f"systemd_quote: {error}") from None


class FilterModule:
    """The filters of this file, for Ansible."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Name to function."""
        return {
            "llama_builds": llama_builds,
            "llama_models": llama_models,
            "llama_presets_plan": llama_presets_plan,
            "llm_router_files": llm_router_files,
            "systemd_quote": systemd_quote,
        }
