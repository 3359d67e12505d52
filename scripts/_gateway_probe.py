"""Runs on the LLM box, as the LLM user in the box's own venv: measures the gateway beside llama-server.

scripts/bench_gateway.py sends it there, with one argument: a JSON object that says what to measure. Prints
one JSON object; progress goes to standard error.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import mmap
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import uvloop

CHAT = "/v1/chat/completions"
TIMEOUT_S = 300
ONLOOKER_PAUSE_S = 0.01
READ_CHUNK = 4 * 1024 * 1024


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


# --- a client that costs little: what it costs is the same on both ways ---


class Way:
    """A way to the server: `host:port`, or the path of its socket."""

    def __init__(self, listen: str) -> None:
        self.listen = listen

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection."""
        if self.listen.startswith("/"):
            return await asyncio.open_unix_connection(self.listen)
        host, _, port = self.listen.rpartition(":")
        return await asyncio.open_connection(host, int(port))


def request(path: str, body: dict[str, Any]) -> bytes:
    """The bytes of a POST."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: box\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(data)}\r\n\r\n".encode() + data


async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Status and body of an answer that has a Content-Length."""
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    length = next(int(line[15:]) for line in lines if line.startswith(b"content-length:"))
    return int(head.split(b" ", 2)[1]), await reader.readexactly(length)


async def paced(way: Way, connections: int, rate: float, count: int) -> list[float]:
    """Seconds of `count` small requests on each connection, each at `rate` a second with some jitter."""
    took: list[float] = []

    async def one(number: int) -> None:
        rng = random.Random(number)  # noqa: S311  (jitter, not a secret)
        reader, writer = await way.open()
        await asyncio.sleep(number / connections / rate)
        for _ in range(count):
            began = time.perf_counter()
            writer.write(request("/tokenize", {"content": "The quick brown fox jumps over the lazy dog."}))
            try:
                status, _ = await answer(reader)
            except asyncio.IncompleteReadError:  # llama-server closes a connection after so many requests
                reader, writer = await way.open()
                continue
            if status != 200:
                raise RuntimeError(f"{way.listen}: HTTP {status}")
            took.append(time.perf_counter() - began)
            await asyncio.sleep(max(0.0, (0.5 + rng.random()) / rate - took[-1]))
        writer.close()

    await asyncio.gather(*(one(number) for number in range(connections)))
    return took


async def streamed(way: Way, tokens: int) -> float:
    """Tokens a second of one stream, from its first piece to its last."""
    reader, writer = await way.open()
    body = {
        "messages": [{"role": "user", "content": "Tell a long story about a dragon."}],
        "max_tokens": tokens,
        "stream": True,
        "ignore_eos": True,
        "temperature": 0.0,
    }
    writer.write(request(CHAT, body).replace(b"host: box", b"host: box\r\nconnection: close"))
    moments = []
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            moments.append(time.perf_counter())
    writer.close()
    return (len(moments) - 2) / (moments[-1] - moments[1])


def rss(pid: int) -> int:
    """Resident bytes of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * mmap.PAGESIZE


async def overhead(asked: dict[str, Any]) -> dict[str, Any]:
    """Latency of small requests, speed of streams, memory, idle connections."""
    direct, gateway = Way(asked["direct"]), Way(asked["gateway"])
    found: dict[str, Any] = {"latency": [], "stream": [], "idle": []}
    await paced(direct, 2, 20, 10)
    await paced(gateway, 2, 20, 10)
    for number in range(asked["repetitions"]):
        pair = {}
        for name, way in (("direct", direct), ("gateway", gateway)):
            pair[name] = sorted(await paced(way, asked["connections"], asked["rate"], asked["requests"]))
        found["latency"].append(pair)
        say(f"latency {number + 1}/{asked['repetitions']}")
    for number in range(asked["streams"]):
        order = [("direct", direct), ("gateway", gateway)]
        pair2 = {}
        for name, way in order if number % 2 else reversed(order):
            pair2[name] = await streamed(way, asked["tokens"])
        found["stream"].append(pair2)
        say(f"stream {number + 1}/{asked['streams']}")
    for number in range(asked["repetitions"]):
        found["idle"].append(await with_idle(gateway, asked))
        say(f"idle {number + 1}/{asked['repetitions']}")
    return found


async def with_idle(gateway: Way, asked: dict[str, Any]) -> dict[str, int]:
    """The gateway's memory beside idle connections, and how many of them are still open when one is used."""
    idle = [await gateway.open() for _ in range(asked["idle"])]
    await paced(gateway, asked["connections"], asked["rate"], 20)
    memory = rss(asked["gateway_pid"])
    reader, writer = idle[0]
    writer.write(request("/tokenize", {"content": "still there"}))
    answers = (await answer(reader))[0] == 200
    still = sum(1 for reader, _ in idle if not reader.at_eof())
    for _, writer in idle:
        writer.close()
    return {"rss": memory, "open": still if answers else 0}


