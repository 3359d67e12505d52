"""Control of the user's service manager, timed: its private socket, and where a moment more is no matter the
programs `systemctl --user` and `journalctl`."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from llmbox.bus import PROPERTIES_INTERFACE, Bus, Refused
from llmbox.errors import LlmboxError, UsageError
from llmbox.wait_ready import pause

COMMAND_TIMEOUT_S = 30
TICK_S = 0.1
JOURNAL_SETTLE_S = 0.6
WAIT_PREFIX = "llmbox-wait-ready:"
TRIAL_UNIT = "llmbox-trial.service"
NOISE_FACTOR = 20
SUSPEND_UNIT = "systemd-suspend.service"
SUSPEND_TICK_S = 0.3
SUSPEND_BEGIN_S = 10.0  # for a suspend of which logind says nothing; it delays one by 5 s
SUSPEND_TIMEOUT_S = 120.0
SLEPT_S = 0.2
PROPERTIES = (
    "Id,LoadState,ActiveState,SubState,Result,MainPID,InvocationID,ActiveEnterTimestamp,StateChangeTimestamp,"
    "ExecMainCode,ExecMainStatus,ExecMainPID,ExecMainStartTimestamp"
)
_SIGNALED = {"2", "3"}  # CLD_KILLED, CLD_DUMPED
_STOPPED = {"1", "15", "9"}  # SIGHUP, which is the units' KillSignal=, SIGTERM of a drop-in, SIGKILL
_DONE = {"done", "skipped"}  # skipped: by a condition that somebody gave the unit
SERVICE = "org.freedesktop.systemd1.Service"


@dataclass(frozen=True)
class Process:
    """A process, and when it was started on the monotonic clock, in seconds."""

    pid: int
    started_s: float


@dataclass(frozen=True)
class UnitState:
    """What systemd says about one unit. `since_s` is seconds since the epoch, 0.0 when it never ran."""

    unit: str
    active: str = "inactive"
    sub: str = "dead"
    load: str = "loaded"
    result: str = "success"
    main_pid: int = 0
    invocation: str = ""
    since_s: float = 0.0
    ending: str = ""
    last_pid: int = 0
    last_start_s: float = 0.0

    @property
    def occupied(self) -> bool:
        """True while the unit holds, gets or gives back the card (not while it waits to be restarted)."""
        return (
            self.active in {"active", "activating", "reloading", "deactivating"}
            and self.sub != "auto-restart"
        )

    @property
    def failed(self) -> bool:
        """True when its last run failed, be it that systemd will try again."""
        return self.active == "failed" or self.sub == "auto-restart"


def runtime_dir() -> Path:
    """This user's runtime directory, found without a login shell. Raises UsageError when there is none."""
    path = Path(os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}")
    if not (path / "systemd/private").exists():
        raise UsageError(
            f"no service manager runs for this user ({path}/systemd is missing); start it "
            f"once and for all with: sudo loginctl enable-linger {os.environ.get('USER') or os.getuid()}"
        )
    return path


