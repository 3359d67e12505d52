"""Runs on a client machine: what a person there waits for. scripts/bench_local_claude.py sends it.

One argument, a JSON object: `what` is `turn` (argv, cwd, env) or `start` (pairs, ours, stub, cwd, env).
Prints one JSON object. Standard library only.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SAID = 2000
HEAD = ("message_start", "ping")  # llama-server sends these before it reads the prompt


def turn(asked: dict[str, Any]) -> dict[str, Any]:
    """One turn of Claude Code, which tells its events in lines: seconds to the answer's first, and in all."""
    first = None
    result: dict[str, Any] = {}
    with tempfile.TemporaryFile("w+") as said:
        began = time.monotonic()
        with subprocess.Popen(
            asked["argv"],
            cwd=asked["cwd"],
            env={**os.environ, **asked["env"]},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
        ) as process:
            for line in process.stdout or ():
                event = json.loads(line) if line.startswith("{") else {}
                if (
                    event.get("type") == "stream_event"
                    and first is None
                    and event["event"]["type"] not in HEAD
                ):
                    first = time.monotonic() - began
                elif event.get("type") == "result":
                    result = event
        seconds = time.monotonic() - began
        said.seek(0)
        words = said.read()[-SAID:]
    ok = process.returncode == 0 and first is not None and not result.get("is_error", True)
    return {"ok": ok, "first_s": first, "seconds": seconds, "said": words or str(result)[-SAID:]}


def start(asked: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a program that becomes the stub, and of the stub alone, in turn; and the program's CPU."""
    found: dict[str, Any] = {"ours": [], "stub": [], "cpu": [], "ok": True, "said": ""}
    for name in ("ours", "stub") * asked["pairs"]:
        before, began = cpu_s(), time.monotonic()
        done = subprocess.run(
            asked[name],
            cwd=asked["cwd"],
            env={**os.environ, **asked["env"]},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        found[name].append(time.monotonic() - began)
        if name == "ours":
            found["cpu"].append(cpu_s() - before)
        if done.returncode != 0:
            return {**found, "ok": False, "said": done.stderr[-SAID:]}
    return found


def cpu_s() -> float:
    """Seconds of processor that ended children have used."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    order = json.loads(sys.argv[1])
    Path(order["cwd"]).mkdir(parents=True, exist_ok=True)
    print(json.dumps({"turn": turn, "start": start}[order["what"]](order)))
