"""Runs on a lab host: counts llama-server processes every 10 ms while a command runs.

usage: python3 - COMMAND < process_sampler.py
Prints one JSON object: returncode, said, samples, most (processes at once), seen (pids), longest_gap_ms,
mean_interval_ms. Standard library only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

INTERVAL_S = 0.01
NAME = "llama-server"


def servers() -> list[int]:
    """Processes of this name that are not zombies; a name is set by exec, not by fork."""
    found = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            head, _, tail = (Path(entry.path) / "stat").read_text(errors="replace").partition(") ")
        except OSError:
            continue
        if head.partition("(")[2] == NAME and tail[:1] != "Z":
            found.append(int(entry.name))
    return found


def main() -> None:
    """Sample until the command ends."""
    seen: list[int] = []
    most = samples = 0
    longest = 0.0
    with subprocess.Popen(
        ["sh", "-c", sys.argv[1]],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as command:
        began = last = time.monotonic()
        while command.poll() is None:
            now = time.monotonic()
            longest, last = max(longest, now - last), now
            pids = servers()
            most, samples = max(most, len(pids)), samples + 1
            seen += [pid for pid in pids if pid not in seen]
            time.sleep(max(0.0, INTERVAL_S - (time.monotonic() - now)))
        said = command.stdout.read() if command.stdout else ""
    print(
        json.dumps(
            {
                "returncode": command.returncode,
                "samples": samples,
                "most": most,
                "seen": seen,
                "longest_gap_ms": round(longest * 1000, 1),
                "said": said[-4000:],
                "mean_interval_ms": round((last - began) / max(samples - 1, 1) * 1000, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
