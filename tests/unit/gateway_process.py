"""Gateways in processes of their own, with passed sockets, started in milliseconds: forked from one that has
imported everything already. It plays systemd: it holds no socket, but reaps and reports.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support import ROOT
from tests.unit.fake_box import FakeBox

DEADLINE_S = 20.0
Keys = list[dict[str, Any]] | None
SETTINGS: dict[str, Any] = {
    "hold_timeout": 5.0,
    "commit_after": 0.2,
    "drain_timeout": 2.0,
    "switch_policy": "always",
    "min_dwell": 0.0,
    "default_preset": "",
    "model_names": {"claude-*": "gemma"},
    "queue_limit": 400,
    "queue_limit_per_key": 400,
    "idle_unload": 0.0,
    "prefetch": False,
    "max_body": 1_000_000,
    "max_buffered": 50_000_000,
    "max_connections": 600,
    "request_timeout": 0.4,
    "shutdown_grace": 0.3,
    "networks": [],
    "audit_max_size": 1_000_000,
    "audit_keep": 2,
    "audit_content": False,
}

FILES = {"keys_file": "keys.json", "state_dir": "", "audit_file": "audit.jsonl"}


def preset(listen: Path, **fields: Any) -> dict[str, Any]:
    """A preset as it stands in presets.json."""
    return {
        "description": "a model",
        "build": "upstream",
        "model": "m",
        "context": 4096,
        "parallel": 4,
        "listen": str(listen),
        "command": ["llama-server"],
        **fields,
    }


class Forge:
    """The process that gateways are forked from."""

    def __init__(self) -> None:
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.unit.gateway_process", str(theirs.fileno())],
            cwd=ROOT,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        self._line.settimeout(DEADLINE_S)

    def start(self, env: dict[str, str], sockets: list[socket.socket], log: Path, box: dict[str, Any]) -> int:
        """Fork a gateway; its process id."""
        order = {"env": env, "log": str(log), "box": box}
        socket.send_fds(self._line, [json.dumps(order).encode()], [sock.fileno() for sock in sockets])
        return int(json.loads(self._line.recv(1000)))

    def wait(self, pid: int) -> int:
        """The exit code of a gateway, once it has ended."""
        self._line.send(json.dumps({"wait": pid}).encode())
        return int(json.loads(self._line.recv(1000)))

    def close(self) -> None:
        """End it."""
        self._line.close()
        self._process.wait(DEADLINE_S)


class Gateway:
    """A gateway's surroundings: its files, its sockets, which outlive it, and the process that runs now."""

    def __init__(
        self, forge: Forge, folder: Path, box: dict[str, Any], keys: Keys = None, **changed: Any
    ) -> None:
        self.forge = forge
        self.folder = folder
        self.box = box
        self.log = folder / "log"
        listen = folder / "server.sock"
        presets = {
            "gemma": preset(listen, unit="llama-gemma.service", aliases=["g"]),
            "smol": preset(listen, unit="llama-smol.service", aliases=["s"], context=2048),
        }
        files = {name: folder / path for name, path in FILES.items()}
        settings = {**SETTINGS, **{name: str(path) for name, path in files.items()}, **changed}
        (folder / "presets.json").write_text(json.dumps({"version": 1, "user": "llm", "presets": presets}))
        (folder / "gateway.json").write_text(json.dumps(settings))
        files["keys_file"].write_text(json.dumps({"version": 1, "keys": keys or []}))
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
        self.port: int = self.listener.getsockname()[1]
        self.control = socket.socket(socket.AF_UNIX)
        self.control.bind(str(folder / "control.sock"))
        self.control.listen()
        self._notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notified.bind(str(folder / "notify.sock"))
        self._notified.settimeout(DEADLINE_S)
        self.pid = 0

    def launch(self) -> None:
        """Start it."""
        env = {
            "LLMBOX_PRESETS": str(self.folder / "presets.json"),
            "LLMBOX_GATEWAY": str(self.folder / "gateway.json"),
            "NOTIFY_SOCKET": str(self.folder / "notify.sock"),
        }
        self.pid = self.forge.start(env, [self.listener, self.control], self.log, self.box)

    def start(self) -> None:
        """Start it and wait until it says that it is ready."""
        self.launch()
        self.await_state("READY=1")

    def await_state(self, state: str) -> None:
        """Wait until it tells systemd `state`."""
        try:
            while self._notified.recv(200).decode() != state:
                pass
        except TimeoutError:
            raise AssertionError(f"never {state}: {self.log.read_text()}") from None

    def signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        pid, self.pid = self.pid, 0
        return self.forge.wait(pid)

    def memory(self) -> int:
        """The most bytes that it had in memory so far."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024

    def close(self) -> None:
        """Kill what runs and close the sockets."""
        if self.pid:
            os.kill(self.pid, 9)
            self.wait()
        for sock in (self.listener, self.control, self._notified):
            sock.close()


@contextmanager
def running(
    forge: Forge, folder: Path, box: dict[str, Any] | None = None, keys: Keys = None, **changed: Any
) -> Iterator[Gateway]:
    """A gateway with these settings in front of a box where gemma serves, or with these attributes."""
    gateway = Gateway(forge, folder, {"preset": "gemma", **(box or {})}, keys, **changed)
    try:
        gateway.start()
        yield gateway
    finally:
        gateway.close()


def main() -> None:
    """Fork gateways as told."""
    from llmbox.gateway import app

    for module in ("llmbox.gateway.box", "anyio._backends._asyncio", "httpcore", "uvicorn.lifespan.off"):
        importlib.import_module(module)  # what a gateway imports when it first needs it

    line = socket.socket(fileno=int(sys.argv[1]))
    while True:
        said, passed, _, _ = socket.recv_fds(line, 10_000, 8)
        if not said:
            return
        order = json.loads(said)
        if "wait" in order:
            line.send(json.dumps(_reaped(order["wait"])).encode())
            continue
        pid = os.fork()
        if pid == 0:
            line.detach()
            _become(order, passed, app.main)
        for fd in passed:
            os.close(fd)
        line.send(json.dumps(pid).encode())


def _reaped(pid: int) -> int:
    until = time.monotonic() + DEADLINE_S - 1
    while time.monotonic() < until:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return 999


def _become(order: dict[str, Any], passed: list[int], run: Any) -> None:
    code = 99
    try:
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for fd in (1, 2):
            os.dup2(log, fd)
        high = [os.dup2(fd, 100 + number) for number, fd in enumerate(passed)]
        for number, fd in enumerate(high):
            os.dup2(fd, 3 + number)
        os.closerange(3 + len(high), 1000)
        environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(high))}
        os.environ.update({**order["env"], **environ})
        box = FakeBox()
        vars(box).update(order["box"])
        code = run([], lambda _: box)
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    main()