# --- switching ---


def first_token(listen: str, model: str) -> float:
    """Seconds from a request that names `model` to its first piece."""
    host, _, port = listen.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=TIMEOUT_S)
    body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "stream": True}
    began = time.perf_counter()
    connection.request("POST", CHAT, json.dumps(body), {"content-type": "application/json"})
    reply = connection.getresponse()
    if reply.status != 200:
        raise RuntimeError(f"{listen}: HTTP {reply.status}: {reply.read()[:300]!r}")
    while line := reply.readline():
        if line.startswith(b"data: {"):
            took = time.perf_counter() - began
            connection.close()
            if b'"error"' in line:
                raise RuntimeError(f"{listen}: {line!r}")
            return took
    raise RuntimeError(f"{listen}: the stream ended without a token")


def router_ini(presets: dict[str, list[str]]) -> str:
    """The presets' own command lines as the router's INI file, without what the router sets itself."""
    lines = ["version = 1", ""]
    for name, argv in presets.items():
        lines.append(f"[{name}]")
        words = argv[1:]
        for number, word in enumerate(words):
            if not word.startswith("--") or word in {"--host", "--port", "--alias"}:
                continue
            value = (
                words[number + 1]
                if number + 1 < len(words) and not words[number + 1].startswith("--")
                else "true"
            )
            lines.append(f"{word[2:]} = {value}")
        lines.append("")
    return "\n".join(lines)


def switch(asked: dict[str, Any]) -> dict[str, Any]:
    """Pairs of switches: through the gateway, and through llama-server's own router with the same binary."""
    names = list(asked["presets"])
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        ini = Path(folder) / "models.ini"
        ini.write_text(router_ini(asked["presets"]))
        log = (Path(folder) / "router.log").open("wb")
        listen = f"127.0.0.1:{asked['router_port']}"
        binary = asked["presets"][names[0]][0]
        argv = [binary, "--models-preset", str(ini), "--models-max", "1"]
        argv += ["--host", "127.0.0.1", "--port", str(asked["router_port"])]
        with subprocess.Popen(argv, stdout=log, stderr=log, cwd=folder) as router:
            try:
                wait_healthy(listen)
                for target in names:  # both files into memory, and each way at the first preset
                    first_token(listen, target)
                    first_token(asked["gateway"], target)
                    time.sleep(asked["dwell"])
                for number in range(asked["pairs"] * len(names)):
                    target = names[number % len(names)]
                    ways = [("gateway", asked["gateway"]), ("router", listen)]
                    pair = {"to": target}
                    for name, where in ways if number // len(names) % 2 == 0 else reversed(ways):
                        time.sleep(asked["dwell"])
                        pair[name] = first_token(where, target)
                    pairs.append(pair)
                    say(f"switch {number + 1}/{asked['pairs'] * len(names)}: {pair}")
            finally:
                router.terminate()
                try:
                    router.wait(10)
                except subprocess.TimeoutExpired:
                    router.kill()
    return {"pairs": pairs}


def wait_healthy(listen: str) -> None:
    """Wait for /health."""
    host, _, port = listen.rpartition(":")
    deadline = time.monotonic() + 60
    while True:
        try:
            connection = http.client.HTTPConnection(host, int(port), timeout=2)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        if time.monotonic() > deadline:
            raise RuntimeError(f"{listen} did not become healthy")
        time.sleep(0.1)


