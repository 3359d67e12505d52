"""One file over HTTP or from a local path into the models directory: resumed, counted, verified, renamed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import http.client
import io
import os
import re
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from .store import (
    CHUNK_BYTES,
    FILE_MODE,
    DiskFull,
    ModelFile,
    Plan,
    Refusal,
    boot_id,
    gigabytes,
    lstat,
    open_regular,
    part_note_path,
    part_path,
    read_json,
    stamp_of,
    stamp_path,
    usable_part,
    write_json,
)

SYNC_BYTES = 256 << 20
# A try that moved the furthest byte on by this share of the file (at most 1 MiB) is progress and
# costs no retry;
# so no server, however it behaves, gets more than `retries` x 1000 requests for one file.
PROGRESS_SHARE = 1000
PROGRESS_BYTES = 1 << 20
SLOWEST_BYTES_PER_S = 1024
BACKOFF_MAX_S = 60.0
RETRY_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
FICLONE = 0x40049409
LOOPBACK = ("127.0.0.1", "::1", "localhost")
USER_AGENT = "llmbox-gguf-fetch/1"

Report = Callable[[str, str, int], None]
"""Called with (phase, file, bytes of it that are there); phases: checking, downloading, copying, waiting."""


class Transient(Exception):
    """Something that may be different at the next try: a cut connection, a stall, a busy server."""

    def __init__(self, text: str, wait: float = 0.0) -> None:
        """`wait`: seconds the server asked for, 0 when it did not."""
        super().__init__(text)
        self.wait = wait


def origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port: what two URLs must share to get the same secrets."""
    parts = urllib.parse.urlsplit(url)
    return (
        parts.scheme,
        (parts.hostname or "").lower(),
        parts.port or (443 if parts.scheme == "https" else 80),
    )


def shown(url: str) -> str:
    """A URL for people and logs: without user, password, query and fragment, any of which may be a secret."""
    parts = urllib.parse.urlsplit(url)
    host = parts.hostname or ""
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{host}{port}{parts.path}"


class _Connection(http.client.HTTPConnection):
    """A connection whose reads have a timeout of their own."""

    def __init__(self, host: str, *, stall_timeout: float, **options: Any) -> None:
        super().__init__(host, **options)
        self.stall_timeout = stall_timeout

    def connect(self) -> None:
        super().connect()
        self.sock.settimeout(self.stall_timeout)


class _TlsConnection(http.client.HTTPSConnection):
    """The same over TLS."""

    def __init__(self, host: str, *, stall_timeout: float, **options: Any) -> None:
        super().__init__(host, **options)
        self.stall_timeout = stall_timeout

    def connect(self) -> None:
        super().connect()
        self.sock.settimeout(self.stall_timeout)


class _Handler(urllib.request.HTTPHandler):
    """Opens http with both timeouts."""

    def __init__(self, stall_timeout: float) -> None:
        super().__init__()
        self.connection = functools.partial(_Connection, stall_timeout=stall_timeout)

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self.connection, req)


