"""What a person types: ocr-pipeline on a photo, verify_ocr.py on a folder through a live service."""

from __future__ import annotations

import base64
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from ocr_pipeline import explain
from ocr_pipeline.reading import FIELDS
from ocr_pipeline.stages import LineClass
from PIL import Image

from tests.ocr.service import REAL_WORKER, running
from tests.support import BIN, ROOT, Run, run

PLATES = Path(__file__).parent / "plates"
FEW = ("3012.jpg", "3034.jpg")


@pytest.fixture(scope="module")
def labels() -> dict[str, Any]:
    """The labels of the fixed plates, by file."""
    rows = json.loads((PLATES / "labels.json").read_text(encoding="utf-8"))["photos"]
    return {row["file"]: row for row in rows}


def pipeline(*words: str | Path) -> Run:
    return run(BIN / "ocr-pipeline", *words, timeout=120)


def test_read_prints_the_object_and_explains_it_in_a_picture(labels: dict[str, Any], tmp_path: Path) -> None:
    photo, picture = PLATES / FEW[0], tmp_path / "how.png"
    found = json.loads(pipeline("read", photo, "--explain", picture).check().stdout)
    assert set(found) == {*FIELDS, "_needs_review", "_reasons", "_confidence"}
    assert {name: found[name] for name in FIELDS if found[name] is not None} == labels[FEW[0]]["fields"]
    with Image.open(picture) as drawn:
        count = {colour: number for number, colour in drawn.getcolors(1 << 24) or ()}
    plate, crop, words = (255, 210, 0), (0, 150, 255), (31, 35, 40)
    for colour in (plate, crop, words, explain.COLOURS[LineClass.NAMEPLATE]):
        assert count.get(colour, 0) > 100, f"nothing is drawn in {colour}"


def test_a_picture_that_cannot_be_written_costs_nobody_the_reading() -> None:
    done = pipeline("read", PLATES / FEW[0], "--explain", "/proc/how.png")
    assert set(json.loads(done.stdout)) >= set(FIELDS)
    assert (done.rc, done.stderr.count("\n")) == (2, 1) and "/proc/how.png" in done.stderr


def test_the_picture_shows_letters_with_accents_without_them() -> None:
    assert explain.drawn("POTÊNCIA (Nº 7): não") == "POTENCIA (No 7): nao"


def test_text_prints_what_is_there() -> None:
    assert "TELE 750" in pipeline("text", PLATES / FEW[0]).check().stdout


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("read", "/nowhere.jpg"), 2, "/nowhere.jpg: No such file or directory"),
        (("read", __file__), 2, "send JPEG, PNG or WebP"),
        (("read", PLATES / FEW[0], "--explain", "how.txt"), 2, "must end in .png"),
        (("read", PLATES / FEW[0], "--explain", "/nowhere/how.png"), 2, "there is no folder /nowhere"),
        (("read", PLATES / FEW[0], "--settings", "/nowhere.yml"), 2, "/nowhere.yml: No such file"),
    ],
)
def test_what_cannot_be_done_is_one_line(words: tuple[str | Path, ...], code: int, says: str) -> None:
    done = pipeline(*words)
    assert (done.rc, done.stdout) == (code, "")
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_folder_is_verified_through_a_live_service_and_against_other_settings(
    labels: dict[str, Any], tmp_path: Path
) -> None:
    """The service reads as the pipeline does; settings that read less are told apart from it."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in FEW:
        shutil.copy(PLATES / name, folder)
    (folder / "labels.json").write_text(json.dumps({"photos": [labels[name] for name in FEW]}))
    other = tmp_path / "text.yml"
    other.write_text("detector: {backend: text}\n")
    result, chart = tmp_path / "result.json", tmp_path / "chart.png"
    with running(tmp_path, worker=REAL_WORKER) as service:
        done = run(
            *(BIN / "python", "scripts/verify_ocr.py", folder, "--url", service.url("")),
            *("--versus", other, "--json", result, "--chart", chart),
            env={"OCR_API_KEY": service.key},
            timeout=240,
        )
    found = json.loads(result.read_text())
    printed = sum(len(labels[name]["fields"]) for name in FEW)
    assert (found["all"]["printed"], found["all"]["accuracy"], found["all"]["silent"]) == (printed, 1.0, 0)
    lost = printed - found["versus"]["all"]["right"]
    assert lost > 0, "its crop is too small for one of them"
    compared = found["compared"]
    assert (compared["only_first_right"], compared["only_second_right"]) == (lost, 0)
    assert compared["difference"] == pytest.approx(-lost / printed)
    assert done.rc == 0, done.tail()
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_the_first_command_of_the_apis_page_sends_a_photo_of_a_phones_size(tmp_path: Path) -> None:
    page = (ROOT / "docs/ocr-api.md").read_text()
    command = page.partition("```console\n$ ")[2].partition("```")[0].partition("|\n    jq ")[0]
    photo = bytes(range(256)) * 16384  # 4 MB
    (tmp_path / "plate.jpg").write_bytes(photo)
    program = tmp_path / "curl"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/words\ncat > {tmp_path}/body\n')
    program.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = run("bash", "-ec", command, cwd=tmp_path, env={"PATH": path, "KEY": "k"})
    assert done.rc == 0, done.tail()
    assert (tmp_path / "words").read_text().split()[-2:] == ["-d", "@-"]
    part = json.loads((tmp_path / "body").read_text())["contents"][0]["parts"][0]["inlineData"]
    assert part["mimeType"] == "image/jpeg"
    assert base64.b64decode(part["data"]) == photo
