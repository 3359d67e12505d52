"""The verdict, from what the looks delivered and when. Pure: time comes in with every call.

There is one rule for heat, for failures and for a hang: a card that has not been well for `hold` seconds is
taken out of service. A look that never comes back is no good look: nothing has to notice that it hangs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmbox.guard.card import Reading
from llmbox.guard.command import Unreadable
from llmbox.guard.kernel_log import News, Xid
from llmbox.guard.settings import Settings

Level = Literal["starting", "ok", "warning", "critical"]
LATE_S = 1.0  # beyond interval and timeout, for a busy machine
GRACE_S = 2.0  # at least, for the first looks of a guard that goes on where a killed one was


@dataclass(frozen=True)
class Verdict:
    """What there is to say, and whether the card must be taken out of service: since when, from when on."""

    level: Level
    reason: str = ""
    stop: bool = False
    since: float = 0.0
    due: float = 0.0


@dataclass
class _Source:
    """What one kind of look has delivered. `fault` is the trouble of the last one, `since` when it began.

    After a good look that is when the next one is due.
    """

    name: str
    since: float
    heard: float
    fault: str = ""
    begun: bool = False

    def hear(self, fault: str, began: float, now: float, due: float) -> None:
        """A look that began then has come back."""
        if not fault:
            self.since = due
        elif not self.fault:
            self.since = began
        self.begun, self.heard, self.fault = True, now, fault


class Judge:
    """Takes looks in, gives the verdict. `cards`: how many there have been at once, since boot or `clear`."""

    def __init__(self, settings: Settings, now: float, cards: int = 0) -> None:
        self._settings = settings
        self._card = _Source("nvidia-smi", now, now)
        self._log = _Source("the look at the kernel log", now, now)
        self._fatal = ""
        self._fatal_since = 0.0
        self.reading: Reading | None = None
        self.cards = cards

    def card(self, found: Reading | Unreadable, began: float, now: float) -> None:
        """A look at the card came back, which began then."""
        due = now + self._settings.interval
        if isinstance(found, Reading) and found.cards < self.cards:
            found = Unreadable(f"nvidia-smi names {found.cards} cards, it named {self.cards} before")
        if isinstance(found, Unreadable):
            self.reading = None
            self._card.hear(str(found), began, now, due)
        else:
            self.reading, self.cards = found, found.cards
            self._card.hear(self._heat(found), now, now, due)

    def log(self, found: News | Unreadable, began: float, now: float) -> list[Xid]:
        """A look at the kernel log came back. Returns the errors in it that a card survives."""
        fault = str(found) if isinstance(found, Unreadable) else ""
        self._log.hear(fault, began, now, now + self._settings.interval)
        if isinstance(found, Unreadable):
            return []
        fatal = [xid for xid in found.xids if xid.number in self._settings.fatal_xids and not xid.recovered]
        if fatal and not self._fatal:
            self._fatal = f"the kernel log tells of Xid {fatal[0].number}: {fatal[0].text or 'no word why'}"
            self._fatal_since = began
        return [xid for xid in found.xids if xid not in fatal]

    def verdict(self, now: float) -> Verdict:
        """What is to be said and done now."""
        if self._fatal:
            return Verdict("critical", self._fatal, True, self._fatal_since, self._fatal_since)
        late = self._settings.interval + self._settings.timeout + LATE_S
        troubles = []
        for source in (self._card, self._log):
            lasts, silent, fault = now - source.since, now - source.heard, source.fault
            if not source.begun:
                fault = f"{source.name} has not answered yet"
                if lasts < self._settings.hold:
                    return Verdict("starting", fault)
            elif silent > late or (not fault and lasts >= self._settings.hold):
                fault = f"{source.name} hangs: no answer for {silent:.0f} s"
            if fault and lasts >= self._settings.hold:
                due = source.since + self._settings.hold
                return Verdict("critical", f"{fault} (for {lasts:.0f} s)", True, source.since, due)
            troubles += [fault] if fault else []
        if troubles:
            return Verdict("critical", troubles[0])
        warning = self._warmth()
        return Verdict("warning" if warning else "ok", warning)

    @property
    def since(self) -> float:
        """Since when not all has been well, or when the next look is due."""
        return min(self._card.since, self._log.since)

    def resume(self, since: float, now: float) -> None:
        """Go on where a former guard was: one that ends again and again must not begin to count anew."""
        for source in (self._card, self._log):
            source.since = min(now, max(since, now - self._settings.hold + GRACE_S))
            source.fault = "the guard was started again"

    def clear(self, now: float) -> None:
        """Somebody says that the cause is gone: everything counts from now on, the cards as well."""
        self._fatal = ""
        self.cards = 0
        self._card.since = self._log.since = now

    def _heat(self, reading: Reading) -> str:
        """Why a reading is critical; empty when it is not."""
        limit = self._settings.temperature_critical
        if reading.temperature >= limit:
            return f"the card has {reading.temperature} °C, {limit} °C are critical"
        thermal = reading.throttle & self._settings.throttle_mask
        if thermal:
            return f"the card slows down for heat (throttle reasons {thermal:#x}) at {reading.temperature} °C"
        return ""

    def _warmth(self) -> str:
        limit = self._settings.temperature_warning
        if self.reading and self.reading.temperature >= limit:
            return f"the card has {self.reading.temperature} °C, {limit} °C are a warning"
        return ""
