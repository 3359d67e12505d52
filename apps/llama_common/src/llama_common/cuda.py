"""Whether the CUDA toolkit and the driver of a host are new enough for the cards that its builds are for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from llama_common.presets import HostConfig
from llama_common.problems import Problem

TOOLKIT, DRIVER = "gpu_host_cuda_version", "gpu_host_driver_version"
BLACKWELL: Final = 100  # sm_100 and above, sm_120 of the RTX 50 among them
BLACKWELL_CUDA: Final = (12, 8)
# NVIDIA's CUDA Compatibility: the first driver branch for a major version, and for Blackwell.
FIRST_DRIVER: Final = {12: 525, 13: 580}
BLACKWELL_DRIVER: Final = 570


def cuda_problems(config: HostConfig, variables: Mapping[str, Any]) -> Iterator[Problem]:
    """What is wrong with the toolkit and the driver that a host is to get."""
    toolkit, driver = str(variables.get(TOOLKIT) or ""), str(variables.get(DRIVER) or "")
    branch = int(driver.partition(".")[0]) if driver else None
    cuda = tuple(int(part) for part in toolkit.split(".")[:2]) if toolkit else None
    blackwell = {
        name: architectures
        for name, build in config.llama_cpp_builds.items()
        if (architectures := _architectures(build.cmake_options)) and max(architectures) >= BLACKWELL
    }
    for name, architectures in blackwell.items():
        card = f"build {name} is for sm_{max(architectures)} (Blackwell)"
        if cuda and cuda < BLACKWELL_CUDA:
            yield Problem(
                (TOOLKIT,), toolkit, f"{card}, which CUDA knows from 12.8 on", "write it like 13.0.3-1"
            )
            return
        if branch and branch < BLACKWELL_DRIVER:
            fix = "write it like 580.159.03-1ubuntu1"
            yield Problem(
                (DRIVER,), driver, f"{card}, which the driver knows from {BLACKWELL_DRIVER} on", fix
            )
            return
    first = FIRST_DRIVER.get(cuda[0]) if cuda else None
    if first and branch and branch < first:
        yield Problem(
            (DRIVER,),
            driver,
            f"CUDA {toolkit} needs a driver of branch {first} or later",
            f"raise it, or lower {TOOLKIT}",
        )


def _architectures(options: Mapping[str, Any]) -> list[int]:
    """The compute capabilities in CMAKE_CUDA_ARCHITECTURES, like 89;120a-real, of a build with CUDA."""
    if options.get("GGML_CUDA") not in (True, "ON"):
        return []
    return [int(number) for number in re.findall(r"\d+", str(options.get("CMAKE_CUDA_ARCHITECTURES", "")))]
