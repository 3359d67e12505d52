"""Calls of the user's service manager, over the private socket that systemctl uses: no bus daemon in between.

A call takes about a millisecond where a systemctl takes ten or more, and a switch, for which clients wait,
needs several. jeepney turns messages into bytes and back.
"""

from __future__ import annotations

import itertools
import socket
import time
from pathlib import Path
from typing import Any, Self

from jeepney import (  # type: ignore[import-untyped]
    DBusAddress,
    HeaderFields,
    Message,
    MessageType,
    Parser,
    new_method_call,
)
from jeepney.auth import BEGIN, AuthenticationError, Authenticator  # type: ignore[import-untyped]

from llmbox.errors import LlmboxError

CALL_TIMEOUT_S = 30.0
GREETING_LIMIT = 4096  # bytes
SYSTEMD = "org.freedesktop.systemd1"
MANAGER = ("/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager")
PROPERTIES_INTERFACE = "org.freedesktop.DBus.Properties"


class Refused(Exception):
    """The service manager's own words on why it does not do something."""


class Bus:
    """One connection. Every call raises LlmboxError when the service manager does not answer."""

    def __init__(self, runtime: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._parser = Parser()
        self._serials = itertools.count(1)
        self._replies: dict[int, Message] = {}
        self._ended: dict[str, str] = {}  # jobs, and how they ended
        try:
            self._socket.settimeout(CALL_TIMEOUT_S)
            self._socket.connect(str(runtime / "systemd/private"))
            self._authenticate()
        except BaseException as error:
            self._socket.close()
            if isinstance(error, (OSError, AuthenticationError)):
                raise _silent(error) from None
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def call(self, member: str, signature: str, *arguments: object, at: tuple[str, str] = MANAGER) -> Any:
        """The body of the answer to a method call; `at` are path and interface. Raises Refused."""
        serial = next(self._serials)
        message = new_method_call(DBusAddress(at[0], SYSTEMD, at[1]), member, signature, arguments)
        deadline = time.monotonic() + CALL_TIMEOUT_S
        try:
            self._socket.settimeout(CALL_TIMEOUT_S)
            self._socket.sendall(message.serialise(serial=serial))
            while serial not in self._replies:
                self._receive(deadline)
        except OSError as error:
            raise _silent(error) from None
        reply = self._replies.pop(serial)
        if reply.header.message_type is MessageType.error:
            raise Refused(str(reply.body[0]) if reply.body else reply.header.fields[HeaderFields.error_name])
        return reply.body

    def job_end(self, job: str, timeout_s: float) -> str | None:
        """How systemd says that a job ended (`done`, `failed`, ...); None when it runs for longer."""
        deadline = time.monotonic() + timeout_s
        try:
            while job not in self._ended:
                self._receive(deadline)
        except TimeoutError:
            return None
        except OSError as error:
            raise _silent(error) from None
        return self._ended.pop(job)

    def _authenticate(self) -> None:
        # BEGIN at once, as systemctl sends it: a first call that comes in one read with it is not looked at
        # by systemd before the second (measured with 252).
        dialogue = Authenticator()
        self._socket.sendall((dialogue.data_to_send() or b"") + BEGIN)
        said = b""
        while b"\r\n" not in said and len(said) < GREETING_LIMIT:
            said += self._some()
        answer, end, news = said.partition(b"\r\n")
        dialogue.feed(answer + end)
        if not dialogue.authenticated:
            raise AuthenticationError(answer)
        self._parser.add_data(news)  # signals: from BEGIN on it tells of everything that goes on

    def _receive(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)
        for message in self._parser.feed(self._some()):
            fields = message.header.fields
            if HeaderFields.reply_serial in fields:
                self._replies[fields[HeaderFields.reply_serial]] = message
            elif fields.get(HeaderFields.member) == "JobRemoved":
                _, job, _, result = message.body
                self._ended[job] = result

    def _some(self) -> bytes:
        data = self._socket.recv(65536)
        if not data:
            raise ConnectionResetError("it closed the connection")
        return data


def _silent(error: Exception) -> LlmboxError:
    said = f"not in {CALL_TIMEOUT_S:.0f} s" if isinstance(error, TimeoutError) else str(error)
    return LlmboxError(f"the service manager of this user does not answer: {said}")
