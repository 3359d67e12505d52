"""Ctrl-C while a program is still importing: exit code 130 and not a word, instead of a traceback.

A program calls `exit_quietly()` before its other imports and `raise_again()` when its own handling begins.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

EXIT_CODE = 130


def exit_quietly() -> None:
    """End at once on SIGINT from here on; a caller that has it ignored (nohup, a shell's &) keeps that."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit)


def raise_again() -> None:
    """SIGINT raises KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _exit:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _exit(_number: int, _frame: FrameType | None) -> None:
    os._exit(EXIT_CODE)
