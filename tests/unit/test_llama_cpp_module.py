"""The host side of role llama_cpp: names of releases, damage, pruning, what a failure says."""

from __future__ import annotations

import errno
import json
import os
import pwd
import shutil
import signal
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from roles.llama_cpp.library import llama_cpp_build as module

COMMIT = "3f2a" * 10
OPTIONS = {"GGML_CUDA": "ON", "CMAKE_CUDA_ARCHITECTURES": "89"}
TOOLCHAIN = module.Toolchain("GNU 13.2.0", "12.8.93", "znver4 flags 0123456789ab")


def test_a_release_is_named_after_everything_that_decides_the_binary() -> None:
    name = module.release_name(COMMIT, OPTIONS, TOOLCHAIN)
    assert name.startswith(f"{COMMIT}-")
    assert len(name) == 40 + 1 + 12
    others = {
        module.release_name("a" * 40, OPTIONS, TOOLCHAIN),
        module.release_name(COMMIT, {**OPTIONS, "CMAKE_CUDA_ARCHITECTURES": "120a-real"}, TOOLCHAIN),
        module.release_name(COMMIT, {**OPTIONS, "GGML_NATIVE": "OFF"}, TOOLCHAIN),
        module.release_name(COMMIT, OPTIONS, module.Toolchain("GNU 14.2.0", "12.8.93", TOOLCHAIN.cpu_target)),
        module.release_name(COMMIT, OPTIONS, module.Toolchain("GNU 13.2.0", "13.0.1", TOOLCHAIN.cpu_target)),
        module.release_name(COMMIT, OPTIONS, module.Toolchain("GNU 13.2.0", "12.8.93", None)),
    }
    assert len({each.rpartition("-")[2] for each in {name, *others}}) == 7


def test_the_order_of_the_options_does_not_matter() -> None:
    backwards = dict(reversed(OPTIONS.items()))
    assert module.release_name(COMMIT, OPTIONS, TOOLCHAIN) == module.release_name(
        COMMIT, backwards, TOOLCHAIN
    )


def test_data_overrides_the_defaults_but_not_what_releases_rely_on() -> None:
    base, owned = {"LLAMA_OPENSSL": "OFF"}, {"CMAKE_INSTALL_RPATH": "$ORIGIN"}
    assert module.merge_options("up", {"LLAMA_OPENSSL": "ON"}, base, owned) == {
        "LLAMA_OPENSSL": "ON",
        "CMAKE_INSTALL_RPATH": "$ORIGIN",
    }
    with pytest.raises(
        module.HostError, match=r"^llama_cpp_builds\.up\.cmake_options\.CMAKE_INSTALL_RPATH = /x: .*fix:"
    ):
        module.merge_options("up", {"CMAKE_INSTALL_RPATH": "/x"}, base, owned)


def test_nvcc_gets_the_compiler_cache_only_in_a_cuda_build() -> None:
    owned = {"CMAKE_CXX_COMPILER_LAUNCHER": "ccache"}
    assert module.merge_options("up", OPTIONS, {}, owned)["CMAKE_CUDA_COMPILER_LAUNCHER"] == "ccache"
    assert "CMAKE_CUDA_COMPILER_LAUNCHER" not in module.merge_options("up", {"GGML_CUDA": "OFF"}, {}, owned)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("ON", True), ("true", True), ("1", True), ("OFF", False), ("", False), (None, False)],
)
def test_what_cmake_takes_for_true(value: str | None, expected: bool) -> None:
    assert module.is_on(value) is expected


def test_an_option_brings_its_packages_when_some_build_switches_it_on() -> None:
    by_option = {"LLAMA_OPENSSL": ["libssl-dev"], "GGML_BLAS": ["libopenblas-dev"]}
    options = [{"LLAMA_OPENSSL": "OFF"}, {"LLAMA_OPENSSL": "ON", "GGML_BLAS": "OFF"}]
    assert module.needed_packages(["g++"], by_option, options) == ["g++", "libssl-dev"]


@pytest.mark.parametrize(
    ("journal", "expected"),
    [
        ("", ("start", None, None)),
        ("llama-build: phase fetch\n", ("fetch", None, None)),
        ("llama-build: phase compile\n[1/285] Building x\n[120/285] Building y\n", ("compile", 120, 285)),
        ("[121/285] Building z\nwarning: [3/4]\n", ("compile", 121, 285)),
        ("[285/285] Linking\nllama-build: phase smoke test\n", ("smoke test", None, None)),
    ],
)
def test_progress_is_read_from_the_journal(journal: str, expected: tuple[Any, ...]) -> None:
    found = module.progress(journal)
    assert (found["phase"], found["done"], found["total"]) == expected


@pytest.mark.parametrize(
    ("result", "journal", "expected"),
    [
        (
            "exit-code",
            "x\nllama-build: error: ninja: exit code 1: a.cpp:1:2: error: no\n",
            "a.cpp:1:2: error: no",
        ),
        ("oom-kill", "llama-build: error: whatever\n", "fix: lower llama_cpp_build_jobs"),
        ("timeout", "", "llama_cpp_build_timeout"),
        ("signal", "[3/4] Building\n", "killed by signal 9"),
        ("success", "", "without a word"),
    ],
)
def test_a_failure_is_one_line_with_its_reason(result: str, journal: str, expected: str) -> None:
    line = module.failure(result, "9", journal, "80%", 60)
    assert expected in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("keep", "protected", "removed"),
    [
        (2, {"e", "d"}, ["c", "b", "a"]),
        (3, {"e", "a"}, ["c", "b"]),
        (1, {"e", "d"}, ["c", "b", "a"]),
        (9, {"e"}, []),
        (2, {"e"}, ["c", "b", "a"]),
    ],
)
def test_pruning_keeps_the_newest_and_never_touches_current_and_previous(
    keep: int, protected: set[str], removed: list[str]
) -> None:
    assert module.releases_to_remove(["e", "d", "c", "b", "a"], keep, protected) == removed


# -- on a directory of releases


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    """As the build tool has it."""
    former = os.umask(0o022)
    yield
    os.umask(former)


