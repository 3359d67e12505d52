"""The lab's HTTP server: model files with Range support, and a package cache for the hosts' apt.

Run as its own process: `python3 -m lab.source_server --listen ADDRESS --models DIR --packages DIR`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from email.utils import formatdate
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote, urlsplit

_FILE_NAME = re.compile(r"/([A-Za-z0-9][A-Za-z0-9._-]*\.gguf)")
_BLOCK = 1 << 20
HEALTH_PATH = "/.health"


class RangeError(Exception):
    """The range asked for lies outside the file (416)."""


def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """Return (first, last) byte of a Range header, or None when the whole file is to be sent.

    What is not a single byte range is ignored, as RFC 9110 allows. Raises RangeError for a range outside the
    file.
    """
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", (header or "").replace(" ", ""))
    if not match or match[1] == match[2] == "":
        return None
    if match[1] == "":
        length = int(match[2])
        if length == 0 or size == 0:
            raise RangeError
        return max(0, size - length), size - 1
    first = int(match[1])
    last = min(int(match[2]), size - 1) if match[2] else size - 1
    if match[2] and int(match[2]) < first:
        return None
    if first >= size:
        raise RangeError
    return first, last


def version() -> str:
    """Return a digest of this very program, by which `lab up` sees that a running server is an old one."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]


class Handler(BaseHTTPRequestHandler):
    """Serves one request; `models` and `packages` are set on a subclass by `make_server`."""

    protocol_version = "HTTP/1.1"
    server_version = "lab"
    models: Path
    packages: Path
    version: str

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        if self.path.startswith("http://"):
            self._package(with_body=with_body)
        elif self.path == HEALTH_PATH:
            self._text(HTTPStatus.OK, json.dumps({"version": self.version}), with_body=with_body)
        elif match := _FILE_NAME.fullmatch(self.path):
            self._model(self.models / match[1], with_body=with_body)
        else:
            self._text(HTTPStatus.NOT_FOUND, "no such file", with_body=with_body)

    def _model(self, path: Path, *, with_body: bool) -> None:
        try:
            stream = path.open("rb")
        except FileNotFoundError:
            self._text(HTTPStatus.NOT_FOUND, "no such file", with_body=with_body)
            return
        with stream:
            facts = os.fstat(stream.fileno())
            tag = f'"{facts.st_size:x}-{facts.st_mtime_ns:x}"'
            modified = formatdate(facts.st_mtime, usegmt=True)
            asked = self.headers.get("Range") if with_body else None
            if self.headers.get("If-Range", tag) not in (tag, modified):
                asked = None  # the client holds a part of another file
            try:
                part = parse_range(asked, facts.st_size)
            except RangeError:
                self.send_response(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
                self.send_header("Content-Range", f"bytes */{facts.st_size}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            first, last = part or (0, facts.st_size - 1)
            self.send_response(HTTPStatus.PARTIAL_CONTENT if part else HTTPStatus.OK)
            if part:
                self.send_header("Content-Range", f"bytes {first}-{last}/{facts.st_size}")
            self.send_header("Content-Length", str(last - first + 1))
            self.send_header("Content-Type", "application/octet-stream")
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("ETag", tag)
            self.send_header("Last-Modified", modified)
            self.end_headers()
            if with_body:
                self._send(stream, first, last - first + 1)

    def _send(self, stream: BinaryIO, first: int, length: int) -> None:
        try:
            self.wfile.flush()
            sent = 0
            while sent < length:
                count = os.sendfile(
                    self.connection.fileno(), stream.fileno(), first + sent, min(_BLOCK, length - sent)
                )
                if count == 0:
                    break
                sent += count
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _package(self, *, with_body: bool) -> None:
        """Pass a request of apt on; a package is kept, because in a pool no file changes under its name."""
        parts = urlsplit(self.path)
        keep = parts.path.endswith(".deb") and with_body
        kept = self.packages / quote(parts.netloc + parts.path, safe="")
        if keep and kept.exists():
            with kept.open("rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                self.send_response(HTTPStatus.OK)
                self.send_header("Content-Length", str(size))
                self.end_headers()
                self._send(stream, 0, size)
            return
        headers = {
            name: value
            for name, value in self.headers.items()
            if name.lower() in ("if-modified-since", "cache-control", "user-agent")
            or (name.lower() == "range" and not keep)
        }
        request = urllib.request.Request(self.path, headers=headers, method=self.command)  # noqa: S310 - http only
        try:
            answer = urllib.request.urlopen(request, timeout=60)  # noqa: S310
        except urllib.error.HTTPError as error:
            self._text(HTTPStatus(error.code), "", with_body=with_body)
            return
        except (urllib.error.URLError, OSError) as error:
            self._text(HTTPStatus.BAD_GATEWAY, str(error), with_body=with_body)
            return
        with answer:
            length = answer.headers.get("Content-Length")
            self.send_response(answer.status)
            for name in ("Content-Length", "Content-Range", "Content-Type", "Last-Modified", "ETag"):
                if answer.headers.get(name):
                    self.send_header(name, answer.headers[name])
            if length is None:
                self.send_header("Connection", "close")
                self.close_connection = True
            self.end_headers()
            if not with_body:
                return
            try:
                if keep and length is not None:
                    self._send_and_keep(answer, int(length), kept)
                else:
                    shutil.copyfileobj(answer, self.wfile, _BLOCK)
            except OSError:
                self.close_connection = True

    def _send_and_keep(self, answer: BinaryIO, length: int, kept: Path) -> None:
        half = kept.with_name(f".{kept.name}.{threading.get_ident()}.partial")
        try:
            with half.open("wb") as out:
                while block := answer.read(_BLOCK):
                    out.write(block)
                    self.wfile.write(block)
                complete = out.tell() == length
            if complete:
                half.replace(kept)
        finally:
            half.unlink(missing_ok=True)

    def _text(self, status: HTTPStatus, text: str, *, with_body: bool) -> None:
        body = text.encode()
        empty = status in (HTTPStatus.NOT_MODIFIED, HTTPStatus.NO_CONTENT)
        self.send_response(status)
        if not empty:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body and not empty:
            self.wfile.write(body)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64


def make_server(address: tuple[str, int], models: Path, packages: Path) -> Server:
    """Return a listening server; the caller runs `serve_forever`."""
    packages.mkdir(parents=True, exist_ok=True)
    for leftover in packages.glob(".*.partial"):
        leftover.unlink(missing_ok=True)
    settings = {"models": models, "packages": packages, "version": version()}
    return Server(address, type("BoundHandler", (Handler,), settings))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="lab.source_server", description=__doc__)
    parser.add_argument("--listen", required=True, help="address:port")
    parser.add_argument("--models", required=True, type=Path)
    parser.add_argument("--packages", required=True, type=Path)
    options = parser.parse_args(arguments)
    address, _, port = options.listen.rpartition(":")
    make_server((address, int(port)), options.models, options.packages).serve_forever()


if __name__ == "__main__":
    main()
