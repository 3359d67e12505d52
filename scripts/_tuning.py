"""What is known of a preset's settings: measured points, kept on the controller, and their speed."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, Literal, Protocol, get_args

from llmbox.gateway.requests import TOO_LONG

from scripts._measure import NotMeasured, Shape, Timed
from scripts._search import OutOfTime, Setting
from scripts._trial import Serving, TrialFailed, last_words

RUNS = 3
# A turn of a coding agent: what it reads anew, the rest comes from the prompt cache, and what it writes.
TURN_READS, TURN_WRITES = 2048, 512
LEAST_GAIN = 0.02  # of a proposal, in runs of its own beside those of the setting in use
FAILURES = 3  # starts that fail for another reason than memory, before the search ends
Goal = Literal["turn", "generation", "prefill"]
Outcome = Literal["measured", "out of memory", "too large", "too slow", "failed"]
Tell = Callable[[str], None]


class NotTuned(Exception):
    """The preset cannot be tuned, or no further; the message is one line."""


@dataclass(frozen=True)
class Case:
    """What points have in common that may be compared. `base`: a hash of everything else that is run."""

    preset: str
    release: str
    driver: str
    model: str
    base: str
    prompt: int
    generate: int


@dataclass(frozen=True)
class Point:
    """One setting and what came of it. Speeds in tokens per second, one a run; `time` in ISO 8601 (UTC).

    `again`: from the comparison at the end. `too large` is a prediction: it was not run.
    """

    time: str
    case: Case
    setting: Setting
    outcome: Outcome
    prefill: tuple[float, ...] = ()
    generation: tuple[float, ...] = ()
    seconds: float = 0.0
    detail: str = ""
    again: bool = False

    def speed(self, goal: Goal) -> float | None:
        """What the search compares: None when it does not fit into memory, 0 when it is of no use."""
        if self.outcome in ("out of memory", "too large"):
            return None
        if self.outcome != "measured":
            return 0.0
        read, write = median(self.prefill), median(self.generation)
        if goal == "turn":
            return TURN_WRITES / (TURN_READS / read + TURN_WRITES / write)
        return read if goal == "prefill" else write


class Points:
    """The file of one host's points: a line of JSON each. Lines that cannot be read are passed over."""

    def __init__(self, file: Path) -> None:
        self.file = file

    @classmethod
    def of(cls, inventory: Path, host: str) -> Points:
        """That of a host of an inventory, which is known by the name of its folder."""
        state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state")
        return cls(state / "llmbox" / "tuning" / inventory.resolve().name / f"{host}.jsonl")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """This tool alone works on the host, and can keep what it finds. Raises OSError (one line)."""
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.open("a").close()
            lock = self.file.with_suffix(".lock").open("w")
        except OSError as error:
            raise OSError(
                f"the points {self.file}: {error.strerror}; fix: XDG_STATE_HOME=DIR that can be written"
            ) from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OSError(
                    f"another tune_moe works on {self.file.stem}; wait until it has ended"
                ) from None
            yield

    def append(self, point: Point) -> None:
        """Keep a point. Raises OSError."""
        text = json.dumps(asdict(point)) + "\n"
        with self.file.open("a+b") as file:
            if file.tell() and self.file.read_bytes()[-1:] != b"\n":  # the last one was torn by a crash
                text = f"\n{text}"
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())

    def of_case(self, case: Case) -> list[Point]:
        """The points of a case, oldest first. Raises OSError."""
        try:
            lines = self.file.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return []
        return [point for line in lines if (point := _read(line)) is not None and point.case == case]


_NAMES = {field.name for field in fields(Point)}


def _read(line: str) -> Point | None:
    """The point on a line, or None: torn, or of another version of this program."""
    try:
        found = json.loads(line)
        if found.keys() != _NAMES or found["outcome"] not in get_args(Outcome):
            return None
        values = {name: tuple(map(float, found[name])) for name in ("prefill", "generation")}
        point = Point(**{**found, **values, "case": Case(**found["case"])})
    except (ValueError, TypeError, AttributeError):
        return None
    sound = min((*point.prefill, *point.generation), default=0) > 0 and all(values.values())
    return point if sound or point.outcome != "measured" else None


class Held(Protocol):
    """A trial that is held (scripts._trial.Trial)."""

    def run(self, command: Sequence[str] | None) -> None: ...
    def serving(self) -> Serving: ...


class Series(Protocol):
    """A meter (scripts._measure.Meter)."""

    disturbed: Callable[[str], None]

    def series(self, shape: Shape, count: int) -> Iterator[Timed]: ...


class _Ended(Exception):
    """The server of this setting ended while it answered, or no run of it ends in time."""

    def __init__(self, outcome: Outcome, detail: str) -> None:
        super().__init__(detail)
        self.outcome: Outcome = outcome
        self.detail = detail


