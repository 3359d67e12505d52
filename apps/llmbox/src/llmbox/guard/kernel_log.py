"""The kernel's log, for NVIDIA's Xid errors: through the journal, which members of systemd-journal may read.

/dev/kmsg would want CAP_SYSLOG (kernel.dmesg_restrict), the group adm would open every log on the box.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from llmbox.guard.command import Command, Unreadable, first_line

LINES = 1000  # in one look; what is more is read by the next
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
    """What a look at the kernel's log has found. `cursor` is where the next one goes on."""

    xids: tuple[Xid, ...]
    cursor: str


class KernelLog:
    """Looks for errors since `cursor`; "" begins with what comes from now on."""

    def __init__(self, command: Command, cursor: str = "") -> None:
        self._command = command
        self._cursor = cursor

    def look(self) -> News:
        """New errors. Raises Unreadable, also when there is no line at all: then the log cannot be read."""
        cursor = self._cursor
        where = [f"--lines={LINES}", f"--after-cursor={cursor}"] if cursor else ["--lines=1"]
        code, out, err = self._command.run(
            ["journalctl", "--dmesg", "--no-pager", "--output=json", "--output-fields=MESSAGE", *where]
        )
        if code != 0:
            raise Unreadable(f"the kernel log cannot be read: {first_line(err) or f'status {code}'}")
        entries = parse(out)
        if not cursor and not entries:
            # Without the right to, journalctl shows nothing and is content with that.
            raise Unreadable(
                "the kernel log cannot be read: the journal shows this user no line of it; "
                "is the user in the group systemd-journal, and has its service manager been restarted since?"
            )
        xids = tuple(xid for _, text in entries if cursor and (xid := xid_in(text)))
        self._cursor = entries[-1][0] if entries else cursor
        return News(xids, self._cursor)


def parse(text: str) -> list[tuple[str, str]]:
    """Cursor and message of each entry. Raises Unreadable."""
    found = []
    try:
        for line in text.splitlines():
            fields = json.loads(line)
            message = fields.get("MESSAGE") or ""
            if isinstance(message, list):  # journald gives bytes that are not UTF-8 as numbers
                message = bytes(message).decode(errors="replace")
            found.append((str(fields["__CURSOR"]), str(message)))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Unreadable("the kernel log cannot be read: journalctl's answer is not its JSON") from None
    return found


def xid_in(message: str) -> Xid | None:
    """The error that a line of the kernel tells of."""
    match = _XID.search(message)
    return Xid(int(match["number"]), (match["text"] or "").strip()[:200]) if match else None
