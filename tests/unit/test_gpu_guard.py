"""gpu-guard: the verdict by a fake clock, what nvidia-smi and the kernel log say, hangs, what follows."""

from __future__ import annotations

import configparser
import errno
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from llmbox.errors import LlmboxError, UsageError
from llmbox.guard import card, cli, enforce, judge, kernel_log, latch, report, watch
from llmbox.guard import settings as settings_module
from llmbox.guard.card import Card, Reading
from llmbox.guard.command import Command, Unreadable
from llmbox.guard.enforce import Enforcer
from llmbox.guard.hook import WAITING, Hook
from llmbox.guard.judge import Judge, Verdict
from llmbox.guard.kernel_log import KernelLog, News, Xid
from llmbox.guard.settings import Settings
from llmbox.systemd import UnitState

from tests.support import ROOT
from tests.unit.test_llmbox_switch import presets

HOLD, INTERVAL, TIMEOUT = 30.0, 2.0, 10.0
FATAL = [48, 62, 79, 95, 119, 120, 154]
QUIET = News((), "c1")
FELL = "pid='<unknown>', name=<unknown>, GPU has fallen off the bus."
LINES = {  # as the driver writes them
    79: f"NVRM: Xid (PCI:0000:01:00): 79, {FELL}",
    13: "NVRM: Xid (PCI:0000:01:00): 13, pid=4711, Graphics Exception",
    62: "NVRM: Xid (PCI:0000:01:00): 62, pid=4711, name=llama-server, 2a3b(1f0c) 00000000 00000000",
    154: "NVRM: Xid (PCI:0000:01:00): 154, GPU recovery action changed from 0x0 (None) to 0x1 (GPU Reset "
    "Required)",
}
RECOVERED = (
    "NVRM: Xid (PCI:0000:01:00): 154, GPU recovery action changed from 0x1 (GPU Reset Required) to 0x0 (None)"
)


def limits(**changes: Any) -> Settings:
    """The settings of the role's defaults."""
    return Settings.model_validate(
        {
            "interval": INTERVAL,
            "timeout": TIMEOUT,
            "hold": HOLD,
            "temperature_warning": 82,
            "temperature_critical": 86,
            "thermal_throttle_reasons": [0x20, 0x40],
            "fatal_xids": FATAL,
            "hook": [],
            "hook_timeout": 5.0,
            "events_dir": "/nonexistent",
            "events_keep": 3,
            **changes,
        }
    )


