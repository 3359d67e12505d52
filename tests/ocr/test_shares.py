"""Shares on a real Samba: encrypted, loud in three different ways, and dying in mid-job."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest
from ocr_pipeline.api.app import LISTINGS
from ocr_pipeline.smb.share import (
    Share,
    ShareEmptyError,
    ShareError,
    ShareForbiddenError,
    ShareInsecureError,
    ShareMissingError,
    ShareRefusedError,
    ShareSettings,
    ShareTooLargeError,
    ShareUnreachableError,
)

from tests.ocr import servers
from tests.ocr.service import Service, photo
from tests.ocr.test_durability import settle, shares_file

T = TypeVar("T")


def share(samba: servers.Samba, **changed: Any) -> Share:
    settings = {
        "server": "127.0.0.1",
        "share": "photos",
        "username": samba.user,
        "password": samba.password,
        "port": samba.port,
        "timeout_s": 3.0,
        **changed,
    }
    return Share(ShareSettings(**settings))


def test_a_feeder_is_listed_and_read(samba: servers.Samba) -> None:
    (samba.photos / "F/P1/deeper").mkdir(parents=True)
    (samba.photos / "F/P4").mkdir()
    for name in (
        "F/P4/ lead.heic",
        "F/P1/a.JPG",
        "F/P2_b.png",
        "F/notes.txt",
        "F/P1/.hidden.jpg",
        "F/P1/deeper/c.jpg",
    ):
        (samba.photos / name).write_bytes(name.encode() * 100_000)
    (samba.photos / "F/P1/link.jpg").symlink_to("/etc/hostname")
    (samba.photos / "F/P1/inside.jpg").symlink_to("a.JPG")
    with share(samba) as opened:
        entries = opened.list("F")
        assert [entry.path for entry in entries] == [
            *("F/P1/a.JPG", "F/P1/inside.jpg"),  # Samba follows a link that stays in the share by itself
            *("F/P2_b.png", "F/P4/ lead.heic"),
        ]
        assert entries[0].size == 1_000_000
        for entry in [entry for entry in entries if "inside" not in entry.path]:
            assert opened.read(entry.path, 2_000_000) == entry.path.encode() * 100_000
        with pytest.raises(ShareTooLargeError):
            opened.read("F/P1/a.JPG", 999_999)


@pytest.mark.parametrize(
    ("changed", "folder", "expected"),
    [
        ({"password": "wrong"}, "F", ShareRefusedError),
        ({"username": "nobody-here"}, "F", ShareRefusedError),
        ({}, "empty", ShareEmptyError),
        ({}, "none", ShareMissingError),
        ({"share": "none"}, "F", ShareMissingError),
        ({"share": "others"}, "F", ShareForbiddenError),
        ({"port": None}, "F", ShareUnreachableError),
    ],
)
def test_each_fault_has_its_own_loud_error(
    samba: servers.Samba, changed: dict[str, Any], folder: str, expected: type[ShareError]
) -> None:
    for name in ("F", "empty"):
        (samba.photos / name).mkdir()
    (samba.photos / "F/P1_a.jpg").write_bytes(b"x")
    if "port" in changed:
        changed = {"port": servers.free_port()}
    started = time.monotonic()
    with pytest.raises(ShareError) as caught, share(samba, **changed) as opened:
        opened.list(folder)
    assert type(caught.value) is expected
    assert time.monotonic() - started < 10
    assert samba.password not in str(caught.value)
    assert "wrong" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_server_that_cannot_encrypt_is_not_used() -> None:
    with servers.samba(encryption="off") as samba:
        (samba.photos / "F").mkdir()
        (samba.photos / "F/P1_a.jpg").write_bytes(b"x")
        with pytest.raises(ShareInsecureError) as caught, share(samba) as opened:
            opened.list("F")
    assert not caught.value.temporary, "nobody tries that again"


def test_credentials_are_one_shares_alone(samba: servers.Samba) -> None:
    """A session with the right password does not serve another with a wrong one."""
    (samba.photos / "F").mkdir()
    (samba.photos / "F/P1_a.jpg").write_bytes(b"x")
    with share(samba) as good:
        assert good.list("F")
        with pytest.raises(ShareRefusedError), share(samba, password="wrong") as bad:
            bad.list("F")
        assert good.list("F")


class Line:
    """A network between a client and a Samba, which can fail as networks do: without a word."""

    def __init__(self, port: int) -> None:
        self.silent_after: int | None = None  # requests of a connection; what comes later is swallowed
        self.drip_s = 0.0  # between two pieces of an answer
        self.piece = 65536
        self._target = port
        self._ends: list[socket.socket] = []
        self._entry = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._entry.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        """Whoever still waits for an answer is told the end of its connection."""
        for end in [self._entry, *self._ends]:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._entry.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                self._ends += [client, server]
                for pump in (self._requests, self._answers):
                    threading.Thread(target=pump, args=(client, server), daemon=True).start()

    def _requests(self, client: socket.socket, server: socket.socket) -> None:
        count = 0
        with contextlib.suppress(OSError):
            while head := client.recv(4, socket.MSG_WAITALL):
                body = client.recv(int.from_bytes(head, "big"), socket.MSG_WAITALL)
                if self.silent_after is None or count < self.silent_after:
                    server.sendall(head + body)
                count += 1

    def _answers(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := server.recv(self.piece):
                time.sleep(self.drip_s)
                client.sendall(piece)


@pytest.fixture
def line(samba: servers.Samba) -> Iterator[Line]:
    """A network to a Samba with one photo."""
    (samba.photos / "F").mkdir()
    (samba.photos / "F/P1_a.jpg").write_bytes(photo())
    with Line(samba.port) as made:
        yield made


def aside(work: Callable[[], T]) -> T:
    """What the work gives or raises; a failure where it does not end."""
    found: Future[T] = Future()

    def go() -> None:
        try:
            found.set_result(work())
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=go, daemon=True).start()
    return found.result(20)


HANDSHAKE = 3  # requests, until the session stands


@pytest.mark.parametrize("after", [1, HANDSHAKE, HANDSHAKE + 2])
def test_a_server_that_falls_silent_is_unreachable(samba: servers.Samba, line: Line, after: int) -> None:
    with share(samba, port=line.port) as opened:
        line.silent_after = after
        with pytest.raises(ShareUnreachableError, match="silent for 3 s"):
            aside(lambda: opened.list("F"))
        line.silent_after = None
        assert opened.list("F"), "on a connection of its own"
        line.silent_after = 0
        with pytest.raises(ShareUnreachableError, match="silent for 3 s"):
            aside(lambda: opened.read("F/P1_a.jpg", 10**6))
        line.silent_after = None
        assert opened.read("F/P1_a.jpg", 10**6) == photo()


def test_a_slow_answer_is_no_silence_but_has_an_end(samba: servers.Samba, line: Line) -> None:
    data = os.urandom(4000)
    (samba.photos / "F/P1_a.jpg").write_bytes(data)
    with share(samba, port=line.port, timeout_s=5.0) as opened:
        opened.list("F")
        line.drip_s, line.piece = 0.1, 64  # the photo alone takes more than 6 s
        assert aside(lambda: opened.read("F/P1_a.jpg", 10**6)) == data
        opened._longest_s = 1.0
        with pytest.raises(ShareUnreachableError, match="not done within 1 s"):
            aside(lambda: opened.read("F/P1_a.jpg", 10**6))


def test_a_share_that_fell_silent_is_listed_again_once_the_network_is_back(
    samba: servers.Samba, line: Line, tmp_path: Path
) -> None:
    folder = tmp_path / "service"
    folder.mkdir()
    settings = Path(shares_file(tmp_path, samba))
    settings.write_text(settings.read_text().replace(str(samba.port), str(line.port)))
    service = Service(folder, shares_file=str(settings))
    line.silent_after = HANDSHAKE
    try:
        service.start_api()
        with ThreadPoolExecutor(LISTINGS) as pool:
            answers = list(pool.map(lambda _: tra(service, "F"), range(LISTINGS)))
        line.silent_after = None
        again = tra(service, "F")
    finally:
        service.stop()
    told = {(answer.status_code, answer.json()["error"]["details"][0]["reason"]) for answer in answers}
    assert told == {(503, "SMB_UNREACHABLE")}
    assert again.status_code == 202, again.text


def tra(service: Service, folder: str, share_name: str = "field") -> Any:
    with service.client() as client:
        body = {"type": "TRA", "feeder": "F", "share": share_name, "folder": folder}
        return client.post("/api/v41/ocr/jobs", json=body)


def test_the_api_tells_each_fault_at_the_submit(samba: servers.Samba, tmp_path: Path) -> None:
    (samba.photos / "empty").mkdir()
    (samba.photos / "F").mkdir()
    (samba.photos / "F/P1_a.jpg").write_bytes(photo())
    folder = tmp_path / "service"
    folder.mkdir()
    service = Service(folder, shares_file=shares_file(tmp_path, samba))
    try:
        service.start_api()
        answers = {name: tra(service, name) for name in ("empty", "none", "..")}
        answers["unknown"] = tra(service, "F", "elsewhere")
        answers["locked"] = tra(service, "F", "locked")
        samba.stop()
        answers["away"] = tra(service, "F")
        with service.client() as client:
            assert client.get("/api/v41/ocr/jobs").json() == [], "never a job of 0 photos"
        assert samba.password not in service.log_text()
        assert "not-the-password" not in service.log_text() + answers["locked"].text
    finally:
        service.stop()
    told = {
        name: (answer.status_code, answer.json()["error"]["details"][0]["reason"])
        for name, answer in answers.items()
    }
    assert told == {
        "empty": (400, "SMB_EMPTY_FOLDER"),
        "none": (404, "SMB_NOT_FOUND"),
        "..": (400, "BAD_JOB"),
        "unknown": (400, "SMB_UNKNOWN_SHARE"),
        "locked": (400, "SMB_WRONG_PASSWORD"),
        "away": (503, "SMB_UNREACHABLE"),
    }


def test_a_share_that_dies_in_mid_job_and_comes_back(samba: servers.Samba, tmp_path: Path) -> None:
    for n in range(20):
        folder = samba.photos / f"F/P{n % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{n}.jpg").write_bytes(photo(seed=n))
    place = tmp_path / "service"
    place.mkdir()
    service = Service(
        place,
        environment={"FAKE_SECONDS": "0.1"},
        shares_file=shares_file(tmp_path, samba),
        attempts=1,  # it costs none
        retry_delay=0.3,
    )
    try:
        service.start_api()
        service.start_worker()
        service.wait_ready()
        job = tra(service, "F").json()["id"]
        servers.wait_for(lambda: done(service, job) >= 3, "the first photos")
        samba.stop()
        threading.Timer(1.5, samba.start).start()
        items = settle(service, job)
    finally:
        service.stop()
    assert [item["state"] for item in items] == ["done"] * 20
    assert {item["attempts"] for item in items} == {1}
    assert samba.password not in service.log_text()


def done(service: Service, job: str) -> int:
    with service.client() as client:
        return int(client.get(f"/api/v41/ocr/jobs/{job}").json()["counts"]["done"])
