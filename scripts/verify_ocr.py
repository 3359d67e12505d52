#!/usr/bin/env python3
"""Read a folder of labelled photos and say how many fields are right, per field and difficulty.

The folder holds `labels.json`: {"photos": [{"file", "fields": {field: value}, and optionally "plate",
"difficulty", "illegible": [fields]}]}; `python -m ocr_pipeline.synthetic FOLDER` writes such a folder. Photos
go through a live service (--url) or through the pipeline in this process (--settings, default embedded).
--versus SETTINGS.yml reads the same photos a second time with other settings and compares the two.

A field counts as printed when the labels have it and it is not illegible. Silent: a wrong value, or a value
for a field
that is not printed, on a photo that was not marked for review. Intervals resample whole plates; where all of
them are alike it is Wilson's, of as many draws as there are plates. A photo that is refused counts as not
read; a busy service is asked again.
Exit codes: 0 the bars are met, 1 one is missed, 2 could not run, or not to its end: what was read is told.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
from ocr_pipeline.errors import BackendError, DeadlineError, ImageRefusedError, OcrError
from ocr_pipeline.reading import FIELDS

BOOTSTRAPS = 1000
FOLDER_BAR = 0.853  # of a whole folder: what a feeder's real photos, easy and hard, are held against
BARS = {("easy", "medium"): 0.97, ("hard",): 0.85}  # of the printed fields of these together
MOST_SILENT = 0.005
MOST_REVIEWED = 0.15
KEY_VARIABLE = "OCR_API_KEY"
Reader = Callable[[bytes], dict[str, Any]]
Z = 1.959964  # of 95 %
LONGEST_WAIT_S = 30.0  # at once for a busy service, whatever it says
PATIENCE_S = 180.0  # for one photo, all together
UNANSWERED = 3  # photos in a row after which the service is taken to be away
NOT_THE_PHOTO = (401, 403, 404)  # statuses that every photo will have
BUSY = (429, 502, 503)


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
    failed: str = ""  # why it was not read at all

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


class StoppedError(CannotRunError):
    """The run ended before its end, with what was read until then."""

    def __init__(self, message: str, outcomes: list[Outcome]) -> None:
        super().__init__(message)
        self.outcomes = outcomes


class UnreadError(Exception):
    """This photo was not read. `away`: for want of an answer, so others may not be either."""

    def __init__(self, reason: str, *, away: bool = False) -> None:
        super().__init__(reason)
        self.away = away


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


def _right(outcome: Outcome) -> tuple[int, int]:
    return len(outcome.right), outcome.printed


def interval(
    outcomes: Sequence[Outcome], count: Callable[[Outcome], tuple[int, int]] = _right
) -> tuple[float, float]:
    """The 95 % interval of a share, `count` its parts in each photo; whole plates are drawn. 0 to 1 without
    plates."""
    counts = [both for both in _by_plate(outcomes, count) if both[1]]
    if not counts:
        return 0.0, 1.0
    low, high = _drawn([(part, whole) for part, whole in counts])
    if low < high:
        return low, high
    # All plates are alike, and so is every draw of them; the next plate need not be.
    return wilson(min(1.0, low), len(counts))


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share that was seen in so many draws."""
    squared = Z * Z / count
    middle = (share + squared / 2) / (1 + squared)
    half = Z * math.sqrt(share * (1 - share) / count + squared / count / 4) / (1 + squared)
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return (0.0 if share == 0 else low, 1.0 if share == 1 else high)


def _by_plate(
    outcomes: Sequence[Outcome], count: Callable[[Outcome], tuple[int, int]]
) -> list[tuple[int, int]]:
    """Of each plate the sum of what is counted in its photos."""
    plates: dict[str, tuple[int, int]] = {}
    for outcome in outcomes:
        part, whole = count(outcome)
        parts, wholes = plates.get(outcome.photo.plate, (0, 0))
        plates[outcome.photo.plate] = (parts + part, wholes + whole)
    return list(plates.values())


