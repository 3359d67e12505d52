"""The lab's HTTP server, over a real socket on loopback."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from lab.source_server import RangeError, make_server, parse_range

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    models = tmp_path / "models"
    models.mkdir()
    (models / "m.gguf").write_bytes(CONTENT)
    (tmp_path / "secret.gguf").write_bytes(b"no")
    server = make_server(("127.0.0.1", 0), models, tmp_path / "packages")
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


def ask(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request(
        method, path, headers={name.replace("_", "-"): value for name, value in headers.items()}
    )
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, dict(answer.getheaders()), body


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, None),
        ("bytes=0-9", (0, 9)),
        ("bytes=90-", (90, 99)),
        ("bytes=-10", (90, 99)),
        ("bytes=-1000", (0, 99)),
        ("bytes=50-1000", (50, 99)),
        ("bytes=0-0", (0, 0)),
        ("bytes=5-2", None),
        ("bytes=0-1,5-6", None),
        ("items=0-1", None),
        ("bytes=-", None),
    ],
)
def test_ranges(header: str | None, expected: tuple[int, int] | None) -> None:
    assert parse_range(header, 100) == expected


@pytest.mark.parametrize(
    ("header", "size"), [("bytes=100-", 100), ("bytes=-0", 100), ("bytes=0-", 0), ("bytes=-5", 0)]
)
def test_ranges_outside_the_file(header: str, size: int) -> None:
    with pytest.raises(RangeError):
        parse_range(header, size)


def test_a_whole_file(port: int) -> None:
    status, headers, body = ask(port, "/m.gguf")
    assert (status, body) == (200, CONTENT)
    assert headers["Accept-Ranges"] == "bytes"
    assert headers["Content-Length"] == str(len(CONTENT))


def test_head_tells_the_size_and_sends_nothing(port: int) -> None:
    status, headers, body = ask(port, "/m.gguf", "HEAD", Range="bytes=5-6")
    assert (status, headers["Content-Length"], body) == (200, str(len(CONTENT)), b"")


def test_the_rest_of_a_file(port: int) -> None:
    status, headers, body = ask(port, "/m.gguf", Range="bytes=1000-")
    assert (status, body) == (206, CONTENT[1000:])
    assert headers["Content-Range"] == f"bytes 1000-{len(CONTENT) - 1}/{len(CONTENT)}"


def test_a_range_past_the_end_is_416_with_the_size(port: int) -> None:
    status, headers, body = ask(port, "/m.gguf", Range=f"bytes={len(CONTENT)}-")
    assert (status, headers["Content-Range"], body) == (416, f"bytes */{len(CONTENT)}", b"")


def test_if_range_sends_the_rest_only_of_the_same_file(port: int) -> None:
    tag = ask(port, "/m.gguf", "HEAD")[1]["ETag"]
    assert ask(port, "/m.gguf", Range="bytes=10-", If_Range=tag)[0] == 206
    status, _, body = ask(port, "/m.gguf", Range="bytes=10-", If_Range='"other"')
    assert (status, body) == (200, CONTENT)


def test_the_etag_changes_with_the_file(port: int, tmp_path: Path) -> None:
    before = ask(port, "/m.gguf", "HEAD")[1]["ETag"]
    (tmp_path / "models/m.gguf").write_bytes(CONTENT + b"x")
    assert ask(port, "/m.gguf", "HEAD")[1]["ETag"] != before


@pytest.mark.parametrize(
    "path", ["/../secret.gguf", "/%2e%2e/secret.gguf", "/.hidden.gguf", "/none.gguf", "/", "/m"]
)
def test_nothing_else_is_served(port: int, path: str) -> None:
    assert ask(port, path)[0] == 404


class Archive(BaseHTTPRequestHandler):
    """A package archive that counts what it is asked for."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if "missing" in self.path:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", "7")
        self.end_headers()
        self.wfile.write(b"package")

    def log_message(self, *_args: object) -> None:
        pass


@pytest.fixture
def archive(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    Archive.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Archive)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_a_package_is_fetched_once(port: int, archive: str, tmp_path: Path) -> None:
    for _ in range(3):
        assert ask(port, f"{archive}/pool/a_1_all.deb")[::2] == (200, b"package")
        deadline = time.monotonic() + 10  # it is kept just after it was sent
        while not list((tmp_path / "packages").glob("*.deb")) and time.monotonic() < deadline:
            time.sleep(0.01)
    assert Archive.asked == ["/pool/a_1_all.deb"]


def test_packages_of_one_name_from_two_places_are_two(port: int, archive: str) -> None:
    ask(port, f"{archive}/pool/a_1_all.deb")
    ask(port, f"{archive}/other/a_1_all.deb")
    assert len(Archive.asked) == 2


def test_lists_are_always_asked_for_anew(port: int, archive: str) -> None:
    for _ in range(2):
        assert ask(port, f"{archive}/dists/x/InRelease")[0] == 200
    assert len(Archive.asked) == 2


def test_what_the_archive_refuses_is_not_kept(port: int, archive: str, tmp_path: Path) -> None:
    assert ask(port, f"{archive}/pool/missing.deb")[0] == 404
    assert list((tmp_path / "packages").iterdir()) == []
