"""llama-server on this machine without a box around it: started, timed, ended."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
from llama_common.memory import Estimate
from llmbox.trial import out_of_memory

from scripts._measure import TIMEOUT_S, WORDS, NotMeasured, Shape, Timed, prompt, timings
from scripts._server_memory import free_port, parse_log

START_TIMEOUT_S = 600.0
END_TIMEOUT_S = 30.0


class NotServing(Exception):
    """The server did not start, or ended; the message is its last line. `memory`: for want of it."""

    def __init__(self, message: str, *, memory: bool = False) -> None:
        super().__init__(message)
        self.memory = memory


@dataclass(frozen=True)
class Server:
    """A server that is ready."""

    client: httpx.Client
    log: Path
    process: subprocess.Popen[bytes]

    def buffers(self) -> Estimate:
        """The buffers that it logged."""
        return parse_log(self.log.read_text(errors="replace"))

    def series(self, shape: Shape, count: int) -> Iterator[Timed]:
        """`count` runs after one that is thrown away. Raises NotServing, NotMeasured."""
        words = " ".join(WORDS * 10)
        each = len(self._post("/tokenize", {"content": words}).json()["tokens"]) / len(words.split())
        for number in range(count + 1):
            body = {
                "prompt": prompt(round(shape.prompt / each), f"{time.monotonic_ns():x}"),
                "n_predict": shape.generate,
                "temperature": 0.2,
                "ignore_eos": True,
                "cache_prompt": False,
            }
            began = time.monotonic()
            reply = self._post("/completion", body)
            if number:
                yield timings(reply, shape, began, time.monotonic())

    def _post(self, path: str, body: dict[str, object]) -> httpx.Response:
        try:
            reply = self.client.post(path, json=body, timeout=TIMEOUT_S)
        except httpx.HTTPError as error:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
            if self.process.poll() is not None:
                raise ended(self.log) from None
            raise NotMeasured(f"POST {path}: {type(error).__name__}") from None
        if reply.status_code != 200:
            raise NotMeasured(f"POST {path}: HTTP {reply.status_code}: {reply.text[:120]}")
        return reply


@contextmanager
def serve(binary: Path, words: Sequence[str]) -> Iterator[Server]:
    """A server with these arguments, on loopback, until the body ends. Raises NotServing."""
    port = free_port()
    argv = [
        str(binary),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--fit",
        "off",
        "--verbosity",
        "4",
        *words,
    ]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with (
            log.open("wb") as sink,
            subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink) as process,
            httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client,
        ):
            try:
                _wait(client, process, log)
                yield Server(client, log, process)
            finally:
                process.terminate()
                try:
                    process.wait(END_TIMEOUT_S)
                except subprocess.TimeoutExpired:
                    process.kill()


def _wait(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        with suppress(httpx.HTTPError):
            if client.get("/health", timeout=5).status_code == 200:
                return
        if process.poll() is not None:
            raise ended(log)
        if time.monotonic() > deadline:
            raise NotServing(f"not ready in {START_TIMEOUT_S:.0f} s")
        time.sleep(0.2)


def ended(log: Path) -> NotServing:
    """Why a server has ended, from the end of its log."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()[-200:] if line.strip()]
    errors = [line for line in lines if " E " in line or "error" in line.lower()]
    return NotServing((errors or lines or ["it said nothing"])[-1][:200], memory=out_of_memory(lines))
