#!/usr/bin/env python3
"""Read a folder of labelled photos and say how many fields are right, per field and difficulty.

The folder holds `labels.json`: {"photos": [{"file", "fields": {field: value}, and optionally "plate",
"difficulty", "illegible": [fields]}]}; `python -m ocr_pipeline.synthetic FOLDER` writes such a folder. Photos
go through a live service (--url) or through the pipeline in this process (--settings, default embedded).
--versus SETTINGS.yml reads the same photos a second time with other settings and compares the two.

A field counts as printed when the labels have it and it is not illegible. Silent: a wrong value, or a value
for a field
that is not printed, on a photo that was not marked for review. Intervals resample whole plates.
Exit codes: 0 the bars are met, 1 one is missed, 2 could not run.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
from ocr_pipeline.errors import OcrError
from ocr_pipeline.reading import FIELDS

BOOTSTRAPS = 1000
BARS = {"easy": 0.97, "medium": 0.97, "hard": 0.85}
MOST_SILENT = 0.005
MOST_REVIEWED = 0.15
KEY_VARIABLE = "OCR_API_KEY"
Reader = Callable[[bytes], dict[str, Any]]


@dataclass(frozen=True)
class Labelled:
    """A photo with what is printed on it."""

    file: str
    plate: str
    difficulty: str
    fields: dict[str, Any]
    illegible: frozenset[str] = frozenset()


@dataclass
class Outcome:
    """What was read from one photo, field by field."""

    photo: Labelled
    right: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    invented: list[str] = field(default_factory=list)
    guessed: list[str] = field(default_factory=list)  # a wrong value where nobody could read one
    review: bool = False
    seconds: float = 0.0

    @property
    def printed(self) -> int:
        """Fields that are printed and legible."""
        return len(self.right) + len(self.wrong) + len(self.missed)

    @property
    def silent(self) -> int:
        """Wrong values that nobody was told to look at."""
        return 0 if self.review else len(self.wrong) + len(self.invented) + len(self.guessed)

    @property
    def correct(self) -> bool:
        """Whether the plate is right as it stands."""
        return not (self.wrong or self.missed or self.invented or self.guessed)


class CannotRunError(Exception):
    """One line for the person."""


def labels(folder: Path) -> list[Labelled]:
    """The folder's labels. Raises CannotRunError."""
    path = folder / "labels.json"
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["photos"]
        found = [
            Labelled(
                str(row["file"]),
                str(row.get("plate", row["file"])),
                str(row.get("difficulty", "all")),
                {name: value for name, value in row["fields"].items() if value is not None},
                frozenset(row.get("illegible", [])),
            )
            for row in rows
        ]
    except OSError as error:
        raise CannotRunError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CannotRunError(f'{path}: not {{"photos": [{{"file", "fields"}}]}}') from None
    for row in found:
        unknown = (set(row.fields) | row.illegible) - set(FIELDS)
        if unknown:
            raise CannotRunError(f"{path}: {row.file}: {sorted(unknown)[0]!r} is no field")
        if Path(row.file).name != row.file:
            raise CannotRunError(f"{path}: {row.file!r} must be a name in the folder")
    if not found:
        raise CannotRunError(f"{path}: no photos")
    return found


def same(value: Any, wanted: Any) -> bool:
    """Whether a value is the label's; numbers compare as numbers."""
    if isinstance(value, bool) or isinstance(wanted, bool):
        return value is wanted
    if isinstance(value, int | float) and isinstance(wanted, int | float):
        return abs(float(value) - float(wanted)) < 1e-6
    return bool(value == wanted)


def judge(photo: Labelled, answer: dict[str, Any], seconds: float) -> Outcome:
    """Hold an answer against its labels."""
    outcome = Outcome(photo, review=bool(answer.get("_needs_review")), seconds=seconds)
    for name in FIELDS:
        value, wanted = answer.get(name), photo.fields.get(name)
        if name in photo.illegible:
            if value is not None and not same(value, wanted):
                outcome.guessed.append(name)
        elif wanted is None:
            if value is not None:
                outcome.invented.append(name)
        elif value is None:
            outcome.missed.append(name)
        else:
            (outcome.right if same(value, wanted) else outcome.wrong).append(name)
    return outcome