class World:
    """A judge, and looks that come back every interval as a test wants them; time is a number."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.judge = Judge(limits(), self.now)

    def during(
        self, seconds: float, found: Reading | Unreadable | None, log: News | Unreadable | None = QUIET
    ) -> Verdict:
        """The world is like this for so long; None: the look never comes back. Ends at the first stop."""
        end = self.now + seconds
        verdict = self.judge.verdict(self.now)
        while self.now < end and not verdict.stop:
            if found is not None:
                self.judge.card(found, self.now, self.now)
            if log is not None:
                self.judge.log(log, self.now, self.now)
            verdict = self.judge.verdict(self.now)
            self.now += INTERVAL
        return verdict


@pytest.fixture
def world() -> World:
    """A card at 60 °C for a minute."""
    world = World()
    assert world.judge.verdict(world.now).level == "starting"
    assert world.during(60, Reading(60, 0)) == Verdict("ok")
    return world


COOL = Reading(60, 0)
CRITICAL: dict[str, Reading | Unreadable | None] = {
    "hot": Reading(91, 0),
    "at the limit": Reading(86, 0x4),
    "slowed down by the driver for heat": Reading(70, 0x24),
    "slowed down by the card for heat": Reading(70, 0x40),
    "cannot be read": Unreadable("nvidia-smi failed with status 1"),
    "hangs, the look as well": None,
}


@pytest.mark.parametrize("found", CRITICAL.values(), ids=CRITICAL.keys())
def test_what_lasts_takes_the_card_out_of_service(world: World, found: Reading | Unreadable | None) -> None:
    began = world.now
    verdict = world.during(120, found)
    assert verdict.stop and verdict.level == "critical"
    assert HOLD <= world.now - began <= 1.5 * HOLD


@pytest.mark.parametrize("found", CRITICAL.values(), ids=CRITICAL.keys())
def test_what_passes_does_not(world: World, found: Reading | Unreadable | None) -> None:
    for _ in range(3):
        assert not world.during(HOLD - INTERVAL, found).stop
        assert world.during(INTERVAL, COOL) == Verdict("ok")


@pytest.mark.parametrize(
    ("found", "level"),
    [
        (Reading(81, 0), "ok"),
        (Reading(82, 0), "warning"),
        (Reading(85, 0x4), "warning"),
        (Reading(76, 0x4), "ok"),
        (Reading(60, 0x1), "ok"),
    ],
    ids=["below the warning", "warm", "warm for an hour", "power cap", "idle"],
)
def test_what_is_no_fault_never_stops_anything(world: World, found: Reading, level: str) -> None:
    verdict = world.during(3600, found)
    assert not verdict.stop and verdict.level == level


def test_another_fault_in_between_does_not_begin_anew(world: World) -> None:
    """Hot, then unreadable: the card was not well for a moment."""
    world.during(HOLD / 2, Reading(90, 0))
    verdict = world.during(HOLD, Unreadable("nvidia-smi failed with status 1"))
    assert verdict.stop and world.now <= 1000 + 60 + 1.5 * HOLD


def test_a_kernel_log_that_cannot_be_read_is_critical(world: World) -> None:
    verdict = world.during(HOLD / 2, COOL, Unreadable("the kernel log cannot be read"))
    assert verdict.level == "critical" and not verdict.stop
    assert world.during(HOLD, COOL, Unreadable("the kernel log cannot be read")).stop


def test_a_kernel_log_whose_look_hangs_is_critical(world: World) -> None:
    began = world.now
    verdict = world.during(120, COOL, None)
    assert verdict.stop and "kernel log" in verdict.reason
    assert HOLD <= world.now - began <= 1.5 * HOLD


@pytest.mark.parametrize("found", [COOL, Unreadable("nvidia-smi failed with status 1")], ids=["good", "bad"])
def test_a_look_that_is_overdue_is_said_before_it_is_acted_on(
    world: World, found: Reading | Unreadable
) -> None:
    """By then it hangs, whatever the last one has said."""
    world.during(INTERVAL, found)
    late = INTERVAL + TIMEOUT + judge.LATE_S
    verdict = world.during(late - 1, None)
    assert verdict.level == ("ok" if found is COOL else "critical") and "hangs" not in verdict.reason
    verdict = world.during(2 * INTERVAL, None)
    assert verdict.level == "critical" and not verdict.stop
    assert verdict.reason.startswith("nvidia-smi hangs: no answer for 1")


def test_a_guard_whose_first_look_never_comes_back() -> None:
    world = World()
    verdict = world.during(120, None, None)
    assert verdict.stop and world.now - 1000 <= 1.5 * HOLD


@pytest.mark.parametrize("line", [LINES[number] for number in (79, 62, 154)], ids=["79", "62", "154"])
def test_a_fatal_error_is_acted_on_at_once(world: World, line: str) -> None:
    xid = kernel_log.xid_in(line)
    assert xid is not None
    assert world.judge.log(News((xid,), "c2"), world.now, world.now) == []
    verdict = world.judge.verdict(world.now)
    assert verdict.stop and f"Xid {xid.number}" in verdict.reason


def test_an_error_of_a_program_and_a_card_that_recovered_are_told_only(world: World) -> None:
    lines = [LINES[13], RECOVERED]
    found = tuple(xid for line in lines if (xid := kernel_log.xid_in(line)))
    assert [xid.number for xid in world.judge.log(News(found, "c2"), world.now, world.now)] == [13, 154]
    assert world.judge.verdict(world.now) == Verdict("ok")


def test_a_slow_answer_that_tells_of_heat_counts_from_then_on(world: World) -> None:
    """It began when the card was still cool, and does not make the heat last longer than it did."""
    world.judge.card(Reading(90, 0), world.now, world.now + TIMEOUT)
    world.judge.log(QUIET, world.now, world.now + HOLD)
    assert not world.judge.verdict(world.now + TIMEOUT + HOLD - 1).stop
    world.judge.card(Reading(90, 0), world.now + TIMEOUT, world.now + TIMEOUT + HOLD)
    world.judge.log(QUIET, world.now, world.now + TIMEOUT + HOLD)
    assert world.judge.verdict(world.now + TIMEOUT + HOLD).stop


def test_an_answer_that_never_came_counts_from_its_beginning(world: World) -> None:
    world.judge.card(Unreadable("nvidia-smi gave no answer in 10 s"), world.now, world.now + TIMEOUT)
    world.judge.log(QUIET, world.now, world.now + HOLD)
    assert world.judge.verdict(world.now + HOLD).stop


def test_cleared_it_counts_anew(world: World) -> None:
    world.judge.log(News((Xid(79, FELL),), "c2"), world.now, world.now)
    world.during(HOLD, Reading(91, 0))
    world.judge.clear(world.now)
    assert not world.judge.verdict(world.now).stop
    assert world.during(2 * HOLD, Reading(91, 0)).stop


def test_a_card_of_two_that_is_gone_until_it_is_cleared(world: World) -> None:
    world.during(INTERVAL, Reading(60, 0, 2))
    verdict = world.during(2 * HOLD, COOL)
    assert verdict.stop and "nvidia-smi names 1 cards, it named 2 before" in verdict.reason
    world.judge.clear(world.now)
    assert world.during(2 * HOLD, COOL) == Verdict("ok"), "it was taken out on purpose"
    assert world.during(HOLD / 2, Reading(60, 0, 2)) == Verdict("ok")
    assert world.during(2 * HOLD, COOL).stop


def test_a_guard_that_is_killed_again_and_again_still_acts() -> None:
    now = since = 1000.0
    for _ in range(20):
        judge = Judge(limits(), now)
        judge.resume(since, now)
        assert not judge.verdict(now).stop, "its first look has a moment"
        for _ in range(3):
            now += 1
            judge.card(Unreadable("nvidia-smi failed with status 1"), now, now)
            judge.log(QUIET, now, now)
            if judge.verdict(now).stop:
                assert HOLD <= now - 1000 <= 1.5 * HOLD
                return
        since = judge.since
    pytest.fail("never acted")


# --- what nvidia-smi says ---


def smi(*answers: tuple[int, str, str]) -> tuple[Card, list[list[str]]]:
    """A card whose nvidia-smi answers these, one after the other, and what it was asked."""
    asked: list[list[str]] = []

    class Answers(Command):
        def run(self, argv: Any, env: Any = None) -> tuple[int, str, str]:
            asked.append(list(argv))
            return answers[len(asked) - 1]

    return Card(Answers(1.0)), asked


@pytest.mark.parametrize(
    ("text", "reading"),
    [
        ("61, 0x0000000000000004\n", Reading(61, 4)),
        ("61, 0x0000000000000001\n74, 0x0000000000000024\n", Reading(74, 0x25, 2)),
    ],
)
def test_readings(text: str, reading: Reading) -> None:
    assert card.parse(text) == reading


@pytest.mark.parametrize(
    "text",
    [
        "",
        "No devices were found\n",
        "[N/A], 0x0000000000000000\n",
        "0, 0x0000000000000000\n",
        "-1, 0x0000000000000000\n",
        "250, 0x0000000000000000\n",
        "61\n",
        "61, Not Active\n",
        "[GPU is lost], [GPU is lost]\n",
        "61, 0x0000000000000000\nUnable to determine the device handle for GPU0000:01:00.0: Unknown Error\n",
        "\x00\xff garbage",
    ],
)
def test_what_is_no_reading_is_none_and_never_a_cool_card(text: str) -> None:
    with pytest.raises(Unreadable):
        card.parse(text)


def test_a_failure_is_told_in_its_own_words() -> None:
    found, _ = smi((9, "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n", ""))
    with pytest.raises(Unreadable, match="status 9: NVIDIA-SMI has failed"):
        found.look()


def test_an_older_driver_names_the_field_otherwise() -> None:
    unknown = (2, 'Field "clocks_event_reasons.active" is not a valid field to query.\n', "")
    found, asked = smi(unknown, (0, "61, 0x4\n", ""), (0, "62, 0x4\n", ""))
    assert found.look() == Reading(61, 4)
    assert found.look() == Reading(62, 4)
    fields = [argv[1].rpartition(",")[2] for argv in asked]
    assert fields == ["clocks_event_reasons.active", *2 * ["clocks_throttle_reasons.active"]]


# --- what the kernel log says ---


class Journal(Command):
    """A journalctl: the kernel's lines of this boot, as cursor, message and microseconds."""

    def __init__(self, *lines: tuple[str, str, int]) -> None:
        super().__init__(1.0)
        self.lines = list(lines)
        self.refuses = False
        self.readable = True

    def run(self, argv: Any, env: Any = None) -> tuple[int, str, str]:
        if self.refuses:
            return 1, "", "Failed to open files: Permission denied"
        options = dict(word.partition("=")[::2] for word in argv)
        count = int(options["--lines"])
        if "--dmesg" not in options:
            assert "--system" in options, "the user's own journal may be read at any time"
            found = [("s1", "systemd: started", 9)][-count:]
        elif "--cursor" in options:
            # The closest one in time, when that entry is not there: sd_journal_get_cursor(3).
            since = int(options["--cursor"].removeprefix("at"))
            found = [line for line in self.lines if line[2] >= since][:count]
        else:
            assert "--after-cursor" not in options
            found = self.lines[-count:]
        fields = ("__CURSOR", "MESSAGE", "__MONOTONIC_TIMESTAMP")
        lines = [json.dumps(dict(zip(fields, map(str, line), strict=True))) for line in found]
        return 0, "\n".join(lines) if self.readable else "", ""


