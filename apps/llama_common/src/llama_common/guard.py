"""What the GPU guard of an LLM box could not take out of service."""

from __future__ import annotations

from collections.abc import Iterator

from llama_common.presets import HostConfig
from llama_common.problems import Problem

ENABLED = "gpu_guard_enabled"


def guard_problems(config: HostConfig) -> Iterator[Problem]:
    """System presets that would go on on a card that is too hot: the guard is a service of the LLM user.

    It has no right to stop a unit of the system, and no sudoers rule gives it one.
    """
    for name, preset in config.llama_presets.items():
        if preset.scope == "system" and _on_the_card(config, preset.build):
            yield Problem(
                ("llama_presets", name, "scope"),
                preset.scope,
                "gpu-guard, a service of the LLM user, could not stop it when the card is in danger: build "
                f"{preset.build} has GGML_CUDA",
                "make it scope user, without listen, or give it a build without GGML_CUDA",
            )


def _on_the_card(config: HostConfig, build: str) -> bool:
    """Whether a build uses the card: one with CUDA does so without layers on it, too."""
    found = config.llama_cpp_builds.get(build)
    return found is not None and found.cmake_options.get("GGML_CUDA") is True