def interval(outcomes: Sequence[Outcome]) -> tuple[float, float]:
    """The 95 % interval of the share of right fields; whole plates are drawn. 0 to 1 without plates."""
    plates: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        plates.setdefault(outcome.photo.plate, []).append(outcome)
    counts = [(sum(len(o.right) for o in row), sum(o.printed for o in row)) for row in plates.values()]
    rng = random.Random(0)  # noqa: S311  (the same photos give the same interval)
    shares = []
    for _ in range(BOOTSTRAPS):
        drawn = rng.choices(counts, k=len(counts)) if counts else []
        printed = sum(count for _, count in drawn)
        if printed:
            shares.append(sum(right for right, _ in drawn) / printed)
    shares.sort()
    return (shares[int(0.025 * len(shares))], shares[int(0.975 * len(shares))]) if shares else (0.0, 1.0)


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The figures of a run."""
    printed = sum(outcome.printed for outcome in outcomes)
    right = sum(len(outcome.right) for outcome in outcomes)
    correct = [outcome for outcome in outcomes if outcome.correct and outcome.photo.fields]
    whole = [outcome for outcome in correct if not outcome.photo.illegible]
    seconds = sorted(outcome.seconds for outcome in outcomes)
    return {
        "photos": len(outcomes),
        "plates": len({outcome.photo.plate for outcome in outcomes}),
        "printed": printed,
        "right": right,
        "accuracy": right / printed if printed else 0.0,
        "interval": interval(outcomes),
        "wrong": sum(len(outcome.wrong) for outcome in outcomes),
        "missed": sum(len(outcome.missed) for outcome in outcomes),
        "silent": sum(outcome.silent for outcome in outcomes),
        "invented": sum(len(outcome.invented) for outcome in outcomes),
        "guessed": sum(len(outcome.guessed) for outcome in outcomes),
        "correct_plates": len(correct),
        "correct_reviewed": sum(outcome.review for outcome in correct),
        "whole_plates": len(whole),
        "whole_reviewed": sum(outcome.review for outcome in whole),
        "seconds_median": seconds[len(seconds) // 2] if seconds else 0.0,
    }


def report(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The whole, by difficulty and by field."""
    levels = sorted({outcome.photo.difficulty for outcome in outcomes})
    by_field = {}
    for name in FIELDS:
        printed = [o for o in outcomes if name in o.right or name in o.wrong or name in o.missed]
        by_field[name] = {
            "printed": len(printed),
            "right": sum(name in o.right for o in printed),
            "wrong": sum(name in o.wrong for o in printed),
            "missed": sum(name in o.missed for o in printed),
            "invented": sum(name in o.invented for o in outcomes),
        }
    return {
        "all": summary(outcomes),
        "by_difficulty": {
            level: summary([o for o in outcomes if o.photo.difficulty == level]) for level in levels
        },
        "by_field": by_field,
    }


def missed_bars(found: dict[str, Any]) -> list[str]:
    """One line for each bar that is missed."""
    lines = []
    for level, figures in found["by_difficulty"].items():
        bar = BARS.get(level)
        if bar is not None and figures["printed"] and figures["accuracy"] < bar:
            lines.append(f"{level}: {figures['accuracy']:.1%} of printed fields, bar {bar:.0%}")
    whole = found["all"]
    if whole["silent"] > MOST_SILENT * whole["printed"]:
        lines.append(
            f"{whole['silent']} silent errors in {whole['printed']} printed fields, bar {MOST_SILENT:.1%}"
        )
    if whole["invented"]:
        lines.append(f"{whole['invented']} absent fields filled, bar 0")
    if whole["correct_plates"] and whole["correct_reviewed"] > MOST_REVIEWED * whole["correct_plates"]:
        lines.append(
            f"{whole['correct_reviewed']} of {whole['correct_plates']} correct plates sent to review, "
            f"bar {MOST_REVIEWED:.0%}"
        )
    return lines


def table(found: dict[str, Any]) -> str:
    """The figures in Markdown."""
    rows = [
        "| photos | plates | printed | right | 95 % interval | silent | invented | reviewed | s/image |",
        "|---|---:|---:|---:|---|---:|---:|---:|---:|",
    ]
    for name, part in [*found["by_difficulty"].items(), ("all", found["all"])]:
        low, high = part["interval"]
        cells = [
            name,
            part["plates"],
            part["printed"],
            f"{part['accuracy']:.1%}",
            f"{low:.1%} to {high:.1%}",
            part["silent"],
            part["invented"],
            f"{part['correct_reviewed']} of {part['correct_plates']}",
            f"{part['seconds_median']:.2f}",
        ]
        rows.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    rows += ["", "| field | printed | right | wrong | missed | invented |", "|---|---:|---:|---:|---:|---:|"]
    for name, part in found["by_field"].items():
        counts = [part[what] for what in ("printed", "right", "wrong", "missed", "invented")]
        rows.append(f"| `{name}` | {' | '.join(str(count) for count in counts)} |")
    return "\n".join(rows)


def in_process(settings: str | None) -> Reader:
    """Photos through the pipeline in this process. Raises OcrError."""
    from ocr_pipeline import build
    from ocr_pipeline import settings as module

    pipeline = build.pipeline(module.load(settings))

    def read(data: bytes) -> dict[str, Any]:
        return pipeline.read(data).flat()

    return read