def numbers(news: News) -> list[int]:
    """Which errors it tells of."""
    return [xid.number for xid in news.xids]


def test_the_log_is_read_from_where_it_was_read_last() -> None:
    journal = Journal(("at1", "usb", 1))
    log = KernelLog(journal)
    assert log.look() == News((), "at1")
    journal.lines += [("at2", "usb", 2), ("at3", LINES[62], 3)]
    news = log.look()
    assert numbers(news) == [62] and news.cursor == "at3"
    assert log.look() == News((), "at3"), "told once"
    assert KernelLog(journal, "at3").look() == News((), "at3"), "nor by the next guard"


def test_an_error_of_this_boot_before_the_guards_first_look_is_news() -> None:
    """As one while the driver was loaded."""
    journal = Journal(("at1", LINES[79], 1), *((f"at{n}", "usb", n) for n in range(2, 3000)))
    log = KernelLog(journal)
    assert numbers(log.look()) == [79] and numbers(log.look()) == []
    assert log.look().cursor == "at2999"


def test_more_lines_than_one_look_reads_are_read_by_the_next() -> None:
    journal = Journal(("at1", "usb", 1))
    log = KernelLog(journal)
    log.look()
    journal.lines += [(f"at{n}", "usb", n) for n in range(2, 2 * kernel_log.LINES)]
    journal.lines += [("at5000", LINES[79], 5000)]
    looks = [log.look() for _ in range(4)]
    assert [numbers(news) for news in looks] == [[], [], [79], []]
    assert [news.more for news in looks] == [True, True, False, False]


def looks_of(look: Callable[[], News], count: int) -> list[News]:
    """What a thread with a minute between two looks finds at once; there are no more of them than this."""
    thread = watch.Look(look, 60.0)
    thread.start()
    try:
        until(lambda: thread.found.qsize() >= count)
        time.sleep(0.2)
        return [news for _, news in thread.news()]
    finally:
        thread.ending.set()


def test_an_error_behind_a_flood_of_lines_is_found_at_once() -> None:
    """Else a flood that outruns a page in each interval hides it for as long as it lasts, and longer."""
    journal = Journal(("at1", "usb", 1), *((f"at{n}", "usb", n) for n in range(2, 5 * kernel_log.LINES)))
    journal.lines.append(("at9000", LINES[79], 9000))
    looks = looks_of(KernelLog(journal, "at1").look, 6)
    assert [numbers(news) for news in looks] == [*5 * [[]], [79]]


def test_a_flood_without_an_end_does_not_take_a_core_for_itself() -> None:
    assert len(looks_of(lambda: News((), "c1", more=True), watch.AT_ONCE + 1)) == watch.AT_ONCE + 1


@pytest.mark.parametrize("cursor", ["", "at1"], ids=["the first look", "a later one"])
def test_a_log_that_shows_nothing_cannot_be_read(cursor: str) -> None:
    """journalctl ends with 0 and no line where the user has no right to the journal, or not any more."""
    journal = Journal(("at1", "usb", 1))
    log = KernelLog(journal, cursor)
    if cursor:
        assert log.look() == News((), "at1")
    journal.readable = False
    for _ in range(2):
        with pytest.raises(Unreadable, match="systemd-journal"):
            log.look()
    journal.readable = True
    assert log.look() == News((), "at1")


def test_a_known_line_that_the_journal_has_made_room_of_is_no_fault() -> None:
    """With newer lines and without any; what comes then is told."""
    journal = Journal(("at1", "usb", 1))
    log = KernelLog(journal)
    log.look()
    journal.lines = [("at2", LINES[62], 2)]
    assert numbers(log.look()) == [62]
    journal.lines = []
    assert log.look() == News((), "at2")
    journal.lines = [("at3", LINES[79], 3)]
    assert numbers(log.look()) == [79]


def test_a_known_line_by_another_cursor_is_no_news() -> None:
    """An entry that is copied to another file has another one; the same words at another time are news."""
    journal = Journal(("at4", LINES[13], 4))
    log = KernelLog(journal)
    assert numbers(log.look()) == [13]
    journal.lines = [("at04", LINES[13], 4), ("at5", LINES[13], 5)]
    assert numbers(log.look()) == [13]
    journal.lines = [("at6", LINES[13], 6)]
    assert numbers(log.look()) == [13]


