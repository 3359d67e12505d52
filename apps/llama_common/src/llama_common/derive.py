"""Everything that roles, units, tables and tools need, derived from the data of one host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llama_common.command import command_line
from llama_common.dialect import Dialect
from llama_common.fields import Address
from llama_common.presets import HostConfig

DEFAULT_RELEASES_ROOT = "/opt/llama.cpp"


def unit_name(preset: str) -> str:
    """The systemd unit of a preset."""
    return f"llama-{preset}.service"


def builds_plan(config: HostConfig) -> dict[str, dict[str, Any]]:
    """What to build: `{name: {"repo", "commit", "cmake_options": {NAME: text}}}`; true is ON, false OFF."""
    return {
        name: {
            "repo": build.repo,
            "commit": config.commit(name),
            "cmake_options": {
                option: _cmake_text(value) for option, value in sorted(build.cmake_options.items())
            },
        }
        for name, build in config.llama_cpp_builds.items()
    }


def models_plan(config: HostConfig) -> list[dict[str, Any]]:
    """What to install, sizes in bytes.

    `[{"name", "used_by": [presets], "files": [{"file", "url", "path", "sha256", "size"}]}]`; the first file
    is the one that llama-server is given.
    """
    used_by: dict[str, list[str]] = {name: [] for name in config.gguf_models}
    for preset in config.llama_presets:
        for model in config.models_for(preset):
            used_by[model].append(preset)
    return [
        {"name": name, "used_by": used_by[name], "files": [file.model_dump() for file in config.files(name)]}
        for name in config.gguf_models
    ]


def presets_plan(
    config: HostConfig,
    *,
    models_dir: str,
    releases_root: str = DEFAULT_RELEASES_ROOT,
    listen: str | None = None,
    dialects: Mapping[str, str | None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Everything about every preset: its own keys, and

    unit, command (argv), listen, health_url (base URL), model_path, draft_path, draft_type, draft_choice
    (what was measured for `auto`), model_files (of all), models (of the model and its draft: name, files,
    tensor_types as numbers, none where the lock has no header), conflicts, after, commit, context_per_slot.
    `listen` is where user presets without a place of their own listen; `dialects` holds the --help text of
    each build's llama-server, where it is known. Raises InventoryError when a binary lacks what its preset
    needs.
    """
    users = sorted(name for name, preset in config.llama_presets.items() if preset.scope == "user")
    foreign = list(config.llama_presets_foreign_units)
    plan = {}
    for name, preset in config.llama_presets.items():
        place = preset.listen or listen or config.llama_presets_listen
        paths = [f"{models_dir}/{config.files(model)[0].file}" for model in config.models_of(name)]
        exclusive = preset.scope == "user"
        projector = [f"{models_dir}/{config.files(model)[0].file}" for model in config.projector_of(name)]
        draft, choice = config.draft(name), config.draft_choice(name)
        plan[name] = {
            **preset.model_dump(mode="json"),
            "context_per_slot": preset.context_per_slot,
            "commit": config.commit(preset.build),
            "unit": unit_name(name),
            "command": command_line(
                name,
                preset,
                binary=f"{releases_root}/{preset.build}/current/bin/llama-server",
                model_path=paths[0],
                draft_path=paths[1] if len(paths) > 1 else None,
                projector_path=projector[0] if projector else None,
                listen=place,
                dialect=Dialect.from_help((dialects or {}).get(preset.build)),
                draft_type=draft.type if draft else None,
            ),
            "listen": place,
            "health_url": Address.parse(place).base_url,
            "model_path": paths[0],
            "draft_path": paths[1] if len(paths) > 1 else None,
            "draft_type": draft.type if draft else None,
            "draft_choice": choice.model_dump(mode="json") if choice else None,
            "model_files": [
                f"{models_dir}/{file.file}"
                for model in [*config.models_of(name), *config.projector_of(name)]
                for file in config.files(model)
            ],
            "models": [
                {
                    "name": model,
                    "files": [f"{models_dir}/{file.file}" for file in config.files(model)],
                    "tensor_types": sorted({run[0] for run in _tensor_runs(config, model)}),
                }
                for model in config.models_of(name)
            ],
            "conflicts": [*(unit_name(other) for other in users if other != name), *foreign]
            if exclusive
            else [],
            "after": [*(unit_name(other) for other in users if other < name), *foreign] if exclusive else [],
        }
    return plan


def _tensor_runs(config: HostConfig, model: str) -> Iterator[list[Any]]:
    """What the lock says of a model's tensors; nothing when it is for another file."""
    header = config.llama_lock.headers.get(model)
    if header is not None and header.sha256 == config.files(model)[0].sha256:
        for runs in header.tensors.values():
            yield from runs


def _cmake_text(value: bool | int | str) -> str:
    if isinstance(value, bool):
        return "ON" if value else "OFF"
    return str(value)
