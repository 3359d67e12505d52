"""The gate's runner: counting, dependencies between stages, and what an interruption leaves."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests import run
from tests.run import Outcome, Report, Result, Stage, failed, passed, skipped
from tests.support import parse_recap

JUNIT = """<testsuites><testsuite tests="5">
<testcase classname="tests.unit.test_a" name="test_one"/>
<testcase classname="tests.unit.test_a" name="test_two"><failure message="assert 1 == 2&#10;more"/></testcase>
<testcase classname="tests.unit.test_a" name="test_two"><error message="teardown"/></testcase>
<testcase classname="tests.unit.test_a" name="test_three"><skipped message="no GPU"/></testcase>
<testcase classname="" name="tests.unit.test_b"><error message="collection failure"/></testcase>
</testsuite></testsuites>"""


def stage(name: str, outcome: Outcome, *needs: str, log: list[str] | None = None) -> Stage:
    def body() -> Outcome:
        if log is not None:
            log.append(name)
        return outcome

    return Stage(name, body, needs)


def test_junit_is_counted_once_per_case_with_its_reason(tmp_path: Path) -> None:
    path = tmp_path / "a.xml"
    path.write_text(JUNIT)
    outcome = run.read_junit(path, "unit")
    assert str(outcome.tally) == "1 passed, 2 failed, 1 skipped"
    assert "FAILED  unit: test_a::test_two: teardown" in outcome.notes
    assert "SKIPPED unit: test_a::test_three: no GPU" in outcome.notes


def test_the_gpu_lane_is_skipped_with_its_reason_where_there_is_no_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run.main(["gpu"]) == 0
    said = capsys.readouterr().out
    assert "SKIPPED gpu: no NVIDIA GPU: nvidia-smi is not installed" in said
    assert said.endswith("0 passed, 0 failed, 1 skipped\n")
    card = tmp_path / "nvidia-smi"
    card.write_text("#!/bin/sh\nexit 9\n")
    card.chmod(0o755)
    assert run.needs_gpu() == "no NVIDIA GPU: nvidia-smi ends with exit code 9"


def test_the_gpu_lane_builds_first_and_needs_its_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "needs_gpu", lambda: None)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    assert [stage.name for stage in run.gpu_stages()] == [
        "gpu build", "gpu layers", "gpu cache", "gpu draft", "gpu tuner",
    ]  # fmt: skip
    assert run.main(["gpu"]) == 1
    said = capsys.readouterr().out
    assert "gpu build: build/gpu-inputs is missing; fix: make test-gpu-inputs" in said
    assert said.endswith("0 passed, 1 failed, 4 skipped\n")


def test_a_failed_stage_stops_only_those_that_need_it() -> None:
    log: list[str] = []
    report = Report()
    run.run_stages(
        [
            stage("lint", failed("lint"), log=log),
            stage("unit", passed(), log=log),
            stage("up", failed("up"), log=log),
            stage("site", passed(), "up", log=log),
            stage("tests", passed(), "site", log=log),
        ],
        report,
    )
    assert log == ["lint", "unit", "up"]
    assert str(report.tally) == "1 passed, 2 failed, 2 skipped"
    assert report.exit_code == 1


def test_what_cannot_run_is_skipped_and_no_ground_for_others() -> None:
    report = Report()
    run.run_stages(
        [stage("unit", passed()), stage("up", skipped("no root")), stage("site", passed(), "up")], report
    )
    assert str(report.tally) == "1 passed, 0 failed, 2 skipped"
    assert report.exit_code == 0


def test_nothing_run_is_a_failure() -> None:
    report = Report()
    run.run_stages([stage("up", skipped("no root"))], report)
    assert report.exit_code == 1


def test_an_interruption_still_removes_the_lab() -> None:
    def interrupted() -> Outcome:
        raise KeyboardInterrupt

    log: list[str] = []
    report = Report()
    stages = [
        Stage("site", interrupted),
        stage("tests", passed(), log=log),
        stage("lab down", passed(), log=log),
    ]
    with pytest.raises(KeyboardInterrupt):
        run.run_stages(stages, report)
    assert log == ["lab down"]
    assert report.exit_code == 1


def test_the_last_line_is_the_count(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report()
    run.run_stages([stage("unit", passed() + skipped("x"))], report)
    report.show()
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"\d+ passed, \d+ failed, \d+ skipped", last)
    assert last == "1 passed, 0 failed, 1 skipped"


def test_a_program_that_hangs_is_a_failure_that_names_the_limit() -> None:
    outcome = run.command_stage("sleeper", ["sleep", "30"], timeout=0.2)
    assert outcome.notes == ("FAILED  sleeper: not done after 0:00 min",)


def test_pytest_that_finds_nothing_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    assert run.pytest("empty", str(tmp_path), timeout=60).tally.failed == 1


def test_files_of_one_name_are_collected_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    for folder in ("unit", "lab"):  # the tests differ: a case is counted by file and name
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "test_same.py").write_text(f"def test_{folder}():\n    pass\n")
    config = f"--config-file={run.ROOT / 'pyproject.toml'}"
    outcome = run.pytest("one name", config, str(tmp_path / "unit"), str(tmp_path / "lab"), timeout=60)
    assert str(outcome.tally) == "2 passed, 0 failed, 0 skipped"


def result(case: str, commit: str = "abc", failed_checks: int = 0) -> Result:
    return Result(case, commit, "2026-01-01 00:00 UTC", 1.0, 1 - failed_checks, failed_checks, 0, ("note",))


def test_a_long_run_goes_on_where_it_stopped() -> None:
    known = {"a": result("a"), "b": result("b", failed_checks=1), "c": result("c", commit="old")}
    cases = ["a", "b", "c", "d"]
    assert run.to_run(cases, None, "abc", known.get) == ["b", "c", "d"]
    assert run.to_run(cases, "a", "abc", known.get) == cases
    assert run.to_run(cases, "c", "abc", known.get) == ["c", "d"]
    assert run.to_run(cases, None, "abc+changes", known.get) == cases
    with pytest.raises(ValueError, match="no such case; the cases are: a, b, c, d"):
        run.to_run(cases, "x", "abc", known.get)


def test_results_and_summary_survive_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(run, "ROOT", tmp_path)
    case = "tests/lab/test_x.py::test_y[1|2]"
    run.store(result(case))
    assert run.stored(case) == result(case)
    run.result_path("broken").write_text("{")
    assert run.stored("broken") is None
    page = tmp_path / "docs" / "1.md"
    run.write_summary(page, "1", [case, "other"], "abc")
    text = page.read_text()
    assert "Commit abc" in text
    assert "passed (1/0/0) | 1 | abc | 2026-01-01 00:00 UTC |" in text
    assert "`other`" not in text and "Not run on this machine: 1 of 2 cases." in text


@pytest.mark.parametrize("suite", [None, "trixie"])
def test_the_lab_stages_run_make_lab_itself_on_hosts_seen_bare(
    suite: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[str] = []

    def execute(argv: Sequence[str], *, timeout: float, env: dict[str, str] | None = None) -> int:
        assert env is not None and env["LAB_NAME"] == "x" and env.get("LAB_SUITE") == suite
        commands.append(" ".join(Path(word).name if word.startswith("/") else word for word in argv[1:]))
        return 0

    def tests(label: str, *_args: str, **_more: object) -> Outcome:
        commands.append(label)
        return passed()

    monkeypatch.delenv("LAB_SUITE", raising=False)
    monkeypatch.setattr(run, "needs_root", lambda: None)
    monkeypatch.setattr(run, "execute", execute)
    monkeypatch.setattr(run, "pytest", tests)
    report = Report()
    run.run_stages(run.lab_stages("x", suite=suite), report)
    assert commands == [
        "-m lab down",
        "-m lab up",
        "-i inventory/lab site.yml --check --diff",
        "scripts/make_lab.py",
        "deploy",
        "lab",
        "-m lab down",
    ]
    assert str(report.tally) == "6 passed, 0 failed, 0 skipped"


def test_a_make_lab_that_fails_stops_the_tests_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "needs_root", lambda: None)
    monkeypatch.setattr(run, "execute", lambda argv, **_more: int("scripts/make_lab.py" in argv))
    monkeypatch.setattr(run, "pytest", lambda *_args, **_more: pytest.fail("it ran"))
    report = Report()
    run.run_stages(run.lab_stages("x"), report)
    assert str(report.tally) == "3 passed, 1 failed, 2 skipped"
    assert report.rows[2][1].notes == ("FAILED  make lab: exit code 1",)


def test_shell_scripts_are_found_by_name_and_by_first_line(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("#!/usr/bin/env bash\n")
    (tmp_path / "b.sh").write_text("echo\n")
    (tmp_path / "c").write_text("#!/usr/bin/env python3\n# bash\n")
    assert [run.is_shell(tmp_path / name) for name in ("a", "b.sh", "c", "missing")] == [
        True,
        True,
        False,
        False,
    ]


def test_recap_is_read_from_the_last_play() -> None:
    output = (
        "PLAY RECAP ****\nlab-llm  : ok=3    changed=1    unreachable=0    failed=0    skipped=2\n"
        "\nPLAY RECAP ****\nlab-ocr                    : ok=7    changed=0    unreachable=1    failed=2\n"
    )
    assert parse_recap(output) == {"lab-ocr": {"ok": 7, "changed": 0, "unreachable": 1, "failed": 2}}


def test_a_stage_that_raises_does_not_keep_the_lab(capsys: pytest.CaptureFixture[str]) -> None:
    ran = []

    def broken() -> Outcome:
        raise RuntimeError("no such thing")

    def down() -> Outcome:
        ran.append("down")
        return passed()

    report = Report()
    run.run_stages([Stage("site", broken), Stage("lab down", down)], report)
    assert ran == ["down"]
    assert report.exit_code == 1
    assert "RuntimeError: no such thing" in report.rows[0][1].notes[0]


def test_a_second_run_on_hosts_is_refused(tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(run.ROOT)!r}); from pathlib import Path\n"
    code += "from tests import run\n"
    code += f"run.alone(Path({str(tmp_path)!r})); print('alone', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout and first.stdout.readline() == "alone\n"
        with pytest.raises(RuntimeError, match="another run"):
            run.alone(tmp_path)
        first.communicate("")
    run.alone(tmp_path)