def _drawn(counts: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """The middle 95 % of the shares of plates drawn with replacement."""
    rng = random.Random(0)  # noqa: S311  (the same photos give the same interval)
    shares = []
    for _ in range(BOOTSTRAPS):
        drawn = rng.choices(counts, k=len(counts))
        shares.append(sum(part for part, _ in drawn) / sum(whole for _, whole in drawn))
    shares.sort()
    return shares[int(0.025 * len(shares))], shares[int(0.975 * len(shares))]


def _silent(outcome: Outcome) -> tuple[int, int]:
    return outcome.silent, outcome.printed


def _reviewed(outcome: Outcome) -> tuple[int, int]:
    counts = outcome.correct and bool(outcome.photo.fields)
    return int(counts and outcome.review), int(counts)


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The figures of a run."""
    printed = sum(outcome.printed for outcome in outcomes)
    right = sum(len(outcome.right) for outcome in outcomes)
    correct = [outcome for outcome in outcomes if outcome.correct and outcome.photo.fields]
    whole = [outcome for outcome in correct if not outcome.photo.illegible]
    seconds = sorted(outcome.seconds for outcome in outcomes if not outcome.failed)
    return {
        "photos": len(outcomes),
        "plates": len({outcome.photo.plate for outcome in outcomes}),
        "printed": printed,
        "right": right,
        "accuracy": right / printed if printed else 0.0,
        "interval": interval(outcomes),
        "failed": sum(bool(outcome.failed) for outcome in outcomes),
        "wrong": sum(len(outcome.wrong) for outcome in outcomes),
        "missed": sum(len(outcome.missed) for outcome in outcomes),
        "silent": sum(outcome.silent for outcome in outcomes),
        "silent_interval": interval(outcomes, _silent),
        "invented": sum(len(outcome.invented) for outcome in outcomes),
        "guessed": sum(len(outcome.guessed) for outcome in outcomes),
        "correct_plates": len(correct),
        "correct_reviewed": sum(outcome.review for outcome in correct),
        "review_interval": interval(outcomes, _reviewed),
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


def together(found: dict[str, Any], levels: Sequence[str]) -> tuple[int, int]:
    """How many fields are printed on the photos of these difficulties, and how many of them are right."""
    parts = [found["by_difficulty"][level] for level in levels if level in found["by_difficulty"]]
    return sum(part["printed"] for part in parts), sum(part["right"] for part in parts)


def missed_bars(found: dict[str, Any], folder_bar: float = FOLDER_BAR) -> list[str]:
    """One line for each bar that is missed. `folder_bar` is that of the folder as a whole."""
    lines = []
    for levels, bar in BARS.items():
        seen = [level for level in levels if level in found["by_difficulty"]]
        printed, right = together(found, levels)
        if printed and right < bar * printed:
            lines.append(f"{' and '.join(seen)}: {right / printed:.1%} of printed fields, bar {bar:.0%}")
    whole = found["all"]
    if not whole["printed"]:
        lines.append("the folder: no printed field in its labels, so nothing was measured")
    elif whole["accuracy"] < folder_bar:
        lines.append(f"the folder: {whole['accuracy']:.1%} of printed fields, bar {folder_bar:.1%}")
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


def _between(ends: Sequence[float] | None) -> str:
    """An interval behind its figure; figures of an older run may have none."""
    return f" ({ends[0]:.1%} to {ends[1]:.1%})" if ends else ""


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
            f"{part['silent']}{_between(part.get('silent_interval'))}",
            part["invented"],
            f"{part['correct_reviewed']} of {part['correct_plates']}{_between(part.get('review_interval'))}",
            f"{part['seconds_median']:.2f}",
        ]
        rows.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    rows += ["", "| field | printed | right | wrong | missed | invented |", "|---|---:|---:|---:|---:|---:|"]
    for name in FIELDS:  # in this order, whatever a file of figures made of it
        part = found["by_field"][name]
        counts = [part[what] for what in ("printed", "right", "wrong", "missed", "invented")]
        rows.append(f"| `{name}` | {' | '.join(str(count) for count in counts)} |")
    if failed := found["all"].get("failed"):
        rows += ["", f"{failed} photos were not read at all; their fields count as missed."]
    return "\n".join(rows)


def in_process(settings: str | None) -> Reader:
    """Photos through the pipeline in this process. Raises OcrError."""
    from ocr_pipeline import build
    from ocr_pipeline import settings as module

    pipeline = build.pipeline(module.load(settings))

    def read(data: bytes) -> dict[str, Any]:
        try:
            return pipeline.read(data).flat()
        except (ImageRefusedError, DeadlineError) as error:
            raise UnreadError(error.reason) from None
        except BackendError as error:
            raise UnreadError(f"{error.reason}: {error}", away=True) from None

    return read


class Live:
    """Photos through a service's API; its key stands in $OCR_API_KEY. `waited`: seconds without a request."""

    def __init__(self, url: str) -> None:
        self._url = url
        key = os.environ.get(KEY_VARIABLE, "")
        headers = {"x-goog-api-key": key} if key else {}
        self._client = httpx.Client(timeout=300, headers=headers, trust_env=False)
        self.waited = 0.0

    def __call__(self, data: bytes) -> dict[str, Any]:
        """The reading of a photo. Raises UnreadError, CannotRunError."""
        part = {"inlineData": {"mimeType": mime_of(data), "data": base64.b64encode(data).decode()}}
        body = {"contents": [{"parts": [part]}]}
        waited, began = self.waited, time.perf_counter()
        for attempt in itertools.count():
            answer, problem = self._ask(body)
            if answer is not None and answer.status_code not in BUSY:
                return self._reading(answer)
            wait = _retry_after(answer, 2.0**attempt)
            if max(self.waited - waited, time.perf_counter() - began) + wait > PATIENCE_S:
                raise UnreadError(problem, away=True)
            time.sleep(wait)
            self.waited += wait
        raise AssertionError

    def _ask(self, body: dict[str, Any]) -> tuple[httpx.Response | None, str]:
        try:
            answer = self._client.post(
                f"{self._url.rstrip('/')}/v1beta/models/nameplate:generateContent", json=body
            )
        except httpx.TransportError as error:
            return None, type(error).__name__
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise CannotRunError(f"{self._url}: {type(error).__name__}") from None
        return answer, f"status {answer.status_code}"

    def _reading(self, answer: httpx.Response) -> dict[str, Any]:
        if answer.status_code in NOT_THE_PHOTO:
            raise CannotRunError(f"{self._url}: status {answer.status_code}")
        if answer.status_code != httpx.codes.OK:
            raise UnreadError(_reason(answer))
        try:
            found = json.loads(answer.json()["candidates"][0]["content"]["parts"][0]["text"])
        except (ValueError, KeyError, IndexError, TypeError):
            found = None
        if not isinstance(found, dict):
            raise CannotRunError(f"{self._url}: an answer without a reading in it")
        return found


def mime_of(data: bytes) -> str:
    """The type that the bytes are of; what no service reads goes as a JPEG, and is refused."""
    if data.startswith(b"\x89PNG"):
        return "image/png"
    return "image/webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else "image/jpeg"


def _retry_after(answer: httpx.Response | None, otherwise: float) -> float:
    """How long to wait: what the service says, within bounds."""
    try:
        wait = float(answer.headers["retry-after"]) if answer is not None else otherwise
    except (KeyError, ValueError):
        wait = otherwise
    return min(max(wait, 0.5), LONGEST_WAIT_S)


def _reason(answer: httpx.Response) -> str:
    """Why a photo was refused, as the service calls it."""
    try:
        return str(answer.json()["error"]["details"][0]["reason"])
    except (ValueError, KeyError, IndexError, TypeError):
        return f"status {answer.status_code}"


def run(folder: Path, photos: Sequence[Labelled], read: Reader, say: Callable[[str], None]) -> list[Outcome]:
    """Read every photo. Raises CannotRunError, StoppedError, OcrError."""
    outcomes: list[Outcome] = []
    away = 0
    for at, photo in enumerate(photos, 1):
        try:
            data = (folder / photo.file).read_bytes()
        except OSError as error:
            raise StoppedError(f"{folder / photo.file}: {error.strerror}", outcomes) from None
        started, waited = time.perf_counter(), getattr(read, "waited", 0.0)
        try:
            answer, failed, away = read(data), "", 0
        except UnreadError as error:
            answer, failed, away = {}, str(error), away + 1 if error.away else 0
            say(f"{photo.file}: not read: {failed}")
        except CannotRunError as error:
            raise StoppedError(str(error), outcomes) from None
        seconds = time.perf_counter() - started - (getattr(read, "waited", 0.0) - waited)
        outcomes.append(judge(photo, answer, seconds))
        outcomes[-1].failed = failed
        if away == UNANSWERED:
            told = f"{away} photos one after the other had no answer, the last: {failed}"
            raise StoppedError(told, outcomes[:-away])
        if at % 10 == 0 or at == len(photos):
            say(f"{at} of {len(photos)} photos")
    return outcomes


def compared(first: Sequence[Outcome], second: Sequence[Outcome]) -> dict[str, Any]:
    """Fields that only one of two configurations reads right, and how much more of them the second reads,
    with the 95 % interval: plates are drawn in pairs, each as both have read it."""
    better = worse = 0
    more: dict[int, int] = {}
    for at, (one, other) in enumerate(zip(first, second, strict=True)):
        lost, won = len(set(one.right) - set(other.right)), len(set(other.right) - set(one.right))
        better, worse, more[id(one)] = better + lost, worse + won, won - lost
        assert one.photo == other.photo, at
    counts = [both for both in _by_plate(first, lambda one: (more[id(one)], one.printed)) if both[1]]
    printed = sum(whole for _, whole in counts)
    low, high = _drawn(counts) if counts else (-1.0, 1.0)
    if low == high:  # all plates alike: as far as one plate in as many may do otherwise
        half = wilson(0.0, len(counts))[1]
        low, high = max(-1.0, low - half), min(1.0, high + half)
    return {
        "only_first_right": better,
        "only_second_right": worse,
        "difference": (worse - better) / printed if printed else 0.0,
        "interval": (low, high),
    }


def spoken(found: dict[str, Any]) -> str:
    """The comparison in one line."""
    low, high = found["interval"]
    return (
        f"{found['only_first_right']} fields only the first reads right, {found['only_second_right']} "
        f"only the second: {found['difference']:+.1%} of printed fields, {low:+.1%} to {high:+.1%}"
    )


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


def share(text: str) -> float:
    """A share on the command line."""
    found = float(text)
    if not 0 <= found <= 1:
        raise ValueError
    return found


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
    parser.add_argument(
        "--bar",
        type=share,
        default=FOLDER_BAR,
        metavar="SHARE",
        help="of printed fields that must be right in the folder as a whole; default: %(default)s",
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
        stopped = None
        try:
            outcomes = run(
                args.folder, photos, Live(args.url) if args.url else in_process(args.settings), say
            )
        except StoppedError as error:
            stopped, outcomes = error, error.outcomes
        found = report(outcomes)
        if outcomes:
            print(table(found))
        others: list[Outcome] = []
        if args.versus and not stopped:
            try:
                others = run(args.folder, photos, in_process(args.versus), say)
            except StoppedError as error:
                stopped = error
        if args.versus and not stopped:
            found = {**found, "versus": report(others), "compared": compared(outcomes, others)}
            print(f"\n{args.versus}:\n{table(found['versus'])}\n\n{spoken(found['compared'])}")
        if args.json and outcomes:
            rows = [{**asdict(o), "photo": o.photo.file} for o in outcomes]
            args.json.write_text(
                json.dumps({**found, "outcomes": rows}, indent=1, default=str) + "\n", encoding="utf-8"
            )
        if args.chart and outcomes:
            chart(found, args.chart)
        if stopped:
            say(f"verify_ocr: {stopped}; {len(outcomes)} of {len(photos)} photos are counted")
            return 2
    except (CannotRunError, OcrError) as error:
        say(f"verify_ocr: {error}")
        return 2
    except OSError as error:
        say(f"verify_ocr: {error.filename}: {error.strerror}")
        return 2
    bars = missed_bars(found, args.bar)
    for line in bars:
        say(f"missed: {line}")
    return 1 if bars else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("verify_ocr: interrupted", file=sys.stderr)
        sys.exit(130)
