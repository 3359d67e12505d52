"""What an LLM box must look like, worked out from its variables: the same data that the roles work with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from llama_common.derive import builds_plan, unit_name
from llama_common.fields import Address
from llama_common.presets import HostConfig, ModelFile

GROUP = "llm_servers"
GATEWAY_UNITS = ("llm-gateway.socket", "llm-gateway.service")


@dataclass(frozen=True)
class LlmBox:
    """One LLM box as its inventory wants it: the checked data, and where the roles put things."""

    config: HostConfig
    user: str
    home: str
    builds_root: str
    models_dir: str
    reserve_bytes: int
    presets_json: str
    base_options: Mapping[str, str]
    owned_options: Mapping[str, str]
    install_all_models: bool = False
    gpu_guard: bool = False

    @classmethod
    def of(cls, variables: Mapping[str, Any]) -> LlmBox:
        """The box that templated variables describe. Raises InventoryError (one line)."""
        names = HostConfig.model_fields.keys() & variables.keys()
        return cls(
            config=HostConfig.load({name: variables[name] for name in names}),
            user=str(variables["llm_user_name"]),
            home=str(variables["llm_user_home"]),
            builds_root=str(variables["llama_cpp_root"]),
            models_dir=str(variables["gguf_models_dir"]),
            reserve_bytes=int(variables["gguf_models_reserve_bytes"]),
            presets_json=f"{variables['llama_presets_dir']}/presets.json",
            base_options=variables["_llama_cpp_base_options"],
            owned_options=variables["_llama_cpp_owned_options"],
            install_all_models=variables["gguf_models_install"] == "all",
            gpu_guard=bool(variables.get("gpu_guard_enabled")),
        )

    def names(self, scope: str | None = None) -> list[str]:
        """Presets (of one scope, `user` or `system`), in the inventory's order."""
        return [name for name, preset in self.config.llama_presets.items() if scope in (None, preset.scope)]

    def unit(self, preset: str) -> str:
        """The systemd unit of a preset."""
        return unit_name(preset)

    def commits(self) -> dict[str, str]:
        """The pinned commit of each build."""
        return {name: self.config.commit(name) for name in self.config.llama_cpp_builds}

    def cmake_options(self) -> dict[str, dict[str, str]]:
        """The CMake options of each build, as the role merges them: what release.json must say."""
        # Not above: beside this import gevent in fleet.py shows a traceback for a host that is not there.
        from roles.llama_cpp.library.llama_cpp_build import merge_options

        return {
            name: merge_options(name, build["cmake_options"], self.base_options, self.owned_options)
            for name, build in builds_plan(self.config).items()
        }

    def model_file(self, preset: str) -> ModelFile:
        """The file that a preset gives to llama-server as its model."""
        return self.config.files(self.config.llama_presets[preset].model)[0]

    def model_sizes(self) -> dict[str, int]:
        """Bytes of each model file that must be on the box."""
        used = {model for preset in self.names() for model in self.config.models_for(preset)}
        models = self.config.gguf_models if self.install_all_models else sorted(used)
        return {file.file: file.size for model in models for file in self.config.files(model)}

    def address(self, preset: str) -> Address:
        """Where a preset listens."""
        return self.config.address(preset)

    @property
    def fronts(self) -> list[Address]:
        """Where clients reach the gateway."""
        return [Address.parse(listen) for listen in self.config.llm_gateway_listen]

    @property
    def front(self) -> Address:
        """Where other machines reach the gateway: its first address that is not loopback, if any."""
        outside = (front for front in self.fronts if not ip_address(front.host).is_loopback)
        return next(outside, self.fronts[0])

    def url(self, address: str) -> str:
        """The gateway's base URL for another machine; `address` is that of the box."""
        front = self.front
        host = address if ip_address(front.host).is_unspecified else front.host
        return f"http://[{host}]:{front.port}" if ":" in host else f"http://{host}:{front.port}"

    def slot_context(self, preset: str) -> int:
        """Tokens that one request of a preset may use: what llama-server's /props must say in n_ctx."""
        return self.config.llama_presets[preset].context_per_slot

    def request(self) -> dict[str, Any]:
        """What the probe is to look at."""
        return {
            "user": self.user,
            "presets_json": self.presets_json,
            "user_units": [self.unit(name) for name in self.names("user")],
            "system_units": [self.unit(name) for name in self.names("system")],
            "gateway_units": list(GATEWAY_UNITS),
            "gpu_guard": self.gpu_guard,
            "ports": sorted({front.port for front in self.fronts if front.port}),
            "listen": self.config.llama_presets_listen,
            "builds_root": self.builds_root,
            "builds": sorted(self.config.llama_cpp_builds),
            "models_dir": self.models_dir,
            "files": sorted(self.model_sizes()),
        }


def gateway_units_unlike(units: Mapping[str, Mapping[str, str]] | None, key: str, wanted: str) -> list[str]:
    """The gateway's units of which systemd does not say `wanted` for `key`; all when it says nothing."""
    return [unit for unit in GATEWAY_UNITS if (units or {}).get(unit, {}).get(key) != wanted]


def presets_of(variables: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """The presets in a host's variables, only their shape checked. Raises InventoryError (one line).

    Before anything else is done with a host: one whose data is refused need not be the one that is meant.
    """
    presets = variables.get("llama_presets") or {}
    if not isinstance(presets, Mapping) or not all(
        isinstance(name, str) and isinstance(preset, Mapping) for name, preset in presets.items()
    ):
        HostConfig.load({name: variables[name] for name in HostConfig.model_fields.keys() & variables.keys()})
    return presets
