"""A preset on trial: its unit runs another command line for a while, and in any case its own again after it.

    python -m llmbox.trial PRESET

reads objects from standard input, one a line, and answers each with one:

    {"command": [...]}  restart the preset with this command line (null: with its own)
    {}                  say which program the preset runs, and how often systemd restarted it for a crash

    {"ok": true, "message": str, "executable": path of the program that serves now, "restarts": int,
     "out_of_memory": bool: whether it was for want of memory that it was restarted}
    {"ok": false, "message": str, "out_of_memory": bool, "reason": [the server's last lines],
     "tried": bool: whether it was started; else the box refused, or was busy with another switch}

An empty line says that whoever asks is still there. The trial ends with its input, after SILENCE_S without a
line, or when its unit llmbox-trial.service is stopped. What served before serves then; should this program
be killed, systemd sees to it (ExecStopPost=). One trial at a time.
"""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from llama_common.units import systemd_quote

from llmbox.errors import EXIT_DONE, EXIT_LOCKED, LlmboxError, UsageError
from llmbox.presets import BoxPreset, PresetsFile, load, presets_path
from llmbox.systemd import TRIAL_UNIT, Systemd, UnitState, runtime_dir

UNIT = TRIAL_UNIT
# After every drop-in of a person's.
DROP_IN = "zz-llmbox-trial.conf"
SILENCE_S = 300.0
LOCK_PATIENCE_S = 120.0
LOCK_PAUSE_S = 1.0
SWITCH_MARGIN_S = 120.0
JOURNAL_LINES = 400
_OUT_OF_MEMORY = re.compile(
    r"out of memory|failed to allocate|cudaMalloc failed|unable to allocate|bad_alloc|lack of memory"
    r"|oom-kill",
    re.IGNORECASE,
)


class Manager(Protocol):
    """What a trial needs of systemd (llmbox.systemd.Systemd, or a fake)."""

    def show(self, units: list[str]) -> Mapping[str, UnitState]: ...
    def reload(self) -> None: ...
    def restarts(self, unit: str) -> int: ...
    def journal_since(self, unit: str, since_s: float, count: int) -> list[str]: ...


Switch = Callable[[Sequence[str], float], dict[str, Any]]


def drop_in(command: Sequence[str]) -> str:
    """The text that makes a unit run `command`. Raises ValueError for what cannot stand in a unit file."""
    return (
        "# A trial by llmbox: removed when it ends, gone with a reboot.\n"
        f"[Service]\nExecStart=\nExecStart={systemd_quote(command)}\n"
    )


def out_of_memory(lines: Sequence[str]) -> bool:
    """Whether what a server wrote says that memory, the card's or the machine's, did not suffice."""
    return any(_OUT_OF_MEMORY.search(line) for line in lines)


def was_tried(said: Mapping[str, Any]) -> bool:
    """Whether lmswitch went as far as to start what it was asked for."""
    return bool(said["ok"] or said.get("changed"))


