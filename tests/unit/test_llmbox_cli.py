"""lmswitch as a person types it: exit codes, one line per mistake, --json, against stand-ins for systemd."""

from __future__ import annotations

import getpass
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from llmbox import cli, gate, idle, resume, status
from llmbox.gateway import client
from llmbox.guard import report
from llmbox.lock import held
from llmbox.presets import PresetsFile
from llmbox.systemd import Systemd, UnitState

from tests.unit.fake_manager import FakeManager

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PRESET: dict[str, Any] = {
    "description": "A coder",
    "build": "upstream",
    "model": "tiny",
    "context": 4096,
    "kv_cache_type": "q8_0",
    "agent": False,
    "listen": "127.0.0.1:9",
    "command": [f"/opt/llama.cpp/upstream/releases/{COMMIT}-ab12/bin/llama-server"],
}
SYSTEMCTL = """#!/bin/sh
# systemctl's stand-in: the name of the active unit is in a file.
shift
case $1 in
show)
  shift 3
  for unit; do
    case $unit in -*) continue ;; esac
    state=inactive; [ "$(cat "$HERE/active")" = "$unit" ] && state=active
    printf 'LoadState=loaded\\nActiveState=%s\\nSubState=running\\nResult=success\\nMainPID=0\\n\\n' $state
  done ;;
esac
exit 0
"""


