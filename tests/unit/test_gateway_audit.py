"""The log of requests: what a line holds, that nobody can forge one, and that it never stops a request."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import re
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from llmbox.gateway.audit import ERROR_LIMIT, STRANGERS, STRANGERS_S, Audit, Entry, line
from llmbox.gateway.usage import Usage

WHEN = datetime(2026, 11, 22, 12, 30, 0, 123456, tzinfo=UTC)
NASTY = [
    'a"\n{"time":"forged"}',
    "\r\n\x00\x1b[31m\x7f\x85\u2028\u2029\u202e",
    "\ud800",
    "\\u000a\\",
    "",
    "x" * 5000,
    "🙂",
]


def entry(**fields: Any) -> Entry:
    return Entry(**{"path": "/v1/messages", "time": WHEN, "id": "1", "key": "alice", **fields})


def test_a_line_holds_the_whole_of_a_request() -> None:
    told = entry(
        key="alice",
        client="192.168.1.7",
        wanted="coder",
        preset="coder",
        stream=True,
        waited_s=1.23456,
        usage=Usage(100, 60, 20, 500.5, float("inf")),
        status=200,
        switch="caused",
        seconds=2.0,
    )
    assert json.loads(line(told)) == {
        "time": "2026-11-22T12:30:00.123Z",
        "id": "1",
        "key": "alice",
        "client": "192.168.1.7",
        "path": "/v1/messages",
        "wanted": "coder",
        "preset": "coder",
        "stream": True,
        "status": 200,
        "error": None,
        "seconds": 2.0,
        "wait_s": 1.235,
        "switch": "caused",
        "prompt_tokens": 100,
        "cached_tokens": 60,
        "generated_tokens": 20,
        "prefill_tok_s": 500.5,
        "generation_tok_s": None,
    }


def test_time_is_utc_and_ids_differ() -> None:
    there = WHEN.astimezone(timezone(timedelta(hours=5)))
    assert json.loads(line(entry(time=there)))["time"] == "2026-11-22T12:30:00.123Z"
    one, other = Entry(path="/props"), Entry(path="/props")
    assert one.id != other.id
    assert one.time.utcoffset() == timedelta(0)
    one.end(200)
    assert one.status == 200 and one.seconds >= 0


def test_content_is_written_only_when_it_is_given(tmp_path: Path) -> None:
    audit = Audit(tmp_path / "audit.jsonl", 10**6, 1)
    audit.write(entry())
    audit.write(entry(), b'{"model": "c\xff\n"}')
    bodies = [json.loads(text).get("body") for text in audit.path.read_text().splitlines()]
    assert bodies == [None, '{"model": "c\ufffd\n"}']


@pytest.mark.parametrize("seed", range(20))
def test_nobody_can_forge_a_line(seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311
    fields = {
        name: "".join(chance.choice(NASTY) + chr(chance.randrange(0x250)) for _ in range(4))
        for name in ("key", "client", "wanted", "preset", "error", "path", "switch", "id")
    }
    text = line(entry(**fields), "".join(NASTY).encode(errors="replace") + b"\xff\x00\n")
    assert re.fullmatch(rb"[\x20-\x7e]*\n", text)
    told = json.loads(text)
    for name, value in fields.items():
        assert told[name] == (value[:ERROR_LIMIT] if name == "error" else value)


def test_a_long_error_is_cut() -> None:
    assert len(line(entry(error="x" * 10**6))) < 1500


# --- rotation ---


def names(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


def test_a_file_is_rotated_just_before_it_would_pass_its_size(tmp_path: Path) -> None:
    size = len(line(entry()))
    for spare, files in ((0, ["audit.jsonl"]), (-1, ["audit.jsonl", "audit.jsonl.1"])):
        place = tmp_path / str(spare)
        audit = Audit(place / "audit.jsonl", 3 * size + spare, 5)
        for _ in range(3):
            audit.write(entry())
        assert names(place) == files
    audit = Audit(tmp_path / "0" / "audit.jsonl", 3 * size, 5)  # as after a restart
    audit.write(entry())
    assert names(tmp_path / "0") == ["audit.jsonl", "audit.jsonl.1"]
    assert audit.path.stat().st_size == size


@pytest.mark.parametrize("seed", range(10))
def test_the_newest_lines_are_kept_in_order(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311
    keep, limit = chance.randint(1, 4), chance.randint(600, 3000)
    audit = Audit(tmp_path / "audit.jsonl", limit, keep)
    for number in range(60):
        audit.write(entry(id=str(number), error="x" * chance.randint(0, 400)))
    files = [audit.path, *(tmp_path / f"audit.jsonl.{number}" for number in range(1, keep + 1))]
    assert names(tmp_path) == sorted(file.name for file in files)
    lines = [json.loads(text) for file in reversed(files) for text in file.read_text().splitlines()]
    assert [told["id"] for told in lines] == [str(number) for number in range(60 - len(lines), 60)]
    for file in files:
        assert 0 < file.stat().st_size <= limit
        assert file.stat().st_mode & 0o777 == 0o600


def test_a_line_larger_than_a_file_has_one_of_its_own(tmp_path: Path) -> None:
    audit = Audit(tmp_path / "audit.jsonl", 1000, 3)
    audit.write(entry(), b"x" * 5000)
    assert names(tmp_path) == ["audit.jsonl"]
    for body in (b"", b"x" * 5000, b""):
        audit.write(entry(), body)
    sizes = [(tmp_path / name).stat().st_size for name in names(tmp_path)]
    assert [size > 5000 for size in sizes] == [False, True, False, True]


def test_whoever_removes_the_file_does_no_harm(tmp_path: Path) -> None:
    audit = Audit(tmp_path / "state" / "audit.jsonl", 10**6, 3)
    audit.write(entry())
    assert audit.path.parent.stat().st_mode & 0o777 == 0o700
    audit.path.unlink()
    audit.write(entry())
    assert len(audit.path.read_text().splitlines()) == 1


def test_strangers_do_not_push_out_the_lines_of_those_with_a_key(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    audit = Audit(tmp_path / "audit.jsonl", 10**6, 1, clock=lambda: now[0])
    for minute in range(2):
        now[0] = minute * STRANGERS_S
        for number in range(STRANGERS + 5):
            audit.write(entry(key="", id=f"stranger {number}", status=401))
            now[0] += (STRANGERS_S - 1) / (STRANGERS + 5)
        audit.write(entry(id="alice's"))
    told = [json.loads(text)["id"] for text in audit.path.read_text().splitlines()]
    assert told == [*(f"stranger {number}" for number in range(STRANGERS)), "alice's"] * 2
    assert len(caplog.records) == 2 and audit.lost == 0
    for _ in range(2 * STRANGERS):  # of a client that may ask, for what is not there
        audit.write(entry(key="", id="typo", status=404))
    assert audit.path.read_text().count('"typo"') == 2 * STRANGERS


# --- a disk that fails ---


class Disk:
    """`os.write` to a disk that takes `room` bytes more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self.room = room
        self._write = os.write
        monkeypatch.setattr(os, "write", self)

    def __call__(self, file: int, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = self._write(file, data[: self.room])
        self.room -= taken
        return taken


def test_a_full_disk_loses_lines_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    audit = Audit(tmp_path / "audit.jsonl", 10**6, 3, clock=lambda: now[0])
    disk = Disk(monkeypatch, 10**6)
    audit.write(entry(id="whole"))
    disk.room = 50
    for _ in range(5):
        audit.write(entry(id="lost"))
        now[0] += 29
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 2  # at 0 s and 87 s
    assert "No space left on device" in caplog.text
    disk.room = 10**6
    audit.write(entry(id="after"))
    assert [json.loads(text)["id"] for text in audit.path.read_text().splitlines()] == ["whole", "after"]
    assert audit.lost == 5


def test_a_short_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda file, data: real(file, data[:7]))
    audit = Audit(tmp_path / "audit.jsonl", 10**6, 3)
    audit.write(entry(id="whole"))
    assert json.loads(audit.path.read_text())["id"] == "whole"


@pytest.mark.parametrize("harm", ["directory", "link", "parent"])
def test_a_path_that_cannot_be_written_stops_nothing(
    tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "state" / "audit.jsonl"
    target = tmp_path / "target"
    if harm == "parent":
        path.parent.write_text("")
    elif harm == "link":
        path.parent.mkdir()
        path.symlink_to(target)
    else:
        path.mkdir(parents=True)
    audit = Audit(path, 10, 1)
    audit.write(entry(error="secret"))
    audit.write(entry())
    assert len(caplog.records) == 1 and "secret" not in caplog.text
    assert audit.lost == 2 and not target.exists()
