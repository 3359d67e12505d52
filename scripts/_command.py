"""What the scripts that look at all hosts of an inventory share: their options, and how they end."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from llama_common.problems import InventoryError
from llama_common.rules import LOCK_COMMAND

from lab.interrupt import EXIT_CODE, raise_again
from scripts._inventory import InventoryUnreadable

COULD_NOT_RUN = 2


def parser(description: str | None, exit_codes: str) -> argparse.ArgumentParser:
    """A parser with --inventory and --limit; the first line of `description`, a docstring, is shown."""
    made = argparse.ArgumentParser(
        description=(description or "").partition("\n")[0], epilog=f"exit codes: {exit_codes}"
    )
    made.add_argument("--inventory", type=Path, required=True, metavar="DIR")
    made.add_argument("--limit", metavar="PATTERN", help="only these hosts (an Ansible pattern)")
    return made


def typed(text: str, inventory: Path) -> str:
    """A fix that names the command to lock models, with the folder that was given for its placeholder."""
    return text.replace(LOCK_COMMAND, LOCK_COMMAND.replace("DIR", shlex.quote(str(inventory))))


def attempt(program: str, inventory: Path, work: Callable[[], int]) -> int:
    """The exit code of `work`; one line and 2 when the inventory or a file is out of its reach."""
    try:
        return work()
    except (InventoryUnreadable, InventoryError, OSError) as error:
        print(f"{program}: {typed(str(error), inventory)}", file=sys.stderr)
        return COULD_NOT_RUN


def end(main: Callable[[], int]) -> NoReturn:
    """Run `main` and end with its exit code; on Ctrl-C at once: hosts may still be being asked."""
    raise_again()
    try:
        code = main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(EXIT_CODE)
    sys.exit(code)