class Trial:
    """One preset's trial. `former` is the preset that served before; "" for none."""

    def __init__(
        self,
        preset: BoxPreset,
        former: str,
        presets: PresetsFile,
        runtime: Path,
        manager: Manager,
        switch: Switch,
        proc: Path = Path("/proc"),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.preset = preset
        self.former = former
        self.presets = presets
        self.units = runtime / "systemd/user"
        self.manager = manager
        self.switch = switch
        self.proc = proc
        self.clock = clock
        self._began = clock()

    def answer(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Do what one line asks for."""
        if "command" not in asked:
            return self._serving("")
        command = asked["command"]
        try:
            text = None if command is None else drop_in([str(word) for word in command])
        except (TypeError, ValueError) as error:
            return {
                "ok": False,
                "message": str(error),
                "out_of_memory": False,
                "executable": "",
                "reason": [],
                "tried": False,
            }
        self._began = self.clock()
        self._put(text)
        done = self._restart()
        if done["ok"]:
            return self._serving(done["message"])
        lines = self._journal()
        tried = was_tried(done)
        if text is not None:  # serve again before anything else
            self._put(None)
            # What refuses the preset's own command as well may have ended the start: the guard, or a person.
            tried = was_tried(self._restart()) and tried
        reason = [str(line) for line in done.get("reason", [])]
        return {
            "ok": False,
            "message": done["message"],
            "out_of_memory": out_of_memory([*lines, *reason, done["message"]]),
            "reason": reason,
            "tried": tried,
        }

    def end(self) -> None:
        """Let what served before serve again. Twice is as good as once."""
        self._put(None)
        up = self._up()
        if up is None:
            if self.former:
                self._switch(self.former)
        elif up.name != self.preset.name:
            return  # a request or a person has asked for another one meanwhile
        elif not self.former:
            self._switch("off")
        elif self.former != self.preset.name:
            self._switch(self.former)
        elif self._argv() != self.preset.command:
            self._restart()

    def executable(self) -> str:
        """The program that the preset's process runs, links resolved; "" when there is none."""
        with suppress(OSError):
            return str((self.proc / str(self._pid()) / "exe").readlink())
        return ""

    def _serving(self, message: str) -> dict[str, Any]:
        restarts = self.manager.restarts(self.preset.unit)
        return {
            "ok": True,
            "message": message,
            "executable": self.executable(),
            "restarts": restarts,
            "out_of_memory": bool(restarts) and out_of_memory(self._journal()),
        }

    def _journal(self) -> list[str]:
        """What the server, and systemd about it, wrote since the last command line was asked for."""
        return self.manager.journal_since(self.preset.unit, self._began, JOURNAL_LINES)

    def _argv(self) -> list[str]:
        with suppress(OSError):
            text = (self.proc / str(self._pid()) / "cmdline").read_text(errors="replace")
            return text.rstrip("\0").split("\0")
        return []

    def _pid(self) -> int:
        return self.manager.show([self.preset.unit])[self.preset.unit].main_pid

    def _up(self) -> BoxPreset | None:
        states = self.manager.show([preset.unit for preset in self.presets.exclusive])
        return next((preset for preset in self.presets.exclusive if states[preset.unit].occupied), None)

    def _put(self, text: str | None) -> None:
        """Lay down the drop-in, or remove it and whatever a trial of another preset may have left."""
        mine = self.units / f"{self.preset.unit}.d" / DROP_IN
        stale = [path for path in self.units.glob(f"llama-*.service.d/{DROP_IN}") if path != mine or not text]
        for path in stale:
            path.unlink(missing_ok=True)
            with suppress(OSError):
                path.parent.rmdir()
        if text:
            mine.parent.mkdir(parents=True, exist_ok=True)
            fresh = mine.with_suffix(".new")
            fresh.write_text(text, encoding="utf-8")
            fresh.replace(mine)
        if text or stale:
            self.manager.reload()

    def _restart(self) -> dict[str, Any]:
        return self._switch("--restart", self.preset.name)

    def _switch(self, *words: str) -> dict[str, Any]:
        limit = max(one.start_timeout + one.stop_timeout for one in self.presets.exclusive)
        return self.switch(words, 2 * limit + SWITCH_MARGIN_S)


class BoxManager(Systemd):
    """The user's service manager, with what only a trial needs."""

    def reload(self) -> None:
        """Have systemd read unit files anew. Raises LlmboxError."""
        done = self._run(["systemctl", "--user", "daemon-reload"])
        if done.returncode != 0:
            raise LlmboxError(f"systemctl --user daemon-reload failed: {done.stderr.strip()}")

    def restarts(self, unit: str) -> int:
        """How often systemd has restarted the unit by itself since it was started."""
        done = self._run(["systemctl", "--user", "show", "--property=NRestarts", "--value", unit])
        return int(done.stdout.strip() or 0)

    def journal_since(self, unit: str, since_s: float, count: int) -> list[str]:
        """The last lines that a unit and systemd wrote about it since then (seconds since the epoch)."""
        command = ["journalctl", "--no-pager", "--quiet", "--output=cat", f"--lines={count}"]
        return self._run([*command, f"--since=@{since_s:.3f}", f"--user-unit={unit}"]).stdout.splitlines()


def lmswitch(words: Sequence[str], timeout_s: float) -> dict[str, Any]:
    """Run lmswitch and return its object; waits while another switch is under way."""
    argv = [str(Path(sys.executable).with_name("lmswitch")), "--json", *words]
    deadline = time.monotonic() + LOCK_PATIENCE_S
    while True:
        try:
            done = subprocess.run(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                timeout=timeout_s,
                check=False,
            )
            said: dict[str, Any] = json.loads(done.stdout)
        except subprocess.TimeoutExpired:
            return {"ok": False, "message": f"lmswitch {' '.join(words)}: no end after {timeout_s:.0f} s"}
        except (OSError, ValueError) as error:
            return {"ok": False, "message": f"lmswitch {' '.join(words)}: {error}"}
        if done.returncode != EXIT_LOCKED or time.monotonic() > deadline:
            return said
        time.sleep(LOCK_PAUSE_S)


def lines(descriptor: int, silence_s: float) -> Iterator[str]:
    """Lines from a pipe, until its end or until nothing has come for `silence_s` seconds."""
    rest = b""
    while select.select([descriptor], [], [], silence_s)[0]:
        got = os.read(descriptor, 1 << 16)
        if not got:
            return
        *whole, rest = (rest + got).split(b"\n")
        yield from (line.decode(errors="replace") for line in whole)


def hold(trial: Trial, asked: Iterator[str], tell: Callable[[str], None]) -> None:
    """Answer lines until there are no more, then let the former preset serve."""
    try:
        for line in asked:
            if not line.strip():
                continue
            try:
                said = trial.answer(dict(json.loads(line)))
            except (ValueError, TypeError):
                said = {"ok": False, "message": f"not a JSON object: {line:.60}"}
            tell(json.dumps(said))
    finally:
        trial.end()


def tell(text: str) -> None:
    """Write an answer; nobody may be there any more to read it."""
    with suppress(OSError):
        os.write(1, f"{text}\n".encode())


def unit_command(preset: BoxPreset, former: str, limit_s: float) -> list[str]:
    """What runs the holding part in a unit of its own, connected to this program's input and output."""
    me = [sys.executable, "-I", "-m", "llmbox.trial"]
    return [
        "systemd-run",
        "--user",
        "--quiet",
        "--pipe",
        "--wait",
        "--collect",
        f"--unit={UNIT}",
        f"--description=Trial of the preset {preset.name}",
        f"--property=TimeoutStopSec={limit_s:.0f}",
        f"--property=ExecStopPost={systemd_quote([*me, '--end', preset.name, former])}",
        *me,
        "--hold",
        preset.name,
        former,
    ]


def main() -> int:
    """Run one of the three parts: the one that a person or a script calls, holding, and ending."""
    try:
        return run(sys.argv[1:])
    except LlmboxError as error:
        tell(json.dumps({"ok": False, "message": str(error)}))
        return error.exit_code


def run(argv: Sequence[str]) -> int:
    """Carry out one command line. Raises LlmboxError."""
    part, words = (argv[0], argv[1:]) if argv and argv[0] in ("--hold", "--end") else ("", argv)
    if len(words) != (2 if part else 1):
        raise UsageError("usage: python -m llmbox.trial PRESET")
    presets = load(presets_path())
    preset = presets.find(words[0])
    if preset not in presets.exclusive:
        raise UsageError(f"{preset.name} is a system service; only the presets behind the gateway are tried")
    runtime = runtime_dir()
    manager = BoxManager(runtime)
    if part:
        trial = Trial(preset, words[1], presets, runtime, manager, lmswitch)
        if part == "--end":
            trial.end()
        else:
            hold(trial, lines(0, SILENCE_S), tell)
        return EXIT_DONE
    if manager.show([UNIT])[UNIT].occupied:
        raise LlmboxError(f"another trial is under way; wait, or end it with: systemctl --user stop {UNIT}")
    states = manager.show([one.unit for one in presets.exclusive])
    former = next((one.name for one in presets.exclusive if states[one.unit].occupied), "")
    limit = 2 * max(one.start_timeout + one.stop_timeout for one in presets.exclusive) + SWITCH_MARGIN_S
    command = unit_command(preset, former, limit)
    # Its input and output are this program's.
    return os.execvpe(command[0], command, manager.environment)  # noqa: S606


if __name__ == "__main__":
    sys.exit(main())
