"""The filter client_files: every file of a client machine, from the boxes' presets and the client's facts.

A thin wrapper of llama_common.clients; the variables for Claude Code come from the one table of local_claude.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleFilterError  # type: ignore[import-untyped]

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "apps/llama_common/src"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "apps/local_claude/src"))

from llama_common import clients
from llama_common.clients import Box
from llama_common.plain import plain
from llama_common.presets import HostConfig
from llama_common.problems import InventoryError
from local_claude.environment import variables as claude_variables
from local_claude.llama import PRESETS
from local_claude.options import CONTEXT_FLOOR

DATA = tuple(HostConfig.model_fields)


def client_hosts(names: Sequence[str], hostvars: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a client needs of the data of these hosts, templated."""
    return [
        {
            "name": name,
            "login": str(hostvars[name].get("llm_user_name") or "llm"),
            "connection": {key: hostvars[name].get(key) for key in ("ansible_host", "ansible_port")},
            "data": {key: hostvars[name][key] for key in DATA if key in hostvars[name]},
        }
        for name in names
    ]


def client_files(
    hosts: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], options: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Every file of a client: {path | paths, kind: own|block|json, text | at + content, wanted}.

    `hosts` are those to log in to; `options` has the role's variables, its `servers` name the LLM boxes among
    them, the one that aliases mean first.
    """
    hosts, options = plain(hosts), plain(options)
    by_name = {host["name"]: host for host in hosts}
    try:
        found = [
            Box.of(
                name,
                by_name[name]["connection"],
                HostConfig.load(by_name[name]["data"]),
                by_name[name]["login"],
            )
            for name in options["servers"]
        ]
    except InventoryError as error:
        raise AnsibleFilterError(str(error)) from None
    home, mac = str(facts["user_dir"]), facts["system"] == "Darwin"
    own = f"{home}/.config/llmbox"
    read = shlex.quote(f"{own}/shell.sh")
    login_shell = str(facts["user_shell"]).rpartition("/")[2]
    entries = clients.aliases(found, f"{home}/.local/bin/local-claude", options["alias_prefix"])
    reached = {name: clients.reached(name, host["connection"]) for name, host in by_name.items()}
    shells = options["shells"]
    box = found[0] if found else None
    model = box.chosen(options["model"]) if box else ""
    providers = clients.opencode_providers(found)
    return [
        {
            "path": f"{own}/shell.sh",
            "kind": "own",
            "text": clients.shell_text(entries, f"{home}/.local/bin"),
            "wanted": bool(shells),
        },
        {
            "path": PRESETS[0].replace("~", home, 1),
            "kind": "own",
            "text": f"{json.dumps(clients.local_presets(found), indent=1)}\n",
            "wanted": bool(found),
        },
        *(
            {
                "paths": [f"{home}/{name}" for name in _start_files(shell, mac)],
                "kind": "block",
                "text": f"[ ! -r {read} ] || . {read}",
                "make": shell == login_shell,
                "wanted": shell in shells,
            }
            for shell in ("bash", "zsh")
        ),
        {
            "path": f"{own}/ssh_config",
            "kind": "own",
            "text": clients.ssh_text(reached),
            "wanted": options["ssh"],
        },
        {
            "paths": [f"{home}/.ssh/config"],
            "kind": "block",
            "text": f'Include "{own}/ssh_config"',
            "make": True,
            "wanted": options["ssh"],
        },
        {
            "path": f"{home}/{'Library/Application Support' if mac else '.config'}/Code/User/settings.json",
            "kind": "json",
            "at": ["claudeCode.environmentVariables"],
            "content": _vscode(box, model, home) if box else [],
            "wanted": options["vscode"] and bool(model),
        },
        {
            "path": f"{home}/.config/opencode/opencode.json",
            "kind": "json",
            "at": ["provider"],
            "content": providers,
            "wanted": options["opencode"] and bool(providers),
        },
    ]


def _start_files(shell: str, mac: bool) -> list[str]:
    """What a shell reads at its start: the first that is there counts, or the last is made.

    Terminals of macOS open login shells.
    """
    if shell == "zsh":
        return [".zshrc"]
    return [".bash_profile", ".bash_login", ".profile", ".bash_profile"] if mac else [".bashrc"]


def _vscode(box: Box, model: str, home: str) -> list[dict[str, str]]:
    """The extension's variables: those that local-claude sets. A key is nobody's to write into a file."""
    context = box.presets[model].context_per_slot if model else CONTEXT_FLOOR
    wanted = {"CLAUDE_CONFIG_DIR": f"{home}/.claude-local", **claude_variables(box.url, "", model, context)}
    if box.keyed:
        del wanted["ANTHROPIC_AUTH_TOKEN"]
    return [{"name": name, "value": value} for name, value in wanted.items()]


class FilterModule:
    """The filters of this file, for Ansible."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Name to function."""
        return {"client_hosts": client_hosts, "client_files": client_files}