def live(url: str) -> Reader:
    """Photos through a service's API; its key stands in $OCR_API_KEY."""
    key = os.environ.get(KEY_VARIABLE, "")
    client = httpx.Client(timeout=300, headers={"x-goog-api-key": key} if key else {}, trust_env=False)

    def read(data: bytes) -> dict[str, Any]:
        part = {"inlineData": {"mimeType": "image/jpeg", "data": base64.b64encode(data).decode()}}
        target = f"{url.rstrip('/')}/v1beta/models/nameplate:generateContent"
        try:
            answer = client.post(target, json={"contents": [{"parts": [part]}]})
            answer.raise_for_status()
            found = json.loads(answer.json()["candidates"][0]["content"]["parts"][0]["text"])
        except httpx.HTTPStatusError as error:
            raise CannotRunError(f"{url}: status {error.response.status_code}") from None
        except httpx.HTTPError as error:
            raise CannotRunError(f"{url}: {type(error).__name__}") from None
        except (ValueError, KeyError, IndexError, TypeError):
            raise CannotRunError(f"{url}: an answer without a reading in it") from None
        if not isinstance(found, dict):
            raise CannotRunError(f"{url}: an answer without a reading in it")
        return found

    return read


def run(folder: Path, photos: Sequence[Labelled], read: Reader, say: Callable[[str], None]) -> list[Outcome]:
    """Read every photo. Raises CannotRunError, OcrError."""
    outcomes = []
    for at, photo in enumerate(photos, 1):
        try:
            data = (folder / photo.file).read_bytes()
        except OSError as error:
            raise CannotRunError(f"{folder / photo.file}: {error.strerror}") from None
        started = time.perf_counter()
        answer = read(data)
        outcomes.append(judge(photo, answer, time.perf_counter() - started))
        if at % 10 == 0 or at == len(photos):
            say(f"{at} of {len(photos)} photos")
    return outcomes


def compared(first: Sequence[Outcome], second: Sequence[Outcome]) -> dict[str, int]:
    """Fields that only one of two configurations reads right."""
    better = sum(len(set(o.right) - set(other.right)) for o, other in zip(first, second, strict=True))
    worse = sum(len(set(other.right) - set(o.right)) for o, other in zip(first, second, strict=True))
    return {"only_first_right": better, "only_second_right": worse}


def chart(found: dict[str, Any], path: Path) -> None:
    """Bars of each field's share of right readings. Raises OSError."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(16)
    picture = Image.new("RGB", (760, 40 + 30 * len(FIELDS)), "white")
    draw = ImageDraw.Draw(picture)
    for at, (name, part) in enumerate(found["by_field"].items()):
        share, y = (part["right"] / part["printed"] if part["printed"] else 0.0), 20 + at * 30
        draw.text((10, y), name, fill=(31, 35, 40), font=font)
        draw.rectangle((190, y, 190 + round(420 * share), y + 20), fill=(9, 105, 218))
        draw.text((625, y), f"{share:.1%} of {part['printed']}", fill=(31, 35, 40), font=font)
    picture.save(path)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog=f"exit codes: 0 bars met, 1 one missed, 2 could not run; the service's key: ${KEY_VARIABLE}",
    )
    parser.add_argument("folder", type=Path, help="photos and labels.json")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--url", help="a live service, like http://ocr:8091")
    where.add_argument("--settings", metavar="FILE", help="in this process, with these settings")
    parser.add_argument(
        "--versus", metavar="FILE", help="A/B: the same photos in this process with these settings"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--chart", type=Path, metavar="FILE.png")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    args = parse(argv)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    try:
        photos = labels(args.folder)
        outcomes = run(args.folder, photos, live(args.url) if args.url else in_process(args.settings), say)
        found = report(outcomes)
        print(table(found))
        if args.versus:
            others = run(args.folder, photos, in_process(args.versus), say)
            found = {**found, "versus": report(others), "compared": compared(outcomes, others)}
            print(f"\n{args.versus}:\n{table(found['versus'])}\n\n{json.dumps(found['compared'])}")
        if args.json:
            rows = [{**asdict(o), "photo": o.photo.file} for o in outcomes]
            args.json.write_text(
                json.dumps({**found, "outcomes": rows}, indent=1, default=str) + "\n", encoding="utf-8"
            )
        if args.chart:
            chart(found, args.chart)
    except (CannotRunError, OcrError) as error:
        say(f"verify_ocr: {error}")
        return 2
    except OSError as error:
        say(f"verify_ocr: {error.filename}: {error.strerror}")
        return 2
    bars = missed_bars(found)
    for line in bars:
        say(f"missed: {line}")
    return 1 if bars else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("verify_ocr: interrupted", file=sys.stderr)
        sys.exit(130)
