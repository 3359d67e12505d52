"""One share, read only. What goes wrong has one class each, never an empty list.

Every Share has a connection cache of its own: the credentials of one job never serve another, and a
connection that
died is not found again by the next try.
"""

from __future__ import annotations

import math
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import smbclient  # type: ignore[import-untyped]
from smbprotocol.exceptions import (  # type: ignore[import-untyped]
    AccessDenied,
    BadNetworkName,
    LogonFailure,
    NoSuchFile,
    ObjectNameInvalid,
    ObjectNameNotFound,
    ObjectPathNotFound,
    PasswordExpired,
    SMBAuthenticationError,
    SMBConnectionClosed,
    SMBException,
    SMBOSError,
    SMBResponseException,
    SMBUnsupportedFeature,
)
from spnego.exceptions import SpnegoError

# Also what is not read: such a photo fails by name, it is not missing without a word.
PHOTOS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif", ".gif")
DEPTH = 2  # FEEDER/PHOTO and FEEDER/POLE/PHOTO
MAX_ENTRIES = 20_000
CHUNK = 1024 * 1024
T = TypeVar("T")


class ShareError(Exception):
    """A share that gave no photos. `code` is for machines, the text one line for a person."""

    code = "SMB_ERROR"
    temporary = False


class ShareUnreachableError(ShareError):
    """The server does not answer, or stopped to."""

    code = "SMB_UNREACHABLE"
    temporary = True


class ShareRefusedError(ShareError):
    """User or password are wrong, or the user may not read there."""

    code = "SMB_WRONG_PASSWORD"


class ShareForbiddenError(ShareRefusedError):
    """The user may not read there."""

    code = "SMB_ACCESS_DENIED"


class ShareMissingError(ShareError):
    """No such share, folder or file."""

    code = "SMB_NOT_FOUND"


class ShareEmptyError(ShareError):
    """The folder is there and holds no photo."""

    code = "SMB_EMPTY_FOLDER"


class ShareNameError(ShareError):
    """A photo's name can be no part of a path."""

    code = "SMB_BAD_NAME"


class ShareInsecureError(ShareError):
    """The server cannot encrypt."""

    code = "SMB_NOT_ENCRYPTED"


class ShareTooLargeError(ShareError):
    """More files, or a larger one, than may be read."""

    code = "SMB_TOO_LARGE"


@dataclass(frozen=True)
class ShareSettings:
    """Where a share is, and as whom it is read. The password is in no text that this object gives."""

    server: str
    share: str
    username: str
    password: str
    folder: str = ""
    port: int = 445
    timeout_s: float = 10.0
    domain: str = ""

    def __repr__(self) -> str:
        return f"ShareSettings({self.username or 'nobody'}@{self.server}:{self.port}/{self.share})"


@dataclass(frozen=True)
class Entry:
    """A photo on a share: its path below the share's folder, and what tells it from a later one there."""

    path: str
    size: int
    modified: float


