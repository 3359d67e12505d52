"""Toolkit and driver against the cards that a host's builds are for."""

from __future__ import annotations

from typing import Any

import pytest
from llama_common.cuda import cuda_problems
from llama_common.presets import HostConfig


def config(architectures: object, cuda: object = True) -> HostConfig:
    options = {"GGML_CUDA": cuda, "CMAKE_CUDA_ARCHITECTURES": architectures}
    build: dict[str, Any] = {
        "repo": "https://git.example/x.git",
        "commit": "0" * 40,
        "cmake_options": options,
    }
    return HostConfig.load({"llama_cpp_builds": {"upstream": build}, "gguf_models": {}, "llama_presets": {}})


@pytest.mark.parametrize(
    ("architectures", "cuda", "driver", "says"),
    [
        ("120a-real", "12.6.3-1", "580.1-1", "sm_120 (Blackwell), which CUDA knows from 12.8"),
        ("89;120", "12.8.0-1", "560.35.05-0ubuntu1", "which the driver knows from 570"),
        ("89", "13.0.3-1", "570.1-1", "CUDA 13.0.3-1 needs a driver of branch 580"),
        ("120a-real", "12.8.0-1", "570.1-1", None),
        ("120a-real", "13.0.3-1", "580.159.03-1ubuntu1", None),
        ("89", "12.4.1-1", "550.54.14-0ubuntu1", None),
        ("120", "", "", None),
    ],
)
def test_a_toolkit_or_driver_that_is_too_old_is_refused(
    architectures: str, cuda: str, driver: str, says: str | None
) -> None:
    variables = {"gpu_host_cuda_version": cuda, "gpu_host_driver_version": driver}
    found = [problem.message for problem in cuda_problems(config(architectures), variables)]
    assert len(found) == (says is not None)
    assert says is None or says in found[0]


def test_a_build_without_cuda_asks_for_nothing() -> None:
    assert not list(cuda_problems(config("120", cuda=False), {"gpu_host_cuda_version": "12.0.0-1"}))
