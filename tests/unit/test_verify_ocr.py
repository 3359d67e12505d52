"""verify_ocr.py on folders of strangers' photos: no bar met by silence, no run lost to one answer."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from ocr_pipeline.errors import BackendError, ImageRefusedError

from scripts import verify_ocr

JPEG, PNG, WEBP = b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"RIFF\x10\0\0\0WEBPVP8 "
Answer = tuple[int, dict[str, str], Any]


def outcome(plate: int, right: bool = True, *, difficulty: str = "all", review: bool = False) -> Any:
    photo = verify_ocr.Labelled(f"{plate}.jpg", str(plate), difficulty, {"fases": 3})
    return verify_ocr.judge(photo, {"fases": 3 if right else None, "_needs_review": review}, 0.1)


def folder_of(place: Path, *photos: bytes) -> Path:
    rows = []
    for number, data in enumerate(photos):
        (place / f"{number}.jpg").write_bytes(data)
        rows.append({"file": f"{number}.jpg", "fields": {"fases": 3}})
    (place / "labels.json").write_text(json.dumps({"photos": rows}))
    return place


def reading(**fields: Any) -> Answer:
    return 200, {}, {"candidates": [{"content": {"parts": [{"text": json.dumps(fields)}]}}]}


@contextmanager
def service(*answers: Answer) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A service that answers so, the last time and again; and what it was asked."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            asked.append(body["contents"][0]["parts"][0]["inlineData"])
            status, headers, found = answers[min(len(asked), len(answers)) - 1]
            data = json.dumps(found).encode()
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_args: Any) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What was waited for, without the waiting."""
    found: list[float] = []
    monkeypatch.setattr("time.sleep", found.append)
    return found


# --- the bars ---


@pytest.mark.parametrize("difficulty", ["all", "customer"])
def test_a_folder_without_known_difficulties_has_a_bar_all_the_same(difficulty: str) -> None:
    bad = [outcome(plate, right=False, difficulty=difficulty) for plate in range(20)]
    assert verify_ocr.missed_bars(verify_ocr.report(bad)) == ["the folder: 0.0% of printed fields, bar 85.3%"]
    good = [outcome(plate, right=plate > 2, difficulty=difficulty) for plate in range(100)]
    assert verify_ocr.missed_bars(verify_ocr.report(good)) == []
    assert len(verify_ocr.missed_bars(verify_ocr.report(good), 0.98)) == 1


@pytest.mark.parametrize(
    ("wrong", "told"), [(5, []), (7, ["easy and medium: 96.5% of printed fields, bar 97%"])]
)
def test_easy_and_medium_are_held_to_one_bar(wrong: int, told: list[str]) -> None:
    """As the benchmark holds them: a few medium photos that are below it do not miss it alone."""
    photos = [outcome(plate, difficulty="easy") for plate in range(100)]
    photos += [outcome(plate, right=plate >= 100 + wrong, difficulty="medium") for plate in range(100, 200)]
    assert verify_ocr.missed_bars(verify_ocr.report(photos)) == told


def test_hard_photos_have_a_bar_of_their_own() -> None:
    for wrong, told in ((15, []), (16, ["hard: 84.0% of printed fields, bar 85%"])):
        photos = [outcome(plate, right=plate >= wrong, difficulty="hard") for plate in range(100)]
        assert verify_ocr.missed_bars(verify_ocr.report(photos), folder_bar=0) == told


def test_no_field_that_a_plate_lacks_may_be_filled_though_a_person_looks() -> None:
    photo = verify_ocr.Labelled("a.jpg", "a", "all", {"fases": 3})
    answer = {"fases": 3, "matricula": "1234", "_needs_review": True}
    found = verify_ocr.report([verify_ocr.judge(photo, answer, 0.1)])
    assert verify_ocr.missed_bars(found) == ["1 absent fields filled, bar 0"]