def make_release(releases: Path, name: str, finished_at: float = 1000.0, end: int = 0) -> Path:
    """A release whose server is a shell script that ends with this exit code."""
    release = releases / name
    (release / "bin").mkdir(parents=True)
    server = release / "bin" / "llama-server"
    server.write_text(f"#!/bin/sh\necho 'version: 1 (3f2a3f2)'\nexit {end}\n", encoding="utf-8")
    server.chmod(0o755)
    (release / "bin" / "libggml.so").symlink_to("libggml.so.0")
    (release / "bin" / "libggml.so.0").write_bytes(b"library")
    files: dict[str, Any] = {"bin/libggml.so": {"link": "libggml.so.0"}}
    for path in (server, release / "bin" / "libggml.so.0"):
        info = path.stat()
        files[str(path.relative_to(release))] = {
            "size": info.st_size,
            "sha256": module._sha256(path),
        }
    stamp = release / module.STAMP
    stamp.write_text(json.dumps({"targets": ["llama-server"], "files": files}), encoding="utf-8")
    os.utime(stamp, (finished_at, finished_at))
    return release


def test_a_whole_release_is_not_damaged(tmp_path: Path) -> None:
    assert module.damage(make_release(tmp_path, "r")) is None


def test_a_release_without_a_stamp_was_never_finished(tmp_path: Path) -> None:
    release = make_release(tmp_path, "r")
    (release / module.STAMP).unlink()
    assert module.damage(release) == "absent"
    assert module.damage(tmp_path / "nothing") == "absent"


def test_a_missing_file_is_found(tmp_path: Path) -> None:
    release = make_release(tmp_path, "r")
    (release / "bin/libggml.so.0").unlink()
    assert module.damage(release) == "bin/libggml.so.0 is missing"


def test_a_truncated_file_is_found(tmp_path: Path) -> None:
    release = make_release(tmp_path, "r")
    os.truncate(release / "bin/libggml.so.0", 3)
    assert module.damage(release) == "bin/libggml.so.0 has 3 bytes instead of 7"


def test_another_content_of_the_same_size_is_found(tmp_path: Path) -> None:
    release = make_release(tmp_path, "r")
    (release / "bin/libggml.so.0").write_bytes(b"LIBRARY")
    assert module.damage(release) == "bin/libggml.so.0 has another content than when it was built"


