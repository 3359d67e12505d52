"""systemd's words turned into states; stand-ins answer for its socket, and on PATH for its programs."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from jeepney import new_signal  # type: ignore[import-untyped]
from llmbox import bus, systemd
from llmbox.errors import LlmboxError, UsageError
from llmbox.systemd import (
    WAIT_PREFIX,
    Process,
    Systemd,
    UnitState,
    journal_command,
    meaningful,
    parse_show,
    runtime_dir,
)

from tests.unit.fake_manager import JOB, MANAGER, FakeManager

FAILED = """Id=llama-coder.service
LoadState=loaded
ActiveState=activating
SubState=auto-restart
Result=exit-code
MainPID=0
InvocationID=0123456789abcdef0123456789abcdef
ActiveEnterTimestamp=
StateChangeTimestamp=@1700000000
ExecMainCode=1
ExecMainStatus=3"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder at the front of PATH; programs written there answer instead of systemd's."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[FakeManager]:
    """A service manager on the socket of a runtime directory."""
    fake = FakeManager(tmp_path)
    yield fake
    fake.close()


def program(folder: Path, name: str, body: str) -> None:
    """Write a shell script."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def test_a_failed_unit_that_will_be_restarted_counts_as_failed() -> None:
    state = parse_show("llama-coder.service", FAILED)
    assert state.failed and not state.occupied
    assert state.ending == "it exited with status 3" and state.since_s == 1_700_000_000


def test_the_time_of_an_active_unit_is_when_it_became_active() -> None:
    block = FAILED.replace("=activating", "=active").replace("EnterTimestamp=", "EnterTimestamp=@1600000000")
    state = parse_show("x", block.replace("auto-restart", "running"))
    assert state.occupied and state.since_s == 1_600_000_000


@pytest.mark.parametrize(
    ("result", "code", "said"),
    [
        ("success", "1", ""),
        ("timeout", "1", "in time"),
        ("oom-kill", "2", "memory"),
        ("signal", "2", "signal 3"),
        ("exit-code", "2", "signal 3"),
    ],
)
def test_the_ending_is_told_in_words(result: str, code: str, said: str) -> None:
    ending = parse_show(
        "x", FAILED.replace("exit-code", result).replace("MainCode=1", f"MainCode={code}")
    ).ending
    assert said in ending and bool(said) == bool(ending)


@pytest.mark.parametrize(("code", "status"), [("1", "0"), ("2", "1"), ("2", "15"), ("2", "9")])
def test_a_server_that_was_stopped_for_not_being_ready_is_no_failure_of_its_own(
    code: str, status: str
) -> None:
    block = FAILED.replace("MainCode=1", f"MainCode={code}").replace("MainStatus=3", f"MainStatus={status}")
    assert parse_show("x", block).ending == "it did not become ready"


def test_the_start_limit_of_the_unit_is_cleared(manager: FakeManager, tmp_path: Path) -> None:
    Systemd(tmp_path).reset_failed("llama-coder.service")
    assert manager.calls == [("ResetFailedUnit", "llama-coder.service")]
    manager.refuses["gone.service"] = "Unit gone.service not loaded."
    Systemd(tmp_path).reset_failed("gone.service")


def test_a_look_tells_what_each_unit_does(manager: FakeManager, tmp_path: Path) -> None:
    manager.active, manager.missing = "b.service", {"c.service"}
    states = Systemd(tmp_path).look(["a.service", "b.service", "c.service"])
    assert {unit: (state.load, state.active) for unit, state in states.items()} == {
        "a.service": ("loaded", "inactive"),
        "b.service": ("loaded", "active"),
        "c.service": ("not-found", "inactive"),
    }


def test_begin_comes_before_systemd_answers(manager: FakeManager, tmp_path: Path) -> None:
    """Otherwise it may come in one read with the first call, and systemd 252 never looks at that one."""
    Systemd(tmp_path).look([])
    assert manager.greeting.startswith(b"\0AUTH EXTERNAL ") and manager.greeting.endswith(b"\r\nBEGIN\r\n")


def test_what_goes_on_meanwhile_may_come_with_the_greeting(manager: FakeManager, tmp_path: Path) -> None:
    body = (999, f"{JOB}999", "other.service", "done")
    manager.news = new_signal(MANAGER, "JobRemoved", "uoss", body).serialise(serial=3)
    manager.active = "a.service"
    assert Systemd(tmp_path).look(["a.service"])["a.service"].active == "active"


def test_the_process_of_a_unit_and_when_it_began(manager: FakeManager, tmp_path: Path) -> None:
    assert Systemd(tmp_path).process("a.service") == Process(4711, 5.25)
    manager.refuses["gone.service"] = "Unit gone.service not loaded."
    assert Systemd(tmp_path).process("gone.service").pid == 0


def test_show_reads_every_unit_in_order(stand_in: Path) -> None:
    program(
        stand_in, "systemctl", f"cat <<'END'\n{FAILED}\n\nId=b\nActiveState=active\nSubState=running\nEND"
    )
    states = Systemd(stand_in).show(["llama-coder.service", "b"])
    assert states["llama-coder.service"].failed and states["b"].occupied


def test_show_says_why_systemd_does_not_answer(stand_in: Path) -> None:
    program(stand_in, "systemctl", "echo 'Failed to connect to bus' >&2; exit 1")
    with pytest.raises(LlmboxError, match="Failed to connect to bus"):
        Systemd(stand_in).show(["a"])


def test_start_waits_for_its_own_job_and_ticks(manager: FakeManager, tmp_path: Path) -> None:
    manager.slow["a"] = 0.35
    ticks: list[float] = []

    def tick() -> bool:
        ticks.append(time.monotonic())
        return False

    systemd = Systemd(tmp_path)
    assert systemd.start("a", timeout_s=10, on_tick=tick) == ""
    assert len(ticks) >= 2 and manager.active == "a"
    assert systemd.start("a", timeout_s=10, restart=True) == "" and systemd.stop("a", timeout_s=10) == ""
    assert [call[0] for call in manager.calls] == ["StartUnit", "RestartUnit", "StopUnit"]
    assert manager.active == ""


@pytest.mark.parametrize("result", ["failed", "timeout", "canceled", "dependency"])
def test_a_job_that_is_not_done_is_told(manager: FakeManager, tmp_path: Path, result: str) -> None:
    manager.results["a"] = result
    assert Systemd(tmp_path).start("a", timeout_s=10) == f"the start of a ended as '{result}'"


def test_a_start_that_a_condition_skips_is_no_failure(manager: FakeManager, tmp_path: Path) -> None:
    manager.results["a"] = "skipped"
    assert Systemd(tmp_path).start("a", timeout_s=10) == ""


def test_a_refusal_is_in_systemd_s_own_words(manager: FakeManager, tmp_path: Path) -> None:
    manager.refuses["a"] = "Unit a is masked."
    assert Systemd(tmp_path).start("a", timeout_s=10) == "Unit a is masked."
    Systemd(tmp_path).start_soon("a")


def test_start_has_a_deadline(manager: FakeManager, tmp_path: Path) -> None:
    manager.slow["a"] = 60.0
    began = time.monotonic()
    assert "did not end in" in Systemd(tmp_path).start("a", timeout_s=0.2)
    assert time.monotonic() - began < 30


def test_an_interrupted_start_goes_on_inside_systemd(manager: FakeManager, tmp_path: Path) -> None:
    manager.slow["a"] = 0.3

    def interrupt() -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Systemd(tmp_path).start("a", timeout_s=30, on_tick=interrupt)
    assert manager.calls == [("StartUnit", "a", "replace")]


def test_who_knows_that_it_is_ready_need_not_wait_for_the_job(manager: FakeManager, tmp_path: Path) -> None:
    manager.slow["a"] = 0.5
    asked = iter([False, True])
    assert Systemd(tmp_path).start("a", timeout_s=30, on_tick=lambda: next(asked)) == ""
    assert manager.active == "" and next(asked, None) is None


def test_a_manager_that_is_gone_or_hangs_is_one_line(
    manager: FakeManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager.hangs = True
    monkeypatch.setattr(bus, "CALL_TIMEOUT_S", 0.2)
    with pytest.raises(LlmboxError, match="does not answer: not in"):
        Systemd(tmp_path).look(["a"])
    manager.close()
    with pytest.raises(LlmboxError, match=r"does not answer: .*refused"):
        Systemd(tmp_path).look(["a"])


def test_last_lines_leave_out_health_requests(stand_in: Path) -> None:
    program(
        stand_in, "journalctl", "printf 'srv: done request: GET /health 127.0.0.1 503\\nerror: no model\\n'"
    )
    state = UnitState("a", invocation="f" * 32)
    assert Systemd(stand_in).last_lines(state, 5) == ["error: no model"]
    assert Systemd(stand_in).last_lines(UnitState("a"), 5) == []


def test_last_lines_are_asked_for_by_process_too(stand_in: Path) -> None:
    program(stand_in, "journalctl", 'echo "$@"')
    state = UnitState("a", invocation="f" * 32, last_pid=77, last_start_s=1_700_000_000.5)
    [asked] = Systemd(stand_in).last_lines(state, 5)
    assert asked.endswith(f"_SYSTEMD_INVOCATION_ID={'f' * 32} + _PID=77 --since=@1700000000")


def test_meaningful_lines_keep_the_last() -> None:
    assert meaningful(["a", "", "b", "GET /health", "c "], 2) == ["b", "c"]


def test_what_the_wait_for_health_says_is_no_health_request() -> None:
    said = f"{WAIT_PREFIX} not ready after 20 s: no answer from /health at 127.0.0.1:1234"
    assert meaningful(["GET /health", said], 5) == [said]


def test_journal_of_user_and_system_units() -> None:
    user = journal_command("a.service", lines=5, follow=True, as_json=False, system=False)
    assert "--user-unit=a.service" in user and "--follow" in user and "--lines=5" in user
    assert "--unit=a.service" in journal_command(
        "a.service", lines=5, follow=False, as_json=True, system=True
    )


def test_without_a_service_manager_the_fix_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(UsageError, match="sudo loginctl enable-linger"):
        runtime_dir()
    (tmp_path / "systemd").mkdir()
    (tmp_path / "systemd/private").touch()
    assert runtime_dir() == tmp_path


SUSPEND = {
    # logind's word, the unit's states, and the seconds that the machine has slept by then.
    "sleeps": """say true; sleep 0.3; unit activating start; sleep 0.3
        echo 8 > slept; unit inactive dead; say false""",
    "sleeps for a moment": """say true; unit activating start; sleep 1.5; unit inactive dead; say false""",
    "sleeps at once": "echo 8 > slept",
    "fails late": """
        say true; sleep 0.3; unit activating start; sleep 0.3; unit failed failed exit-code 1; say false""",
    "fails at once": "unit failed failed exit-code 1",
    "is given up": "say true; sleep 0.3; say false",
    "does not begin": "",
    "hangs": "say true; sleep 0.3; unit activating start",
}


@pytest.mark.parametrize(
    ("way", "said"),
    [
        ("sleeps", ""),
        ("sleeps for a moment", ""),
        ("sleeps at once", ""),
        ("fails late", "systemd-suspend.service: it exited with status 1; look with: journalctl"),
        ("fails at once", "systemd-suspend.service: it exited with status 1; look with: journalctl"),
        ("is given up", "it was accepted, and the machine did not sleep"),
        ("does not begin", "it was accepted, and the machine did not sleep"),
        ("hangs", "has not ended in 4 s, so nothing is started: it may sleep"),
    ],
)
def test_a_suspend_is_over_when_the_machine_is_awake_again(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch, way: str, said: str
) -> None:
    here = f"cd {stand_in}"
    (stand_in / "slept").write_text("3")
    # The run before has failed, too, and is not to be mistaken for this one.
    (stand_in / "unit").write_text("ActiveState=failed\nResult=exit-code\nExecMainStatus=2\nInvocationID=1\n")
    helpers = """
        say() { echo "b $1" > said.new; mv said.new said; }
        unit() {
            printf 'ActiveState=%s\\nSubState=%s\\nResult=%s\\n' "$1" "$2" "${3:-success}" > unit.new
            printf 'ExecMainStatus=%s\\nExecMainCode=1\\nInvocationID=2\\n' "${4:-0}" >> unit.new
            mv unit.new unit
        }"""
    program(stand_in, "goes", f"{here}; {helpers}\n{SUSPEND[way]}\ntouch over")
    # logind says that it is at it before its caller returns.
    program(stand_in, "sudo", f'{here}; echo "$*" > asked; ./goes >/dev/null 2>&1 & sleep 0.5')
    program(stand_in, "busctl", f"{here}; cat said 2>/dev/null")
    program(stand_in, "systemctl", f"{here}; cat unit")
    monkeypatch.setattr(systemd, "asleep", lambda: float((stand_in / "slept").read_text() or 3))
    for name, seconds in (("TIMEOUT", 4.0), ("BEGIN", 1.0), ("TICK", 0.05)):
        monkeypatch.setattr(systemd, f"SUSPEND_{name}_S", seconds)
    if way == "hangs":
        with pytest.raises(LlmboxError, match=said):
            Systemd(stand_in).suspend()
    else:
        told = Systemd(stand_in).suspend()
        assert told.startswith(said) and bool(told) == bool(said)
    assert (stand_in / "over").exists()
    assert (stand_in / "asked").read_text() == "-n /usr/bin/systemctl suspend\n"
