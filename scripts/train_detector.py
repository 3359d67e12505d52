#!/usr/bin/env python3
"""Train the plate detector on synthetic photos and export it as ONNX; `make train-detector` makes its
environment.

A small anchor-free network in plain torch on the CPU: one scale of 16 x 16 cells on a photo of 256 pixels.
The output is `[1, 4 + nc, N]`, boxes as centre and size in input pixels, class names in the file's metadata:
what a YOLO export has. Writes the weights and a page with the recipe and what held-out photos showed. Exit
codes: 0 written, 1 too weak.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import torch
from ocr_pipeline.detect import GREY, letterbox, plates_of
from ocr_pipeline.geometry import Box
from ocr_pipeline.settings import DetectorSettings
from ocr_pipeline.synthetic.scene import IDENTIFICATION, TRANSFORMER, sample
from torch import Tensor, nn

NAMES = (IDENTIFICATION, TRANSFORMER)
SIDE, STRIDE = 256, 16
DRAWN = 320  # side of a photo for training: it is cut or shrunk to SIDE, another way each time
CELLS = SIDE // STRIDE
TRAIN_SEED, HELD_OUT_SEED = 1_000_000, 2_000_000  # nothing else uses photos of these seeds
LEFT = 0.6  # of a plate's area that must be within the cut, or it is none to find
THREADS = 2
RATE = 3e-3
CAUTION = 0.6  # taken off the logit of a utility's plate: a false one makes a bank where there is none
SCORE = DetectorSettings().score  # what the service takes for a plate is what is counted
ENOUGH = 0.9  # of the plates that must be found, or the weights are not written


def layer(inside: int, outside: int, side: int, stride: int) -> nn.Sequential:
    """A full convolution: few channels, so it is cheaper than its pieces."""
    return nn.Sequential(
        nn.Conv2d(inside, outside, side, stride, 1, bias=False), nn.BatchNorm2d(outside), nn.SiLU()
    )


def block(inside: int, outside: int, stride: int = 1) -> nn.Sequential:
    """Depthwise, then pointwise convolution."""
    return nn.Sequential(
        nn.Conv2d(inside, inside, 3, stride, 1, groups=inside, bias=False),
        nn.BatchNorm2d(inside),
        nn.SiLU(),
        nn.Conv2d(inside, outside, 1, bias=False),
        nn.BatchNorm2d(outside),
        nn.SiLU(),
    )


class Detector(nn.Module):  # type: ignore[misc]  # torch is only in the environment of `make train-detector`
    """Photo to `[n, 4 + nc, N]`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(layer(3, 24, 6, 4), layer(24, 40, 3, 2))
        self.fine = nn.Sequential(layer(40, 64, 3, 2), block(64, 96), block(96, 96))
        self.coarse = nn.Sequential(block(96, 160, 2), block(160, 160), block(160, 160))
        self.merge = nn.Sequential(block(256, 96), block(96, 96))
        self.head = nn.Conv2d(96, 4 + len(NAMES), 1)
        nn.init.constant_(self.head.bias[4:], -4.0)
        rows, columns = torch.meshgrid(torch.arange(CELLS), torch.arange(CELLS), indexing="ij")
        self.register_buffer("x", (columns.float() + 0.5).reshape(1, -1) * STRIDE)
        self.register_buffer("y", (rows.float() + 0.5).reshape(1, -1) * STRIDE)

    def raw(self, photo: Tensor) -> Tensor:
        """Sides' distances in strides (log) and class logits, cell by cell."""
        fine = self.fine(self.stem(photo))
        coarse = nn.functional.interpolate(self.coarse(fine), scale_factor=2.0, mode="nearest")
        return self.head(self.merge(torch.cat([fine, coarse], dim=1))).flatten(2)

    def boxes(self, raw: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Left, top, right, bottom of each cell's box."""
        sides = torch.exp(raw[:, :4].clamp(-4, 4)) * STRIDE
        return self.x - sides[:, 0], self.y - sides[:, 1], self.x + sides[:, 2], self.y + sides[:, 3]

    def forward(self, photo: Tensor) -> Tensor:
        """What the exported file gives."""
        raw = self.raw(photo)
        left, top, right, bottom = self.boxes(raw)
        box = torch.stack([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top], dim=1)
        return torch.cat([box, torch.sigmoid(raw[:, 4:])], dim=1)


def photo(seed: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """A small photo in a square, and its plates: class, left, top, right, bottom."""
    made = sample(seed, scale=0.25 if seed % 3 else 0.35)
    square, factor, left, top = letterbox(made.pixels, side)
    rows = [
        [NAMES.index(kind), *(edge * factor + (left, top)[at % 2] for at, edge in enumerate(box))]
        for kind, box in made.boxes
    ]
    return square, np.array(rows, np.float32).reshape(-1, 5)


def photos_of(first: int, count: int, side: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The photos of `count` seeds, drawn by two processes."""
    cv2.setNumThreads(1)  # what a forked process inherits must not be another's threads
    with multiprocessing.get_context("fork").Pool(THREADS) as pool:
        return pool.starmap(photo, [(first + at, side) for at in range(count)], chunksize=8)


def varied(rng: random.Random, square: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mirrored, turned, nearer or farther, lighter or darker: the same plates, as far as they are in it."""
    rows, side = rows.copy(), square.shape[0]
    if rng.random() < 0.5:
        square = square[:, ::-1]
        rows[:, [1, 3]] = side - rows[:, [3, 1]]
    for _ in range(rng.choice((0, 0, 1, 2, 3))):
        square = np.rot90(square)
        rows = np.stack([rows[:, 0], rows[:, 2], side - rows[:, 3], rows[:, 4], side - rows[:, 1]], axis=1)
    factor = SIDE / side * rng.uniform(0.9, 1.25)
    left, top = (rng.uniform(0, 1) * (SIDE - side * factor) for _ in range(2))
    move = np.array([[factor, 0, left], [0, factor, top]], np.float32)
    square = cv2.warpAffine(
        np.ascontiguousarray(square), move, (SIDE, SIDE), flags=cv2.INTER_LINEAR, borderValue=(GREY,) * 3
    )
    rows[:, 1:] = rows[:, 1:] * factor + np.array([left, top, left, top], np.float32)
    area = (rows[:, 3] - rows[:, 1]) * (rows[:, 4] - rows[:, 2])
    rows[:, 1:] = rows[:, 1:].clip(0, SIDE)
    kept = (rows[:, 3] - rows[:, 1]) * (rows[:, 4] - rows[:, 2]) >= LEFT * area
    lit = square.astype(np.float32) * rng.uniform(0.6, 1.35) + rng.uniform(-20, 20)
    return np.clip(lit, 0, 255), rows[kept]


def loss_of(model: Detector, pictures: Tensor, targets: list[np.ndarray]) -> Tensor:
    """Binary cross entropy for the classes, 1 - GIoU for the boxes; a plate owns the cells in its middle
    half.
    """
    raw = model.raw(pictures)
    classes = torch.zeros(len(targets), len(NAMES), CELLS * CELLS)
    wanted = torch.zeros(len(targets), 4, CELLS * CELLS)
    owned = torch.zeros(len(targets), CELLS * CELLS, dtype=torch.bool)
    x, y = model.x[0], model.y[0]
    for at, rows in enumerate(targets):
        for kind, left, top, right, bottom in sorted(
            rows.tolist(), key=lambda row: -(row[3] - row[1]) * (row[4] - row[2])
        ):
            reach_x, reach_y = max((right - left) / 4, STRIDE * 0.51), max((bottom - top) / 4, STRIDE * 0.51)
            mine = ((x - (left + right) / 2).abs() <= reach_x) & ((y - (top + bottom) / 2).abs() <= reach_y)
            classes[at, :, mine] = 0.0
            classes[at, int(kind), mine] = 1.0
            wanted[at, :, mine] = torch.tensor([left, top, right, bottom]).reshape(4, 1)
            owned[at] |= mine
    chance = torch.sigmoid(raw[:, 4:])
    weight = torch.where(classes > 0, 1 - chance, chance).detach() ** 1.5
    named = (
        nn.functional.binary_cross_entropy_with_logits(raw[:, 4:], classes, reduction="none") * weight
    ).sum()
    left, top, right, bottom = (side[owned] for side in model.boxes(raw))
    l, t, r, b = (wanted[:, at][owned] for at in range(4))  # noqa: E741
    common = (torch.minimum(right, r) - torch.maximum(left, l)).clamp(0) * (
        torch.minimum(bottom, b) - torch.maximum(top, t)
    ).clamp(0)
    union = (right - left) * (bottom - top) + (r - l) * (b - t) - common
    hull = (torch.maximum(right, r) - torch.minimum(left, l)) * (
        torch.maximum(bottom, b) - torch.minimum(top, t)
    )
    giou = common / union.clamp(1) - (hull - union) / hull.clamp(1)
    count = max(1, int(owned.sum()))
    return named / count * 2 + (1 - giou).sum() / count * 2


def train(model: Detector, photos: list[tuple[np.ndarray, np.ndarray]], seconds: float, epochs: int) -> int:
    """Train until the time or the epochs are up; how many epochs it was."""
    rng = random.Random(7)  # noqa: S311  (the same photos give the same network, on one machine)
    batch, started, steps, done = 16, time.monotonic(), 0, 0
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=1e-3)
    for _ in range(epochs):
        if time.monotonic() - started >= seconds:
            break
        order = rng.sample(range(len(photos)), len(photos))
        total = 0.0
        model.train()
        for at in range(0, len(order) - batch + 1, batch):
            share = min(1.0, max(done / epochs, (time.monotonic() - started) / seconds))
            steps += 1
            for group in optimiser.param_groups:
                group["lr"] = RATE * min(steps / 40, max(0.01, 0.5 * (1 + np.cos(np.pi * share))))
            pairs = [varied(rng, *photos[index]) for index in order[at : at + batch]]
            pictures = torch.from_numpy(
                np.stack([picture.transpose(2, 0, 1) for picture, _ in pairs]).astype(np.float32) / 255
            )
            loss = loss_of(model, pictures, [rows for _, rows in pairs])
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimiser.step()
            total += float(loss.detach())
        done += 1
        print(
            f"epoch {done}: loss {total * batch / len(order):.3f}, {time.monotonic() - started:.0f} s",
            flush=True,
        )
    return done


def score(model: Detector, photos: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """Plates found (overlap >= 0.5, right class) and boxes that are no plate, on photos that it never saw."""
    model.eval()
    found = dict.fromkeys(NAMES, 0)
    there = dict.fromkeys(NAMES, 0)
    false, overlaps = 0, []
    names = dict(enumerate(NAMES))
    for square, rows in photos:
        with torch.no_grad():
            output = model(torch.from_numpy(square.transpose(2, 0, 1)[None].astype(np.float32) / 255)).numpy()
        plates = plates_of(output, names, SCORE, 1.0, 0.0, 0.0, SIDE, SIDE)
        used = set()
        for kind, *sides in rows.tolist():
            name = NAMES[int(kind)]
            there[name] += 1
            best = max(
                (
                    (plate.box.iou(Box(*sides)), at)
                    for at, plate in enumerate(plates)
                    if plate.kind == name and at not in used
                ),
                default=(0.0, -1),
            )
            if best[0] >= 0.5:
                found[name] += 1
                used.add(best[1])
                overlaps.append(best[0])
        false += len(plates) - len(used)
    return {
        "score": SCORE,
        "found": found,
        "there": there,
        "false": false,
        "photos": len(photos),
        "iou": round(float(np.mean(overlaps or [0])), 3),
    }


def export(model: Detector, path: Path) -> None:
    """Write the ONNX file with its class names."""
    model.eval()
    example = torch.zeros(1, 3, SIDE, SIDE)
    torch.onnx.export(
        model, (example,), str(path), input_names=["images"], output_names=["output0"], opset_version=18,
        dynamo=True, external_data=False,
    )  # fmt: skip
    stored = onnx.load(str(path))
    del stored.metadata_props[:]
    stored.metadata_props.add(key="names", value=str(dict(enumerate(NAMES))))
    for node in stored.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    onnx.save(stored, str(path))


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the ONNX file")
    parser.add_argument("--metrics", type=Path, required=True, help="a JSON file with recipe and figures")
    parser.add_argument("--photos", type=int, default=480)
    parser.add_argument("--held-out", type=int, default=120)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=600, help="of training at most")
    args = parser.parse_args()
    torch.manual_seed(7)
    torch.set_num_threads(THREADS)
    started = time.monotonic()
    photos = photos_of(TRAIN_SEED, args.photos, DRAWN)
    drawn = time.monotonic() - started
    print(f"{args.photos} photos drawn in {drawn:.0f} s", flush=True)
    model = Detector()
    rare = [pair for pair in photos if (pair[1][:, 0] == NAMES.index(TRANSFORMER)).any()]
    epochs = train(model, photos + rare, args.seconds, args.epochs)
    trained = time.monotonic() - started - drawn
    with torch.no_grad():
        model.head.bias[4 + NAMES.index(TRANSFORMER)] -= CAUTION
    figures = score(model, photos_of(HELD_OUT_SEED, args.held_out, SIDE))
    share = sum(figures["found"].values()) / max(1, sum(figures["there"].values()))
    recipe = {
        "parameters": sum(weights.numel() for weights in model.parameters()),
        "photos": args.photos,
        "photos_twice": len(rare),
        "epochs": epochs,
        "seeds": [TRAIN_SEED, HELD_OUT_SEED],
        "side": SIDE,
        "caution": CAUTION,
        "torch": torch.__version__,
        "seconds_drawing": round(drawn),
        "seconds_training": round(trained),
    }
    print(json.dumps({"recipe": recipe, "held_out": figures}), flush=True)
    if share < ENOUGH:
        print(f"only {share:.1%} of the plates were found: nothing written", file=sys.stderr)
        return 1
    export(model, args.out)
    args.metrics.write_text(json.dumps({"recipe": recipe, "held_out": figures}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
