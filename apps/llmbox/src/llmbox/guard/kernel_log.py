"""The kernel's log, for NVIDIA's Xid errors: through the journal, which members of systemd-journal may read.

/dev/kmsg would want CAP_SYSLOG (kernel.dmesg_restrict), the group adm would open every log on the box.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import NamedTuple

from llmbox.guard.command import Command, Unreadable, first_line

LINES = 1000  # in one look; what is more is read by the next, at once
BEFORE = 10_000  # in the first look: the last ones of this boot, and at its beginning all of them
_XID = re.compile(r"NVRM: Xid \([^)]*\): (?P<number>[0-9]+)(?:, (?P<text>.*))?")
# Xid 154 tells what the card needs from now on; this is how it says: nothing any more.
_RECOVERED = re.compile(r"recovery action changed from .* to 0x0\b")


@dataclass(frozen=True)
class Xid:
    """One error of the card, in the driver's own words."""

    number: int
    text: str

    @property
    def recovered(self) -> bool:
        """Whether it says that nothing is wrong any more."""
        return self.number == 154 and bool(_RECOVERED.search(self.text))


@dataclass(frozen=True)
class News:
    """What a look at the kernel's log has found. `cursor` is where the next one goes on, `more`: at once."""

    xids: tuple[Xid, ...]
    cursor: str
    more: bool = False


class Line(NamedTuple):
    """An entry of the journal. `stamp` is when it came, in microseconds since boot."""

    cursor: str
    text: str
    stamp: str = ""


class KernelLog:
    """Looks for errors since `cursor`; "" begins with those of this boot.

    Each look begins at the last line that is known already, not behind it: a log without news still has to
    show that line. An answer without any would be the same from a log that may not be read any more.
    """

    def __init__(self, command: Command, cursor: str = "") -> None:
        self._command = command
        self._known = Line(cursor, "")

    def look(self) -> News:
        """New errors. Raises Unreadable, also when the log shows nothing at all: then it cannot be read."""
        known = self._known
        where = [f"--lines={LINES}", f"--cursor={known.cursor}"] if known.cursor else [f"--lines={BEFORE}"]
        found = self._ask("--dmesg", *where)
        # A line that the journal has made room of is no fault; there is always a line of something else then.
        if not found and not (known.cursor and self._ask("--system", "--lines=1")):
            # Without the right to, journalctl shows nothing and is content with that.
            raise Unreadable(
                "the kernel log cannot be read: the journal shows this user no line of it; "
                "is the user in the group systemd-journal, and has its service manager been restarted since?"
            )
        news = found[1:] if found and _same(found[0], known) else found
        self._known = found[-1] if found else known
        more = bool(known.cursor) and len(found) >= LINES
        return News(tuple(xid for line in news if (xid := xid_in(line.text))), self._known.cursor, more)

    def _ask(self, *which: str) -> list[Line]:
        code, out, err = self._command.run(
            ["journalctl", "--no-pager", "--output=json", "--output-fields=MESSAGE", *which]
        )
        if code != 0:
            raise Unreadable(f"the kernel log cannot be read: {first_line(err) or f'status {code}'}")
        return parse(out)


def _same(one: Line, other: Line) -> bool:
    """Whether both are the same entry, which may have several cursors: sd_journal_get_cursor(3)."""
    return one.cursor == other.cursor or (one.stamp != "" and one[1:] == other[1:])


def parse(text: str) -> list[Line]:
    """The entries that journalctl tells of. Raises Unreadable."""
    found = []
    try:
        for line in text.splitlines():
            fields = json.loads(line)
            message = fields.get("MESSAGE") or ""
            if isinstance(message, list):  # journald gives bytes that are not UTF-8 as numbers
                message = bytes(message).decode(errors="replace")
            stamp = str(fields.get("__MONOTONIC_TIMESTAMP") or "")
            found.append(Line(str(fields["__CURSOR"]), str(message), stamp))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Unreadable("the kernel log cannot be read: journalctl's answer is not its JSON") from None
    return found


def xid_in(message: str) -> Xid | None:
    """The error that a line of the kernel tells of."""
    match = _XID.search(message)
    return Xid(int(match["number"]), (match["text"] or "").strip()[:200]) if match else None