def test_a_log_that_is_refused_cannot_be_read() -> None:
    journal = Journal(("at1", "usb", 1))
    journal.refuses = True
    with pytest.raises(Unreadable, match="Permission denied"):
        KernelLog(journal).look()


@pytest.mark.parametrize("text", ["no JSON", '{"MESSAGE": "without a cursor"}', '{"__CURSOR": 1', "[]"])
def test_an_answer_that_is_not_journalctls(text: str) -> None:
    with pytest.raises(Unreadable):
        kernel_log.parse(text)


def test_a_message_that_is_not_utf8() -> None:
    entry = json.dumps({"__CURSOR": "c", "MESSAGE": [*b"NVRM: Xid (PCI:0000:01:00): 79, \xff"]})
    assert kernel_log.xid_in(kernel_log.parse(entry)[0].text) == Xid(79, "\ufffd")


# --- what hangs ---


def program(folder: Path, text: str) -> Path:
    """An executable Python script."""
    file = folder / "program"
    file.write_text(f"#!{sys.executable} -IS\n{text}\n")
    file.chmod(0o755)
    return file


def test_a_child_that_ignores_sigterm_is_abandoned_and_not_joined_by_another(tmp_path: Path) -> None:
    stubborn = program(
        tmp_path, "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)"
    )
    command = Command(0.1)
    with pytest.raises(Unreadable, match=r"no answer in 0\.1 s"):
        command.run([str(stubborn)])
    with pytest.raises(Unreadable, match="gave no answer"):  # SIGKILL has reached it: the next one may come
        time.sleep(0.05)
        command.run([str(stubborn)])


class Undead:
    """A child in uninterruptible sleep, which cannot be made here: nothing that is asked of it comes back."""

    pid = 4711
    made = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        Undead.made += 1
        self.reaped = threading.Event()  # never set

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.reaped.wait()
        raise AssertionError

    kill = wait = poll = communicate


class Unkillable(Undead):
    """A milder one: it takes a signal, which has no effect, and says so when asked."""

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        raise subprocess.TimeoutExpired("nvidia-smi", timeout or 0)

    def kill(self) -> None:  # type: ignore[override]
        pass

    def poll(self) -> None:  # type: ignore[override]
        return None


def test_one_that_cannot_be_killed_stays_the_only_one() -> None:
    Undead.made = 0
    command = Command(0.1, popen=Unkillable)  # type: ignore[arg-type]
    for expected in ("gave no answer", "hangs and cannot be killed", "hangs and cannot be killed"):
        with pytest.raises(Unreadable, match=expected):
            command.run(["nvidia-smi"])
    assert Undead.made == 1


# --- what follows ---


class FakeManager:
    """Units that are up until they are stopped."""

    def __init__(self, *up: str) -> None:
        self.up = set(up)
        self.stopped: list[str] = []
        self.patience_s = 0.0
        self.says = ""

    def look(self, units: list[str]) -> dict[str, UnitState]:
        return {unit: UnitState(unit, active="active" if unit in self.up else "inactive") for unit in units}

    def stop(self, unit: str, *, timeout_s: float) -> str:
        self.stopped.append(unit)
        self.patience_s = timeout_s
        if not self.says:
            self.up.discard(unit)
        return self.says


class Place:
    """A guard in a runtime directory of its own; `card_look` and `log_look` are what its threads do."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.runtime = folder
        self.events = folder / "events"
        self.limits = limits(
            **{"interval": 0.02, "timeout": 0.2, "hold": 0.3, "events_dir": str(self.events), **changes}
        )
        self.manager = FakeManager("llama-coder.service")
        self.told: list[str] = []
        self.card_look: Callable[[], Reading] = lambda: Reading(61, 4)
        self.news = News((), "c1")
        self.began_at: list[str] = []
        self.enforcers: list[Enforcer] = []

    def change(self, **changes: Any) -> None:
        """Other settings."""
        self.limits = limits(**{**self.limits.model_dump(), **changes})

    def started(self, **changes: Any) -> Enforcer:
        """An enforcer whose threads run."""
        self.change(**changes)
        enforcer = Enforcer(self.limits, presets(), self.manager, lambda _reason: True)
        self.enforcers.append(enforcer)
        enforcer.start()
        return enforcer

    def guard(self) -> watch.Guard:
        """A new guard, as after a start of the program."""

        def block(reason: str) -> bool:
            self.told.append(reason)
            return True

        def kernel_log(cursor: str) -> Callable[[], News]:
            self.began_at.append(cursor)
            return self.take_news

        enforcer = Enforcer(self.limits, presets(), self.manager, block)
        return watch.Guard(self.limits, self.runtime, lambda: self.card_look(), kernel_log, enforcer)

    def take_news(self) -> News:
        """What the kernel log says, once."""
        news, self.news = self.news, News((), "c1")
        return news

    def watches(self, guard: watch.Guard, until: Callable[[], bool], patience_s: float = 5.0) -> float:
        """The guard runs until this is so. Returns the seconds that it took."""
        began = time.monotonic()
        thread = threading.Thread(target=guard.run)
        thread.start()
        try:
            while not until():
                assert time.monotonic() - began < patience_s, "it never came"
                time.sleep(0.005)
            return time.monotonic() - began
        finally:
            guard.ending = True
            thread.join()

    def kinds(self) -> list[str]:
        """What the events tell."""
        return [json.loads(file.read_text())["kind"] for file in sorted(self.events.glob("*.json"))]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A box whose preset coder serves."""
    monkeypatch.setattr(watch, "TICK_S", 0.01)
    monkeypatch.setattr(watch, "WRITE_S", 0.0)
    monkeypatch.setattr(enforce, "AGAIN_S", 0.05)
    place = Place(tmp_path)
    yield place
    for enforcer in place.enforcers:
        enforcer.end()


def assert_own_times(event: dict[str, Any], hold: float) -> None:
    """The event tells, by the guard's own clock, since when it counted, what was due, when it acted."""
    since, due, acted = (event["monotonic"][name] for name in ("since", "due", "acted"))
    assert due - since == pytest.approx(hold)
    assert due <= acted <= time.monotonic()


