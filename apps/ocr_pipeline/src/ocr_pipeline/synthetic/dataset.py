"""A folder of labelled photos, as `scripts/verify_ocr.py` reads it: the photos and `labels.json`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ocr_pipeline.synthetic.scene import DIFFICULTIES, Sample, sample

LABELS = "labels.json"


def samples(first: int, count: int, make: Callable[..., Sample] = sample) -> Iterator[tuple[int, Sample]]:
    """`count` photos from the seed `first` on, the difficulties in turn."""
    for seed in range(first, first + count):
        yield seed, make(seed, DIFFICULTIES[seed % len(DIFFICULTIES)])


def entry(name: str, seed: int, made: Sample) -> dict[str, Any]:
    """A photo's line in the labels: `fields` has what is printed, `illegible` what nobody could read."""
    return {
        "file": name,
        "plate": str(seed),
        "difficulty": made.difficulty,
        "kind": made.kind,
        "fields": made.values,
        "illegible": sorted(name for name, legible in made.legible.items() if not legible),
        "boxes": [[kind, [round(side, 1) for side in box]] for kind, box in made.boxes],
    }


def write(folder: Path, first: int, count: int, make: Callable[..., Sample] = sample) -> None:
    """Write photos and labels. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed, made in samples(first, count, make):
        name = f"{seed:06d}.jpg"
        (folder / name).write_bytes(made.jpeg())
        rows.append(entry(name, seed, made))
    (folder / LABELS).write_text(
        json.dumps({"photos": rows}, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
    )