class Share:
    """A share of one server, for one user. `longest_s`: what one listing or reading may take in all."""

    def __init__(self, settings: ShareSettings, longest_s: float = math.inf) -> None:
        self._settings = settings
        self._longest_s = longest_s
        self._connections: dict[str, Any] = {}

    def __enter__(self) -> Share:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def list(self, folder: str) -> list[Entry]:
        """Every photo of a folder, and of the folders in it. Raises ShareError; never an empty list."""
        root = self._path(folder)

        def walk() -> list[Entry]:
            return sorted(self._walk(root, "", DEPTH), key=lambda entry: entry.path)

        found = self._attempt(walk, folder)
        if not found:
            kinds = ", ".join(PHOTOS)
            raise ShareEmptyError(f"{self._shown(folder)} holds no photo ({kinds}); is it the right folder?")
        return [Entry(f"{folder}/{entry.path}", entry.size, entry.modified) for entry in found]

    def read(self, path: str, limit: int) -> bytes:
        """A photo's bytes, `limit` at most. Raises ShareError."""
        where = self._path(path)

        def fetch() -> bytes:
            with smbclient.open_file(
                where, mode="rb", buffering=0, share_access="r", **self._connection()
            ) as file:
                parts: list[bytes] = []
                size = 0
                while chunk := file.read(CHUNK):
                    size += len(chunk)
                    if size > limit:
                        raise ShareTooLargeError(f"{self._shown(path)} is larger than {limit} bytes")
                    parts.append(chunk)
                return b"".join(parts)

        return self._attempt(fetch, path)

    def close(self) -> None:
        """End the connections."""
        while self._connections:
            _, connection = self._connections.popitem()
            with suppress(Exception):  # it is gone, however it goes
                connection.disconnect(close=False, timeout=1)

    def _walk(self, path: str, below: str, depth: int) -> Iterator[Entry]:
        count = 0
        for entry in smbclient.scandir(path, **self._connection()):
            count += 1
            if count > MAX_ENTRIES:
                raise ShareTooLargeError(
                    f"{below or 'the folder'} has more than {MAX_ENTRIES} entries; split it"
                )
            name = f"{below}{entry.name}"
            if entry.is_symlink():  # may lead anywhere
                continue
            if entry.is_dir():
                if depth > 1 and not entry.name.startswith("."):
                    yield from self._walk(rf"{path}\{entry.name}", f"{name}/", depth - 1)
            elif entry.name.lower().endswith(PHOTOS) and not entry.name.startswith("."):
                _readable(name)
                status = entry.smb_info
                yield Entry(name, status.end_of_file, status.last_write_time.timestamp())

    def _attempt(self, work: Callable[[], T], path: str) -> T:
        """Work on the share; what goes wrong becomes one of the errors above."""
        with self._told(path), _Watch(self._connections, self._settings.timeout_s, self._longest_s) as watch:
            try:
                smbclient.register_session(
                    self._settings.server,
                    username=self._user(),
                    password=self._settings.password,
                    port=self._settings.port,
                    encrypt=True,
                    connection_timeout=self._settings.timeout_s,
                    connection_cache=self._connections,
                    auth_protocol="ntlm",
                )
                return work()
            except BaseException as error:
                self.close()
                if watch.why and isinstance(error, Exception) and not isinstance(error, ShareError):
                    raise TimeoutError(watch.why) from None
                raise
        raise AssertionError  # _told raises

    @contextmanager
    def _told(self, path: str) -> Iterator[None]:
        server = f"{self._settings.server}:{self._settings.port}"
        who = self._settings.username or "nobody"
        shown = self._shown(path)
        try:
            yield
        except ShareError:
            raise
        except (LogonFailure, PasswordExpired, SMBAuthenticationError, SpnegoError):
            fix = "correct the share's username and password in the inventory"
            raise ShareRefusedError(f"{server} refuses user {who} or its password; {fix}") from None
        except AccessDenied:
            raise ShareForbiddenError(f"user {who} may not read {shown}; grant it, or use another") from None
        except SMBUnsupportedFeature:
            raise ShareInsecureError(f"{server} cannot encrypt (SMB 3 is needed); enable it there") from None
        except (BadNetworkName, *_NOT_FOUND):
            raise ShareMissingError(f"{shown} does not exist; check share and folder") from None
        except SMBOSError as error:
            raise self._of_status(error.ntstatus, shown, server, who) from None
        except SMBResponseException as error:
            raise self._of_status(error.status, shown, server, who) from None
        except (TimeoutError, SMBConnectionClosed, OSError, ValueError, SMBException) as error:
            # smbprotocol raises ValueError for a refused connection.
            why = " ".join(str(error).split())[:160] or type(error).__name__
            if "encryption is required" in why:  # it has no class of its own for that
                raise ShareInsecureError(f"{server} does not encrypt; enable it there") from None
            fix = "check the server, the network and the port"
            raise ShareUnreachableError(f"{server} does not answer ({why}); {fix}") from None

    def _of_status(self, status: int, shown: str, server: str, who: str) -> ShareError:
        if status in (0xC0000022, 0xC00000CA):
            return ShareForbiddenError(f"user {who} may not read {shown}; grant it, or use another")
        if status in (0xC000006D, 0xC000006E, 0xC0000064, 0xC000006A, 0xC0000071, 0xC0000072, 0xC0000234):
            return ShareRefusedError(f"{server} refuses user {who} or its password; correct them")
        if status in (
            0xC0000034,
            0xC000003A,
            0xC00000CC,
            0xC000000F,
            0xC0000103,
            0xC0000033,
            0xC0000039,
            0xC0000225,
        ):
            return ShareMissingError(f"{shown} does not exist; check share and folder")
        return ShareUnreachableError(f"{server} answers with status 0x{status & 0xFFFFFFFF:08X} for {shown}")

    def _connection(self) -> dict[str, Any]:
        return {
            "port": self._settings.port,
            "username": self._user(),
            "password": self._settings.password,
            "encrypt": True,
            "connection_cache": self._connections,
        }

    def _user(self) -> str:
        domain = self._settings.domain
        return f"{domain}\\{self._settings.username}" if domain else self._settings.username

    def _path(self, path: str) -> str:
        parts = [
            part for text in (self._settings.folder, checked_path(path)) for part in text.split("/") if part
        ]
        return "\\".join([rf"\\{self._settings.server}", self._settings.share, *parts])

    def _shown(self, path: str) -> str:
        parts = [self._settings.server, self._settings.share, self._settings.folder, path]
        return "//" + "/".join(part.strip("/") for part in parts if part)