def test_a_look_that_never_comes_back_stops_the_preset(place: Place) -> None:
    command = Command(0.05, popen=Undead)  # type: ignore[arg-type]
    place.card_look = Card(command).look
    took = place.watches(place.guard(), lambda: place.kinds() == ["stop"])
    assert took >= 0.3, "hold"
    assert place.manager.stopped == ["llama-coder.service"]
    assert place.told[-1].startswith("the GPU guard has taken the card out of service: nvidia-smi has not")
    (event,) = place.events.glob("*.json")
    told = json.loads(event.read_text())
    assert told["stopped"] == ["coder"]
    assert_own_times(told, place.limits.hold)
    assert "nvidia-smi" in latch.refusal(place.runtime)


def test_a_card_that_is_well_is_left_alone_and_the_gateway_told_once(place: Place) -> None:
    place.watches(place.guard(), lambda: report.report(place.runtime, time.monotonic()).level == "ok")
    assert place.manager.stopped == [] and place.told == [""] and latch.refusal(place.runtime) == ""


def test_a_fatal_error_stops_the_preset_and_clear_serves_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.news = News((Xid(79, FELL),), "c9")
    guard = place.guard()
    monkeypatch.setattr(cli, "runtime_dir", lambda: place.runtime)

    def cleared() -> bool:
        if place.kinds() == ["stop"]:
            cli.clear()
        return "clear" in place.kinds() and place.told[-1] == ""

    place.watches(guard, cleared)
    assert latch.refusal(place.runtime) == ""
    assert "Xid 79" in next(reason for reason in place.told if reason)
    (event,) = place.events.glob("*-stop.json")
    assert_own_times(json.loads(event.read_text()), 0.0)  # due at once


def test_a_preset_that_somebody_starts_meanwhile_is_stopped_again(place: Place) -> None:
    latch.close(place.runtime, "it was hot", 0.0)

    def again() -> bool:
        place.manager.up.add("llama-gemma.service")
        return place.manager.stopped.count("llama-gemma.service") >= 2

    place.watches(place.guard(), again)


def test_a_stop_has_the_time_that_the_preset_may_take(place: Place) -> None:
    """Twice: systemd sends the second signal to a server that hangs after half of it."""
    enforcer = Enforcer(place.limits, presets(), place.manager, lambda _reason: True)
    enforcer.stop("it is hot")
    enforcer.once()
    (preset,) = (one for one in presets().exclusive if one.unit == "llama-coder.service")
    assert place.manager.patience_s > 2 * preset.stop_timeout


def test_a_gateway_that_starts_anew_is_told_again(place: Place) -> None:
    """It has forgotten that the card is out of service."""
    told: list[str] = []

    def block(reason: str) -> bool:
        told.append(reason)
        return True

    enforcer = Enforcer(place.limits, presets(), place.manager, block)
    enforcer.stop("it is hot")
    for count in range(1, 4):
        enforcer.once()
        assert told == count * [latch.told("it is hot")]
    enforcer.serve()
    for _ in range(3):
        enforcer.once()
    assert told[3:] == [""]


