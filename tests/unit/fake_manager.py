"""A service manager's private socket: answers the calls that llmbox makes, as systemd would."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jeepney import (  # type: ignore[import-untyped]
    DBusAddress,
    HeaderFields,
    Message,
    Parser,
    new_error,
    new_method_return,
    new_signal,
)

MANAGER = DBusAddress("/org/freedesktop/systemd1", interface="org.freedesktop.systemd1.Manager")
JOB = "/org/freedesktop/systemd1/job/"


class FakeManager:
    """Units are exclusive: `active` is the one that is up. Everything it was asked is in `calls`.

    `begin` and `up` are called with a unit when its job begins and when it has ended well; a stop has none.
    """

    def __init__(
        self,
        runtime: Path,
        *,
        begin: Callable[[str], object] = lambda _unit: None,
        up: Callable[[str], object] = lambda _unit: None,
    ) -> None:
        self.active = ""
        self.missing: set[str] = set()
        self.results: dict[str, str] = {}  # how a unit's job ends when it is not `done`
        self.slow: dict[str, float] = {}  # seconds until it does
        self.refuses: dict[str, str] = {}
        self.pid = 4711
        self.calls: list[tuple[Any, ...]] = []
        self.hangs = False
        self.greeting = b""
        self.news = b""  # what it says in one breath with its greeting
        self._begin, self._up = begin, up
        self._jobs = 0
        (runtime / "systemd").mkdir(exist_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(runtime / "systemd/private"))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Nobody is let in any more."""
        with contextlib.suppress(OSError):  # closed already
            self._listener.shutdown(socket.SHUT_RDWR)  # a close alone would leave the thread in accept()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            begun = b""
            while b"BEGIN\r\n" not in begun:
                data = connection.recv(4096)
                if not data:
                    return
                begun += data
                if b"AUTH EXTERNAL" in data:
                    self.greeting = data
                    connection.sendall(b"OK 0123456789abcdef0123456789abcdef\r\n" + self.news)
            parser = Parser()
            parser.add_data(begun.partition(b"BEGIN\r\n")[2])
            while True:
                try:
                    for message in parser.feed(b""):
                        self._answer(connection, message)
                    data = connection.recv(4096)
                except OSError:
                    return
                if not data:
                    return
                parser.add_data(data)

    def _answer(self, connection: socket.socket, message: Message) -> None:
        member, body = message.header.fields[HeaderFields.member], message.body
        self.calls.append((member, *body))
        if self.hangs:
            return
        unit = body[0] if body and isinstance(body[0], str) else ""
        if unit in self.refuses:
            name = "org.freedesktop.systemd1.NoSuchUnit"
            connection.sendall(new_error(message, name, "s", (self.refuses[unit],)).serialise(serial=9))
            return
        signature, answer = self._done(member, body)
        connection.sendall(new_method_return(message, signature, answer).serialise(serial=9))
        if member in ("StartUnit", "RestartUnit", "StopUnit"):
            self._job(connection, member, unit, answer[0])

    def _done(self, member: str, body: tuple[Any, ...]) -> tuple[str | None, tuple[Any, ...]]:
        if member == "ListUnitsByNames":
            rows = [(unit, "", *self._state(unit), "", "/unit", 0, "", "/") for unit in body[0]]
            return "a(ssssssouso)", (rows,)
        if member == "GetUnit":
            return "o", ("/org/freedesktop/systemd1/unit/it",)
        if member == "Get":
            value = {"MainPID": ("u", self.pid), "ExecMainStartTimestampMonotonic": ("t", 5_250_000)}
            return "v", (value[body[1]],)
        if member == "ResetFailedUnit":
            return None, ()
        self._jobs += 1
        return "o", (f"{JOB}{self._jobs}",)

    def _state(self, unit: str) -> tuple[str, str, str]:
        if unit in self.missing:
            return "not-found", "inactive", "dead"
        return ("loaded", "active", "running") if unit == self.active else ("loaded", "inactive", "dead")

    def _job(self, connection: socket.socket, member: str, unit: str, job: str) -> None:
        self._begin("" if member == "StopUnit" else unit)
        time.sleep(self.slow.get(unit, 0.0))
        result = self.results.get(unit, "done")
        if result == "done":
            self.active = "" if member == "StopUnit" else unit
            self._up(self.active)
        for ended in (f"{JOB}999", job):  # somebody else's first
            body = (int(ended.rpartition("/")[2]), ended, unit, result)
            connection.sendall(new_signal(MANAGER, "JobRemoved", "uoss", body).serialise(serial=10))
