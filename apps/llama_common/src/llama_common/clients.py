"""What a client machine is told about the LLM boxes: aliases, SSH entries, providers, all from the presets.

Pure: the inventory's data goes in, texts and settings come out.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, Final

from llama_common.fields import Address
from llama_common.presets import HostConfig, Preset
from llama_common.problems import Problem

# By its first words the role local_claude knows a file of ours.
MANAGED: Final = "Managed by llmbox: roles/local_claude."
VERBS: Final = ("off", "sleep", "status", "logs")
MAX_OUTPUT: Final = 16384
SSH_PORT: Final = 22
KEY_VARIABLE: Final = "LLMBOX_KEY"


@dataclass(frozen=True)
class Box:
    """One LLM box as a client sees it. `login` is who runs lmswitch there; `host` is where it is reached."""

    name: str
    host: str
    ssh_port: int
    login: str
    config: HostConfig

    @classmethod
    def of(cls, name: str, variables: Mapping[str, Any], config: HostConfig, login: str) -> Box:
        """From a host's connection variables and its data."""
        return cls(name, *reached(name, variables), login, config)

    @property
    def gateway(self) -> tuple[str, int]:
        """Address and port of the gateway: the first that other machines reach."""
        fronts = [Address.parse(front) for front in self.config.llm_gateway_listen]
        outside = [front for front in fronts if not ip_address(front.host).is_loopback]
        front = (outside or fronts)[0]
        address = ip_address(front.host)
        host = self.host if address.is_unspecified or address.is_loopback else front.host
        return host, front.port or 0

    @property
    def url(self) -> str:
        """The gateway's URL."""
        host, port = self.gateway
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    @property
    def keyed(self) -> bool:
        """Whether clients need a key."""
        return bool(self.config.llm_gateway_keys)

    @property
    def presets(self) -> dict[str, Preset]:
        """Those behind the gateway."""
        return {name: self.config.llama_presets[name] for name in self.config.user_presets}

    def chosen(self, wanted: str = "") -> str:
        """The preset for a program that is told one: the wanted, the default or an agent's; or ""."""
        agents = [name for name, preset in self.presets.items() if preset.agent]
        found = [wanted, self.config.llm_gateway_default_preset, *agents, *self.presets]
        return next((name for name in found if name in self.presets), "")


def reached(name: str, variables: Mapping[str, Any]) -> tuple[str, int]:
    """Address and SSH port of a host, from its connection variables."""
    return str(variables.get("ansible_host") or name), int(variables.get("ansible_port") or SSH_PORT)


def aliases(boxes: Sequence[Box], tool: str, prefix: str = "ll") -> dict[str, str]:
    """Shell aliases, name to command line. The first box has the short names, others theirs behind a dash.

    `tool` is local-claude as it is found without PATH.
    """
    found: dict[str, str] = {}
    for box in boxes:
        suffix = f"-{box.name}" if found else ""
        lmswitch = shlex.join(["ssh", f"{box.login}@{box.name}", "lmswitch"])
        fresh = {}
        for name, preset in box.presets.items():
            for word in (name, *preset.aliases):
                fresh[f"{prefix}{word}{suffix}"] = f"{lmswitch} {name}"
        fresh |= {f"{prefix}{verb}{suffix}": f"{lmswitch} {verb}" for verb in VERBS}
        host, port = box.gateway
        for name, preset in box.presets.items():
            if preset.agent:
                command = shlex.join([tool, "--host", host, "--port", str(port), "--model", name])
                fresh[f"srl-{name}{suffix}"] = shlex.join(["specstory", "run", "claude", "-c", command])
        found |= fresh
    return found


def shell_text(entries: Mapping[str, str], bin_dir: str) -> str:
    """A file that bash and zsh read: the aliases, and the tool's folder on PATH."""
    folder = shlex.quote(bin_dir)
    return "".join(
        [
            f"# {MANAGED} From the presets of the inventory; for bash and zsh.\n",
            f'case ":$PATH:" in *:{folder}:*) ;; *) PATH={folder}:"$PATH" ;; esac\n',
            *(f"alias {name}={shlex.quote(command)}\n" for name, command in entries.items()),
        ]
    )


def ssh_text(boxes: Mapping[str, tuple[str, int]]) -> str:
    """Entries for ssh_config, from name to address and port. Who logs in stays the person's own choice."""
    lines = [f"# {MANAGED}"]
    for name, (host, port) in boxes.items():
        lines += [f"Host {name}", f"  HostName {host}", *([f"  Port {port}"] if port != SSH_PORT else [])]
    return "\n".join(lines) + "\n"


def client_problems(variables: Mapping[str, Any], servers: Mapping[str, Sequence[str]]) -> list[Problem]:
    """What is wrong with a client's variables beside the LLM boxes there are, with their presets' names."""
    named, model = variables.get("local_claude_servers"), variables.get("local_claude_model")
    known = ", ".join(servers) or "none"
    found = [
        Problem(
            ("local_claude_servers", str(index)),
            name,
            "is no host of the group llm_servers",
            f"there is: {known}",
        )
        for index, name in enumerate(named or [])
        if name not in servers
    ]
    if found or not model:
        return found
    first = next(iter(servers if named is None else named), "")
    if model in servers.get(first, []):
        return []
    presets = ", ".join(servers.get(first, [])) or "none"
    what = f"is no preset of {first or 'any LLM box'}"
    return [Problem(("local_claude_model",), model, what, f"there is: {presets}")]


# What a preset says about a server that a client starts for itself; the rest is the box's own affair.
LOCAL: Final = (
    *("description", "context", "kv_cache_type", "n_gpu_layers", "n_cpu_moe", "threads", "flash_attention"),
    *("parallel", "agent", "jinja", "extra_args"),
)


def local_presets(boxes: Sequence[Box]) -> dict[str, Any]:
    """What `local-claude --backend llama` reads: each preset's flags and its model's file, by name.

    Of two boxes with a preset of one name the first counts.
    """
    found: dict[str, Any] = {}
    for box in boxes:
        for name, preset in box.presets.items():
            said = preset.model_dump(mode="json", include=set(LOCAL), exclude_none=True)
            found.setdefault(name, {"file": box.config.files(preset.model)[0].file, **said})
    return {"comment": MANAGED, "version": 1, "presets": found}


def opencode_providers(boxes: Sequence[Box]) -> dict[str, Any]:
    """Providers for OpenCode, one a box, with the context that each preset really gives a request."""
    return {
        f"llmbox-{box.name}": {
            "npm": "@ai-sdk/openai-compatible",
            "name": f"llmbox {box.name}",
            "options": {
                "baseURL": f"{box.url}/v1",
                **({"apiKey": f"{{env:{KEY_VARIABLE}}}"} if box.keyed else {}),
            },
            "models": {
                name: {
                    "name": preset.description,
                    "limit": {
                        "context": preset.context_per_slot,
                        "output": min(MAX_OUTPUT, preset.context_per_slot // 8),
                    },
                }
                for name, preset in box.presets.items()
            },
        }
        for box in boxes
        if box.presets
    }
