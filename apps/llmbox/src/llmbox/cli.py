"""`lmswitch`: switch the preset that serves, stop it, look at it.

Exit codes: 0 done, 1 failed (with the reason and what serves now), 2 bad usage, 3 another switch is on.
With --json standard output is one JSON object; what happens meanwhile is told on standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import pwd
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from llmbox.errors import EXIT_DONE, EXIT_FAILED, LlmboxError, UsageError

if TYPE_CHECKING:
    from llmbox.presets import BoxPreset, PresetsFile
    from llmbox.switch import Outcome
    from llmbox.systemd import Systemd

# Imported where they are used: a bad command line or `--help` must not pay for pydantic and httpx.

DESCRIPTION = "Switch the model preset that serves on this box."
EPILOG = """verbs:
  PRESET        make this preset (or its alias) serve; returns when it is ready
  off           stop the preset that serves
  sleep         stop it, then suspend the machine; over when it is awake again
  resume        after sleep: start what it stopped, and have it generate
  status        what serves, since when, from which build
  list          all presets
  logs [PRESET] journal of the active (or the named) preset: -n LINES, -f to follow

exit codes: 0 done, 1 failed, 2 bad usage, 3 another switch is under way"""
PROGRESS_LINE_S = 5.0
DEFAULT_LOG_LINES = 50
CANARY_TIMEOUT_S = 60.0


class ConsoleReporter:
    """Progress on standard error: one line rewritten on a terminal, a line every few seconds elsewhere."""

    live = True

    def __init__(self) -> None:
        self.tty = sys.stderr.isatty()
        self.open_line = False
        self.last_line_s = 0.0
        self.last_doing = ""

    def progress(self, name: str, elapsed_s: float, doing: str) -> None:
        """Say how long the switch has taken and what goes on."""
        text = f"{name}: {elapsed_s:.1f} s, {doing}"
        if self.tty:
            self._write(f"\r\x1b[K{text}")
            self.open_line = True
        elif doing != self.last_doing or elapsed_s - self.last_line_s >= PROGRESS_LINE_S:
            self.last_line_s, self.last_doing = elapsed_s, doing
            self._write(f"{text}\n")

    def note(self, text: str, lines: list[str] | None = None) -> None:
        """Say one thing, with the lines that belong to it below, at once."""
        self.close()
        self._write("".join([f"lmswitch: {text}\n", *(f"  | {line}\n" for line in lines or [])]))

    def close(self) -> None:
        """End a rewritten line, so that what follows begins on its own."""
        if self.open_line:
            self._write("\r\x1b[K")
            self.open_line = False

    def _write(self, text: str) -> None:
        # A terminal that went away must not leave a switch half done.
        with suppress(OSError, ValueError):
            sys.stderr.write(text)
            sys.stderr.flush()


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script."""
    options = parse(sys.argv[1:] if argv is None else argv)
    try:
        code = run(options)
        sys.stdout.flush()  # here, where a reader that has gone is no traceback
        return code
    except LlmboxError as error:
        if options.json:
            print(json.dumps({"ok": False, "message": str(error)}), flush=True)
        print(f"lmswitch: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_FAILED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return EXIT_FAILED


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is one line, without the usage above it; an object with --json."""

    as_json = False

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and exit with 2."""
        line = f"{message}; see: lmswitch --help"
        if self.as_json:
            print(json.dumps({"ok": False, "message": line}), flush=True)
        print(f"lmswitch: {line}", file=sys.stderr)
        sys.exit(UsageError.exit_code)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Exits with 2 and one line when it cannot be meant."""
    parser = Parser(
        "lmswitch",
        description=DESCRIPTION,
        epilog=EPILOG,
        usage="lmswitch [--json] PRESET|off|sleep|resume|status|list|logs",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.as_json = "--json" in argv
    parser.add_argument("what", metavar="PRESET|VERB", help="see below")
    parser.add_argument("preset", nargs="?", help="for logs: whose")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--restart", action="store_true", help="with PRESET: even when it is ready")
    parser.add_argument("--keep", action="store_true", help="with off: for `lmswitch resume` to start again")
    parser.add_argument("-n", "--lines", type=int, metavar="LINES", help="for logs (default 50)")
    parser.add_argument("-f", "--follow", action="store_true", help="for logs: go on as lines come")
    options = parser.parse_intermixed_args(argv)
    if options.what != "logs" and (options.preset or options.lines is not None or options.follow):
        parser.error(f"{options.what} takes no further arguments; PRESET, -n and -f belong to logs")
    if options.restart and options.what in {"off", "sleep", "resume", "status", "list", "logs"}:
        parser.error("--restart goes with a preset")
    if options.keep and options.what != "off":
        parser.error("--keep goes with off")
    if options.lines is not None and not 0 < options.lines <= 100_000:
        parser.error(f"-n {options.lines}: between 1 and 100000 lines")
    return options


def run(options: argparse.Namespace) -> int:
    """Carry out one parsed command line. Raises LlmboxError in one line."""
    from llmbox import presets as presets_module
    from llmbox.systemd import Systemd, runtime_dir

    presets = presets_module.load(presets_module.presets_path())
    require_user(presets.user)
    if options.what == "resume":
        return resume(presets, options)
    if options.what in presets_module.VERBS:
        verb, preset = options.what, presets.find(options.preset) if options.preset else None
    else:
        verb, preset = "switch", presets.find(options.what)
        if preset.scope == "system":
            raise UsageError(
                f"{preset.name} is a system service, not one of the exclusive presets: "
                f"sudo systemctl restart {preset.unit}"
            )
    if verb == "switch":
        presets_module.check_thoroughly(presets_module.presets_path())
    runtime = runtime_dir()
    systemd = Systemd(runtime)
    if verb == "status":
        return show_status(presets, systemd, runtime, as_json=options.json)
    if verb == "list":
        return show_list(presets, systemd, as_json=options.json)
    if verb == "logs":
        return show_logs(presets, systemd, preset, options)
    return change(verb, preset, presets, systemd, runtime, options)


def resume(presets: PresetsFile, options: argparse.Namespace) -> int:
    """`lmswitch resume`: start the preset that `sleep` stopped."""
    from llmbox import presets as presets_module
    from llmbox import resume as stopped
    from llmbox.switch import Outcome
    from llmbox.systemd import Systemd, runtime_dir

    name = stopped.recall()
    if name is None:
        return told(Outcome(True, "resume: no preset served when the machine went to sleep"), options)
    if name not in presets.presets:
        stopped.remember(None)
        return told(Outcome(False, f"resume: {name}, which served, is no preset any more"), options)
    presets_module.check_thoroughly(presets_module.presets_path())
    runtime = runtime_dir()
    return change("resume", presets.presets[name], presets, Systemd(runtime), runtime, options)


def require_user(user: str, command: str = "") -> None:
    """Raise UsageError with the command to type when another user than the presets' owner runs this."""
    command = command or f"lmswitch {' '.join(sys.argv[1:])}"
    try:
        wanted = pwd.getpwnam(user).pw_uid
    except KeyError:
        raise UsageError(
            f"the presets' user {user!r} does not exist; run the playbook llm_server.yml"
        ) from None
    if os.getuid() != wanted:
        me = pwd.getpwuid(os.getuid()).pw_name
        raise UsageError(
            f"the presets belong to the user {user}, you are {me}; type: sudo -u {user} {command}"
        )


def change(
    verb: str,
    preset: BoxPreset | None,
    presets: PresetsFile,
    systemd: Systemd,
    runtime: Path,
    options: argparse.Namespace,
) -> int:
    """The verbs that change what serves, under the lock and with signals turned into a way back."""
    from llmbox import idle
    from llmbox import resume as stopped
    from llmbox.gateway.client import requests_held
    from llmbox.guard import latch
    from llmbox.lock import held
    from llmbox.server import LlamaServer
    from llmbox.switch import Interrupted, Outcome, Switcher

    def health(listen: str) -> str:
        with LlamaServer(listen) as server:
            return server.health()

    reporter = ConsoleReporter()
    switcher = Switcher(presets, systemd, health, reporter, barred=lambda: latch.refusal(runtime))
    began = time.monotonic()

    def tell(figures: Mapping[str, Any]) -> None:
        doing = f"{figures.get('phase')}, {figures.get('in_flight')} requests in flight"
        reporter.progress(options.what, time.monotonic() - began, doing)

    with held(runtime, options.what), signals(Interrupted):
        if verb == "off":
            idle.remember(runtime, None)  # the card is to be free
        try:
            # Neither what changes nothing nor what is refused at once is a reason to hold requests.
            if preset is not None and (
                (switcher.serves(preset.name) and not options.restart) or switcher.refusal(preset.name)
            ):
                outcome = switcher.switch(preset.name, restart=options.restart)
            else:
                with requests_held(runtime, preset.name if preset else None, tell) as switched:
                    if preset is not None:
                        outcome = switcher.switch(preset.name, restart=options.restart)
                    else:
                        keep = stopped.remember if options.keep else None
                        outcome = switcher.off(keep) if verb == "off" else switcher.sleep(stopped.remember)
                    if outcome.changed:
                        switched(outcome.ok, outcome.parts)
            if verb == "resume" and preset is not None and outcome.ok:
                outcome = canary(preset, outcome)
            if outcome.ok and verb != "sleep" and not options.keep:
                forget(reporter)
        except Interrupted:
            outcome = Outcome(False, "interrupted; look with: lmswitch status")
    reporter.close()
    return told(outcome, options)


def forget(reporter: ConsoleReporter) -> None:
    """Whoever switches or stops by hand has said what is to serve: `resume` brings nothing back any more."""
    from llmbox import resume as stopped

    try:
        stopped.remember(None)
    except LlmboxError as error:  # what was asked for is done
        reporter.note(str(error))


def told(outcome: Outcome, options: argparse.Namespace) -> int:
    """Say how a verb ended. Returns the exit code."""
    with suppress(OSError):
        if options.json:
            print(json.dumps(outcome.as_json()), flush=True)
        else:
            print(f"lmswitch: {outcome.message}", file=sys.stdout if outcome.ok else sys.stderr, flush=True)
    return EXIT_DONE if outcome.ok else EXIT_FAILED


def canary(preset: BoxPreset, outcome: Outcome) -> Outcome:
    """A card may wake up broken while everything looks healthy: only tokens prove it."""
    from llmbox.server import LlamaServer

    began = time.monotonic()
    with LlamaServer(preset.listen, CANARY_TIMEOUT_S) as server:
        why = server.canary()
    if why:
        said = f"{preset.name} is up and generates nothing: {why}; look with: nvidia-smi, lmswitch logs"
        return replace(outcome, ok=False, message=said, reason=[why])
    return replace(outcome, message=f"{outcome.message}, and generates ({time.monotonic() - began:.1f} s)")


@contextmanager
def signals(interrupted: type[BaseException]) -> Iterator[None]:
    """Ctrl-C and SIGTERM raise `interrupted`; a closed terminal does not end a switch."""

    def handler(_number: int, _frame: FrameType | None) -> NoReturn:
        raise interrupted

    former = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    former[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, action in former.items():
            signal.signal(number, action)


def show_status(presets: PresetsFile, systemd: Systemd, runtime: Path, *, as_json: bool) -> int:
    """`lmswitch status`."""
    from datetime import UTC, datetime

    from llmbox.gateway.client import ask_status
    from llmbox.guard import report
    from llmbox.status import Probe, collect, screen
    from llmbox.systemd import TRIAL_UNIT

    def probe(listen: str) -> Probe:
        from llmbox.server import LlamaServer

        with LlamaServer(listen) as server:
            health = server.health()
            if health != "ok":
                return Probe(health)
            return Probe(health, None if as_json else server.context(), server.in_flight())

    def executable(pid: int) -> str:
        with suppress(OSError):
            return str(Path(f"/proc/{pid}/exe").readlink())
        return ""

    units = (preset.unit for preset in presets.exclusive)
    states = systemd.show([*units, *presets.foreign_units, TRIAL_UNIT])
    guard = report.report(runtime, time.monotonic()) if report.installed() else None
    status = collect(presets, states, probe, executable, ask_status(runtime), guard)
    print(json.dumps(status.as_json()) if as_json else screen(status, datetime.now(UTC), Path.home()))
    return EXIT_DONE


def show_list(presets: PresetsFile, systemd: Systemd, *, as_json: bool) -> int:
    """`lmswitch list`."""
    from llmbox.status import preset_state

    states = systemd.show([preset.unit for preset in presets.exclusive])
    services = [preset.unit for preset in presets.presets.values() if preset.scope == "system"]
    states |= systemd.show(services, system=True)
    rows = []
    for preset in presets.presets.values():
        # systemd's word is enough here: a list must not wait for a server that hangs.
        state = preset_state(states[preset.unit], "ok")
        rows.append(
            {
                "name": preset.name,
                "aliases": preset.aliases,
                "state": state,
                "context": preset.context,
                "build": preset.build,
                "model": preset.model,
                "scope": preset.scope,
                "description": preset.description,
            }
        )
    if as_json:
        print(json.dumps({"presets": rows}))
        return EXIT_DONE
    head = ("PRESET", "ALIAS", "STATE", "CONTEXT", "BUILD", "MODEL")
    table = [
        head,
        *(
            (
                str(row["name"]),
                ",".join(preset.aliases),
                str(row["state"]),
                str(row["context"]),
                str(row["build"]),
                str(row["model"]),
            )
            for row, preset in zip(rows, presets.presets.values(), strict=True)
        ),
    ]
    widths = [max(len(line[column]) for line in table) for column in range(len(head))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    return EXIT_DONE


def show_logs(
    presets: PresetsFile, systemd: Systemd, preset: BoxPreset | None, options: argparse.Namespace
) -> int:
    """`lmswitch logs`: of the named preset, or of the one that is up (or that failed last)."""
    from llmbox.status import Probe, collect
    from llmbox.systemd import journal_command

    if preset is None:
        states = systemd.show([one.unit for one in presets.exclusive])
        preset = collect(presets, states, lambda _listen: Probe(), lambda _pid: "").preset
    if preset is None:
        raise LlmboxError("no preset is active; name one: lmswitch logs PRESET")
    lines = DEFAULT_LOG_LINES if options.lines is None else options.lines
    command = journal_command(
        preset.unit, lines=lines, follow=options.follow, as_json=options.json, system=preset.scope == "system"
    )
    if not options.json:
        os.execvpe(command[0], command, systemd.environment)  # noqa: S606  (the journal's own output, Ctrl-C and all)
    with subprocess.Popen(command, env=systemd.environment, text=True, stdout=subprocess.PIPE) as journal:
        assert journal.stdout is not None
        entries = (_entry(line) for line in journal.stdout)
        if options.follow:
            for entry in entries:
                print(json.dumps(entry), flush=True)
        else:
            print(json.dumps({"preset": preset.name, "lines": list(entries)}))
    return EXIT_DONE if journal.returncode == 0 else EXIT_FAILED


def _entry(line: str) -> dict[str, str]:
    from llmbox.status import iso

    fields = json.loads(line)
    message = fields.get("MESSAGE") or ""
    if isinstance(message, list):  # journald gives bytes that are not UTF-8 as numbers
        message = bytes(message).decode(errors="replace")
    return {"time": iso(int(fields["__REALTIME_TIMESTAMP"]) / 1e6), "message": message}


if __name__ == "__main__":
    sys.exit(main())
