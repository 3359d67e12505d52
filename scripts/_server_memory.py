"""What llama.cpp says of its memory: the buffers that llama-server logs, llama-fit-params' estimate."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from llama_common.graph import Device
from llama_common.memory import MIB, Estimate, NotPredicted, Settings, Use, estimate
from llama_common.model import Model

START_TIMEOUT_S = 120
FIT_TIMEOUT_S = 60
_BUFFER = re.compile(r"(\S+) (model|KV|RS|compute) buffer size *= *([0-9.]+) MiB")
_FIT = re.compile(r"^(\S+) (\d+) (\d+) (\d+) *$", re.MULTILINE)
_FIELDS = {"model": "weights", "KV": "cache", "RS": "cache", "compute": "compute"}


class NoFigure(Exception):
    """The program did not say what it was asked; the message is one line."""


def flags(settings: Settings) -> list[str]:
    """The flags of llama-server and llama-fit-params for these settings."""
    words = ["--ctx-size", str(settings.context), "--parallel", str(settings.parallel)]
    words += ["--batch-size", str(settings.batch), "--ubatch-size", str(settings.ubatch)]
    words += ["--cache-type-k", settings.kv_cache_type, "--cache-type-v", settings.kv_cache_type]
    words += ["--flash-attn", "on" if settings.flash_attention else "off"]
    words += ["--n-gpu-layers", str(settings.n_gpu_layers)]
    return [*words, "--n-cpu-moe", str(settings.n_cpu_moe)] if settings.n_cpu_moe else words


def parse_log(log: str) -> Estimate:
    """The buffers in a log of llama-server, those of the CPU apart from all others."""
    sums = {"gpu": Use(), "cpu": Use()}
    for name, kind, mib in _BUFFER.findall(log):
        place = "cpu" if name.startswith("CPU") or name.endswith("_Host") else "gpu"
        field = _FIELDS[kind]
        sums[place] = replace(sums[place], **{field: getattr(sums[place], field) + round(float(mib) * MIB)})
    return Estimate(**sums)


def parse_fit(output: str) -> Estimate:
    """The last lines of `llama-fit-params --fit-print on`: device, then MiB of model, context and compute.

    Raises NoFigure.
    """
    sums = {"gpu": Use(), "cpu": Use()}
    rows = _FIT.findall(output)
    if not any(name == "Host" for name, *_ in rows):
        raise NoFigure(f"llama-fit-params said {output.strip()[-120:]!r}, which names no host memory")
    for name, *figures in rows:
        place = "cpu" if name == "Host" else "gpu"
        sums[place] += Use(*(int(figure) * MIB for figure in figures))
    return Estimate(**sums)


def as_served(said: Estimate, model: Model, settings: Settings, gpu: Device | None) -> Estimate:
    """What llama-fit-params said, without the logits that llama-server does not reserve.

    The one reserves logits for every token of a batch, the other for one a slot. The difference comes from
    the header, and is taken out only where the header gives the very figure that was said.
    """
    for mixed in (True, False):
        try:
            most, least = (
                estimate(model, replace(settings, outputs=outputs, mixed=mixed), gpu)
                for outputs in (settings.batch, None)
            )
        except NotPredicted:
            return said
        places = [("gpu", said.gpu), ("cpu", said.cpu)]
        if all(0 <= getattr(most, name).compute - use.compute < MIB for name, use in places):
            return Estimate(*(replace(use, compute=getattr(least, name).compute) for name, use in places))
    return said


def start(binary: Path, model: Path, settings: Settings, rpc: str | None = None) -> Estimate:
    """Start llama-server until its buffers stand, read them, end it. Raises NoFigure.

    Without mmap and without repacking, because either counts a tensor twice.
    """
    words = [str(binary), "--model", str(model), "--port", str(free_port()), "--no-warmup", "--fit", "off"]
    words += ["--load-mode", "none", "--no-repack", "--verbosity", "4", *flags(settings)]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with (
            log.open("wb") as sink,
            subprocess.Popen(
                words + (["--rpc", rpc] if rpc else []), stdin=subprocess.DEVNULL, stdout=sink, stderr=sink
            ) as server,
        ):
            try:
                deadline = time.monotonic() + START_TIMEOUT_S
                while "reserve took" not in (text := log.read_text(errors="replace")):
                    if server.poll() is not None or time.monotonic() > deadline:
                        said = [line for line in text.splitlines() if " E " in line] or text.splitlines()[-1:]
                        raise NoFigure(f"llama-server did not start on {model.name}: {' '.join(said[:1])}")
                    time.sleep(0.05)
            finally:
                server.kill()
        return parse_log(text)


def fit(binary: Path, model: Path, settings: Settings, rpc: str | None = None) -> Estimate:
    """What llama-fit-params projects. Raises NoFigure."""
    words = [str(binary), "--model", str(model), "--fit-print", "on", "--no-repack", *flags(settings)]
    try:
        done = subprocess.run(
            words + (["--rpc", rpc] if rpc else []),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=FIT_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise NoFigure(f"llama-fit-params gave no answer within {FIT_TIMEOUT_S} s") from None
    return parse_fit(done.stdout)


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def rpc_server(binary: Path) -> Iterator[str]:
    """A server that stands in as the second device; gives its address. It can die with its client."""
    port = free_port()
    with subprocess.Popen(
        [str(binary), "--host", "127.0.0.1", "--port", str(port)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as server:
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
                if server.poll() is not None or time.monotonic() > deadline:
                    raise NoFigure(f"{binary.name} does not listen")
                time.sleep(0.05)
            yield f"127.0.0.1:{port}"
        finally:
            server.kill()
