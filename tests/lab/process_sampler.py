"""Runs on a lab host as root: counts llama-server processes every 10 ms while a command runs.

usage: python3 - COMMAND < process_sampler.py
Prints one JSON object: returncode, said, samples, most (processes at once), seen (pids), mean_interval_ms,
p99_interval_ms, longest_interval_ms. Standard library only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from itertools import pairwise
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


def go_first() -> None:
    """Be scheduled before llama-server's threads, which take every core while a model loads."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except PermissionError:  # a kernel with real-time groups gives this one no share
        os.nice(-20)


def main() -> None:
    """Sample until the command ends."""
    seen: list[int] = []
    most = 0
    moments: list[float] = []
    with subprocess.Popen(
        ["sh", "-c", sys.argv[1]],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as command:
        go_first()  # after the command's start: it inherits nothing
        while command.poll() is None:
            moments.append(time.monotonic())
            pids = servers()
            most = max(most, len(pids))
            seen += [pid for pid in pids if pid not in seen]
            time.sleep(max(0.0, moments[-1] + INTERVAL_S - time.monotonic()))
        said = command.stdout.read() if command.stdout else ""
    intervals = sorted(after - before for before, after in pairwise(moments))
    print(
        json.dumps(
            {
                "returncode": command.returncode,
                "samples": len(moments),
                "most": most,
                "seen": seen,
                "mean_interval_ms": round(sum(intervals) / len(intervals) * 1000, 2),
                "p99_interval_ms": round(intervals[len(intervals) * 99 // 100] * 1000, 1),
                "longest_interval_ms": round(intervals[-1] * 1000, 1),
                "said": said[-4000:],
            }
        )
    )


if __name__ == "__main__":
    main()
