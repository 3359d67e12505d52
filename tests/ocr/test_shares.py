"""Shares on a real Samba: encrypted, loud in three different ways, and dying in mid-job."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
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
    with share(samba) as opened:
        entries = opened.list("F")
        assert [entry.path for entry in entries] == ["F/P1/a.JPG", "F/P2_b.png", "F/P4/ lead.heic"]
        assert entries[0].size == 1_000_000
        for entry in entries:
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
        attempts=10,
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
    assert max(item["attempts"] for item in items) > 1
    assert samba.password not in service.log_text()


def test_a_share_that_stays_away_ends_the_job_loudly(samba: servers.Samba, tmp_path: Path) -> None:
    (samba.photos / "F").mkdir()
    (samba.photos / "F/P1_a.jpg").write_bytes(photo())
    place = tmp_path / "service"
    place.mkdir()
    service = Service(place, shares_file=shares_file(tmp_path, samba), attempts=2, retry_delay=0.1)
    try:
        service.start_api()
        job = tra(service, "F").json()["id"]
        samba.stop()
        items = settle(service, job)
        with service.client() as client:
            assert client.get(f"/api/v41/ocr/jobs/{job}").json()["state"] == "failed"
    finally:
        service.stop()
    assert items[0]["error"]["code"] == "SMB_UNREACHABLE"
    assert "attempt 2 of 2" in items[0]["error"]["message"]


def done(service: Service, job: str) -> int:
    with service.client() as client:
        return int(client.get(f"/api/v41/ocr/jobs/{job}").json()["counts"]["done"])
