"""`gpu-guard`: watch the card, say what the guard found, put the card back into service.

    gpu-guard status [--json]   what the guard says: exit code 0 while the card is in service, 1 otherwise
    gpu-guard clear             put the card back into service, once the cause is gone
    gpu-guard run               watch (systemd runs this: gpu-guard.service)

Exit codes: 0 done, 1 failed, 2 bad usage.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import time
from types import FrameType

from llmbox.cli import require_user
from llmbox.errors import EXIT_DONE, EXIT_FAILED, LlmboxError
from llmbox.gateway.client import set_blocked
from llmbox.guard import latch, settings
from llmbox.guard.card import Card
from llmbox.guard.command import Command
from llmbox.guard.enforce import Enforcer
from llmbox.guard.kernel_log import KernelLog
from llmbox.guard.report import report, settings_file, text
from llmbox.guard.watch import Guard
from llmbox.presets import load as load_presets
from llmbox.presets import presets_path
from llmbox.systemd import Systemd, runtime_dir


class Priorities(logging.Formatter):
    """The journal's own priorities: sd-daemon(3)."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, its priority first."""
        level = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4}.get(record.levelno, 6)
        return f"<{level}>{super().format(record)}"


def run_guard() -> int:
    """`gpu-guard run`."""
    handler = logging.StreamHandler()
    if "JOURNAL_STREAM" in os.environ:
        handler.setFormatter(Priorities())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    limits = settings.load(settings_file())
    presets = load_presets(presets_path())
    runtime = runtime_dir()
    enforcer = Enforcer(limits, presets, Systemd(runtime), lambda reason: set_blocked(runtime, reason))
    guard = Guard(
        limits,
        runtime,
        Card(Command(limits.timeout)).look,
        lambda cursor: KernelLog(Command(limits.timeout), cursor).look,
        enforcer,
    )

    def end(_number: int, _frame: FrameType | None) -> None:
        guard.ending = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    guard.run()
    return EXIT_DONE


def show(as_json: bool) -> int:
    """`gpu-guard status`."""
    found = report(runtime_dir(), time.monotonic())
    print(json.dumps(found.as_json()) if as_json else text(found))
    return EXIT_DONE if found.serves else EXIT_FAILED


def clear() -> int:
    """`gpu-guard clear`."""
    runtime = runtime_dir()
    if not latch.refusal(runtime):
        print("gpu-guard: the card is in service already")
        return EXIT_DONE
    latch.open_again(runtime)
    set_blocked(runtime, "")  # the guard does so, too, where it runs
    print("gpu-guard: the card is in service again; start a preset with: lmswitch PRESET")
    return EXIT_DONE


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script."""
    parser = argparse.ArgumentParser(
        "gpu-guard", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=["status", "clear", "run"])
    parser.add_argument("--json", action="store_true", help="with status: one JSON object")
    options = parser.parse_args(argv)
    try:
        require_user(load_presets(presets_path()).user, f"gpu-guard {options.verb}")
        if options.verb == "run":
            return run_guard()
        return show(options.json) if options.verb == "status" else clear()
    except LlmboxError as error:
        print(f"gpu-guard: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"gpu-guard: {error}", file=sys.stderr)
        return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