class _TlsHandler(urllib.request.HTTPSHandler):
    """Opens https with both timeouts."""

    def __init__(self, stall_timeout: float) -> None:
        super().__init__()
        self.connection = functools.partial(
            _TlsConnection, stall_timeout=stall_timeout, context=ssl.create_default_context()
        )

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self.connection, req)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but neither from https to http nor with a token to another host."""

    max_redirections = 10

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        target = urllib.parse.urlsplit(newurl).scheme
        if target not in ("http", "https"):
            raise Refusal(
                f"{shown(req.full_url)} redirects to {target}:, which is not followed; fix: check the url"
            )
        if req.type == "https" and target == "http":
            raise Refusal(
                f"{shown(req.full_url)} redirects from https to http ({shown(newurl)}), which is not"
                " followed; fix: use a source that stays on https"
            )
        following = super().redirect_request(req, fp, code, msg, headers, newurl)
        if following is not None and origin(newurl) != origin(req.full_url):
            following.remove_header("Authorization")
        return following


@dataclass
class Fetcher:
    """Downloads files of one plan. `token` goes to the hub's origin and nowhere else."""

    plan: Plan
    token: str | None = None
    report: Report = lambda _phase, _name, _done: None
    sleep: Callable[[float], None] = time.sleep
    opener: urllib.request.OpenerDirector = field(init=False)

    def __post_init__(self) -> None:
        stall = self.plan.stall_timeout
        scheme, host, _port = origin(self.plan.hf_endpoint)
        if self.token and scheme != "https" and host not in LOOPBACK:
            raise Refusal(
                f"gguf_models_hf_endpoint: {self.plan.hf_endpoint} would get the token unencrypted; fix:"
                " use an https endpoint, or no token"
            )
        self.opener = urllib.request.build_opener(_Handler(stall), _TlsHandler(stall), _Redirects())

    @property
    def directory(self) -> Path:
        """The models directory."""
        return Path(self.plan.directory)

    def install(self, file: ModelFile) -> None:
        """Bring one file in: after this it is in place, verified and stamped.

        Raises Refusal; then nothing was replaced.
        """
        try:
            digest = self._copy(file) if file.path is not None else self._download(file)
        except OSError as problem:
            if problem.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFull(
                    f"{self.directory}: no space left while writing {file.name}; what is there is kept; fix:"
                    " free some space and run again, it resumes"
                ) from None
            raise Refusal(
                f"{file.name}: {problem.strerror or problem} ({problem.filename or self.directory}); "
                "fix: mend that and run again, it resumes"
            ) from None
        if digest != file.sha256:
            self._discard(file)
            raise Refusal(
                f"{file.name}: wrong checksum: expected sha256 {file.sha256}, got {digest} from"
                f" {file.path or shown(file.url or '')}; the partial file is removed, nothing was replaced;"
                " fix: if the source is right, write the lock again (scripts/lock_models.py) or correct"
                " gguf_models." + file.model
            )
        self._put_in_place(file)

    def _put_in_place(self, file: ModelFile) -> None:
        part, target = part_path(self.directory, file.name), self.directory / file.name
        descriptor = open_regular(part)
        try:
            os.fchmod(descriptor, FILE_MODE)
            os.fsync(descriptor)
            part.replace(target)
            status = os.fstat(descriptor)
        finally:
            os.close(descriptor)
        sync_directory(self.directory)
        write_json(stamp_path(self.directory, file.name), stamp_of(status, file.sha256))
        part_note_path(self.directory, file.name).unlink(missing_ok=True)

    def _discard(self, file: ModelFile) -> None:
        part_path(self.directory, file.name).unlink(missing_ok=True)
        part_note_path(self.directory, file.name).unlink(missing_ok=True)

    def _copy(self, file: ModelFile) -> str:
        """Copy a local file, sharing its blocks where the file system can. Returns the sha256 of the copy."""
        source = Path(file.path or "")
        if source.resolve() == (self.directory / file.name).resolve():
            raise Refusal(
                f"{source} is the installed file itself and its content is not the locked one; fix: put the"
                f" right file there, or correct gguf_models.{file.model}"
            )
        try:
            origin_file = source.open("rb", buffering=0)
        except OSError as problem:
            raise Refusal(
                f"gguf_models.{file.model}: {source} cannot be read: {problem.strerror}; fix: put the file"
                " there, readable for the owner of the models directory"
            ) from None
        with origin_file:
            size = os.fstat(origin_file.fileno()).st_size
            if size != file.size:
                raise Refusal(
                    f"gguf_models.{file.model}: {source} has {size} bytes, the lock says {file.size}; nothing"
                    " was copied; fix: give the right file, or correct size and sha256"
                )
            with Part.begin(self.directory, file, 0) as part:
                try:
                    fcntl.ioctl(part.descriptor, FICLONE, origin_file.fileno())
                except OSError:
                    while chunk := origin_file.read(CHUNK_BYTES):
                        part.write(chunk)
                        self.report("copying", file.name, part.have)
                    return part.hexdigest()
                part.reread(lambda done: self.report("checking", file.name, done))
                return part.hexdigest()

    def _download(self, file: ModelFile) -> str:
        """Fetch until all bytes are there, going on after each cut. Returns the sha256 of what came."""
        with Part.begin(self.directory, file, usable_part(self.directory, file)) as part:
            part.reread(lambda done: self.report("checking", file.name, done))
            step = max(1, min(PROGRESS_BYTES, file.size // PROGRESS_SHARE))
            furthest, failures = part.have, 0
            while part.have < file.size:
                try:
                    self._attempt(file, part)
                except Transient as problem:
                    moved, furthest = part.have - furthest, max(furthest, part.have)
                    failures = 0 if moved >= step else failures + 1
                    if failures > self.plan.retries:
                        raise Refusal(
                            f"{file.name}: gave up after {failures} tries without progress at"
                            f" {gigabytes(part.have)} of {gigabytes(file.size)} from {shown(file.url or '')}:"
                            f" {problem}; what came is kept; fix: check the network and run again, it resumes"
                        ) from None
                    self.report("waiting", file.name, part.have)
                    self.sleep(
                        min(
                            BACKOFF_MAX_S,
                            max(problem.wait, float(2 ** max(0, failures - 1)) if failures else 0.2),
                        )
                    )
            return part.hexdigest()

    def _attempt(self, file: ModelFile, part: Part) -> None:
        """One request and as much of its body as comes.

        Raises Transient when some is missing, Refusal when it is wrong.
        """
        with self._open(file, part) as response:
            self._check_answer(file, part, response)
            window_start, window_have = time.monotonic(), part.have
            while part.have < file.size:
                try:
                    chunk = response.read1(CHUNK_BYTES)
                except (OSError, http.client.HTTPException) as problem:
                    raise Transient(f"the connection broke ({describe(problem)})") from None
                if not chunk:
                    raise Transient("the server closed the connection early")
                if part.have + len(chunk) > file.size:
                    raise self._too_long(file)
                part.write(chunk)
                self.report("downloading", file.name, part.have)
                now = time.monotonic()
                if now - window_start >= self.plan.stall_timeout:
                    if part.have - window_have < SLOWEST_BYTES_PER_S * self.plan.stall_timeout:
                        raise Transient(
                            f"less than {SLOWEST_BYTES_PER_S} bytes/s for {self.plan.stall_timeout:.0f} s"
                        )
                    window_start, window_have = now, part.have
            if response.length is None:
                with contextlib.suppress(OSError, http.client.HTTPException):
                    if response.read1(1):
                        raise self._too_long(file)

    def _too_long(self, file: ModelFile) -> Refusal:
        self._discard(file)
        return Refusal(
            f"{file.name}: the server sends more than the locked {file.size} bytes; stopped, the partial file"
            " is removed; fix: write the lock again (scripts/lock_models.py) or correct"
            f" gguf_models.{file.model}.size"
        )

    def _open(self, file: ModelFile, part: Part) -> http.client.HTTPResponse:
        """Send the request. Raises Transient or Refusal for every answer without a usable body."""
        url = file.url or ""
        headers = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity"}
        if part.have:
            headers["Range"] = f"bytes={part.have}-"
            if part.etag:
                headers["If-Range"] = part.etag
        if self.token and origin(url) == origin(self.plan.hf_endpoint):
            headers["Authorization"] = f"Bearer {self.token}"
        # The scheme is http or https: ModelFile checks the URL, _Redirects every further one.
        request = urllib.request.Request(url, headers=headers)  # noqa: S310
        try:
            response: http.client.HTTPResponse = self.opener.open(request, timeout=self.plan.connect_timeout)
            return response
        except urllib.error.HTTPError as answer:
            with contextlib.closing(answer):
                raise self._refused(file, part, answer) from None
        except urllib.error.URLError as problem:
            if isinstance(problem.reason, ssl.SSLCertVerificationError):
                raise Refusal(
                    f"{file.name}: {shown(url)}: the server's certificate is not trusted"
                    f" ({problem.reason.verify_message}); fix: install the issuing CA on the host, or correct"
                    " the url"
                ) from None
            raise Transient(f"no connection ({describe(problem.reason)})") from None
        except (OSError, http.client.HTTPException) as problem:
            raise Transient(f"no answer ({describe(problem)})") from None

    def _refused(self, file: ModelFile, part: Part, answer: urllib.error.HTTPError) -> Exception:
        """What an error status means."""
        where = shown(answer.url or file.url or "")
        if answer.code == 416:
            part.restart()
            return Transient("the server has fewer bytes than an earlier answer gave (HTTP 416)")
        if answer.code in RETRY_STATUS:
            wait = answer.headers.get("Retry-After", "")
            return Transient(f"HTTP {answer.code}", float(wait) if re.fullmatch(r"\d{1,4}", wait) else 0.0)
        if answer.code in (401, 403):
            return Refusal(
                f"{file.name}: {where} answers HTTP {answer.code}; fix: accept the model's licence on the hub"
                " and give gguf_models_hf_token (or gguf_models_hf_token_file)"
            )
        return Refusal(
            f"{file.name}: {where} answers HTTP {answer.code}; fix: correct gguf_models.{file.model}"
        )

    def _check_answer(self, file: ModelFile, part: Part, response: http.client.HTTPResponse) -> None:
        """Compare the answer's headers with the lock before a byte of the body is read."""
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise Refusal(
                f"{file.name}: the server sends it encoded ({response.headers['Content-Encoding']}); fix: use"
                " another source"
            )
        if response.status == 206:
            ranged = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
            if ranged is None or int(ranged[1]) != part.have:
                raise Refusal(
                    f"{file.name}: asked for byte {part.have} and later, the server answered with "
                    f"{response.headers.get('Content-Range')!r}; fix: use another source"
                )
            total = None if ranged[2] == "*" else int(ranged[2])
        else:
            part.restart()
            total = None if response.length is None else response.length
        if total is not None and total != file.size:
            raise Refusal(
                f"{file.name}: the server's file has {total} bytes, the lock says {file.size}; nothing was"
                " read; fix: write the lock again (scripts/lock_models.py) or correct"
                f" gguf_models.{file.model}"
            )
        part.note_source(response.headers.get("ETag"))


@dataclass
class Part:
    """The growing file: its bytes, their digest, and the note that lets a later process go on."""

    directory: Path
    file: ModelFile
    descriptor: int
    have: int = 0
    synced: int = 0
    etag: str | None = None
    digest: Any = field(default_factory=hashlib.sha256)

    @classmethod
    @contextlib.contextmanager
    def begin(cls, directory: Path, file: ModelFile, usable: int) -> Iterator[Part]:
        """Open the part with its first `usable` bytes kept (not hashed yet: see `reread`), the rest cut
        off.
        """
        path = part_path(directory, file.name)
        status = lstat(path)
        if status is not None and usable == 0:
            path.unlink()
        descriptor = open_regular(path, os.O_RDWR | os.O_CREAT)
        try:
            os.ftruncate(descriptor, usable)
            note = read_json(part_note_path(directory, file.name)) if usable else {}
            etag = note.get("etag") if note.get("source") == source_digest(file) else None
            part = cls(
                directory,
                file,
                descriptor,
                synced=min(usable, note.get("synced", 0)),
                etag=etag if isinstance(etag, str) else None,
            )
            part._write_note()
            try:
                yield part
            finally:
                if lstat(path) is not None:
                    with contextlib.suppress(OSError):  # the part is usable in this boot without it
                        part._sync()
        finally:
            os.close(descriptor)

    def reread(self, on_done: Callable[[int], None]) -> None:
        """Hash what is already there."""
        with io.FileIO(self.descriptor, "rb", closefd=False) as stream:
            stream.seek(0)
            while chunk := stream.read(CHUNK_BYTES):
                self.digest.update(chunk)
                self.have += len(chunk)
                on_done(self.have)

    def write(self, chunk: bytes) -> None:
        """Append. Raises OSError; a short write is finished."""
        view = memoryview(chunk)
        while view:
            view = view[os.pwrite(self.descriptor, view, self.have + len(chunk) - len(view)) :]
        self.digest.update(chunk)
        self.have += len(chunk)
        if self.have - self.synced >= SYNC_BYTES:
            self._sync()

    def restart(self) -> None:
        """Forget everything: the next byte is the first."""
        if self.have:
            os.ftruncate(self.descriptor, 0)
            self.have, self.synced, self.etag, self.digest = 0, 0, None, hashlib.sha256()
            self._write_note()

    def note_source(self, etag: str | None) -> None:
        """Remember a strong ETag; a weak one says nothing about bytes."""
        strong = etag if etag and etag.startswith('"') and len(etag) <= 256 else None
        if strong != self.etag:
            self.etag = strong
            self._write_note()

    def hexdigest(self) -> str:
        """The sha256 of all bytes so far."""
        return str(self.digest.hexdigest())

    def _sync(self) -> None:
        os.fdatasync(self.descriptor)
        self.synced = self.have
        self._write_note()

    def _write_note(self) -> None:
        write_json(
            part_note_path(self.directory, self.file.name),
            {
                "sha256": self.file.sha256,
                "source": source_digest(self.file),
                "etag": self.etag,
                "synced": self.synced,
                "boot": boot_id(),
            },
        )


def source_digest(file: ModelFile) -> str:
    """Tells whether an ETag is of the same source, without the URL: that may hold a secret."""
    return hashlib.sha256((file.url or file.path or "").encode()).hexdigest()


def describe(problem: object) -> str:
    """An exception in a few words."""
    if isinstance(problem, TimeoutError):
        return "timed out"
    if isinstance(problem, OSError) and problem.strerror:
        return problem.strerror
    return str(problem) or type(problem).__name__


def sync_directory(directory: Path) -> None:
    """Make a rename in `directory` survive a power failure."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
