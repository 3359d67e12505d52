"""API keys of the OCR service, and what never reaches a log."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
from pathlib import Path

import pytest
from ocr_pipeline.api import keys, redact
from ocr_pipeline.api.errors import Refusal

KEY = "ocr-" + "aB3-_" * 8 + "xyz"  # as `ocr-key new` makes them
ENTRY = {"name": "laptop", "sha256": hashlib.sha256(KEY.encode()).hexdigest()}


def store(tmp_path: Path, *entries: dict[str, str]) -> keys.KeyStore:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"version": 1, "keys": list(entries)}))
    return keys.KeyStore(path)


@pytest.mark.parametrize(
    ("headers", "query"),
    [
        ({"x-goog-api-key": KEY}, None),
        ({"authorization": f"Bearer {KEY}"}, None),
        ({"authorization": f"bearer  {KEY} "}, None),
        ({}, KEY),
    ],
)
def test_a_key_by_each_of_the_three_ways(tmp_path: Path, headers: dict[str, str], query: str | None) -> None:
    assert store(tmp_path, ENTRY).name_of(headers, query, "192.0.2.7") == "laptop"


@pytest.mark.parametrize(
    ("headers", "query", "words"),
    [
        ({}, None, "no key"),
        ({"x-goog-api-key": "wrong"}, None, "not known"),
        ({"x-goog-api-key": KEY + "x"}, None, "not known"),
        ({"x-goog-api-key": ENTRY["sha256"]}, None, "not known"),
        ({"authorization": f"Basic {KEY}"}, None, "no key"),
        ({}, "\ud800", "not known"),
        ({}, "x" * 100_000, "not known"),
    ],
)
def test_without_a_known_key_401(
    tmp_path: Path, headers: dict[str, str], query: str | None, words: str
) -> None:
    with pytest.raises(Refusal) as caught:
        store(tmp_path, ENTRY).name_of(headers, query, "127.0.0.1")
    assert caught.value.code == 401
    assert words in caught.value.message
    assert caught.value.headers == {"WWW-Authenticate": "Bearer"}


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.9.9.9", "::1"])
def test_without_keys_the_machine_itself_is_served(tmp_path: Path, peer: str) -> None:
    assert store(tmp_path).name_of({}, None, peer) == keys.LOCAL


@pytest.mark.parametrize("peer", ["192.0.2.7", "::ffff:192.0.2.7", None, "nonsense"])
def test_without_keys_nobody_else_is(tmp_path: Path, peer: str | None) -> None:
    with pytest.raises(Refusal):
        store(tmp_path).name_of({}, None, peer)


def test_every_key_is_compared_in_constant_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []

    def counted(known: bytes, shown: bytes) -> bool:
        compared.append(known)
        return hmac.compare_digest(known, shown)

    monkeypatch.setattr("ocr_pipeline.api.keys.compare_digest", counted)
    others = [keys.new(f"k{number}")[1] for number in range(3)]
    store(tmp_path, ENTRY, *others).name_of({"x-goog-api-key": KEY}, None, None)
    assert len(compared) == 4


def test_a_changed_file_is_read_anew_and_a_broken_one_leaves_the_former_keys(tmp_path: Path) -> None:
    known = store(tmp_path, ENTRY)
    path = tmp_path / "keys.json"
    path.write_text("{broken")
    assert known.name_of({"x-goog-api-key": KEY}, None, None) == "laptop"
    assert "keys.json" in known.problem
    key, entry = keys.new("second")
    path.write_text(json.dumps({"version": 1, "keys": [entry]}))
    os.utime(path, ns=(1, 1))
    assert known.name_of({"x-goog-api-key": key}, None, None) == "second"
    with pytest.raises(Refusal):
        known.name_of({"x-goog-api-key": KEY}, None, None)


@pytest.mark.parametrize(
    "content",
    [
        {"version": 1, "keys": [ENTRY, {**ENTRY, "name": "other"}]},
        {"version": 1, "keys": [ENTRY, {**keys.new("laptop")[1]}]},
        {"version": 1, "keys": [{"name": "x", "sha256": KEY}]},
        {"version": 1, "keys": [{"name": "a b", "sha256": ENTRY["sha256"]}]},
        {"version": 2, "keys": []},
        {"version": 1, "keys": [{**ENTRY, "extra": 1}]},
    ],
)
def test_a_wrong_file_is_refused_without_showing_it(tmp_path: Path, content: object) -> None:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"keys\.json") as caught:
        keys.KeyStore(path)
    assert KEY not in str(caught.value)


def test_a_new_key_has_256_bits_and_its_hash_is_what_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    key, entry = keys.new("x")
    assert len(key) == len("ocr-") + 43
    assert entry["sha256"] == hashlib.sha256(key.encode()).hexdigest()
    assert keys.main(["new", "field.1"]) == 0
    assert "ocr_service_keys" in capsys.readouterr().out
    assert keys.main(["new", "no name"]) == 2


@pytest.mark.parametrize(
    "line",
    [
        f"GET /v1/models?key={KEY} HTTP/1.1",
        f"GET /v1/models?alt=sse&key={KEY}&x=1",
        f"{{'x-goog-api-key': '{KEY}'}}",
        f"(b'x-goog-api-key', b'{KEY}')",
        f"Authorization: Bearer {KEY}",
        f"postgresql://ocr:{KEY}@db/records",
        f"redis://:{KEY}@cache:6379/0",
        f"password={KEY}",
        f"whatever {KEY} is",
    ],
)
def test_no_key_and_no_password_in_a_log(line: str) -> None:
    told = redact.redact(line)
    assert KEY not in told
    assert "***" in told


@pytest.mark.parametrize(
    "line",
    [
        "GET /v1/models?alt=sse&key=SECRET&x=1",
        "GET /v1/models?api_key=SECRET",
        "{'x-goog-api-key': 'SECRET'}",
        "(b'x-goog-api-key', b'SECRET')",
        "Authorization: Basic SECRET",
        "it said bearer SECRET",
        "postgresql://ocr:SECRET@db/records",
        "password=SECRET",
    ],
)
def test_a_secret_of_another_service_is_kept_out_by_where_it_stands(line: str) -> None:
    """A client that asked a cloud before sends its old key, which has no form of ours."""
    told = redact.redact(line.replace("SECRET", "AIza-of-a-cloud"))
    assert told == line.replace("SECRET", "***")


def test_a_traceback_is_redacted_too() -> None:
    formatter = redact.RedactingFormatter("%(message)s")
    try:
        raise ValueError(f"?key={KEY}")
    except ValueError as error:
        record = logging.LogRecord(
            "x", 40, "f", 1, "it broke: %s", (f"&key={KEY}",), (ValueError, error, None)
        )
    assert KEY not in formatter.format(record)
