"""What a share lists: every photo that somebody put there, and nothing that cannot be read."""

from __future__ import annotations

import datetime
from types import SimpleNamespace
from typing import Any

import pytest
from ocr_pipeline.smb.share import Share, ShareEmptyError, ShareNameError, ShareSettings, checked_path

Tree = dict[str, Any]  # a folder's entries; None is a file


def entry(name: str, folder: Tree | None) -> Any:
    """An entry as smbclient gives it."""
    written = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    return SimpleNamespace(
        name=name,
        smb_info=SimpleNamespace(end_of_file=1, last_write_time=written),
        is_symlink=lambda: name.startswith("link"),
        is_dir=lambda: folder is not None,
    )


def listed(monkeypatch: pytest.MonkeyPatch, tree: Tree) -> list[str]:
    """The paths that a share lists of folder F."""

    def scandir(path: str, **_: Any) -> list[Any]:
        here = tree
        for part in path.split("\\")[5:]:
            here = here[part]
        return [entry(name, folder) for name, folder in here.items()]

    monkeypatch.setattr("smbclient.scandir", scandir)
    monkeypatch.setattr("smbclient.register_session", lambda *_, **__: None)
    return [found.path for found in Share(ShareSettings("host", "photos", "u", "p")).list("F")]


def test_photos_of_formats_that_are_not_read_are_listed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("a.HEIC", "b.heif", "c.avif", "d.GIF", "e.jpg")
    assert listed(monkeypatch, {"P1": dict.fromkeys((*names, "notes.txt"))}) == [
        f"F/P1/{name}" for name in names
    ]


def test_what_is_listed_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    found = listed(monkeypatch, {"P1 ": {" lead.jpg": None, "b .jpg": None}})
    assert found == ["F/P1 / lead.jpg", "F/P1 /b .jpg"]
    assert [checked_path(path) for path in found] == found


@pytest.mark.parametrize("name", ["a:b.jpg", "a\tb.heic", "a*.png"])
def test_a_photo_that_cannot_be_read_by_its_name_is_told(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with pytest.raises(ShareNameError, match="rename it"):
        listed(monkeypatch, {"P1": {"a.jpg": None, name: None}})


def test_links_that_the_server_shows_as_links_are_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may lead anywhere on that server."""
    assert listed(monkeypatch, {"P1": {"a.jpg": None, "link.jpg": None}, "link": {"z.jpg": None}}) == [
        "F/P1/a.jpg"
    ]


def test_deeper_folders_are_not_the_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ShareEmptyError):
        listed(monkeypatch, {"P1": {"deeper": {"z.jpg": None}}})