class Box:
    """A folder that plays the box: presets.json, a runtime directory, stand-ins on PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "active").write_text("")
        self.manager = FakeManager(folder, up=(folder / "active").write_text)
        self.manager.results["llama-bad.service"] = "failed"
        (folder / "systemctl").write_text(SYSTEMCTL)
        (folder / "systemctl").chmod(0o755)
        (folder / "sudo").write_text('#!/bin/sh\necho "$*" >> "$HERE/suspended"; exit 1\n')
        (folder / "sudo").chmod(0o755)
        presets = {
            "coder": {**PRESET, "aliases": ["c"], "unit": "llama-coder.service"},
            "bad": {**PRESET, "unit": "llama-bad.service"},
            "vision": {**PRESET, "unit": "llama-vision.service", "scope": "system", "listen": "127.0.0.1:8"},
        }
        self.write({"version": 1, "user": getpass.getuser(), "presets": presets})
        self.environment = {
            **os.environ,
            "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
            "HERE": str(folder),
            "HOME": str(folder),
            "XDG_RUNTIME_DIR": str(folder),
            "LLMBOX_PRESETS": str(folder / "presets.json"),
        }

    def write(self, content: object) -> None:
        """Write presets.json."""
        (self.folder / "presets.json").write_text(json.dumps(content))

    def command(self, *words: str) -> list[str]:
        """lmswitch's command line."""
        return [sys.executable, "-m", "llmbox.cli", *words]

    def lmswitch(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Call lmswitch's entry point in this process: a new one takes half a second to import it all."""
        said, wrong = io.StringIO(), io.StringIO()
        with (
            mock.patch.dict(os.environ, self.environment),
            mock.patch.object(sys, "argv", ["lmswitch", *words]),
            redirect_stdout(said),
            redirect_stderr(wrong),
        ):
            try:
                code = cli.main()
            except SystemExit as ended:
                assert isinstance(ended.code, int)
                code = ended.code
        return subprocess.CompletedProcess(["lmswitch", *words], code, said.getvalue(), wrong.getvalue())

    def kept(self) -> str:
        """What a resume would start."""
        file = self.folder / resume.FILE
        return file.read_text().strip() if file.exists() else ""

    def idle(self) -> None:
        """Nothing is active: a stop of the fake manager's says nothing to systemctl's stand-in."""
        self.manager.active = ""
        (self.folder / "active").write_text("")

    def typed(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run lmswitch as a program."""
        return subprocess.run(
            self.command(*words),
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    """A box with nothing active."""
    made = Box(tmp_path)
    yield made
    made.manager.close()


def test_a_switch_by_alias(box: Box) -> None:
    done = box.typed("c")
    assert (done.returncode, "coder is ready" in done.stdout) == (0, True), done
    assert (box.folder / "active").read_text().strip() == "llama-coder.service"


def test_json_of_a_switch_is_one_object(box: Box) -> None:
    answer = json.loads(box.lmswitch("coder", "--json").stdout)
    assert answer["ok"] is True and answer["serving"] == "coder" and answer["changed"] is True


def test_a_failed_switch_exits_1_with_what_serves(box: Box) -> None:
    box.lmswitch("coder")
    done = box.lmswitch("--json", "bad")
    answer = json.loads(done.stdout)
    assert done.returncode == 1
    why = "the start of llama-bad.service ended as 'failed'"
    assert answer["serving"] == "coder" and answer["reason"] == [why]
    assert why in done.stderr


def test_requests_are_not_held_for_a_switch_that_is_refused_beforehand(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    box.lmswitch("coder")
    holds: list[str | None] = []

    @contextmanager
    def hold(_runtime: Path, preset: str | None, _tell: object) -> Iterator[Callable[..., None]]:
        holds.append(preset)
        yield lambda *_: None

    monkeypatch.setattr(client, "requests_held", hold)
    assert box.lmswitch("coder", "--restart").returncode == 0
    assert holds == ["coder"]
    monkeypatch.setattr(gate, "refusal", lambda _: "it does not know --x")
    done = box.lmswitch("bad")
    assert done.returncode == 1 and "bad is refused: it does not know --x; coder still serves" in done.stderr
    assert box.lmswitch("coder", "--restart").returncode == 1
    assert holds == ["coder"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "required"),
        (["nonsense"], "unknown preset or verb 'nonsense'"),
        (["vision"], "sudo systemctl restart llama-vision.service"),
        (["status", "coder"], "takes no further arguments"),
        (["coder", "-f"], "takes no further arguments"),
        (["logs", "-n", "0"], "between 1 and 100000"),
        (["logs", "nonsense"], "unknown preset"),
        (["off", "--restart"], "--restart goes with a preset"),
        (["resume", "--restart"], "--restart goes with a preset"),
        (["coder", "--keep"], "--keep goes with off"),
    ],
)
def test_bad_usage_exits_2_without_a_traceback(box: Box, words: list[str], said: str) -> None:
    done = box.lmswitch(*words)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_resume_starts_what_was_stopped_and_has_it_generate(box: Box) -> None:
    done = box.lmswitch("resume")
    assert done.returncode == 0 and "no preset served" in done.stdout
    box.lmswitch("coder")
    assert box.lmswitch("off", "--keep").returncode == 0
    box.idle()
    with mock.patch("llmbox.server.LlamaServer.canary", return_value=""):
        done = box.lmswitch("resume")
    assert done.returncode == 0 and "coder is ready" in done.stdout and "and generates" in done.stdout
    assert "no preset served" in box.lmswitch("resume").stdout, "it was resumed already"


def test_off_has_the_next_request_start_nothing_but_a_sleep_does_not(box: Box) -> None:
    idle.remember(box.folder, "coder")
    box.lmswitch("sleep")
    assert idle.recall(box.folder) == "coder"
    assert box.lmswitch("off").returncode == 0
    assert idle.recall(box.folder) is None


def test_a_card_that_generates_nothing_is_a_failed_resume(box: Box) -> None:
    box.lmswitch("coder")
    box.lmswitch("off", "--keep")
    done = box.lmswitch("resume", "--json")  # nothing listens where the preset should
    answer = json.loads(done.stdout)
    assert done.returncode == 1 and not answer["ok"] and answer["serving"] == "coder"
    assert "generates nothing: ConnectError" in answer["message"]


def test_a_dead_card_fails_every_resume_not_the_first_alone(box: Box) -> None:
    box.lmswitch("coder")
    box.lmswitch("off", "--keep")
    for _ in range(2):
        done = box.lmswitch("resume")  # nothing listens where the preset should
        assert done.returncode == 1 and "generates nothing" in done.stderr
    with mock.patch("llmbox.server.LlamaServer.canary", return_value=""):
        assert box.lmswitch("resume").returncode == 0
    assert box.kept() == ""


@pytest.mark.parametrize("words", [["coder"], ["off"]])
def test_what_is_done_by_hand_is_not_undone_by_a_resume(box: Box, words: list[str]) -> None:
    box.lmswitch("coder")
    box.lmswitch("off", "--keep")
    assert box.kept() == "coder"
    assert box.lmswitch("bad").returncode == 1
    assert box.kept() == "coder", "a switch that failed has changed nothing"
    assert box.lmswitch(*words).returncode == 0
    assert box.kept() == ""
    box.lmswitch("off")
    assert "no preset served" in box.lmswitch("resume").stdout


def test_keeping_twice_keeps_what_served(box: Box) -> None:
    box.lmswitch("coder")
    box.lmswitch("off", "--keep")
    box.idle()
    assert box.lmswitch("off", "--keep").returncode == 0
    assert box.kept() == "coder"


def test_requests_are_held_until_the_suspend_is_over(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    box.lmswitch("coder")
    told: list[str] = []

    @contextmanager
    def hold(_runtime: Path, _preset: str | None, _tell: object) -> Iterator[Callable[..., None]]:
        told.append("held")
        yield lambda *_: None
        told.append("let go")

    def asleep(_systemd: Systemd) -> str:
        told.append("asleep")
        return ""

    monkeypatch.setattr(client, "requests_held", hold)
    monkeypatch.setattr(Systemd, "suspend", asleep)
    done = box.lmswitch("sleep")
    assert done.returncode == 0 and "the machine slept, and is awake again" in done.stdout
    assert told == ["held", "asleep", "let go"] and box.kept() == "coder"


def test_a_sleep_that_failed_brings_back_what_served(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    box.lmswitch("coder")
    monkeypatch.setattr(Systemd, "suspend", lambda _: "systemd-suspend.service: it exited with status 1")
    done = box.lmswitch("sleep", "--json")
    answer = json.loads(done.stdout)
    assert (
        done.returncode == 1 and answer["serving"] == "coder" and "exited with status 1" in answer["message"]
    )
    assert (box.folder / "active").read_text() == "llama-coder.service" and box.kept() == ""


@pytest.mark.parametrize("words", [["sleep"], ["off", "--keep"]])
def test_what_cannot_be_kept_is_not_stopped(box: Box, words: list[str]) -> None:
    box.lmswitch("coder")
    (box.folder / ".local").write_text("no folder")  # root too cannot write below a file
    done = box.lmswitch(*words, "--json")
    assert (
        done.returncode == 1 and "cannot be written (Not a directory)" in json.loads(done.stdout)["message"]
    )
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert (box.folder / "active").read_text() == "llama-coder.service"
    assert not [call for call in box.manager.calls if call[0] == "StopUnit"]
    assert not (box.folder / "suspended").exists()


def test_a_preset_that_left_the_inventory_is_not_resumed(box: Box) -> None:
    box.lmswitch("coder")
    box.lmswitch("off", "--keep")
    box.write({"version": 1, "user": getpass.getuser(), "presets": {}})
    done = box.lmswitch("resume")
    assert done.returncode == 1 and "coder, which served, is no preset any more" in done.stderr
    assert box.lmswitch("resume").returncode == 0


def test_the_wrong_user_is_told_the_command(box: Box) -> None:
    box.write({"version": 1, "user": "nobody", "presets": {}})
    done = box.lmswitch("status")
    assert done.returncode == 2 and "sudo -u nobody lmswitch status" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_missing_presets_file_is_one_line_and_json(box: Box) -> None:
    (box.folder / "presets.json").unlink()
    done = box.lmswitch("status", "--json")
    assert done.returncode == 2 and json.loads(done.stdout)["ok"] is False
    assert len(done.stderr.splitlines()) == 1 and "run the playbook" in done.stderr


def test_a_held_lock_exits_3_and_names_its_holder(box: Box) -> None:
    with held(box.folder, "coder"):
        done = box.lmswitch("off")
    assert done.returncode == 3 and f"lmswitch coder, pid {os.getpid()}" in done.stderr
    assert box.lmswitch("off").returncode == 0


def test_looking_needs_no_lock(box: Box) -> None:
    with held(box.folder, "coder"):
        assert box.lmswitch("status").returncode == 0
        assert box.lmswitch("list").returncode == 0


def test_ctrl_c_goes_back_and_exits_1(box: Box) -> None:
    box.lmswitch("coder")
    box.manager.slow["llama-bad.service"] = 1
    with subprocess.Popen(
        box.command("bad"), env=box.environment, stderr=subprocess.PIPE, text=True
    ) as switching:
        assert switching.stderr is not None
        assert "bad" in switching.stderr.readline()  # it says something: the switch is under way
        switching.send_signal(signal.SIGINT)
        _, said = switching.communicate(timeout=20)
    assert switching.returncode == 1
    assert "interrupted: the switch to bad is given up, going back to coder" in said
    assert (box.folder / "active").read_text().strip() == "llama-coder.service"


def test_status_json_has_exactly_the_promised_keys(box: Box) -> None:
    keys = {"active", "state", "since", "build", "commit", "in_flight", "queued"}
    stopped = json.loads(box.lmswitch("status", "--json").stdout)
    assert set(stopped) == keys and stopped["active"] is None and stopped["state"] == "stopped"
    box.lmswitch("coder")
    up = json.loads(box.lmswitch("--json", "status").stdout)
    assert set(up) == keys
    assert (up["active"], up["state"], up["build"], up["commit"]) == ("coder", "failed", "upstream", COMMIT)


def test_list_shows_every_preset(box: Box) -> None:
    rows = json.loads(box.lmswitch("list", "--json").stdout)["presets"]
    assert {row["name"]: row["aliases"] for row in rows} == {"coder": ["c"], "bad": [], "vision": []}
    assert {"context", "build", "model", "state"} <= set(rows[0])
    assert box.lmswitch("list").stdout.count("\n") == 4


def test_a_reader_that_has_enough_is_no_traceback(box: Box) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        done = subprocess.run(
            box.command("list"), env=box.environment, stdout=closed, stderr=subprocess.PIPE, timeout=30
        )
    assert (done.returncode, done.stderr) == (1, b"")


def test_logs_of_nothing_says_what_to_type(box: Box) -> None:
    done = box.lmswitch("logs")
    assert done.returncode == 1 and "lmswitch logs PRESET" in done.stderr


def test_logs_as_json(box: Box) -> None:
    entry = '{"MESSAGE": "hello", "__REALTIME_TIMESTAMP": "1700000000000000"}'
    (box.folder / "journalctl").write_text(f"#!/bin/sh\necho '{entry}'\n")
    (box.folder / "journalctl").chmod(0o755)
    done = box.lmswitch("logs", "coder", "--json")
    assert json.loads(done.stdout)["lines"] == [{"time": "2023-11-14T22:13:20Z", "message": "hello"}]


def test_help_and_bad_usage_do_not_import_the_heavy_libraries() -> None:
    code = (
        "import sys\nfrom llmbox import cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'httpx', 'pydantic', 'llama_common'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("active", "sub", "health", "state"),
    [
        ("inactive", "dead", "silent", "stopped"),
        ("activating", "start-post", "silent", "loading"),
        ("active", "running", "ok", "ready"),
        ("active", "running", "loading", "loading"),
        ("active", "running", "silent", "failed"),
        ("deactivating", "stop-sigterm", "ok", "draining"),
        ("failed", "failed", "silent", "failed"),
        ("activating", "auto-restart", "silent", "failed"),
    ],
)
def test_states_in_one_word(active: str, sub: str, health: str, state: str) -> None:
    assert status.preset_state(UnitState("x", active=active, sub=sub), health) == state


def test_the_running_release_is_told_not_the_installed_one() -> None:
    other = "f" * 40
    running = f"/opt/x/releases/{other}-1/bin/llama-server"
    assert status.release_name(running, PRESET["command"][0]) == f"{other}-1"
    assert status.release_name("", PRESET["command"][0]).partition("-")[0] == COMMIT
    assert status.release_name("", "/usr/bin/llama-server") == ""


def test_the_screen_fits_and_tells_a_shrunk_context() -> None:
    presets = PresetsFile.model_validate(
        {"version": 1, "user": "llm", "presets": {"coder": {**PRESET, "unit": "llama-coder.service"}}}
    )
    up = UnitState("llama-coder.service", active="active", sub="running", since_s=1_700_000_000)
    seen = status.collect(
        presets, {up.unit: up}, lambda _listen: status.Probe("ok", 2048, 3), lambda _pid: ""
    )
    text = status.screen(seen, datetime.fromtimestamp(1_700_003_700, UTC))
    assert "ready since 2023-11-14T22:13:20Z (1 h 1 min)" in text
    assert "2048 tokens (the preset asks for 4096)" in text and "3 requests" in text
    assert len(text.splitlines()) <= 12


def test_the_status_says_what_the_guard_says_where_there_is_one() -> None:
    presets = PresetsFile.model_validate({"version": 1, "user": "llm", "presets": {}})
    guard = report.Report(running=True, level="ok", temperature=61)
    seen = status.collect(presets, {}, lambda _listen: status.Probe(), lambda _pid: "", None, guard)
    assert seen.as_json()["gpu_guard"] == guard.as_json()
    assert "  card      61 °C, ok" in status.screen(seen, datetime.now(UTC)).splitlines()


CHOICE = {"verdict": "rejected", "reason": "0.64 times", "draft": "small", "measured": "2026-11-28T00:00Z"}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"draft": "none"}, ""),
        ({"draft": "small", "draft_type": "draft-simple"}, "small (draft-simple), not measured: the inv"),
        ({"draft": "auto"}, "none: auto has not been measured; run scripts/choose_draft.py"),
        (
            {"draft": "auto", "draft_choice": {**CHOICE, "release": "r"}},
            "small, rejected 2026-11-28T00:00Z: 0.6",
        ),
        ({"draft": "auto", "draft_choice": {**CHOICE, "release": "q"}}, "another release: measure again"),
        ({"draft": "auto", "draft_choice": {**CHOICE, "draft": None}}, "its own head, rejected"),
    ],
)
def test_the_screen_and_the_json_tell_of_a_draft(keys: dict[str, Any], said: str) -> None:
    release = f"{COMMIT}-r"
    choice = keys.get("draft_choice")
    if choice and choice.get("release") == "r":
        keys = {**keys, "draft_choice": {**choice, "release": release}}
    preset = {**PRESET, **keys, "unit": "llama-coder.service"}
    presets = PresetsFile.model_validate({"version": 1, "user": "llm", "presets": {"coder": preset}})
    up = UnitState("llama-coder.service", active="active", sub="running", main_pid=7)
    program = f"/opt/x/releases/{release}/bin/llama-server"
    seen = status.collect(presets, {up.unit: up}, lambda _: status.Probe("ok", 4096), lambda _: program)
    text = status.screen(seen, datetime.now(UTC))
    if not said:
        assert "draft" not in text and "draft" not in seen.as_json()
        return
    assert said in next(line for line in text.splitlines() if line.startswith("  draft"))
    told = seen.as_json()["draft"]
    assert isinstance(told, dict) and told["setting"] == keys["draft"]
    assert told["choice"] == keys.get("draft_choice")
    assert told["fresh"] == (None if not choice else choice.get("release") == "r")


@pytest.mark.parametrize("state", ["active", "activating", "inactive"])
def test_the_screen_and_the_json_say_that_a_preset_is_on_trial(state: str) -> None:
    presets = PresetsFile.model_validate(
        {"version": 1, "user": "llm", "presets": {"coder": {**PRESET, "unit": "llama-coder.service"}}}
    )
    trial = UnitState("llmbox-trial.service", active=state, sub="running")
    for unit in (UnitState("llama-coder.service"), UnitState("llama-coder.service", active="active")):
        states = {unit.unit: unit, trial.unit: trial}
        seen = status.collect(presets, states, lambda _listen: status.Probe("ok"), lambda _pid: "")
        text = status.screen(seen, datetime.now(UTC))
        assert ("to end it: systemctl --user stop llmbox-trial.service" in text) is (state != "inactive")
        assert seen.as_json().get("on_trial", False) is (state != "inactive")


def test_the_screen_names_the_foreign_unit_that_has_the_card() -> None:
    presets = PresetsFile.model_validate(
        {
            "version": 1,
            "user": "llm",
            "foreign_units": ["lmstudio.service"],
            "presets": {"coder": {**PRESET, "unit": "llama-coder.service"}},
        }
    )
    down = UnitState("llama-coder.service")
    for state, said in (
        ("active", "systemctl --user stop lmstudio.service"),
        ("inactive", "the card is free"),
    ):
        foreign = UnitState("lmstudio.service", active=state, sub="running")
        states = {down.unit: down, foreign.unit: foreign}
        seen = status.collect(presets, states, lambda _listen: status.Probe(), lambda _pid: "")
        assert said in status.screen(seen, datetime.now(UTC))


def test_the_screen_shows_the_gateway_s_queue_and_its_last_switch() -> None:
    presets = PresetsFile.model_validate(
        {"version": 1, "user": "llm", "presets": {"coder": {**PRESET, "unit": "llama-coder.service"}}}
    )
    up = UnitState("llama-coder.service", active="active", sub="running")
    figures = {
        "queued": 7,
        "in_flight": 1,
        "last_switch": {"from": "tiny", "to": "coder", "ok": True, "parts": {"drain": 0.5, "load": 2.0}},
    }
    seen = status.collect(
        presets, {up.unit: up}, lambda _listen: status.Probe("ok", 4096, 3), lambda _pid: "", figures
    )
    assert (seen.as_json()["queued"], seen.as_json()["in_flight"]) == (7, 1)
    text = status.screen(seen, datetime.now(UTC))
    assert "1 requests, 7 queued" in text and "tiny to coder: drain 0.50 s, load 2.00 s" in text


@pytest.mark.parametrize("words", [[], ["--bogus"], ["--version"], ["off", "more"], ["logs", "-n", "x"]])
def test_what_cannot_be_meant_is_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for extra in ([], ["--json"]):
        with pytest.raises(SystemExit) as ended:
            cli.parse([*words, *extra])
        assert ended.value.code == 2
        said = capsys.readouterr()
        assert said.err.count("\n") == 1 and said.err.startswith("lmswitch: ")
        assert bool(said.out) == bool(extra) and (not extra or json.loads(said.out)["ok"] is False)