class Tuner:
    """Measures settings on the real server, each once; a setting that is known is not run again.

    `compose` gives the command line of a setting, `too_large` says why it cannot fit into memory, or "".
    """

    def __init__(
        self,
        held: Held,
        meter: Series,
        points: Points,
        case: Case,
        compose: Callable[[Setting], Sequence[str]],
        too_large: Callable[[Setting], str],
        tell: Tell,
        *,
        goal: Goal,
        budget_s: float,
        clock: Callable[[], float],
        fresh: bool = False,
    ) -> None:
        self.held, self.meter, self.points, self.case = held, meter, points, case
        self.compose, self.too_large, self.tell = compose, too_large, tell
        self.goal: Goal = goal
        self.clock = clock
        self.deadline = clock() + budget_s
        kept = [] if fresh else points.of_case(case)
        self.found = [point for point in kept if point.outcome != "failed"]  # whatever it was may be mended
        self.known = len(self.found)
        self.longest = max((point.seconds for point in self.found), default=0.0)
        meter.disturbed = self._disturbed

    def __call__(self, setting: Setting) -> float | None:
        """The speed of a setting, None when it does not fit (scripts._search). Raises OutOfTime, NotTuned."""
        return self.point(setting).speed(self.goal)

    def point(self, setting: Setting, *, again: bool = False) -> Point:
        """What is known of a setting, or measured now. Raises OutOfTime, NotTuned, NotMeasured."""
        for known in self.found:
            if known.setting == setting and known.again is again:
                return known
        reason = "" if again else self.too_large(setting)
        if reason:
            point = self._new(setting, "too large", detail=reason)
        else:
            # The comparison at the end takes two more.
            if not again and self.found and self.clock() + 3 * self.longest > self.deadline:
                raise OutOfTime
            point = self._run(setting, again=again)
        self.points.append(point)
        self.found.append(point)
        self.longest = max(self.longest, point.seconds)
        self.tell(f"{len(self.found)}: {told(point, self.goal)}")
        failed = [one for one in self.found if one.outcome == "failed"]
        if point.outcome == "failed" and (len(self.found) == 1 or len(failed) >= FAILURES):
            raise NotTuned(f"{shown(setting)}: {point.detail}")
        return point

    def _run(self, setting: Setting, *, again: bool) -> Point:
        self.tell(f"{len(self.found) + 1}: {shown(setting)}: starting{' once more' if again else ''}")
        began = self.clock()
        runs: list[Timed] = []
        outcome: Outcome = "measured"
        detail = ""
        try:
            self.held.run(self.compose(setting))
            for timed in self.meter.series(Shape("deep", self.case.prompt, self.case.generate), RUNS):
                runs.append(timed)
            self._look()
        except TrialFailed as error:
            outcome = "out of memory" if error.out_of_memory else "failed"
            detail = last_words(error)
        except _Ended as error:
            outcome, detail = error.outcome, error.detail
        return self._new(
            setting,
            outcome,
            prefill=tuple(round(timed.prefill_tok_s, 3) for timed in runs),
            generation=tuple(round(timed.generation_tok_s, 3) for timed in runs),
            seconds=round(self.clock() - began, 1),
            detail=detail,
            again=again,
        )

    def _new(self, setting: Setting, outcome: Outcome, **more: Any) -> Point:
        moment = datetime.now(UTC).isoformat(timespec="seconds")
        return Point(moment, self.case, dict(setting), outcome, **more)

    def _look(self) -> None:
        """Make sure that it was this release that answered, and that it lived. Raises _Ended, NotMeasured."""
        serving = self.held.serving()
        if serving.restarts:
            outcome: Outcome = "out of memory" if serving.out_of_memory else "failed"
            raise _Ended(outcome, "its server ended while it answered; look at: lmswitch logs")
        if f"/releases/{self.case.release}/" not in serving.executable:
            raise NotMeasured(f"{serving.executable or 'nothing'} served instead of {self.case.release}")

    def _disturbed(self, why: str) -> None:
        """A run counts for nothing: for another's sake, or is it the setting's own fault?"""
        if TOO_LONG in why:
            raise _Ended("too slow", why)
        serving = self.held.serving()
        if serving.restarts:
            self._look()


def told(point: Point, goal: Goal) -> str:
    """A point in one line."""
    speed = point.speed(goal)
    if point.outcome != "measured" or speed is None:
        return f"{shown(point.setting)}: {point.outcome}{f': {point.detail}' if point.detail else ''}"
    turn = "" if goal != "turn" else f", {speed:.1f} tok/s over a whole turn"
    return (
        f"{shown(point.setting)}: prefill {median(point.prefill):.1f} tok/s, "
        f"generation {median(point.generation):.1f} tok/s{turn}"
    )


def shown(setting: Mapping[str, int]) -> str:
    """A setting as a person reads it."""
    return ", ".join(f"{name} {value}" for name, value in setting.items())


def gain(used: Point, best: Point, goal: Goal) -> float | None:
    """By which share the second is faster than the first; None when either has no speed."""
    before, after = used.speed(goal), best.speed(goal)
    return after / before - 1 if before and after else None
