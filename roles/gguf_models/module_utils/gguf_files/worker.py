"""What runs in the transient unit: bring in every file of the plan, say how far it is, leave a result."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .download import Fetcher
from .store import (
    MISSING,
    OK,
    UNVERIFIED,
    DiskFull,
    FileState,
    ModelFile,
    Plan,
    Refusal,
    check_space,
    free_bytes,
    hash_file,
    inspect,
    locked,
    missing_bytes,
    stamp_of,
    stamp_path,
    write_json,
)

PROGRESS_NAME, RESULT_NAME = "progress.json", "result.json"
# Names of credentials, not their values.
PLAN_CREDENTIAL, TOKEN_CREDENTIAL, ENVIRONMENT_CREDENTIAL = "plan", "hf-token", "environment"
REPORT_INTERVAL_S = 0.5
RATE_WINDOW_S = 10.0


@dataclass
class Progress:
    """How far the run is, written as JSON at most twice a second. Rates are of the last ten seconds."""

    path: Path
    total: int = 0
    count: int = 0
    clock: Callable[[], float] = time.monotonic
    before: int = 0
    index: int = 0
    _last: tuple[str, str] = ("", "")
    _samples: deque[tuple[float, int]] = field(default_factory=deque)
    _written: float = float("-inf")

    def start_file(self, index: int) -> None:
        """File number `index` (from 1) begins."""
        self.index = index

    def finish_file(self, size: int) -> None:
        """Its bytes count as done from now on."""
        self.before += size

    def __call__(self, phase: str, name: str, done: int) -> None:
        """`done` bytes of file `name` are there."""
        now = self.clock()
        if (phase, name) != self._last:
            self._last, self._written = (phase, name), float("-inf")
            self._samples.clear()
        if now - self._written < REPORT_INTERVAL_S:
            return
        self._written = now
        self._samples.append((now, done))
        while now - self._samples[0][0] > RATE_WINDOW_S:
            self._samples.popleft()
        then, had = self._samples[0]
        span = now - then
        rate = max(0.0, (done - had) / span) if span > 0 else 0.0
        write_json(
            self.path,
            {
                "phase": phase,
                "file": name,
                "index": self.index,
                "count": self.count,
                "file_bytes": done,
                "done_bytes": self.before + done,
                "total_bytes": self.total,
                "bytes_per_s": round(rate),
            },
        )


def bring_in(
    plan: Plan,
    progress: Progress,
    *,
    token: str | None = None,
    free: Callable[[Path], int] = free_bytes,
    fetcher: Fetcher | None = None,
) -> dict[str, list[str]]:
    """Verify what is there, then install what is missing.

    Returns {"verified": file names, "installed": file names, "refusals": a line per file that could not be}.
    Raises Refusal when nothing can be installed at all: another run holds the lock, or the disk is too small.
    """
    directory = Path(plan.directory)
    fetcher = fetcher or Fetcher(plan, token)
    fetcher.report = progress
    files = {file.name: file for file in plan.files}
    with locked(directory):
        states = inspect(plan)
        unverified = [files[state.name] for state in states if state.state == UNVERIFIED]
        verified = verify(directory, unverified, progress)
        wrong = [state for state in states if state.state not in (OK, UNVERIFIED)]
        wrong += [FileState(file.name, MISSING) for file in unverified if file.name not in verified]
        todo = [files[state.name] for state in wrong]
        check_space(plan, missing_bytes(todo, wrong), free(directory))
        progress.total, progress.count, progress.before = sum(file.size for file in todo), len(todo), 0
        installed, refusals = [], []
        for index, file in enumerate(todo, 1):
            progress.start_file(index)
            try:
                fetcher.install(file)
                installed.append(file.name)
            except DiskFull:
                raise
            except Refusal as refusal:  # a long download of another file is not lost to this one's fault
                refusals.append(str(refusal))
            progress.finish_file(file.size)
    return {"verified": verified, "installed": installed, "refusals": refusals}


def verify(directory: Path, files: list[ModelFile], progress: Progress) -> list[str]:
    """Hash files that have no valid stamp; stamp the right ones and return their names."""
    progress.total, progress.count = sum(file.size for file in files), len(files)
    right = []
    for index, file in enumerate(files, 1):
        progress.start_file(index)
        done = 0

        def more(size: int, name: str = file.name) -> None:
            nonlocal done
            done += size
            progress("checking", name, done)

        before = stamp_of((directory / file.name).lstat(), file.sha256)
        digest = hash_file(directory / file.name, more)
        if digest == file.sha256 and before == stamp_of((directory / file.name).lstat(), digest):
            write_json(stamp_path(directory, file.name), before)
            right.append(file.name)
        progress.finish_file(file.size)
    return right


def main() -> int:
    """The unit's program.

    Reads the plan, the token and further environment (a proxy's address may hold a password) from systemd's
    credentials; writes into its runtime directory.
    """
    # `systemctl stop` and a shutdown end in order, so that what came is on the disk.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    credentials, runtime = Path(os.environ["CREDENTIALS_DIRECTORY"]), Path(os.environ["RUNTIME_DIRECTORY"])
    plan = Plan.from_json((credentials / PLAN_CREDENTIAL).read_text(encoding="utf-8"))
    further = credentials / ENVIRONMENT_CREDENTIAL
    if further.exists():
        os.environ.update(json.loads(further.read_text(encoding="utf-8")))
    secret = credentials / TOKEN_CREDENTIAL
    token = secret.read_text(encoding="utf-8").strip() if secret.exists() else None
    result: dict[str, Any] = {"plan": plan.identity}
    (runtime / PROGRESS_NAME).unlink(missing_ok=True)
    try:
        result |= bring_in(plan, Progress(runtime / PROGRESS_NAME), token=token)
    except Refusal as refusal:
        result["refusals"] = [str(refusal)]
    except OSError as problem:
        result["refusals"] = [
            f"{problem.filename or plan.directory}: {problem.strerror or problem}; "
            "fix: mend that and run again, it resumes"
        ]
    for line in result["refusals"]:
        print(line, file=sys.stderr)
    write_json(runtime / RESULT_NAME, result)
    return 1 if result["refusals"] else 0