def test_another_content_of_the_same_size_and_time_is_found(tmp_path: Path) -> None:
    release = make_release(tmp_path, "r")
    library = release / "bin/libggml.so.0"
    before = library.stat()
    library.write_bytes(b"LIBRARY")
    os.utime(library, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert module.damage(release) == "bin/libggml.so.0 has another content than when it was built"


def test_a_new_time_alone_is_no_damage(tmp_path: Path) -> None:
    release = make_release(tmp_path, "r")
    os.utime(release / "bin/libggml.so.0", (5, 5))
    assert module.damage(release) is None


def test_a_link_to_elsewhere_is_found(tmp_path: Path) -> None:
    release = make_release(tmp_path, "r")
    (release / "bin/libggml.so").unlink()
    (release / "bin/libggml.so").symlink_to("/etc/passwd")
    assert module.damage(release) == "bin/libggml.so is no link to libggml.so.0"


def test_a_server_that_does_not_start_is_found_though_every_file_is_whole(tmp_path: Path) -> None:
    release = make_release(tmp_path, "r", end=1)
    assert "llama-server does not start" in str(module.damage(release))


@pytest.mark.parametrize(
    ("name", "mode", "expected"),
    [
        ("bin/llama-server", 0o644, "has mode 0644: not everybody can run it"),
        ("bin/llama-server", 0o744, "has mode 0744: not everybody can run it"),
        ("bin/llama-server", 0o775, "has mode 0775: others than its owner can change it"),
        ("bin/libggml.so.0", 0o646, "has mode 0646: others than its owner can change it"),
        ("bin/libggml.so.0", 0o600, "has mode 0600: not everybody can read it"),
        ("bin", 0o777, "has mode 0777: others than its owner can change it"),
        ("bin", 0o700, "has mode 0700: not everybody can run it"),
        (module.STAMP, 0o664, "has mode 0664: others than its owner can change it"),
        (".", 0o775, "has mode 0775: others than its owner can change it"),
    ],
)
def test_a_mode_that_lets_too_many_or_too_few_in_is_found(
    tmp_path: Path, name: str, mode: int, expected: str
) -> None:
    release = make_release(tmp_path, "r")
    (release / name).chmod(mode)
    assert module.damage(release) == f"{'the release' if name == '.' else name} {expected}"


@pytest.mark.parametrize(
    ("owner", "release_owner", "expected"),
    [
        (0, 0, None),
        (999, 0, "belongs to user 999 instead of root"),
        (999, 999, None),
        (0, 999, None),
        (1500, 999, "belongs to user 1500 instead of 999"),
    ],
)
@pytest.mark.parametrize("kind", [stat.S_IFREG | 0o644, stat.S_IFLNK | 0o777])
def test_a_foreign_owner_is_found(kind: int, owner: int, release_owner: int, expected: str | None) -> None:
    info = os.stat_result((kind, 1, 1, 1, owner, 0, 0, 0, 0, 0))
    assert module.wrong_access(info, release_owner) == expected


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("name", ["bin/llama-server", "bin/libggml.so", "bin", module.STAMP])
def test_a_file_of_another_user_in_a_release_of_root_is_found(tmp_path: Path, name: str) -> None:
    release = make_release(tmp_path, "r")
    os.chown(release / name, 12345, 0, follow_symlinks=False)
    assert module.damage(release) == f"{name} belongs to user 12345 instead of root"


def test_a_broken_stamp_is_found(tmp_path: Path) -> None:
    release = make_release(tmp_path, "r")
    (release / module.STAMP).write_text("{", encoding="utf-8")
    assert "cannot be read" in str(module.damage(release))


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> module.Host:
    """A host with one build, whose releases lie in tmp_path."""
    monkeypatch.setattr(module, "RUN_DIR", tmp_path / "run")
    monkeypatch.setattr(module, "SYSTEM_UNITS", tmp_path / "system")
    monkeypatch.setattr(module, "running_units", list)
    monkeypatch.setattr(module, "_give_to_root", lambda release: False)
    monkeypatch.setattr(module, "in_use", lambda releases, *_: set())
    monkeypatch.setattr(module.Host, "release", lambda self, build: "new")
    return module.Host(
        {
            "root": str(tmp_path / "opt"),
            "user": None,
            "keep_releases": 2,
            "remove_unused": False,
            "activate": True,
            "reason": "",
            "serving_user": "llm",
            "tool": "",
            "packages": [],
            "option_packages": {},
            "base_options": {},
            "owned_options": {},
            "builds": {"up": {"repo": "r", "commit": COMMIT, "cmake_options": {}}},
        }
    )


def test_activation_points_current_at_the_release_and_keeps_the_former_one(host: module.Host) -> None:
    directory = host.root / "up"
    for age, name in enumerate(("new", "old", "older", "oldest")):
        make_release(directory / "releases", name, finished_at=1000.0 - age)
    module.point(directory / "current", "old")
    module.point(directory / "previous", "older")
    result = host.activate(host.builds["up"])
    assert (directory / "current").readlink() == Path("releases/new")
    assert (directory / "previous").readlink() == Path("releases/old")
    assert result["removed"] == ["older", "oldest"]
    assert sorted(path.name for path in (directory / "releases").iterdir()) == ["new", "old"]
    assert host.activate(host.builds["up"])["changed"] is False


def test_what_is_put_beside_the_programs_is_removed(host: module.Host, tmp_path: Path) -> None:
    directory = host.root / "up"
    for age, name in enumerate(("new", "old", "older")):
        make_release(directory / "releases", name, finished_at=1000.0 - age)
    module.point(directory / "current", "new")
    module.point(directory / "previous", "old")
    host.params = {**host.params, "keep_releases": 3}
    assert host._probe_build(host.builds["up"], False)["action"] == "none"
    backend, link, folder, foreign = (
        directory / "releases" / name
        for name in ("new/bin/libggml-mine.so", "old/bin/.link", "old/bin/folder", "older/bin/other")
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("kept")
    backend.write_bytes(b"library")
    link.symlink_to(elsewhere)
    (folder / "in").mkdir(parents=True)
    foreign.touch()
    probed = host._probe_build(host.builds["up"], False)
    assert probed["action"] == "activate"
    assert probed["reason"] == f"to be removed: {backend}, {link}, {folder}"
    assert host.activate(host.builds["up"])["removed"] == [str(path) for path in (backend, link, folder)]
    assert foreign.exists() and elsewhere.exists(), "nobody serves from there"
    assert host._probe_build(host.builds["up"], False)["action"] == "none"
    assert module.damage(directory / "releases/new") is None


def test_a_folder_of_programs_that_leads_elsewhere_is_not_tidied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = make_release(tmp_path, "r")
    (release / "bin/mine").touch()
    assert [path.name for path in module.strangers(release)] == ["mine"]
    with monkeypatch.context() as other:
        other.setattr(os, "geteuid", lambda: release.stat().st_uid + 1)
        assert module.strangers(release) == []
    (release / "bin").rename(tmp_path / "elsewhere")
    (release / "bin").symlink_to(tmp_path / "elsewhere")
    assert module.strangers(release) == []


# -- an update: a release beside the current one, then kept, rejected or gone back from


@pytest.fixture
def two(host: module.Host, monkeypatch: pytest.MonkeyPatch) -> module.Host:
    """`old` is current and serves, `new` stands beside it; `host.restarts` are the releases restarted on."""
    directory = host.root / "up"
    for age, name in enumerate(("new", "old", "older")):
        make_release(directory / "releases", name, finished_at=1000.0 - age)
    module.point(directory / "current", "old")
    module.point(directory / "previous", "older")
    monkeypatch.setattr(module, "_directory", lambda path, *_: path.mkdir(parents=True, exist_ok=True))
    host.restarts = []  # type: ignore[attr-defined]
    host.broken, host.refused = set(), set()  # type: ignore[attr-defined]

    def restart(user: str, build: str) -> str:
        current = str(module.link_target(directory / "current"))
        host.restarts.append(current)  # type: ignore[attr-defined]
        if current in host.broken:  # type: ignore[attr-defined]
            raise module.DoesNotServe("coder failed")
        if current in host.refused:  # type: ignore[attr-defined]
            raise module.HostError("coder is refused")
        return "coder"

    monkeypatch.setattr(module, "restart_serving", restart)
    return host


def links(host: module.Host) -> tuple[str | None, str | None]:
    return tuple(module.link_target(host.root / "up" / name) for name in ("current", "previous"))  # type: ignore[return-value]


def test_a_release_that_is_to_be_compared_first_stands_beside_the_current_one(two: module.Host) -> None:
    two.params = {**two.params, "activate": False}
    two.activate(two.builds["up"])
    assert links(two) == ("old", "older")
    assert len(list((two.root / "up/releases").iterdir())) == 3


def test_a_former_release_without_its_stamp_is_nothing_to_go_back_to(two: module.Host) -> None:
    (two.root / "up/releases/old" / module.STAMP).unlink()
    two.activate(two.builds["up"])
    assert links(two) == ("new", "older")


def test_the_first_release_of_a_build_becomes_current_with_nothing_to_compare(host: module.Host) -> None:
    make_release(host.root / "up" / "releases", "new")
    host.params = {**host.params, "activate": False}
    host.activate(host.builds["up"])
    assert links(host) == ("new", None)


def test_an_accepted_release_is_current_and_serves(two: module.Host) -> None:
    (two.root / "up/rejected").mkdir()
    (two.root / "up/rejected/new").write_text("before\n")
    result = two.accept("up", "new")
    assert links(two) == ("new", "old")
    assert (result["restarted"], result["removed"], two.restarts) == ("coder", ["older"], ["new"])  # type: ignore[attr-defined]
    assert module.rejection(two.root / "up", "new") is None


def test_there_is_no_moment_without_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link, seen, replace = tmp_path / "current", [], Path.replace
    module.point(link, "a")

    def watched(self: Path, target: Any) -> Path:
        seen.append(module.link_target(link))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    module.point(link, "b")
    assert (seen, module.link_target(link)) == (["a"], "b")


def test_killed_in_a_rollback_what_was_left_does_not_come_back(
    two: module.Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    two.accept("up", "new")
    monkeypatch.setattr(module.Host, "_change", killed)
    with pytest.raises(KeyboardInterrupt):
        two.roll_back("up")
    assert "rolled back to old" in (module.rejection(two.root / "up", "new") or "")


class Killed(BaseException):
    """As kill -9: nothing is put back."""


def kill_at(monkeypatch: pytest.MonkeyPatch, *links: str) -> None:
    """Kill what changes links right after it has changed one of these."""
    replace = Path.replace

    def replaced(self: Path, target: Path) -> None:
        replace(self, target)
        if target.name in links:
            raise Killed

    monkeypatch.setattr(Path, "replace", replaced)


@pytest.mark.parametrize("phase", ["accept", "activate"])
@pytest.mark.parametrize("next_step", ["roll_back", "accept", "activate"])
def test_killed_between_the_two_links_the_way_back_is_not_lost(
    two: module.Host, monkeypatch: pytest.MonkeyPatch, phase: str, next_step: str
) -> None:
    def step(name: str) -> object:
        return two.activate(two.builds["up"]) if name == "activate" else two.accept("up", "new")

    with monkeypatch.context() as killing:
        kill_at(killing, "current", "previous")
        with pytest.raises(Killed):
            step(phase)
    if next_step == "roll_back":
        current = links(two)[0]
        former = two.roll_back("up")["release"]
        assert (current, former) in (("new", "old"), ("old", "older"))
        assert links(two) == (former, current)
    else:
        step(next_step)
        assert links(two) == ("new", "old")
    assert not list((two.root / "up").glob(".*"))


def test_killed_while_it_is_put_back_the_way_back_is_not_lost(
    two: module.Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    two.broken = {"new"}  # type: ignore[attr-defined]
    symlink_to = Path.symlink_to

    def linked(self: Path, target: Path) -> None:
        symlink_to(self, target)
        if target.name == "older":
            raise Killed

    with monkeypatch.context() as killing:
        killing.setattr(Path, "symlink_to", linked)
        with pytest.raises(Killed):
            two.accept("up", "new")
    assert links(two) == ("new", "old")
    assert two.roll_back("up")["release"] == "old"
    assert links(two) == ("old", "new")


@pytest.mark.parametrize("step", ["reject", "current", "previous", "restart"])
def test_a_rollback_that_was_killed_anywhere_is_completed_by_the_next_one(
    two: module.Host, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    two.accept("up", "new")
    serves = ["new"]
    monkeypatch.setattr(module, "in_use", lambda *_: set(serves))
    reject, restart = module.reject, module.restart_serving

    def restarted(user: str, build: str) -> str | None:
        serves[:] = [str(module.link_target(two.root / "up/current"))]
        return restart(user, build)

    def at(name: str) -> None:
        if name == step:
            raise Killed

    def rejecting(*args: Any) -> None:
        reject(*args)
        at("reject")

    with monkeypatch.context() as killing:
        killing.setattr(module, "reject", rejecting)
        kill_at(killing, step)
        killing.setattr(module, "restart_serving", lambda *_: at("restart"))
        with pytest.raises(Killed):
            two.roll_back("up")
    monkeypatch.setattr(module, "restart_serving", restarted)
    result = two.roll_back("up")
    assert (result["release"], result["former"], result["restarted"]) == ("old", "new", "coder")
    assert links(two) == ("old", "new") and serves == ["old"]
    assert "rolled back to old" in (module.rejection(two.root / "up", "new") or "")
    with pytest.raises(module.HostError, match="new was rejected"):
        two.roll_back("up")


def test_a_killed_rollback_whose_target_does_not_serve_leaves_the_links_as_before_it(
    two: module.Host,
) -> None:
    two.accept("up", "new")
    module.reject(two.root / "up", "new", "rolled back to old")
    (two.root / "up/.previous.of.old").symlink_to("releases/new")
    two.broken = {"old"}  # type: ignore[attr-defined]
    with pytest.raises(module.HostError, match="old does not serve: coder failed; new is current again"):
        two.roll_back("up")
    assert links(two) == ("new", "old")


@pytest.mark.parametrize(("phase", "ignored"), [("accept", True), ("roll_back", True), ("probe", False)])
def test_who_hangs_up_does_not_end_the_swap(
    monkeypatch: pytest.MonkeyPatch, phase: str, ignored: bool
) -> None:
    now: dict[int, Any] = {}
    seen: list[dict[int, Any]] = []

    def swap(*_: object) -> dict[str, Any]:
        seen.append(dict(now))
        return {}

    params = {"phase": phase, "build": "up", "release": "r"}
    fake = SimpleNamespace(params=params, check_mode=False, exit_json=lambda **_: None)
    monkeypatch.setattr(signal, "signal", now.__setitem__)
    monkeypatch.setattr(module, "AnsibleModule", lambda **_: fake)
    monkeypatch.setattr(module, "Host", lambda _: SimpleNamespace(**{phase: swap}))
    module.main()
    assert seen == [dict.fromkeys((signal.SIGHUP, signal.SIGTERM), signal.SIG_IGN) if ignored else {}]


def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int = 0) -> Path:
    """What the record of what was deployed is told: a file with a line each, and where `current` led then."""
    told, program = tmp_path / "told", tmp_path / "llmbox-drift"
    program.write_text(f'#!/bin/sh\necho "$@" $(readlink "$2/current") >> {told}\nexit {code}\n')
    program.chmod(0o755)
    monkeypatch.setattr(module, "DRIFT", str(program))
    return told


@pytest.mark.parametrize("code", [0, 1])
def test_where_the_releases_lead_then_is_told_to_the_record_of_what_was_deployed(
    two: module.Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    told = recorded(tmp_path, monkeypatch, code)
    two.accept("up", "new")
    two.roll_back("up")
    folder = two.root / "up"
    assert told.read_text().splitlines() == [f"renew {folder} releases/new", f"renew {folder} releases/old"]
    two.broken.add("old")  # type: ignore[attr-defined]
    two.accept("up", "new")
    with pytest.raises(module.HostError):
        two.roll_back("up")
    assert len(told.read_text().splitlines()) == 3, "it was put back"


def test_a_release_that_became_current_without_a_restart_is_seen_and_restarted(
    two: module.Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after kill -9 between the two: no link tells, only what runs."""
    running = {"old"}
    monkeypatch.setattr(module, "in_use", lambda *_: running)
    directory = two.root / "up"
    assert module.still_served(directory) == [], "it is the current one"
    module.point(directory / "previous", "old")
    module.point(directory / "current", "new")
    assert two._probe_build(two.builds["up"], False)["still_served"] == ["old"]
    result = two.accept("up", "new")
    assert (result["changed"], result["restarted"], two.restarts) == (True, "coder", ["new"])  # type: ignore[attr-defined]
    assert links(two) == ("new", "old")
    running = {"new"}
    result = two.accept("up", "new")
    assert (result["changed"], result["restarted"], two.restarts) == (False, None, ["new"])  # type: ignore[attr-defined]


def test_what_a_system_preset_runs_does_not_change_places(two: module.Host, tmp_path: Path) -> None:
    """Only what lmswitch serves would be restarted: the other server would be left on the old release."""
    two.accept("up", "new")
    units, directory = tmp_path / "system", two.root / "up"
    units.mkdir()
    (units / "llama-masked.service").symlink_to("/dev/null")
    (units / "llama-gone.service").symlink_to("nowhere")
    (units / "llama-other.service").write_text(f"ExecStart={directory}2/current/bin/llama-server -m x\n")
    assert two._probe_build(two.builds["up"], False)["without_gateway"] == ""
    (units / "llama-vision.service").write_text(f"ExecStart={directory}/current/bin/llama-server -m x\n")
    told = two._probe_build(two.builds["up"], False)["without_gateway"]
    assert told.startswith(f"{directory}: llama-vision.service of the system serves with this build")
    assert "; fix: write the commit that it should run into llama_cpp_builds.up, then site.yml" in told
    for link in ("accept", "roll_back"):
        with pytest.raises(module.HostError) as error:
            two.accept("up", "old") if link == "accept" else two.roll_back("up")
        assert str(error.value) == told
    assert (links(two), two.restarts) == (("new", "old"), ["new"])  # type: ignore[attr-defined]
    assert not (directory / "rejected").exists()


@pytest.mark.parametrize("phase", ["accept", "roll_back"])
@pytest.mark.parametrize("starts", ["broken", "refused"])
def test_killed_before_its_restart_a_release_that_does_not_start_then_is_taken_back(
    two: module.Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str, starts: str
) -> None:
    told = recorded(tmp_path, monkeypatch)
    directory = two.root / "up"
    current, serves = ("new", "old") if phase == "accept" else ("old", "new")
    module.point(directory / "previous", serves)
    module.point(directory / "current", current)
    if phase == "roll_back":
        module.reject(directory, "new", "rolled back to old")
    monkeypatch.setattr(module, "in_use", lambda *_: {serves})
    setattr(two, starts, {current})
    with pytest.raises(module.HostError) as error:
        two.accept("up", current) if phase == "accept" else two.roll_back("up")
    if starts == "broken":
        assert str(error.value) == f"{current} does not serve: coder failed; {serves} is current again"
        assert two.restarts == [current, serves]  # type: ignore[attr-defined]
        assert links(two) == (serves, current) and module.rejection(directory, serves) is None
        assert told.read_text() == f"renew {directory} releases/{serves}\n"
    else:  # the next run does it: nothing was found against it
        assert str(error.value) == "coder is refused" and two.restarts == [current]  # type: ignore[attr-defined]
        assert links(two) == (current, serves)
        assert (module.rejection(directory, "new") is None) == (phase == "accept")


@pytest.mark.parametrize("why", ["another serves", "no room"])
def test_a_release_that_could_not_be_taken_back_is_not_to_be_rejected(
    two: module.Host, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """It is current: to say that the other one stays would not be so."""
    two.broken = {"new"}  # type: ignore[attr-defined]
    if why == "another serves":
        module.point(two.root / "up/current", "new")
        monkeypatch.setattr(module, "in_use", lambda *_: {"old"})
    else:
        FullDisk(monkeypatch, 4, True)
    with pytest.raises(module.HostError, match="new cannot take over: coder failed; new is current") as error:
        two.accept("up", "new")
    assert not isinstance(error.value, module.DoesNotServe) and links(two)[0] == "new"


def test_only_a_server_counts_as_serving(tmp_path: Path) -> None:
    for name in ("llama-server", "llama-bench"):
        program = tmp_path / "releases" / name / "bin" / name
        program.parent.mkdir(parents=True)
        shutil.copy(Path("/bin/sleep").resolve(), program)
    module.point(tmp_path / "current", "new")
    processes = [
        subprocess.Popen([tmp_path / "releases" / name / "bin" / name, "60"])
        for name in ("llama-server", "llama-bench")
    ]
    try:
        assert module.in_use(tmp_path / "releases") == {"llama-server", "llama-bench"}
        assert module.still_served(tmp_path) == ["llama-server"]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_a_release_that_does_not_serve_is_taken_back(two: module.Host) -> None:
    two.broken = {"new"}  # type: ignore[attr-defined]
    said = "new does not serve: coder failed; old is current again"
    with pytest.raises(module.HostError, match=said):
        two.accept("up", "new")
    assert links(two) == ("old", "older")
    assert two.restarts == ["new", "old"]  # type: ignore[attr-defined]
    # By the same step: a play that ends meanwhile could not, and site.yml would make it current again.
    assert str(module.rejection(two.root / "up", "new")).endswith(f": {said}")


@pytest.mark.parametrize("starts", ["broken", "refused"])
def test_the_first_new_release_that_is_taken_back_leaves_no_way_back_to_the_one_that_serves(
    two: module.Host, starts: str
) -> None:
    """Nothing was before it: a link that leads to the current release would be a drift."""
    (two.root / "up/previous").unlink()
    setattr(two, starts, {"new"})
    with pytest.raises(module.HostError, match="old is current again"):
        two.accept("up", "new")
    assert links(two) == ("old", None)


def test_a_rejection_that_cannot_be_written_is_told_beside_its_reason(
    two: module.Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    two.broken = {"new"}  # type: ignore[attr-defined]
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/opt/x")
    monkeypatch.setattr(module, "reject", lambda *_: (_ for _ in ()).throw(full))
    with pytest.raises(
        module.DoesNotServe,
        match="coder failed; old is current again; it could not be marked: /opt/x: No space",
    ):
        two.accept("up", "new")


@pytest.mark.parametrize(
    ("broken", "refused", "tried", "left"),
    [
        ({"new"}, set(), True, ""),
        ({"new", "old"}, set(), True, ", but could not be restarted: coder failed"),
        (set(), {"new", "old"}, False, ", but could not be restarted: coder is refused"),
        (set(), {"new"}, False, ""),
        # The guard came while it started, say: nothing serves then.
        ({"new"}, {"old"}, False, ", but could not be restarted: coder is refused"),
    ],
)
def test_what_the_box_refuses_is_not_the_release_s_fault(
    two: module.Host, broken: set[str], refused: set[str], tried: bool, left: str
) -> None:
    two.broken, two.refused = broken, refused  # type: ignore[attr-defined]
    with pytest.raises(module.HostError) as error:
        two.accept("up", "new")
    assert isinstance(error.value, module.DoesNotServe) == tried
    words = "does not serve" if tried else "cannot take over"
    why = "coder failed" if "new" in broken else "coder is refused"
    assert str(error.value) == f"new {words}: {why}; old is current again{left}"
    assert (module.rejection(two.root / "up", "new") is not None) == tried
    assert links(two) == ("old", "older")
    assert two.restarts == ["new", "old"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("phase", ["accept", "roll_back"])
@pytest.mark.parametrize("kind", [module.DoesNotServe, module.HostError])
def test_a_preset_that_had_failed_before_says_nothing_about_a_release(
    two: module.Host, monkeypatch: pytest.MonkeyPatch, phase: str, kind: type[module.HostError]
) -> None:
    """Its model is gone, say: neither release can start it, and nothing is lost with either."""
    if phase == "roll_back":
        two.accept("up", "new")

    def fails(*_: str) -> str:
        failure = kind("coder failed")
        failure.served = False
        raise failure

    monkeypatch.setattr(module, "restart_serving", fails)
    result = two.accept("up", "new") if phase == "accept" else two.roll_back("up")
    assert result["restarted"] is None
    assert links(two) == (("new", "old") if phase == "accept" else ("old", "new"))
    rejected = module.rejection(two.root / "up", "new")
    assert (rejected is None) == (phase == "accept")


@pytest.mark.parametrize("tried", [True, False])
def test_the_play_is_told_whether_the_release_was_tried(monkeypatch: pytest.MonkeyPatch, tried: bool) -> None:
    told: dict[str, Any] = {}

    def accept(_build: str, _release: str) -> dict[str, Any]:
        raise (module.DoesNotServe if tried else module.HostError)("x")

    def fail(**said: Any) -> None:
        told.update(said)
        raise SystemExit(1)

    params = {"phase": "accept", "build": "up", "release": "new"}
    fake = SimpleNamespace(params=params, check_mode=False, fail_json=fail)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(module, "AnsibleModule", lambda **_: fake)
    monkeypatch.setattr(module, "Host", lambda _: SimpleNamespace(accept=accept))
    with pytest.raises(SystemExit):
        module.main()
    assert told == {"msg": "x", "tried": tried}


def test_a_rollback_that_does_not_serve_rejects_nothing(two: module.Host) -> None:
    two.accept("up", "new")
    two.broken = {"old"}  # type: ignore[attr-defined]
    with pytest.raises(module.HostError, match="old does not serve: coder failed; new is current again"):
        two.roll_back("up")
    assert links(two) == ("new", "old") and module.rejection(two.root / "up", "new") is None
    two.broken = set()  # type: ignore[attr-defined]
    assert two.roll_back("up")["release"] == "old"


class FullDisk:
    """A file system that has room for `room` more changes of a link, and then, while it lasts, for none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int, lasts: bool) -> None:
        self.room, self.lasts = room, lasts
        for name in ("symlink_to", "replace"):
            monkeypatch.setattr(Path, name, self.bounded(getattr(Path, name)))

    def bounded(self, change: Any) -> Any:
        def changed(path: Path, target: Path) -> None:
            self.room -= path.name.startswith(".previous") or path.name.startswith(".current")
            if self.room == -1 or (self.room < 0 and self.lasts):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target), None, str(path))
            change(path, target)

        return changed


def test_a_disk_that_is_full_before_there_is_a_way_back_has_the_old_release_started_anew(
    two: module.Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The links had changed: what was started meanwhile may be of the new release."""
    (two.root / "up/previous").unlink()
    FullDisk(monkeypatch, 3, False)
    with pytest.raises(module.HostError, match="old is current again"):
        two.accept("up", "new")
    assert links(two) == ("old", None) and two.restarts == ["old"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("lasts", [False, True])
@pytest.mark.parametrize("room", range(4))
@pytest.mark.parametrize("phase", ["accept", "roll_back"])
def test_a_full_disk_is_one_line_and_rejects_nothing_that_serves_on(
    two: module.Host, monkeypatch: pytest.MonkeyPatch, phase: str, room: int, lasts: bool
) -> None:
    if phase == "roll_back":
        two.accept("up", "new")
    before, restarts = links(two), len(two.restarts)  # type: ignore[attr-defined]
    wanted = {"old": "new", "new": "old"}[str(before[0])]
    with monkeypatch.context() as full:
        FullDisk(full, room, lasts)
        with pytest.raises(module.HostError) as error:
            two.roll_back("up") if phase == "roll_back" else two.accept("up", wanted)
    after = links(two)[0]
    again = " again" if after == before[0] else ""
    assert str(error.value).startswith(f"{wanted} cannot take over: {two.root}/up/")
    assert str(error.value).endswith(f": No space left on device; fix: free space; {after} is current{again}")
    rejected = module.rejection(two.root / "up", str(before[0])) is not None
    assert rejected == (phase == "roll_back" and after != before[0])
    if after == before[0]:
        assert links(two) == before and (len(two.restarts) == restarts) == (room < 3)  # type: ignore[attr-defined]
    assert (after == before[0]) == (room < 3 or not lasts)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/opt/x"),
            "phase probe: /opt/x: No space left on device; fix: free space; then run it again",
        ),
        (
            OSError(errno.EROFS, "Read-only file system", "/a", None, "/b"),
            "phase probe: /b: Read-only file system; fix: put that right on the host; then run it again",
        ),
        (OSError("no file"), "phase probe: no file; then run it again"),
    ],
)
def test_what_the_file_system_refuses_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: OSError, line: str
) -> None:
    class Failed(Exception):
        pass

    def probe() -> None:
        raise error

    def fail(msg: str) -> None:
        raise Failed(msg)

    fake = SimpleNamespace(params={"phase": "probe"}, check_mode=False, fail_json=fail)
    monkeypatch.setattr(module, "AnsibleModule", lambda **_: fake)
    monkeypatch.setattr(module, "Host", lambda _: SimpleNamespace(probe=probe))
    with pytest.raises(Failed) as told:
        module.main()
    assert str(told.value) == line


@pytest.mark.parametrize("link", ["accept", "roll_back"])
def test_a_damaged_release_is_not_gone_to(two: module.Host, link: str) -> None:
    for name in ("new", "older"):
        (two.root / "up/releases" / name / "bin/libggml.so.0").unlink()
    name = {"accept": "new", "roll_back": "older"}[link]
    fix = f"playbooks/update_llama_cpp.yml with commit {name} in llama_cpp_builds.up, which builds it anew"
    with pytest.raises(module.HostError, match=rf"/{name}: .* is missing; fix: {fix}$"):
        two.accept("up", "new") if link == "accept" else two.roll_back("up")
    assert links(two) == ("old", "older")
    assert not (two.root / "up/rejected").exists()


def test_a_rejected_release_is_refused_by_name_until_it_is_compared_again(two: module.Host) -> None:
    two.params = {**two.params, "reason": "coder: 30 % slower"}
    two.reject("up", "new")
    probe = two._probe_build
    said = (
        rf"commit {COMMIT} was rejected on this host \(....-..-..: coder: 30 % slower\); fix: put back old,"
    )
    with pytest.raises(module.HostError, match=said) as error:
        probe(two.builds["up"], False)
    assert "\n" not in str(error.value)
    same = f"{COMMIT}-older"  # with other options: its commit is in the data already
    (two.root / "up/releases/old").rename(two.root / "up/releases" / same)
    module.point(two.root / "up/current", same)
    with pytest.raises(
        module.HostError, match=rf"put back what {same} was built with \(its release.json\), com"
    ):
        probe(two.builds["up"], False)
    two.params = {**two.params, "activate": False}
    assert probe(two.builds["up"], False)["action"] in ("none", "activate")


def test_rolled_back_the_former_release_serves_and_the_other_one_does_not_come_back(two: module.Host) -> None:
    two.accept("up", "new")
    result = two.roll_back("up")
    assert (result["release"], result["former"], result["restarted"]) == ("old", "new", "coder")
    assert links(two) == ("old", "new")
    with pytest.raises(module.HostError, match=r"was rejected on this host .*rolled back to old"):
        two._probe_build(two.builds["up"], False)
    with pytest.raises(module.HostError, match=r"new was rejected .* old stays; fix: another commit"):
        two.roll_back("up")
    assert links(two) == ("old", "new")


@pytest.mark.parametrize("name", ["nothing", "../up", ""])
def test_a_build_that_is_not_there_is_named_with_those_that_are(two: module.Host, name: str) -> None:
    with pytest.raises(module.HostError, match=r"no such build below .*; fix: up"):
        two.roll_back(name)


def test_with_nothing_to_go_back_to_nothing_happens(host: module.Host) -> None:
    make_release(host.root / "up" / "releases", "new")
    module.point(host.root / "up" / "current", "new")
    with pytest.raises(module.HostError, match=r"no release to go back to; current is new; fix: .*\.up"):
        host.roll_back("up")
    module.point(host.root / "up" / "previous", "new")  # an update was killed between its two links
    with pytest.raises(module.HostError, match="no release to go back to; current is new; fix: "):
        host.roll_back("up")


@pytest.mark.parametrize(
    ("active", "build", "answers", "outcome"),
    [
        ("coder", "up", [{"ok": True}], "coder"),
        ("coder", "other", [], None),
        (None, None, [], None),
        ("coder", "up", [{"message": "another switch is under way (x)"}, {"ok": True}], "coder"),
        (
            "coder",
            "up",
            [{"message": "failed", "changed": True, "reason": ["why", "llmbox-wait-ready: x"]}],
            "failed why",
        ),
        ("coder", "up", [{"message": "failed: refused", "changed": False}], "failed: refused"),
    ],
)
def test_only_what_serves_with_the_build_is_restarted(
    monkeypatch: pytest.MonkeyPatch,
    active: str | None,
    build: str | None,
    answers: list[dict[str, Any]],
    outcome: str | None,
) -> None:
    told = [{"active": active, "build": build}, *answers]
    monkeypatch.setattr(module, "run", lambda *_, **__: f"a line\n{json.dumps(told.pop(0))}\n")
    monkeypatch.setattr(module, "LMSWITCH", __file__)
    monkeypatch.setattr(module, "LOCK_PAUSE_S", 0.0)
    user = pwd.getpwuid(os.geteuid()).pw_name
    if outcome and outcome.startswith("failed"):
        with pytest.raises(module.HostError, match=outcome) as error:
            module.restart_serving(user, "up")
        assert isinstance(error.value, module.DoesNotServe) == outcome.endswith("why")
    else:
        assert module.restart_serving(user, "up") == outcome
    assert told == []


@pytest.mark.parametrize("state", ["ready", "loading", "failed"])
def test_whether_it_served_before_is_told_of_what_does_not_start(
    monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    told = [{"active": "coder", "build": "up", "state": state}, {"message": "failed", "changed": True}]
    monkeypatch.setattr(module, "run", lambda *_, **__: json.dumps(told.pop(0)))
    monkeypatch.setattr(module, "LMSWITCH", __file__)
    with pytest.raises(module.DoesNotServe) as error:
        module.restart_serving(pwd.getpwuid(os.geteuid()).pw_name, "up")
    assert error.value.served == (state != "failed")


@pytest.mark.parametrize(
    ("printed", "message"),
    [
        ("ModuleNotFoundError: No module named 'llmbox'\n", "lmswitch gave no answer: ModuleNotFoundError: "),
        ('{"ok": false, "message": "presets.json cannot be read"}\n', "presets.json cannot be read"),
    ],
)
def test_an_lmswitch_that_does_not_say_what_serves_is_not_taken_for_nothing_serves(
    monkeypatch: pytest.MonkeyPatch, printed: str, message: str
) -> None:
    monkeypatch.setattr(module, "run", lambda *_, **__: printed)
    monkeypatch.setattr(module, "LMSWITCH", __file__)
    with pytest.raises(module.HostError, match=message) as error:
        module.restart_serving(pwd.getpwuid(os.geteuid()).pw_name, "up")
    assert not isinstance(error.value, module.DoesNotServe)


def test_a_host_without_lmswitch_has_nothing_to_restart() -> None:
    assert module.restart_serving("no-such-user", "up") is None


def test_a_release_that_a_process_runs_is_never_removed(
    host: module.Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = host.root / "up"
    for age, name in enumerate(("new", "old", "older")):
        make_release(directory / "releases", name, finished_at=1000.0 - age)
    module.point(directory / "current", "old")
    monkeypatch.setattr(module, "in_use", lambda releases, *_: {"older"})
    assert host.activate(host.builds["up"])["removed"] == []


def test_activation_sweeps_what_an_ended_build_left(host: module.Host) -> None:
    releases = host.root / "up" / "releases"
    make_release(releases, "new")
    (releases / ".gone.partial" / "bin").mkdir(parents=True)
    (host.root / "up" / "build" / "x").mkdir(parents=True)
    host.activate(host.builds["up"])
    assert [path.name for path in releases.iterdir()] == ["new"]
    assert list((host.root / "up" / "build").iterdir()) == []


def test_what_a_running_build_works_with_is_not_swept(
    host: module.Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = host.root / "up"
    for name in ("releases/.new.partial", "releases/.gone.partial", "build/x"):
        (directory / name).mkdir(parents=True)
    monkeypatch.setattr(module, "running_units", lambda: ["llama-build-new.service"])
    host._sweep(host.builds["up"])
    assert [path.name for path in (directory / "releases").iterdir()] == [".new.partial"]
    assert (directory / "build/x").is_dir()


def test_a_release_that_is_built_again_is_none_until_it_is_finished(two: module.Host) -> None:
    """Killed in between it would be taken for whole; what serves from it keeps its files."""
    release = two.root / "up/releases/new"
    two.params = {**two.params, "user": pwd.getpwuid(os.geteuid()).pw_name}
    assert two._damage(two.builds["up"], "new") is None
    two._prepare_directories(two.builds["up"], "new")
    assert module.damage(release) == "absent" and (release / "bin/llama-server").is_file()


def test_a_damaged_release_is_not_made_current(host: module.Host) -> None:
    release = make_release(host.root / "up" / "releases", "new")
    (release / "bin/libggml.so.0").unlink()
    with pytest.raises(module.HostError, match="is missing"):
        host.activate(host.builds["up"])
    assert not (host.root / "up" / "current").exists()


def test_a_build_that_the_data_no_longer_names_is_reported_and_removed_on_request(
    host: module.Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_release(host.root / "up" / "releases", "new")
    module.point(host.root / "up" / "current", "new")
    for name in ("gone", "serves", "Not-A-Build"):
        make_release(host.root / name / "releases", "old")
    (host.root / "libexec").mkdir()
    (host.root / "notes").mkdir()
    (host.root / "link").symlink_to(host.root / "gone")
    monkeypatch.setattr(
        module, "in_use", lambda releases, *_: {"old"} if "serves" in str(releases) else set()
    )
    monkeypatch.setattr(module.Host, "_tool_differs", lambda self: False)
    monkeypatch.setattr(module.Host, "_probe_build", lambda self, *_: {"action": "none"})
    probed = host.probe()
    assert [(entry["build"], entry["in_use"]) for entry in probed["unused"]] == [
        ("gone", False),
        ("serves", True),
    ]
    assert all(entry["bytes"] > 0 for entry in probed["unused"])
    assert probed["changed"] is False

    host.params = {**host.params, "remove_unused": True}
    assert host.probe()["changed"] is True
    assert host.remove()["removed"] == ["gone"]
    assert sorted(path.name for path in host.root.iterdir()) == [
        "Not-A-Build", "libexec", "link", "notes", "serves", "up",
    ]  # fmt: skip
    assert host.probe()["changed"] is False
    assert host.remove()["changed"] is False


def test_the_own_process_counts_as_a_user_of_its_program(tmp_path: Path) -> None:
    python = Path("/proc/self/exe").readlink()
    assert python.name in module.in_use(python.parent)


@pytest.mark.parametrize(
    ("name", "value"), [("disk_min", "llama_cpp_build_disk_min"), ("memory_min", "memory")]
)
def test_too_little_room_is_one_line_with_the_limit(host: module.Host, name: str, value: str) -> None:
    host.root.mkdir()
    host.params = {**host.params, "disk_min": 0, "memory_min": 0, name: 1 << 60}
    with pytest.raises(module.HostError, match=rf"{value}.*fix:") as error:
        host._check_room(host.builds["up"])
    assert "\n" not in str(error.value)


@pytest.fixture
def compiler(tmp_path: Path) -> dict[str, str]:
    """The options of a build whose C and C++ compiler only says its version."""
    program = tmp_path / "cc"
    program.write_text("#!/bin/sh\necho 13.2.0\n", encoding="utf-8")
    program.chmod(0o755)
    return {"CMAKE_C_COMPILER": str(program), "CMAKE_CXX_COMPILER": str(program), "GGML_NATIVE": "OFF"}


def test_a_compiler_that_is_not_there_is_named_with_its_option(compiler: dict[str, str]) -> None:
    with pytest.raises(module.HostError, match=r"CMAKE_CUDA_COMPILER = /no/nvcc: .*fix: install the CUDA"):
        module.toolchain("up", {**compiler, "GGML_CUDA": "ON", "CMAKE_CUDA_COMPILER": "/no/nvcc"})
    with pytest.raises(module.HostError, match=r"no working compiler /no/cc \(CMAKE_C_COMPILER\)"):
        module.toolchain("up", {"CMAKE_C_COMPILER": "/no/cc"})


def test_the_cuda_version_is_that_of_the_configured_compiler(
    compiler: dict[str, str], tmp_path: Path
) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda tools, release 12.8, V12.8.93'\n", encoding="utf-8")
    nvcc.chmod(0o755)
    options = {**compiler, "GGML_CUDA": "ON", "CMAKE_CUDA_COMPILER": str(nvcc)}
    assert module.toolchain("up", options) == module.Toolchain("GNU 13.2.0", "12.8.93", None)


def test_the_cpu_target_counts_unless_the_build_is_for_any_cpu(compiler: dict[str, str]) -> None:
    assert module.toolchain("up", compiler).cpu_target is None
    assert module.toolchain("up", {**compiler, "GGML_NATIVE": "ON"}).cpu_target


def test_root_runs_what_was_built_as_the_build_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = make_release(tmp_path, "r")
    asked: dict[str, Any] = {}

    def recorded(argv: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        asked.update(options, argv=argv)
        return subprocess.CompletedProcess(argv, 0, "version: 1", "")

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(subprocess, "run", recorded)
    assert module.damage(release, "daemon") is None
    assert asked["argv"][1] == "--version"
    assert asked["user"] == pwd.getpwnam("daemon").pw_uid
    assert asked["extra_groups"] == ()
    assert module.damage(release, "no-such-user") is None
    assert asked["user"] == pwd.getpwnam("nobody").pw_uid