# --- a cold file ---


def resident_share(path: Path) -> float:
    """The part of a file that is in the page cache, by mincore(2)."""
    from llmbox.prefetch import resident_bytes

    return resident_bytes(path) / path.stat().st_size


def evict(path: Path) -> None:
    """Take a file out of the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def server_pid(unit: str) -> int:
    """The main process of a user unit."""
    done = subprocess.run(
        ["systemctl", "--user", "show", "--value", "--property=MainPID", unit],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    return int(done.stdout)


def read_bytes(pid: int) -> int:
    """Bytes that a process had read from a disk."""
    text = Path(f"/proc/{pid}/io").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("read_bytes:"))


class Onlooker(threading.Thread):
    """A client that asks whatever preset serves one small thing after the other; its waits are in seconds."""

    def __init__(self, listen: str) -> None:
        super().__init__(daemon=True)
        host, _, port = listen.rpartition(":")
        self.connection = http.client.HTTPConnection(host, int(port), timeout=TIMEOUT_S)
        self.stop = threading.Event()
        self.waits: list[float] = []
        self.error: Exception | None = None

    def run(self) -> None:
        """Ask until told to stop."""
        body, headers = json.dumps({"content": "dragon"}), {"content-type": "application/json"}
        try:
            while not self.stop.wait(ONLOOKER_PAUSE_S):
                began = time.perf_counter()
                self.connection.request("POST", "/tokenize", body, headers)
                reply = self.connection.getresponse()
                if reply.status != 200:
                    raise RuntimeError(f"/tokenize: HTTP {reply.status}: {reply.read()[:300]!r}")
                reply.read()
                self.waits.append(time.perf_counter() - began)
        except (OSError, http.client.HTTPException, RuntimeError) as error:
            self.error = error

    def longest(self) -> float:
        """End it. Returns the longest wait."""
        self.stop.set()
        self.join(TIMEOUT_S)
        self.connection.close()
        if self.error:
            raise RuntimeError(f"a request beside the switch was lost: {self.error}")
        return max(self.waits)


def cold(asked: dict[str, Any]) -> dict[str, Any]:
    """Switch to a preset whose file was evicted: what its server reads from the disk, and the seconds."""
    path = Path(asked["file"])
    rounds = []
    for number in range(asked["repetitions"]):
        first_token(asked["gateway"], asked["other"])
        time.sleep(asked["dwell"])
        evict(path)
        before = resident_share(path)
        onlooker = Onlooker(asked["gateway"])
        onlooker.start()
        took = first_token(asked["gateway"], asked["preset"])
        outage = onlooker.longest()
        pid = server_pid(asked["unit"])
        rounds.append(
            {
                "resident_before": before,
                "read_share": read_bytes(pid) / path.stat().st_size,
                "seconds": took,
                "outage": outage,
            }
        )
        say(f"cold {number + 1}/{asked['repetitions']}: {rounds[-1]}")
        time.sleep(asked["dwell"])
    return {"rounds": rounds}


def read_rate(asked: dict[str, Any]) -> dict[str, float]:
    """Bytes a second at which a file that was evicted is read from the disk."""
    path = Path(asked["file"])
    first_token(asked["gateway"], asked["other"])  # what a server has mapped cannot be evicted
    time.sleep(asked["dwell"])
    evict(path)
    buffer = bytearray(READ_CHUNK)
    began = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        size = sum(iter(lambda: file.readinto(buffer), 0))
    return {"rate": size / (time.perf_counter() - began)}


def end_with_caller() -> None:
    """Interrupt this program when its standard input ends: nobody waits for it any more."""

    def watch() -> None:
        sys.stdin.read()
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Measure what the argument names."""
    end_with_caller()
    asked = json.loads(sys.argv[1])
    if asked["what"] == "overhead":
        found = uvloop.run(overhead(asked))
    else:
        found = {"switch": switch, "cold": cold, "read_rate": read_rate}[asked["what"]](asked)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