def test_each_field_is_counted_by_what_became_of_it() -> None:
    printed = {"fases": 3, "potencia_kva": 45.0, "numero_serie": "1"}
    photo = verify_ocr.Labelled("a.jpg", "a", "all", printed)
    answer = {"fases": 3, "potencia_kva": 75.0, "matricula": "9"}
    found = verify_ocr.report([verify_ocr.judge(photo, answer, 0.1)])["by_field"]
    counts = {
        name: [found[name][what] for what in ("printed", "right", "wrong", "missed", "invented")]
        for name in found
    }
    assert {name: count for name, count in counts.items() if any(count)} == {
        "fases": [1, 1, 0, 0, 0],
        "potencia_kva": [1, 0, 1, 0, 0],
        "numero_serie": [1, 0, 0, 1, 0],
        "matricula": [0, 0, 0, 0, 1],
    }


@pytest.mark.parametrize(
    ("reviewed", "told"), [(3, []), (4, ["4 of 20 correct plates sent to review, bar 15%"])]
)
def test_few_correct_plates_may_be_sent_to_review(reviewed: int, told: list[str]) -> None:
    photos = [outcome(plate, review=plate < reviewed) for plate in range(20)]
    photos += [outcome(plate, right=False, review=True) for plate in range(20, 23)]  # are none
    assert verify_ocr.missed_bars(verify_ocr.report(photos), folder_bar=0) == told


@pytest.mark.parametrize(("silent", "missed"), [(1, False), (2, True)])
def test_one_field_in_200_may_be_wrong_and_not_marked(silent: int, missed: bool) -> None:
    photo = verify_ocr.Labelled("a.jpg", "a", "all", {"fases": 3})
    photos = [outcome(plate) for plate in range(200 - silent)]
    photos += [verify_ocr.judge(photo, {"fases": 1}, 0.1)] * silent
    told = [f"{silent} silent errors in 200 printed fields, bar 0.5%"] * missed
    assert verify_ocr.missed_bars(verify_ocr.report(photos)) == told


def test_a_folder_in_which_nothing_is_printed_meets_no_bar() -> None:
    photo = verify_ocr.Labelled("a.jpg", "a", "all", {})
    told = verify_ocr.missed_bars(verify_ocr.report([verify_ocr.judge(photo, {}, 0.1)]))
    assert told == ["the folder: no printed field in its labels, so nothing was measured"]


def test_a_run_that_reads_nothing_exits_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with service(reading()) as (url, _):
        assert verify_ocr.main([str(folder_of(tmp_path, JPEG)), "--url", url]) == 1
    assert "missed: the folder: 0.0%" in capsys.readouterr().err


# --- intervals ---


def test_twenty_plates_all_right_do_not_prove_every_plate() -> None:
    found = verify_ocr.summary([outcome(plate) for plate in range(20)])
    low, high = found["interval"]
    assert (round(low, 3), high) == (0.839, 1.0)  # Wilson's, of 20
    assert found["silent_interval"] == (0.0, pytest.approx(1 - low))
    assert found["review_interval"] == (0.0, pytest.approx(1 - low))
    none = verify_ocr.summary([outcome(plate, right=False) for plate in range(20)])
    assert none["interval"] == (0.0, pytest.approx(1 - low))


def test_one_plate_says_little_of_others() -> None:
    photos = [outcome(1), outcome(1, right=False)]
    low, high = verify_ocr.summary(photos)["interval"]
    assert low < 0.2
    assert high > 0.8


def test_silent_errors_and_reviews_have_an_interval_in_the_table() -> None:
    outcomes = [outcome(plate, review=plate < 10) for plate in range(100)]
    low, high = verify_ocr.summary(outcomes)["review_interval"]
    assert 0.03 < low < 0.1 < high < 0.18
    page = verify_ocr.table(verify_ocr.report(outcomes))
    assert f"10 of 100 ({low:.1%} to {high:.1%})" in page
    assert "0 (0.0% to 3.7%)" in page
    assert verify_ocr.summary([])["review_interval"] == (0.0, 1.0)


def test_figures_of_an_earlier_run_without_them_are_shown_still() -> None:
    found = verify_ocr.report([outcome(1)])
    for part in (found["all"], *found["by_difficulty"].values()):
        for name in ("silent_interval", "review_interval", "failed"):
            del part[name]
    assert "| all |" in verify_ocr.table(found)


