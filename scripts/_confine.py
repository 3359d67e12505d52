"""Runs a program that may write below one folder only, and connect to some ports only: Linux's Landlock.

    _confine.py --write DIR [--port N ...] -- COMMAND...

Everything that the program starts is held to the same, and sends signals to its own kind only. Where the
kernel has no Landlock the program is not started and the exit code is 125. Standard library only.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import struct
import sys
from collections.abc import Sequence
from typing import NoReturn

NO_LANDLOCK = 125
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION, _BENEATH, _PORT = 1, 1, 2  # flag of create_ruleset; kinds of rules
_NO_NEW_PRIVS = 38
# Bits of LANDLOCK_ACCESS_FS_*: what changes a file or folder, by the ABI version that knows them.
_WRITE_FILE, _TRUNCATE = 1 << 1, 1 << 14
_MAKE_AND_REMOVE = sum(1 << bit for bit in range(4, 13))
_REFER = 1 << 13
_CONNECT_TCP = 1 << 1
_SCOPES = 0b11  # abstract UNIX sockets and signals
# Programs need these to run at all; nothing stays in them.
_DEVICES = ("/dev/null", "/dev/zero", "/dev/tty", "/dev/ptmx", "/dev/pts", "/dev/shm")  # noqa: S108

_libc = ctypes.CDLL(None, use_errno=True)


def abi() -> int:
    """The version of Landlock that this kernel has; 0: none."""
    if not sys.platform.startswith("linux"):
        return 0
    return max(0, int(_libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION)))


def confine(folder: str, ports: Sequence[int]) -> None:
    """Hold this process, and all that it starts, to `folder` and `ports`. Raises OSError."""
    version = abi()
    changes = _WRITE_FILE | _MAKE_AND_REMOVE
    changes |= _REFER if version >= 2 else 0
    changes |= _TRUNCATE if version >= 3 else 0
    network = _CONNECT_TCP if version >= 4 else 0
    wanted = struct.pack("=QQQ", changes, network, _SCOPES if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = _call(_CREATE_RULESET, wanted, ctypes.c_size_t(size), 0)
    try:
        for path in (folder, *_DEVICES):
            if path != folder and not os.path.exists(path):  # noqa: PTH110 - a leaf of the standard library
                continue
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            try:
                allowed = changes if os.path.isdir(path) else changes & (_WRITE_FILE | _TRUNCATE)  # noqa: PTH112
                _call(_ADD_RULE, ruleset, _BENEATH, struct.pack("=Qi", allowed, place), 0)
            finally:
                os.close(place)
        for port in ports if network else ():
            _call(_ADD_RULE, ruleset, _PORT, struct.pack("=QQ", network, port), 0)
        if _libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        _call(_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _call(number: int, *arguments: object) -> int:
    result = int(_libc.syscall(number, *arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Become the confined command."""
    parser = argparse.ArgumentParser(description="Run a command that may write below one folder only.")
    parser.add_argument("--write", required=True, metavar="DIR")
    parser.add_argument("--port", type=int, action="append", default=[])
    parser.add_argument("command", nargs="+")
    options = parser.parse_args(argv)
    if not abi():
        sys.exit(NO_LANDLOCK)
    confine(options.write, options.port)
    os.execvp(options.command[0], options.command)  # noqa: S606 - a list, no shell


if __name__ == "__main__":
    main()
