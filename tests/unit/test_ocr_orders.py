"""Jobs as clients ask for them, shares' paths, the service's settings."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from ocr_pipeline.api import orders, settings
from ocr_pipeline.api.errors import Refusal
from ocr_pipeline.errors import SettingsError
from ocr_pipeline.jobs.tables import Item, Kind
from ocr_pipeline.smb.share import Entry, ShareMissingError, ShareSettings, checked_path
from sqlalchemy import String

SETTINGS = settings.Settings(max_poles=3, max_images_per_pole=2, max_image=1024, max_feeder_images=3)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def alt(*poles: Any, **more: Any) -> dict[str, Any]:
    return {"type": "ALT", "poles": list(poles), **more}


def pole(pole_id: str, *images: bytes) -> dict[str, Any]:
    return {"id": pole_id, "images": [{"data": b64(image)} for image in images]}


def test_an_alt_order() -> None:
    order = orders.order(alt(pole("P-1", b"a", b"b"), pole("P-2", b"a"), feeder="F 1"), SETTINGS)
    assert (order.kind, order.feeder) == (Kind.ALT, "F 1")
    assert [(photo.pole_id, photo.name, photo.data) for photo in order.photos] == [
        ("P-1", "1", b"a"),
        ("P-1", "2", b"b"),
        ("P-2", "1", b"a"),
    ]
    assert order.photos[0].image_hash == order.photos[2].image_hash


def test_the_texts_are_let_go_as_they_are_decoded() -> None:
    body = alt(pole("P", b"x"))
    orders.order(body, SETTINGS)
    assert body["poles"][0]["images"] == [{}]


def test_a_tra_order() -> None:
    order = orders.order({"type": "TRA", "feeder": "F", "share": "field", "folder": "2026/F"}, SETTINGS)
    assert (order.kind, order.share, order.folder, order.photos) == (Kind.TRA, "field", "2026/F", ())


@pytest.mark.parametrize(
    ("body", "reason", "words"),
    [
        ([], "BAD_ENVELOPE", "must be an object"),
        ({}, "BAD_JOB", "TRA or ALT"),
        ({"type": "alt"}, "BAD_JOB", "TRA or ALT"),
        (alt(), "BAD_ENVELOPE", "poles: 0 entries; 1 to 3"),
        (alt(*(pole(f"P{n}", b"x") for n in range(4))), "BAD_ENVELOPE", "4 entries"),
        (alt(pole("P", b"1", b"2", b"3")), "BAD_ENVELOPE", "poles[0].images: 3 entries; 1 to 2"),
        (alt(pole("P")), "BAD_ENVELOPE", "0 entries"),
        (alt(pole("P", b"1"), pole("P", b"2")), "BAD_JOB", "is there twice"),
        (alt(pole("=cmd()", b"1")), "BAD_JOB", "poles[0].id"),
        (alt(pole("../etc", b"1")), "BAD_JOB", "poles[0].id"),
        (alt({"id": 5, "images": [{"data": "AAAA"}]}), "BAD_JOB", "poles[0].id"),
        (alt({"id": "P", "images": [{"data": "!"}]}), "BAD_BASE64", "poles[0].images[0].data"),
        (alt({"id": "P", "images": [{"name": "a\nb", "data": "AAAA"}]}), "BAD_JOB", "images[0].name"),
        (alt(pole("P", b"x" * 1025)), "IMAGE_TOO_LARGE", "1025 bytes"),
        (alt(pole("P", b"x"), feeder="<b>"), "BAD_JOB", "feeder"),
        ({"type": "TRA"}, "BAD_JOB", "folder"),
        ({"type": "TRA", "feeder": "F", "share": "s", "folder": "../F"}, "BAD_JOB", "no path of a share"),
        ({"type": "TRA", "feeder": "F", "share": r"\\evil\x", "folder": "F"}, "BAD_JOB", "share"),
        ({"type": "TRA", "share": "s", "folder": "F"}, "BAD_JOB", "feeder is missing"),
    ],
)
def test_a_wrong_order_names_the_place(body: Any, reason: str, words: str) -> None:
    with pytest.raises(Refusal) as caught:
        orders.order(body, SETTINGS)
    assert caught.value.reason == reason
    assert words in caught.value.message


def test_the_fingerprint_is_the_orders() -> None:
    one = orders.order(alt(pole("P", b"a"), feeder="F"), SETTINGS).fingerprint()
    assert one == orders.order(alt(pole("P", b"a"), feeder="F"), SETTINGS).fingerprint()
    assert one != orders.order(alt(pole("P", b"b"), feeder="F"), SETTINGS).fingerprint()
    assert one != orders.order(alt(pole("Q", b"a"), feeder="F"), SETTINGS).fingerprint()
    assert one != orders.order(alt(pole("P", b"a"), feeder="G"), SETTINGS).fingerprint()


@pytest.mark.parametrize(
    ("path", "expected"), [("F/P-1/a.jpg", "P-1"), ("F/P2_front.jpg", "P2"), ("F/P3.jpg", "P3")]
)
def test_the_pole_of_a_path(path: str, expected: str) -> None:
    found = orders.photos_of([Entry(path, 5, 1.0)], "F", SETTINGS)
    assert [photo.pole_id for photo in found] == [expected]
    assert found[0].data is None


def test_the_longest_path_that_the_database_keeps_is_a_photo() -> None:
    (found,) = orders.photos_of([Entry(f"F/P/{'a' * 504}.jpg", 1, 1.0)], "F", SETTINGS)
    column = Item.__table__.c.name.type
    assert isinstance(column, String)
    assert len(found.name) == column.length


CAMERAS = ("IMG_0001", "dsc-00012", "PXL_20260101_1", "20260101_101010", "IMG0001")


def test_in_a_pole_s_folder_a_photo_may_be_called_anything() -> None:
    """As a pole may be called by a number of eight digits."""
    for path, pole in (*((f"F/P1/{name}.jpg", "P1") for name in CAMERAS), ("F/20410417_a.jpg", "20410417")):
        assert orders.photos_of([Entry(path, 5, 1.0)], "F", SETTINGS)[0].pole_id == pole


def test_a_photo_that_was_replaced_on_the_share_is_another() -> None:
    hashes = {
        orders.photos_of([entry], "F", SETTINGS)[0].image_hash
        for entry in (Entry("F/P/a.jpg", 5, 1.0), Entry("F/P/a.jpg", 6, 1.0), Entry("F/P/a.jpg", 5, 2.0))
    }
    assert len(hashes) == 3


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([Entry(f"F/P{n}/a.jpg", 1, 1.0) for n in range(4)], "TOO_MANY_IMAGES"),
        ([Entry("F/=1+1/a.jpg", 1, 1.0)], "BAD_POLE"),
        *(([Entry(f"F/{name}.jpg", 1, 1.0)], "BAD_POLE") for name in CAMERAS),
        ([Entry(f"F/P/{'a' * 505}.jpg", 1, 1.0)], "BAD_JOB"),
    ],
)
def test_a_feeder_that_cannot_be_a_job(entries: list[Entry], reason: str) -> None:
    with pytest.raises(Refusal) as caught:
        orders.photos_of(entries, "F", SETTINGS)
    assert caught.value.reason == reason


@pytest.mark.parametrize("path", ["F", "2026/F 7/P-1", "F_ã", "F/P1 / a.jpg"])
def test_paths_below_a_share(path: str) -> None:
    assert checked_path(f"/{path}/") == path


@pytest.mark.parametrize(
    "path",
    ["", "/", "..", "a/../b", "a//b", r"a\b", "a:b", "a\0b", ".. /a", "a/.", "a/ ", "...", "C:/x", "*"],
)
def test_paths_that_could_lead_elsewhere(path: str) -> None:
    with pytest.raises(ShareMissingError):
        checked_path(path)


def test_a_password_is_in_no_text() -> None:
    share = ShareSettings("server", "photos", "reader", "hunter22")
    assert "hunter22" not in repr(share)
    entry = settings.ShareEntry(server="s", share="x", username="u", password="hunter22")
    assert "hunter22" not in repr(entry)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not usable JSON"),
        ("[]", "the whole"),
        ('{"port": 0}', "port"),
        ('{"unknown": 1}', "unknown"),
        ('{"queue": "nowhere"}', "must be an address"),
        ('{"attempts": 99}', "attempts"),
    ],
)
def test_wrong_settings_are_one_line_with_the_remedy(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "service.json"
    path.write_text(content)
    with pytest.raises(SettingsError) as caught:
        settings.load(path)
    assert words in str(caught.value)
    assert "ocr_server.yml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_shares_file_shows_no_password(tmp_path: Path) -> None:
    shares = tmp_path / "shares.json"
    shares.write_text(json.dumps({"version": 1, "shares": {"f": {"server": "s", "password": "hunter22"}}}))
    with pytest.raises(SettingsError) as caught:
        settings.Settings(shares_file=str(shares)).shares()
    assert "hunter22" not in str(caught.value)
    assert "shares.f" in str(caught.value)


def test_the_embedded_default_needs_no_server() -> None:
    embedded = settings.Settings(state_dir="/var/lib/ocr")
    assert embedded.url("database") == "sqlite:////var/lib/ocr/jobs.sqlite3"
    assert embedded.url("queue") == "sqlite:////var/lib/ocr/queue.sqlite3"
    assert embedded.shares() == {}
    assert settings.Settings(records="postgresql://h/d").url("records") == "postgresql://h/d"
