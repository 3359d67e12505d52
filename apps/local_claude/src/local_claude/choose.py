"""A choice among several, with the arrow keys, on the terminal of standard error."""

from __future__ import annotations

import os
import re
import select
import sys
import termios
import tty
from collections.abc import Callable, Sequence

UP, DOWN, ENTER, GIVE_UP = "up", "down", "enter", "give up"
_KEYS = {
    b"\x1b[A": UP, b"\x1bOA": UP, b"k": UP,
    b"\x1b[B": DOWN, b"\x1bOB": DOWN, b"j": DOWN,
    b"\r": ENTER, b"\n": ENTER,
    b"\x1b": GIVE_UP, b"q": GIVE_UP, b"\x03": GIVE_UP, b"\x04": GIVE_UP, b"": GIVE_UP,
}  # fmt: skip

_KEY = re.compile(rb"\x1b[\[O].|.", re.DOTALL)  # several may come in one read
_BEGUN = re.compile(rb"\x1b[\[O]?\Z")
TURN_S = 0.5
REST_S = 0.05  # over a slow line an arrow key comes in pieces; behind Escape alone nothing follows


def choose(title: str, rows: Sequence[str], first: int = 0) -> int | None:
    """The number of the row that a person picks; None when they give up."""
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor)
        return pick(title, rows, first, lambda: read_keys(descriptor), _write, _size)
    except KeyboardInterrupt:
        return None
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def read_keys(descriptor: int) -> bytes:
    """What was typed, an arrow key to its end; nothing once there is nobody who types."""
    while not select.select([descriptor], [], [], TURN_S)[0]:
        pass  # a Ctrl-C that came just before the wait is heard at its end
    keys = piece = os.read(descriptor, 64)
    while piece and _BEGUN.search(keys) and select.select([descriptor], [], [], REST_S)[0]:
        piece = os.read(descriptor, 64)
        keys += piece
    return keys


def pick(
    title: str,
    rows: Sequence[str],
    at: int,
    read: Callable[[], bytes],
    write: Callable[[str], None],
    size: Callable[[], tuple[int, int]] = lambda: (80, 24),
) -> int | None:
    """The choice itself: keys come from `read`, what is to be seen goes to `write`, on (columns, lines).

    A list that is taller than the terminal is shown around the row that is meant, a longer row is cut: what
    scrolls or wraps could not be drawn over again.
    """
    write(_cut(f"{title}: {len(rows)} (arrow keys, Enter; q gives up)", size()[0]) + "\n")
    while True:
        columns, lines = size()
        height = max(1, min(len(rows), lines - 2))
        top = min(max(0, at - height // 2), len(rows) - height)
        for number in range(top, top + height):
            row = _cut(f"{'>' if number == at else ' '} {rows[number]}", columns)
            write(f"\x1b[K\x1b[7m{row}\x1b[0m\n" if number == at else f"\x1b[K{row}\n")
        for pressed in _KEY.findall(read()) or [b""]:
            key = _KEYS.get(pressed)
            if key == ENTER:
                return at
            if key == GIVE_UP:
                return None
            at = (at + {UP: -1, DOWN: 1}.get(key or "", 0)) % len(rows)
        write(f"\x1b[{height}A")


def _cut(text: str, columns: int) -> str:
    return text if len(text) < columns else f"{text[: max(0, columns - 2)]}…"


def _size() -> tuple[int, int]:
    try:
        columns, lines = os.get_terminal_size(sys.stderr.fileno())
    except OSError:
        columns = lines = 0
    return columns or 80, lines or 24  # a serial line tells 0


def _write(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