def test_two_configurations_have_an_interval_of_their_difference() -> None:
    """Paired: the plates that both fail say nothing of the difference."""
    first = [outcome(plate, right=plate >= 50) for plate in range(100)]
    second = [outcome(plate, right=plate >= 40) for plate in range(100)]
    found = verify_ocr.compared(first, second)
    assert (found["only_first_right"], found["only_second_right"]) == (0, 10)
    assert found["difference"] == pytest.approx(0.1)
    low, high = found["interval"]
    assert 0.03 < low < 0.1 < high < 0.18, "unpaired it would contain 0"


def test_two_configurations_that_read_the_same_may_differ_on_other_plates() -> None:
    same = [outcome(plate) for plate in range(20)]
    found = verify_ocr.compared(same, same)
    low, high = found["interval"]
    assert found["difference"] == 0
    assert low == -high
    assert 0.1 < high < 0.2


# --- a live service ---


def test_the_type_is_that_of_the_bytes(tmp_path: Path) -> None:
    with service(reading(fases=3)) as (url, asked):
        assert verify_ocr.main([str(folder_of(tmp_path, JPEG, PNG, WEBP)), "--url", url]) == 0
    assert [part["mimeType"] for part in asked] == ["image/jpeg", "image/png", "image/webp"]
    assert [base64.b64decode(part["data"]) for part in asked] == [JPEG, PNG, WEBP]


def test_a_busy_service_is_waited_for_as_long_as_it_says_within_bounds(
    tmp_path: Path, waits: list[float]
) -> None:
    busy: list[Answer] = [
        (429, {"retry-after": "7"}, {}),
        (503, {"retry-after": "86400"}, {}),
        (503, {"retry-after": "soon"}, {}),
    ]
    with service(*busy, reading(fases=3)) as (url, asked):
        assert verify_ocr.main([str(folder_of(tmp_path, JPEG)), "--url", url]) == 0
    assert len(asked) == 4
    assert waits == [7.0, verify_ocr.LONGEST_WAIT_S, pytest.approx(4.0)]


def test_a_refused_photo_counts_as_unread_and_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused: Answer = (400, {}, {"error": {"details": [{"reason": "UNSUPPORTED_FORMAT"}]}})
    result = tmp_path / "result.json"
    with service(reading(fases=3), refused, (504, {}, []), reading(fases=3)) as (url, asked):
        words = [str(folder_of(tmp_path, *[JPEG] * 4)), "--url", url, "--json", str(result)]
        assert verify_ocr.main(words) == 1
    assert len(asked) == 4
    found = json.loads(result.read_text())
    assert (found["all"]["right"], found["all"]["missed"], found["all"]["failed"]) == (2, 2, 2)
    assert [row["failed"] for row in found["outcomes"]] == ["", "UNSUPPORTED_FORMAT", "status 504", ""]
    assert "1.jpg: not read: UNSUPPORTED_FORMAT" in capsys.readouterr().err


def test_a_service_that_stays_away_ends_the_run_and_what_was_read_is_kept(
    tmp_path: Path, waits: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    result = tmp_path / "result.json"
    with service(reading(fases=3), (503, {}, {})) as (url, _):
        words = [str(folder_of(tmp_path, *[JPEG] * 9)), "--url", url, "--json", str(result)]
        assert verify_ocr.main(words) == 2
    found = json.loads(result.read_text())
    assert (found["all"]["photos"], found["all"]["right"]) == (1, 1)
    assert sum(waits) <= 3 * verify_ocr.PATIENCE_S
    said = capsys.readouterr()
    assert "verify_ocr: 3 photos one after the other had no answer, the last: status 503" in said.err
    assert "1 of 9 photos" in said.err


def test_a_key_that_is_refused_is_no_photos_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with service((401, {}, {})) as (url, asked):
        assert verify_ocr.main([str(folder_of(tmp_path, JPEG, JPEG)), "--url", url]) == 2
    assert len(asked) == 1
    assert "status 401" in capsys.readouterr().err


def test_in_this_process_a_refusal_counts_and_a_backend_that_is_away_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stub:
        error: Exception = ImageRefusedError("DAMAGED_IMAGE", "damaged")

        def read(self, _data: bytes) -> Any:
            raise self.error

    monkeypatch.setattr("ocr_pipeline.build.pipeline", lambda _settings: Stub())
    folder = str(folder_of(tmp_path, *[JPEG] * 4))
    assert verify_ocr.main([folder]) == 1
    Stub.error = BackendError("no server")
    assert verify_ocr.main([folder]) == 2
