"""JSON over HTTP to one server: bounded in time and size, no proxies, no redirects.

http.client instead of a library: it is there already, and everything imported here delays every start.
"""

from __future__ import annotations

import http.client
import io
import json
import re
import socket
import time
from typing import Any, NamedTuple

from local_claude.errors import EXIT_UNREACHABLE, EXIT_USAGE, LocalClaudeError, shown

LOOK_TIMEOUT_S = 5.0
MAX_ANSWER_BYTES = 8 * 2**20
_HOST = re.compile(
    r"^(?:[A-Za-z0-9](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9])?|\[?[0-9A-Fa-f:.]{2,45}(?:%\w+)?\]?)$"
)
_URL = re.compile(r"^(?P<scheme>https?)://(?P<rest>[^/?#@\s]+)/?(?P<path>v1/?)?$")
_PORT = re.compile(r"^(?P<host>.+?):(?P<port>[0-9]{1,5})$")


class _ByDeadline(io.RawIOBase):
    """What a socket says until the deadline: one that drips a byte a second is silent too."""

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self._socket = connection
        self._raw = connection.makefile("rb", buffering=0)
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class Trouble(Exception):
    """No answer came; `cause` is one of refused, silent, name, route, tls, plain, broken, large."""

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(detail)
        self.cause = cause


class Reply(NamedTuple):
    """One answer: the status, the headers with small names, the JSON value or None, the text's beginning."""

    status: int
    headers: dict[str, str]
    data: Any
    text: str

    @property
    def message(self) -> str:
        """What an error says in the words of the server."""
        found = self.data.get("error") if isinstance(self.data, dict) else None
        if isinstance(found, dict):
            found = found.get("message")
        if not found and isinstance(self.data, dict):
            found = self.data.get("message") or self.data.get("detail")
        return shown(found if found else self.text[:200])


class Server(NamedTuple):
    """An address, and the key for it."""

    scheme: str
    host: str
    port: int
    key: str = ""

    def __repr__(self) -> str:
        """Without the key."""
        return f"Server({self.url})"

    @property
    def url(self) -> str:
        """`http://host:port`, without a path: Claude Code adds its own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        default = {"http": 80, "https": 443}[self.scheme]
        return f"{self.scheme}://{host}" + ("" if self.port == default else f":{self.port}")

    @property
    def local(self) -> bool:
        """Whether it is this machine by its name."""
        return self.host in {"127.0.0.1", "localhost", "::1"}

    def get(self, path: str, timeout_s: float = LOOK_TIMEOUT_S) -> Reply:
        """GET `path`. Raises Trouble."""
        return self._ask("GET", path, None, timeout_s)

    def post(self, path: str, body: object, timeout_s: float = LOOK_TIMEOUT_S) -> Reply:
        """POST `body` as JSON. Raises Trouble."""
        return self._ask("POST", path, json.dumps(body).encode(), timeout_s)

    def _ask(self, method: str, path: str, body: bytes | None, timeout_s: float) -> Reply:
        headers = {"Accept": "application/json", "Connection": "close"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        if body is not None:
            headers |= {"Content-Type": "application/json", "anthropic-version": "2023-06-01"}
        kind = http.client.HTTPSConnection if self.scheme == "https" else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=min(timeout_s, LOOK_TIMEOUT_S))
        deadline = time.monotonic() + timeout_s

        def answer_by(sock: Any, *words: Any, **more: Any) -> http.client.HTTPResponse:
            answer = http.client.HTTPResponse(sock, *words, **more)
            answer.fp.close()
            answer.fp = io.BufferedReader(_ByDeadline(sock, deadline))
            return answer

        connection.response_class = answer_by  # type: ignore[assignment]
        try:
            connection.connect()
            if connection.sock is not None:
                connection.sock.settimeout(timeout_s)
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            raw = self._read(answer)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _trouble(error, timeout_s) from None
        finally:
            connection.close()
        text = raw.decode("utf-8", "replace")
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            data = None
        return Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, data, text)

    @staticmethod
    def _read(answer: http.client.HTTPResponse) -> bytes:
        pieces: list[bytes] = []
        size = 0
        while piece := answer.read1(65536):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_ANSWER_BYTES:
                raise Trouble("large", f"its answer is larger than {MAX_ANSWER_BYTES // 2**20} MiB")
        return b"".join(pieces)


def _trouble(error: Exception, timeout_s: float) -> Trouble:
    """What went wrong, from an exception of the standard library."""
    name = type(error).__name__
    if isinstance(error, TimeoutError):
        return Trouble("silent", f"no answer within {timeout_s:g} s")
    if isinstance(error, ConnectionRefusedError):
        return Trouble("refused", "nothing listens there")
    if isinstance(error, socket.gaierror):
        return Trouble("name", "the name is not known")
    if name.startswith("SSL"):  # ssl is not imported for the sake of a name
        reason = getattr(error, "verify_message", "") or getattr(error, "reason", "") or str(error)
        return Trouble("tls", f"TLS: {shown(str(reason))}")
    if isinstance(error, ConnectionError):
        return Trouble("broken", "it closes the connection without an answer")
    if isinstance(error, http.client.HTTPException | ValueError):
        return Trouble("broken", "what it says is no HTTP")
    if isinstance(error, OSError):
        return Trouble("route", error.strerror or name)
    return Trouble("broken", name)


def parse_server(host: str, port: int | None, default_port: int, key: str) -> Server:
    """The server of `--host` and `--port`; the host may be an URL. Raises LocalClaudeError."""
    scheme, rest = "http", host
    if "://" in host:
        match = _URL.match(host)
        if match is None:
            raise LocalClaudeError(
                EXIT_USAGE, f"--host {shown(host)} is no address", "write it like http://ancalagon:1234"
            )
        scheme, rest = match["scheme"], match["rest"]
        default_port = 443 if scheme == "https" else default_port
    inside = None if rest.count(":") > 1 and "]" not in rest else _PORT.match(rest)
    if inside is not None:
        rest, own = inside["host"], int(inside["port"])
        if port is not None and port != own:
            raise LocalClaudeError(
                EXIT_USAGE, f"--host names the port {own}, --port says {port}", "leave one of them out"
            )
        port = own
    if not _HOST.match(rest):
        raise LocalClaudeError(
            EXIT_USAGE, f"--host {shown(host)} is no host name or address", "write it like ancalagon"
        )
    port = default_port if port is None else port
    if not 0 < port < 65536:
        raise LocalClaudeError(EXIT_USAGE, f"--port {port} is no port", "write a number from 1 to 65535")
    return Server(scheme, rest.strip("[]"), port, key)


def unreachable(server: Server, trouble: Trouble, how_to_start: str) -> LocalClaudeError:
    """The refusal for a server that gave no answer, by cause."""
    fix = {
        "refused": how_to_start,
        "silent": "look whether the server hangs or loads a model, or whether a firewall drops the packets",
        "name": "correct --host, or add the name to DNS, /etc/hosts or the tailnet",
        "route": "look at the network: VPN, tailnet, Wi-Fi",
        "tls": "make its certificate known: SSL_CERT_FILE and NODE_EXTRA_CA_CERTS; or is it http://?",
        "broken": "another program listens there, or it wants https://: correct --host or --port",
        "large": "another program listens there: correct --host or --port",
    }[trouble.cause]
    return LocalClaudeError(EXIT_UNREACHABLE, f"{server.url}: {trouble}", fix)
