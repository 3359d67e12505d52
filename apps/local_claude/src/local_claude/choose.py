"""A choice among several, with the arrow keys, on the terminal of standard error."""

from __future__ import annotations

import os
import re
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


def choose(title: str, rows: Sequence[str], first: int = 0) -> int | None:
    """The number of the row that a person picks; None when they give up."""
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor)
        return pick(title, rows, first, lambda: os.read(descriptor, 64), _write)
    except KeyboardInterrupt:
        return None
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def pick(
    title: str, rows: Sequence[str], at: int, read: Callable[[], bytes], write: Callable[[str], None]
) -> int | None:
    """The choice itself: keys come from `read`, what is to be seen goes to `write`."""
    write(f"{title} (arrow keys, Enter; q gives up)\n")
    while True:
        for number, row in enumerate(rows):
            write(f"\x1b[K\x1b[7m> {row}\x1b[0m\n" if number == at else f"\x1b[K  {row}\n")
        for pressed in _KEY.findall(read()) or [b""]:
            key = _KEYS.get(pressed)
            if key == ENTER:
                return at
            if key == GIVE_UP:
                return None
            at = (at + {UP: -1, DOWN: 1}.get(key or "", 0)) % len(rows)
        write(f"\x1b[{len(rows)}A")


def _write(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