class Systemd:
    """The service manager of the user whose runtime directory is given."""

    def __init__(self, runtime: Path) -> None:
        self.runtime = runtime
        self.environment = {
            # Without the gateway's own notification socket, on which systemctl would answer too.
            **{name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"},
            "XDG_RUNTIME_DIR": str(runtime),
            "DBUS_SESSION_BUS_ADDRESS": f"unix:path={runtime}/bus",
            "LC_ALL": "C.UTF-8",
        }

    def show(self, units: Iterable[str], *, system: bool = False) -> dict[str, UnitState]:
        """State of each unit, known to systemd or not. Raises LlmboxError when systemd does not answer."""
        names = list(units)
        if not names:
            return {}
        scope = "--system" if system else "--user"
        done = self._run(["systemctl", scope, "show", "--timestamp=unix", f"--property={PROPERTIES}", *names])
        if done.returncode != 0:
            raise LlmboxError(f"systemctl {scope} show failed: {_one_line(done.stderr)}")
        blocks = done.stdout.strip("\n").split("\n\n")
        return {name: parse_show(name, block) for name, block in zip(names, blocks, strict=True)}

    def look(self, units: Iterable[str]) -> dict[str, UnitState]:
        """The same in a moment, but only whether each unit is there and what it does: load, active, sub."""
        names = list(units)
        with Bus(self.runtime) as bus:
            (rows,) = bus.call("ListUnitsByNames", "as", names)
        return {
            name: UnitState(name, load=load, active=active, sub=sub)
            for name, (_, _, load, active, sub, *_) in zip(names, rows, strict=True)
        }

    def process(self, unit: str) -> Process:
        """The main process of a unit; PID 0 when it has none any more."""
        with Bus(self.runtime) as bus:
            try:
                (path,) = bus.call("GetUnit", "s", unit)
            except Refused:
                return Process(0, 0.0)
            pid, started = (
                bus.call("Get", "ss", SERVICE, name, at=(path, PROPERTIES_INTERFACE))[0][1]
                for name in ("MainPID", "ExecMainStartTimestampMonotonic")
            )
        return Process(pid, started / 1e6)

    def reset_failed(self, unit: str) -> None:
        """Clear the unit's start limit: a start that a person wants is never refused for being the sixth."""
        with Bus(self.runtime) as bus, suppress(Refused):  # a unit that is not loaded has nothing to clear
            bus.call("ResetFailedUnit", "s", unit)

    def start(
        self,
        unit: str,
        *,
        timeout_s: float,
        restart: bool = False,
        on_tick: Callable[[], bool] = lambda: False,
    ) -> str:
        """Start (or restart) the unit and wait until it is ready. Returns "", or why it is not.

        `on_tick` says True when it knows already that it is; the job then goes on inside systemd. Raises
        whatever `on_tick` or a signal handler raises; the job goes on then, too.
        """
        return self._job("restart" if restart else "start", unit, timeout_s, on_tick)

    def start_soon(self, unit: str) -> None:
        """Submit the start job without waiting for it: from here on systemd sees it through."""
        with Bus(self.runtime) as bus, suppress(Refused):
            bus.call("StartUnit", "ss", unit, "replace")

    def stop(self, unit: str, *, timeout_s: float) -> str:
        """Stop the unit, and with it a pending automatic restart. Returns "", or why it is not stopped."""
        return self._job("stop", unit, timeout_s)

    def _job(
        self, verb: str, unit: str, timeout_s: float, on_tick: Callable[[], bool] = lambda: False
    ) -> str:
        began = time.monotonic()
        with Bus(self.runtime) as bus:
            try:
                (job,) = bus.call(f"{verb.capitalize()}Unit", "ss", unit, "replace")
            except Refused as refusal:
                return str(refusal)
            while (end := bus.job_end(job, pause(time.monotonic() - began))) is None:
                if time.monotonic() > began + timeout_s:
                    return f"the {verb} of {unit} did not end in {timeout_s:.0f} s"
                if on_tick():
                    return ""
        return "" if end in _DONE else f"the {verb} of {unit} ended as '{end}'"

    def last_lines(self, state: UnitState, count: int) -> list[str]:
        """The last lines that one run of the unit wrote, once the journal has settled."""
        if not state.invocation:
            return []
        command = ["journalctl", "--no-pager", "--quiet", "--output=cat", f"--lines={count * NOISE_FACTOR}"]
        command.append(f"_SYSTEMD_INVOCATION_ID={state.invocation}")
        if state.last_pid:
            # What a process writes just before its end may reach the journal without the name of its unit:
            # journald looks that up by the process. The process ID is always there.
            command += ["+", f"_PID={state.last_pid}", f"--since=@{int(state.last_start_s)}"]
        deadline = time.monotonic() + JOURNAL_SETTLE_S
        lines: list[str] = []
        while True:
            before = lines
            lines = meaningful(self._run(command).stdout.splitlines(), count)
            # Streams are independent: the line of the wait may come before the last one of the server.
            told = any(not line.startswith(WAIT_PREFIX) for line in lines)
            if (told and lines == before) or time.monotonic() > deadline:
                return lines
            time.sleep(TICK_S)

    def suspend(self) -> str:
        """Suspend the machine through the one sudo rule, until it is awake again.

        Returns "", or why it did not sleep. Raises LlmboxError when that does not end: it may sleep yet.
        """
        before, slept = self._suspend_unit().invocation, asleep()
        done = self._run(["sudo", "-n", "/usr/bin/systemctl", "suspend"])
        if done.returncode != 0:
            return _one_line(done.stderr) or f"exit {done.returncode}"
        # Only accepted: inhibitors may delay it, the driver has the card's memory to save, it may fail.
        began = time.monotonic()  # stands still while the machine sleeps
        begun = ran = False
        while True:
            preparing, unit = self._prepares_for_sleep(), self._suspend_unit()
            ran |= unit.occupied
            goes_on = preparing or unit.occupied
            failed = unit.failed and unit.invocation != before
            waited = time.monotonic() - began
            if not goes_on and (begun or failed or asleep() - slept > SLEPT_S or waited > SUSPEND_BEGIN_S):
                break
            if waited > SUSPEND_TIMEOUT_S:
                raise LlmboxError(
                    f"the suspend has not ended in {SUSPEND_TIMEOUT_S:.0f} s, so nothing is started: it may "
                    f"sleep yet; look with: systemctl status {SUSPEND_UNIT}; then: lmswitch resume"
                )
            begun |= goes_on
            time.sleep(SUSPEND_TICK_S)
        if failed:
            return f"{SUSPEND_UNIT}: {unit.ending or 'failed'}; look with: journalctl -b -u {SUSPEND_UNIT}"
        if ran or asleep() - slept > SLEPT_S:
            return ""
        return f"it was accepted, and the machine did not sleep; look with: journalctl -b -u {SUSPEND_UNIT}"

    def _suspend_unit(self) -> UnitState:
        return self.show([SUSPEND_UNIT], system=True)[SUSPEND_UNIT]

    def _prepares_for_sleep(self) -> bool:
        """Whether logind is at it: since it has accepted, until the machine is awake again or it failed."""
        manager = ("org.freedesktop.login1", "/org/freedesktop/login1", "org.freedesktop.login1.Manager")
        said = self._run(["busctl", "--system", "get-property", *manager, "PreparingForSleep"])
        return said.stdout.strip() == "b true"

    def _run(
        self, command: list[str], timeout_s: float = COMMAND_TIMEOUT_S
    ) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_s,
                check=False,
                start_new_session=True,
            )
        except FileNotFoundError:
            raise LlmboxError(f"{command[0]} is not on this machine; lmswitch needs systemd") from None
        except subprocess.TimeoutExpired:
            raise LlmboxError(f"{' '.join(command)} did not return in {timeout_s:.0f} s") from None