def test_a_latch_that_cannot_be_written_keeps_nothing_from_being_stopped(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """/run/user is full: the preset is stopped at once, the file is there as soon as there is room."""
    write, full = latch.write, threading.Event()
    full.set()

    def refuses(file: Path, value: dict[str, Any]) -> None:
        if file == place.runtime / latch.LATCH and full.is_set():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(file, value)

    monkeypatch.setattr(latch, "write", refuses)
    place.news = News((Xid(79, FELL),), "c9")

    def closed() -> bool:
        if not place.manager.up and place.kinds() == ["stop"]:
            full.clear()
        return "Xid 79" in latch.refusal(place.runtime)

    place.watches(place.guard(), closed)
    assert f"{latch.LATCH} cannot be written: " in caplog.text and os.strerror(errno.ENOSPC) in caplog.text
    assert place.kinds() == ["stop"]


def test_what_cannot_be_stopped_is_told(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    place.manager.says = "the stop of llama-coder.service ended as 'timeout'"
    place.news = News((Xid(79, FELL),), "c9")
    place.watches(place.guard(), lambda: place.kinds() == ["stop"])
    (event,) = place.events.glob("*.json")
    assert "could not be stopped" in json.loads(event.read_text())["trouble"]
    assert "could not be stopped" in caplog.text


def test_a_service_manager_that_does_not_answer_is_told(place: Place) -> None:
    def silent(_units: list[str]) -> dict[str, UnitState]:
        raise LlmboxError("it does not answer")

    place.manager.look = silent  # type: ignore[method-assign,assignment]
    place.news = News((Xid(79, FELL),), "c9")
    place.watches(place.guard(), lambda: place.kinds() == ["stop"])


@pytest.mark.parametrize(
    ("state", "stops"),
    [
        ("active", True),
        ("activating", True),
        ("reloading", True),
        ("deactivating", True),
        ("inactive", False),
        ("failed", False),
    ],
)
def test_a_preset_that_is_still_loading_is_stopped_as_well(place: Place, state: str, stops: bool) -> None:
    place.manager.look = lambda units: {unit: UnitState(unit, active=state) for unit in units}  # type: ignore[method-assign]
    enforcer = Enforcer(place.limits, presets(), place.manager, lambda _reason: True)
    enforcer.stop("it is hot")
    enforcer.once()
    assert ("llama-coder.service" in place.manager.stopped) is stops


def test_what_fails_as_nobody_thought_of_is_tried_again(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """The thread lives on: without it nothing would ever be stopped again."""
    look, failed = place.manager.look, threading.Event()

    def once_broken(units: list[str]) -> dict[str, UnitState]:
        if not failed.is_set():
            failed.set()
            raise RuntimeError("nobody thought of this")
        return look(units)

    place.manager.look = once_broken  # type: ignore[method-assign]
    place.started().stop("it is hot")
    until(lambda: not place.manager.up)
    assert failed.is_set() and "nobody thought of this" in caplog.text


def test_an_error_that_the_card_survives_is_in_the_journal(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    place.news = News((Xid(13, "Graphics Exception"),), "c2")
    place.watches(place.guard(), lambda: "Xid 13" in report.report(place.runtime, time.monotonic()).xid)
    assert "the kernel log tells of Xid 13: Graphics Exception" in caplog.text
    assert place.kinds() == [] and place.manager.stopped == []


def test_systemd_is_told_that_the_guard_is_there_and_lives(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Type=notify waits for READY=1; without WATCHDOG=1 systemd kills a guard that does its work."""
    said: list[str] = []
    monkeypatch.setattr(watch, "notify", said.append)
    place.watches(place.guard(), lambda: said.count("WATCHDOG=1") >= 3)
    assert (said[0], said[-1]) == ("READY=1", "STOPPING=1")
    assert set(said[1:-1]) == {"WATCHDOG=1"}


def test_a_guard_that_was_killed_says_so_and_goes_on_where_it_was(place: Place) -> None:
    first = place.guard()
    place.watches(first, lambda: report.report(place.runtime, time.monotonic()).running)
    state = json.loads((place.runtime / latch.STATE).read_text())
    assert state["ended"] and not report.report(place.runtime, time.monotonic()).running
    second = place.guard()
    assert place.kinds() == [], "one that ended by itself is no event"
    latch.write(place.runtime / latch.STATE, {**state, "ended": False, "updated": time.monotonic() - 3})
    third = place.guard()
    place.watches(third, lambda: place.kinds() == ["restart"])
    assert place.began_at == ["", "c1", "c1"] and second is not first
    found = report.report(place.runtime, time.monotonic() - 10)
    assert found.restarts == 1


def test_the_next_guard_after_a_killed_one_goes_on_counting(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stops a card that was hot for almost long enough, and counts how often a guard was killed."""
    monkeypatch.setattr(judge, "GRACE_S", 0.05)
    place.change(hold=60.0)
    place.card_look = lambda: Reading(91, 0)
    now = time.monotonic()
    former = {"ended": False, "since": now - 59.0, "updated": now, "restarts": 2}
    latch.write(place.runtime / latch.STATE, former)
    place.watches(place.guard(), lambda: "stop" in place.kinds())
    assert (latch.read(place.runtime / latch.STATE) or {})["restarts"] == 3


@pytest.mark.parametrize("away_s", [0.0, 60.0])
def test_a_guard_that_is_told_to_end_again_and_again_still_stops_a_hot_card(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, away_s: float
) -> None:
    """`kill PID`, or each run of the playbook; one that was away for long begins to count anew."""
    monkeypatch.setattr(judge, "GRACE_S", 0.05)
    place.card_look = lambda: Reading(91, 0)
    state = place.runtime / latch.STATE
    began = time.monotonic()
    while time.monotonic() - began < 2 * place.limits.hold and not place.kinds():
        ends = time.monotonic() + 0.4 * place.limits.hold
        place.watches(place.guard(), lambda ends=ends: bool(place.kinds()) or time.monotonic() > ends)  # type: ignore[misc]
        former = latch.read(state) or {}
        latch.write(state, {**former, "updated": former["updated"] - away_s})
    assert place.kinds() == ([] if away_s else ["stop"])
    said = "the guard was told to end, and was started again; nobody watched for 0.0 s"
    assert (said in caplog.text) is not bool(away_s)
    assert latch.read(state)["restarts"] == 0  # type: ignore[index]


def until(done: Callable[[], bool], patience_s: float = 5.0) -> float:
    """Wait until this is so. Returns the seconds that it took."""
    began = time.monotonic()
    while not done():
        assert time.monotonic() - began < patience_s, "it never came"
        time.sleep(0.005)
    return time.monotonic() - began


@pytest.mark.parametrize("ended", [True, False], ids=["ended", "killed"])
def test_the_next_guard_misses_a_card_of_two_as_well(place: Place, ended: bool) -> None:
    place.card_look = lambda: Reading(61, 4, 2)
    state = place.runtime / latch.STATE
    place.watches(place.guard(), lambda: report.report(place.runtime, time.monotonic()).level == "ok")
    latch.write(state, {**(latch.read(state) or {}), "ended": ended})
    place.card_look = lambda: Reading(61, 4)
    place.watches(place.guard(), lambda: "stop" in place.kinds())
    assert "names 1 cards, it named 2 before" in latch.refusal(place.runtime)
    latch.open_again(place.runtime)
    state.unlink()  # as the boot does with the runtime directory
    place.watches(place.guard(), lambda: report.report(place.runtime, time.monotonic()).level == "ok")


def test_the_hook_gets_the_event_and_its_failure_changes_nothing(
    place: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "copy"
    hook = [
        sys.executable,
        "-ISc",
        "import os, shutil; shutil.copy(os.environ['GPU_GUARD_EVENT'], "
        f"{str(copy)!r} + os.environ['GPU_GUARD_KIND'] + os.environ['GPU_GUARD_REASON']); os._exit(3)",
    ]
    enforcer = place.started(hook=hook)
    enforcer.event("restart", reason="-as a test")
    until(lambda: "exit code 3" in caplog.text)
    assert json.loads(copy.with_name("copyrestart-as a test").read_text())["reason"] == "-as a test"


def test_the_hook_s_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may not speak to systemd for the guard, and a NUL in a reason does not keep it from running."""
    monkeypatch.setenv("NOTIFY_SOCKET", "/nonexistent")
    told = tmp_path / "told"
    argv = ["/bin/sh", "-c", f'echo "${{NOTIFY_SOCKET-unset}} $GPU_GUARD_KIND $GPU_GUARD_REASON" > {told}']
    Hook(argv, 5.0).run({"kind": "stop", "reason": "Xid\0 79"}, "")
    assert told.read_text() == "unset stop Xid 79\n"


@pytest.fixture
def slow_hook(tmp_path: Path) -> Iterator[tuple[list[str], Path]]:
    """A hook that takes 10 s, and the file that holds its process's number once it runs."""
    file = tmp_path / "process"
    yield ["/bin/sh", "-c", f"echo $$ > {file}.new; mv {file}.new {file}; exec sleep 10"], file
    if file.exists():
        with suppress(ProcessLookupError):
            os.kill(int(file.read_text()), signal.SIGKILL)


@pytest.mark.parametrize("kind", ["restart", "clear"])
def test_a_fatal_error_is_acted_on_at_once_while_the_hook_of_another_event_runs(
    place: Place, slow_hook: tuple[list[str], Path], kind: str
) -> None:
    """Preset and gateway themselves are timed: the latch is closed by another thread than theirs."""
    hook, runs = slow_hook
    place.change(hook=hook, hook_timeout=10.0)
    if kind == "restart":
        latch.write(place.runtime / latch.STATE, {"ended": False, "updated": time.monotonic()})
    else:
        latch.close(place.runtime, "it was hot", 0.0)
    guard = place.guard()
    if kind == "clear":
        latch.open_again(place.runtime)
    took: list[float] = []

    def acted() -> bool:
        if runs.exists() and not took:
            assert place.kinds() == [kind] and not any("Xid" in reason for reason in place.told)
            place.manager.up.add("llama-coder.service")
            place.news = News((Xid(79, FELL),), "c9")
            took.append(until(lambda: not place.manager.up and "Xid 79" in place.told[-1]))
            os.kill(int(runs.read_text()), 0)
        return bool(took)

    place.watches(guard, acted, patience_s=20.0)
    assert took[0] <= 1.0, "seconds until the preset was stopped and the gateway told"


def test_a_hook_that_cannot_be_killed_is_abandoned(
    place: Place,
    slow_hook: tuple[list[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Killed in vain, as one in uninterruptible sleep: nothing waits for it, and no second one is begun."""
    monkeypatch.setattr(subprocess.Popen, "kill", lambda _self: None)
    hook, runs = slow_hook
    enforcer = place.started(hook=hook, hook_timeout=0.5)
    enforcer.event("restart", reason="the first one")
    until(runs.exists)
    enforcer.event("clear", reason="the second one")
    enforcer.stop("it is hot")
    assert until(lambda: not place.manager.up) <= 1.0
    until(lambda: "hangs and cannot be killed" in caplog.text)
    assert "gave no answer in 0.5 s" in caplog.text
    os.kill(int(runs.read_text()), 0)


def test_events_beyond_those_that_may_wait_are_written_and_the_hook_not_told(
    place: Place,
    slow_hook: tuple[list[str], Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    hook, runs = slow_hook
    enforcer = place.started(hook=hook, hook_timeout=10.0, events_keep=100)
    enforcer.event("restart", reason="this one runs")
    until(runs.exists)
    for number in range(WAITING + 2):
        enforcer.event("clear", reason=str(number))
    assert until(lambda: len(place.kinds()) == WAITING + 3) <= 1.0
    until(lambda: caplog.text.count("not told of the event clear: too many wait") == 2)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_an_event_that_cannot_be_written_is_told_once_and_holds_nothing_up(
    place: Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
) -> None:
    """The hook hears of it, the next events are dealt with, the preset is stopped."""
    told = tmp_path / "told"
    write = latch.write

    def full(file: Path, value: dict[str, Any]) -> None:
        if file.parent == place.events and value["kind"] == "restart":
            raise OSError(number, os.strerror(number), str(file))
        write(file, value)

    monkeypatch.setattr(latch, "write", full)
    enforcer = place.started(
        hook=["/bin/sh", "-c", f'echo "$GPU_GUARD_EVENT $GPU_GUARD_KIND $GPU_GUARD_REASON" >> {told}']
    )
    enforcer.event("restart", reason="it was killed")
    until(lambda: told.exists() and told.read_text() == " restart it was killed\n")
    enforcer.stop("it is hot")
    enforcer.event("stop", reason="it is hot")
    until(lambda: place.kinds() == ["stop"] and "stop it is hot" in told.read_text())
    time.sleep(5 * enforce.AGAIN_S)
    (record,) = (
        record for record in caplog.records if record.name == enforce.__name__ and record.levelname == "ERROR"
    )
    said = record.getMessage()
    assert os.strerror(number) in said and '"reason": "it was killed"' in said and "\n" not in said
    assert record.exc_info is None and place.manager.up == set()


def test_what_could_not_be_written_whole_leaves_nothing(tmp_path: Path) -> None:
    """A folder in the file's place: it cannot be replaced."""
    (tmp_path / "event.json").mkdir()
    with pytest.raises(OSError, match="directory"):
        latch.write(tmp_path / "event.json", {})
    assert [file.name for file in tmp_path.iterdir()] == ["event.json"]


def test_old_events_make_room(tmp_path: Path) -> None:
    place = Place(tmp_path)
    enforcer = Enforcer(place.limits, presets(), place.manager, lambda _reason: True, clock=lambda: 0.0)
    for number in range(5):
        enforcer.event("restart", reason=str(number))
    enforcer.once()
    assert len(list(place.events.glob("*.json"))) == 3


def test_a_gateway_that_is_not_there_is_told_when_it_is(tmp_path: Path) -> None:
    place = Place(tmp_path)
    answers = iter([False, True])
    enforcer = Enforcer(place.limits, presets(), place.manager, lambda _reason: next(answers))
    for _ in range(4):
        enforcer.once()
    assert next(answers, None) is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_program_goes_on_where_the_former_one_was_and_ends_when_it_is_told_to(
    place: Place, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """The whole `gpu-guard run`, but for nvidia-smi, journalctl, systemd and the gateway."""
    began_at: list[str] = []

    class Log:
        def __init__(self, _command: Command, cursor: str = "") -> None:
            began_at.append(cursor)

        def look(self) -> News:
            return News((), "c8")

    class Cool:
        def __init__(self, _command: Command) -> None:
            pass

        def look(self) -> Reading:
            return COOL

    state = place.runtime / latch.STATE
    latch.write(state, {"cursor": "c7", "ended": True, "updated": time.monotonic() - 60})
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    monkeypatch.setattr(settings_module, "load", lambda _file: place.limits)
    monkeypatch.setattr(cli, "load_presets", lambda _file: presets())
    monkeypatch.setattr(cli, "runtime_dir", lambda: place.runtime)
    monkeypatch.setattr(cli, "Systemd", lambda _runtime: place.manager)
    monkeypatch.setattr(cli, "set_blocked", lambda _runtime, _reason: True)
    monkeypatch.setattr(cli, "KernelLog", Log)
    monkeypatch.setattr(cli, "Card", Cool)
    handlers = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)}

    def told_to_end() -> None:
        until(lambda: (latch.read(state) or {}).get("cursor") == "c8")
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=told_to_end)
    try:
        for one in handlers:
            signal.signal(one, lambda *_: pytest.fail("nobody listens to it"))
        sender.start()
        assert cli.run_guard() == 0
    finally:
        sender.join()
        for one, handler in handlers.items():
            signal.signal(one, handler)
    assert began_at == ["c7"] and (latch.read(state) or {})["ended"]
    assert place.manager.up, "nothing was wrong"


# --- what a person sees ---


def test_the_report(tmp_path: Path) -> None:
    assert "does not run" in report.text(report.report(tmp_path, 100.0))
    state = {"level": "warning", "reason": "warm", "temperature": 84, "updated": 99.0}
    latch.write(tmp_path / latch.STATE, state)
    assert report.text(report.report(tmp_path, 100.0)) == "84 °C, warning: warm"
    assert not report.report(tmp_path, 130.0).running, "it has written nothing for too long"
    latch.close(tmp_path, "it was hot", 0.0)
    found = report.report(tmp_path, 100.0)
    assert not found.serves and report.text(found).startswith("out of service: it was hot; now: 84 °C")


@pytest.mark.parametrize(("level", "code"), [("ok", 0), ("warning", 0), ("critical", 1), ("starting", 1)])
def test_the_exit_code_of_status_says_whether_the_card_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: str, code: int
) -> None:
    monkeypatch.setattr(cli, "runtime_dir", lambda: tmp_path)
    assert cli.show(as_json=False) == 1, "nobody watches"
    latch.write(tmp_path / latch.STATE, {"level": level, "updated": time.monotonic()})
    assert cli.show(as_json=False) == code
    latch.close(tmp_path, "it was hot", 0.0)
    assert cli.show(as_json=True) == 1


def test_clear_tells_the_gateway_where_no_guard_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, str]] = []

    def set_blocked(runtime: Path, reason: str) -> bool:
        told.append((reason, latch.refusal(runtime)))
        return True

    monkeypatch.setattr(cli, "runtime_dir", lambda: tmp_path)
    monkeypatch.setattr(cli, "set_blocked", set_blocked)
    latch.close(tmp_path, "it was hot", 0.0)
    assert cli.clear() == 0
    assert told == [("", "")], "once, and not before the latch is open"
    assert cli.clear() == 0 and len(told) == 1, "it is in service already"


def test_a_latch_that_cannot_be_understood_holds(tmp_path: Path) -> None:
    (tmp_path / "llmbox").mkdir()
    (tmp_path / latch.LATCH).write_text("{")
    assert latch.refusal(tmp_path) and report.report(tmp_path, 0.0).stopped


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"temperature_warning": 86}, "temperature_warning = 86 is not below"),
        ({"interval": 20.0}, "hold = 30 must be at least"),
        ({"timeout": 31.0}, "hold = 30 must be at least"),
        ({"hold": 0.0}, "hold = 0.0"),
        ({"more": 1}, "more = 1"),
    ],
)
def test_settings_that_cannot_be_meant(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    file = tmp_path / "gpu-guard.json"
    file.write_text(json.dumps({**limits().model_dump(), **changes}))
    with pytest.raises(UsageError) as caught:
        settings_module.load(file)
    assert said in str(caught.value)


def test_the_page_names_the_boxes_that_have_a_guard_and_those_that_are_told() -> None:
    page = " ".join((ROOT / "docs/gpu-guard.md").read_text().split())
    guarded = {file.stem for file in (ROOT / "playbooks").glob("*.yml") if "- gpu_guard" in file.read_text()}
    assert guarded == {"llm_server"}
    assert "It is installed on LLM boxes where the inventory declares an NVIDIA card" in page
    assert "on an LLM box without one the play says that it is not" in page
    assert "An OCR box has no guard, and its play says nothing of one" in page


def test_the_page_and_the_long_run_say_the_same_of_the_roles_defaults() -> None:
    """Of the 30 s, which the gate does not wait for."""
    name = "test_the_times_of_the_roles_defaults"
    page = " ".join((ROOT / "docs/gpu-guard.md").read_text().partition("## Measured")[2].split())
    rows = (ROOT / "docs/test-runs/7.md").read_text().splitlines()
    (row,) = (row for row in rows if name in row)
    assert ("passed in the long run" in page) is ("| passed (1/0/0) |" in row)
    assert "not been measured" not in page and f"`{name}`" in page
    assert f"def {name}(" in (ROOT / "tests/lab/test_gpu_guard.py").read_text()


def test_the_units_program_is_the_installed_one() -> None:
    unit = (ROOT / "roles/gpu_guard/templates/gpu-guard.service.j2").read_text()
    assert "bin/gpu-guard run" in unit and os.access(Path(sys.executable).with_name("gpu-guard"), os.X_OK)


def test_a_guard_that_ends_or_hangs_is_started_again_before_the_card_has_been_hot_for_too_long() -> None:
    """Each in its section: systemd passes over a setting that is in another one."""
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(ROOT / "roles/gpu_guard/templates/gpu-guard.service.j2")
    service = unit["Service"]
    assert unit["Unit"]["StartLimitIntervalSec"] == "0", "however often"
    assert service["Restart"] == "always", "after kill PID as well, which is a clean end"
    assert (service["Type"], service["WatchdogSignal"]) == ("notify", "SIGKILL")
    assert service["WatchdogSec"] == "{{ gpu_guard_watchdog }}"
    defaults = yaml.safe_load((ROOT / "roles/gpu_guard/defaults/main.yml").read_text())
    away_s = sum(float(service[name]) for name in ("RestartSec", "TimeoutStopSec"))
    assert away_s + defaults["gpu_guard_watchdog"] < defaults["gpu_guard_hold"]
    assert (service["KillMode"], unit["Install"]["WantedBy"]) == ("mixed", "default.target")
