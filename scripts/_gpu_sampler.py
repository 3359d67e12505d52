"""What the NVIDIA GPUs of a host do, a line of JSON each second until standard input closes.

verify_throughput.py runs this there over ssh. Standard library only, Python >= 3.9. A nvidia-smi that hangs
is left behind, never waited for: it may not even be killable.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
from typing import Any

INTERVAL_S = 1.0
TIMEOUT_S = 5.0
FIELDS = (
    "driver_version",
    "name",
    "utilization.gpu",
    "power.draw",
    "temperature.gpu",
    "memory.used",
    "memory.total",
)


def numbers(texts: list[str]) -> list[float]:
    """Those that are numbers: a card that does not measure something says [N/A]."""
    found = []
    for text in texts:
        try:
            found.append(float(text))
        except ValueError:
            continue
    return found


def sample(csv: str) -> dict[str, Any]:
    """All GPUs of a box as one: the mean of their utilization, the sum of power and memory, the hottest."""
    rows = [[field.strip() for field in line.split(",")] for line in csv.splitlines() if line.strip()]
    if not rows or any(len(row) != len(FIELDS) for row in rows):
        return {"error": "nvidia-smi printed something else than was asked"}
    driver, name, busy, power, heat, used, total = ([row[at] for row in rows] for at in range(len(FIELDS)))
    utilization = numbers(busy)
    return {
        "driver": driver[0],
        "name": " + ".join(name),
        "utilization_percent": sum(utilization) / len(utilization) if utilization else None,
        "power_w": sum(numbers(power)) or None,
        "temperature_c": max(numbers(heat), default=None),
        "memory_mib": sum(numbers(used)) or None,
        "memory_total_mib": sum(numbers(total)) or None,
    }


def look() -> dict[str, Any]:
    """One sample; `error` when nvidia-smi fails or hangs, `absent` when there is none."""
    argv = ["nvidia-smi", "--query-gpu=" + ",".join(FIELDS), "--format=csv,noheader,nounits"]
    try:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    except OSError:
        return {"absent": True}
    try:
        out, _ = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return {"error": f"nvidia-smi hangs: no answer in {TIMEOUT_S:g} s"}
    if process.returncode != 0:
        said = (out.strip().splitlines() or ["nothing"])[-1]
        return {"error": f"nvidia-smi failed with exit code {process.returncode}: {said}"}
    return sample(out)


def main() -> None:
    """Print samples until nobody listens any longer, or there is nothing to say."""
    while True:
        found = look()
        print(json.dumps(found), flush=True)
        if "absent" in found or "error" in found:
            return
        if select.select([sys.stdin], [], [], INTERVAL_S)[0]:
            return


if __name__ == "__main__":
    main()