def asleep() -> float:
    """Seconds that this machine has slept since it was started."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)


def meaningful(lines: Iterable[str], count: int) -> list[str]:
    """The last lines that say something: without blank ones and our own questions whether it is ready yet."""
    return [
        line.rstrip()
        for line in lines
        if line.strip() and ("/health" not in line or line.startswith(WAIT_PREFIX))
    ][-count:]


def journal_command(unit: str, *, lines: int, follow: bool, as_json: bool, system: bool) -> list[str]:
    """The journalctl command that shows what a unit and systemd said about it."""
    return [
        "journalctl",
        "--no-pager",
        "--quiet",
        f"--output={'json' if as_json else 'short-iso'}",
        f"--lines={lines}",
        *(["--follow"] if follow else []),
        f"--unit={unit}" if system else f"--user-unit={unit}",
    ]


def parse_show(unit: str, block: str) -> UnitState:
    """One unit's block of `systemctl show --timestamp=unix` as a UnitState."""
    values = dict(line.partition("=")[::2] for line in block.splitlines() if "=" in line)
    active = values.get("ActiveState", "inactive")
    stamp = values.get("ActiveEnterTimestamp" if active == "active" else "StateChangeTimestamp", "")
    return UnitState(
        unit=unit,
        active=active,
        sub=values.get("SubState", "dead"),
        load=values.get("LoadState", "loaded"),
        result=values.get("Result", "success"),
        main_pid=int(values.get("MainPID") or 0),
        invocation=values.get("InvocationID", ""),
        since_s=_seconds(stamp),
        ending=_ending(values),
        last_pid=int(values.get("ExecMainPID") or 0),
        last_start_s=_seconds(values.get("ExecMainStartTimestamp", "")),
    )


def _seconds(stamp: str) -> float:
    """`@1763836800` as seconds since the epoch; 0.0 for what never was."""
    return float(stamp[1:]) if stamp.startswith("@") else 0.0


def _ending(values: dict[str, str]) -> str:
    result = values.get("Result", "success")
    if result == "success":
        return ""
    status = values.get("ExecMainStatus", "0")
    if result == "timeout":
        return "it did not become ready, or did not stop, in time"
    if result == "oom-kill":
        return "the kernel killed it for lack of memory"
    signaled = values.get("ExecMainCode") in _SIGNALED
    if result == "exit-code" and status in (_STOPPED if signaled else {"0"}):
        # The server's own end was no failure: the wait for /health failed, and systemd stopped the server.
        return "it did not become ready"
    if signaled:
        return f"it was ended by signal {status}"
    return f"it exited with status {status}"


def _one_line(text: str) -> str:
    """The first line that says something; systemctl adds hints below it."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")
