"""Watch the GPUs of a host over ssh while something is measured there."""

from __future__ import annotations

import json
import shlex
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import fmean
from typing import Any

from scripts._history import Gpu
from scripts._inventory import Host

SAMPLER = Path(__file__).resolve().parent / "_gpu_sampler.py"
FIRST_TIMEOUT_S = 20.0  # until the first sample; nvidia-smi itself gets 5 s
END_TIMEOUT_S = 5.0
KEPT = 3600  # samples, one a second: longer than any run


class GpuWatch:
    """Samples with the moments at which they came; `first` says what the host has."""

    def __init__(self) -> None:
        self.first: Mapping[str, Any] = {}
        self._samples: deque[tuple[float, Mapping[str, Any]]] = deque(maxlen=KEPT)
        self._ready = threading.Event()

    def add(self, moment: float, sample: Mapping[str, Any]) -> None:
        """Take a sample in."""
        self.first = self.first or sample
        self._samples.append((moment, sample))
        self._ready.set()

    def end(self) -> None:
        """There will be no more samples."""
        self._ready.set()

    def wait(self) -> None:
        """Wait until the host has said what it has."""
        self._ready.wait(FIRST_TIMEOUT_S)

    @property
    def driver(self) -> str:
        """NVIDIA's version; "none" without a GPU, "unknown" when nvidia-smi does not say."""
        return "none" if "absent" in self.first else str(self.first.get("driver") or "unknown")

    @property
    def trouble(self) -> str:
        """Why there are no figures of a GPU, in one line; empty when there are."""
        if "absent" in self.first:
            return "no NVIDIA GPU: nvidia-smi is not installed"
        last = self._samples[-1][1] if self._samples else {"error": "nvidia-smi could not be run over ssh"}
        return str(last.get("error", ""))

    def during(self, began: float, ended: float) -> Gpu | None:
        """Mean utilization and power, most heat and memory between two moments; None without a GPU."""
        seen = [sample for moment, sample in list(self._samples) if began <= moment <= ended]

        def values(name: str) -> list[float]:
            return [float(one[name]) for one in seen if one.get(name) is not None]

        found = {
            "utilization_percent": _of(fmean, values("utilization_percent")),
            "power_w": _of(fmean, values("power_w")),
            "temperature_c": _of(max, values("temperature_c")),
            "memory_mib": _of(max, values("memory_mib")),
        }
        return found if any(value is not None for value in found.values()) else None


def _of(summary: Any, values: list[float]) -> float | None:
    return round(summary(values), 1) if values else None


@contextmanager
def watched(host: Host) -> Iterator[GpuWatch]:
    """The GPUs of `host` during the body. Never raises for what is wrong there: `trouble` tells it."""
    watch = GpuWatch()
    python = str(host.variables.get("ansible_python_interpreter") or "/usr/bin/python3")
    command = f"{python} -u -c {shlex.quote(SAMPLER.read_text())}"
    with subprocess.Popen(
        host.ssh(command),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        reader = threading.Thread(target=_read, args=(process, watch), daemon=True)
        reader.start()
        try:
            watch.wait()
            yield watch
        finally:
            assert process.stdin is not None
            process.stdin.close()  # the sampler ends by itself
            process.terminate()
            reader.join(END_TIMEOUT_S)


def _read(process: subprocess.Popen[str], watch: GpuWatch) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        with suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict):
                watch.add(time.monotonic(), found)
    watch.end()