class _Watch:
    """Beside work on a share: cuts its connections when the server has been silent for too long, or the work
    lasts too long. smbprotocol itself waits for an answer without end once a connection stands."""

    def __init__(self, connections: dict[str, Any], silence_s: float, longest_s: float) -> None:
        self.why = ""
        self._connections = connections
        self._silence_s = silence_s
        self._longest_s = longest_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look_on, name="share", daemon=True)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _look_on(self) -> None:
        began = time.monotonic()
        while not self._done.wait(min(1.0, self._silence_s / 10)):
            lasts = time.monotonic() - began
            for connection in list(self._connections.values()):
                with suppress(OSError, AttributeError):  # it ends at this moment
                    link = connection.transport._sock
                    if lasts > self._longest_s:
                        self._cut(link, f"not done within {self._longest_s:.0f} s")
                    elif min(lasts, _silent_s(link)) > self._silence_s:
                        self._cut(link, f"silent for {self._silence_s:.0f} s")

    def _cut(self, link: socket.socket, why: str) -> None:
        # No close(): it waits for a lock that a sender may hold. smbprotocol's thread sees it and closes.
        self.why = why
        link.shutdown(socket.SHUT_RDWR)


def _silent_s(link: socket.socket) -> float:
    """Since the last byte came, as the kernel knows it: a large answer that comes slowly is no silence."""
    known = link.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 56)
    return int(struct.unpack_from("=I", known, 52)[0]) / 1000  # tcpi_last_data_recv


_NOT_FOUND = (NoSuchFile, ObjectNameInvalid, ObjectNameNotFound, ObjectPathNotFound)
_FORBIDDEN = re.compile(r'[\x00-\x1f\\:*?"<>|]')


def checked_path(path: str) -> str:
    """A path below a share's folder, that cannot lead out of it. Raises ShareMissingError."""
    parts = path.strip("/").split("/")
    # A name may begin or end with a blank, as files have; a server may take `.. ` for `..`.
    if _FORBIDDEN.search(path) or not all(part.strip(" .") for part in parts):
        raise ShareMissingError(f"{path!r:.80} is no path of a share; write it like FEEDER or FEEDER/POLE")
    return "/".join(parts)


def _readable(name: str) -> None:
    """Nothing is listed that cannot be read afterwards. Raises ShareNameError."""
    try:
        checked_path(name)
    except ShareMissingError:
        raise ShareNameError(f"{name!r:.120}: a photo cannot be called so; rename it") from None
