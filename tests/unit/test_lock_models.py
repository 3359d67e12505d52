"""scripts/lock_models.py as a person runs it: what it reads, writes, prints and returns."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from llama_common.presets import Lock as LockData

from scripts._lock import CannotRunError, Lock, RefusedError, command, inventory, lockfile
from scripts._lock.inventory import BuildRequest, HeaderRequest, ModelRequest, Requests
from tests.local_hub import LocalHub
from tests.support import ROOT

SCRIPT = ROOT / "scripts/lock_models.py"
TIMEOUT_S = 60
COMMIT_A, COMMIT_B = "a" * 40, "b" * 40
BUILD = {"repo": "https://git.example.invalid/x.git", "ref": COMMIT_A, "commit": COMMIT_A}


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The servers are on this machine, whatever proxy and hub its user has."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("HF_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[LocalHub]:
    with LocalHub() as running:
        yield running


def model_lock(size: int = 5, commit: str = COMMIT_A) -> dict[str, Any]:
    files = [{"file": "m.gguf", "size": size, "sha256": "c" * 64}]
    return {"repo": "owner/name", "revision": "main", "commit": commit, "files": files}


# --- the inventory's side ---


def asked(builds: Mapping[str, Any] | None = None, models: Mapping[str, Any] | None = None) -> Requests:
    variables = {"llama_cpp_builds": builds or {}, "gguf_models": models or {}}
    return inventory.requests_of({"box": variables}, ["box"])


def test_only_what_needs_the_lock_is_asked_for() -> None:
    found = asked(
        {
            "pinned": {"repo": "https://x.invalid/a.git", "commit": COMMIT_A},
            "moving": {"repo": "https://x.invalid/a.git", "ref": "main", "cmake_options": {"A": "{{ b }}"}},
        },
        {
            "by-url": {"url": "https://x.invalid/a.gguf", "sha256": "c" * 64, "size": 1},
            "on-hub": {
                "hf": {"repo": "owner/name", "file": ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]}
            },
        },
    )
    assert found == Requests(
        {"moving": BuildRequest("moving", "https://x.invalid/a.git", "main")},
        {
            "on-hub": ModelRequest(
                "on-hub", "owner/name", "main", ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf")
            )
        },
        {"by-url": HeaderRequest("by-url", (("https://x.invalid/a.gguf", 1, "c" * 64),))},
    )


@pytest.mark.parametrize(
    ("builds", "models", "line"),
    [
        (
            {"b": {"repo": "--upload-pack=x", "ref": "main"}},
            {},
            'llama_cpp_builds.b.repo = "--upload-pack=x": ',
        ),
        ({"b": {"repo": "ext::sh", "ref": "main"}}, {}, 'llama_cpp_builds.b.repo = "ext::sh": '),
        ({"b": {"repo": "https://x.invalid/a", "ref": "-x"}}, {}, 'llama_cpp_builds.b.ref = "-x": '),
        ({"b": {"repo": "https://x.invalid/a"}}, {}, "llama_cpp_builds.b.ref = null: neither ref nor commit"),
        (
            {"b": {"repo": "{{ source }}/a", "ref": "main"}},
            {},
            'llama_cpp_builds.b.repo = "{{ source }}/a": a template',
        ),
        ({"b": "main"}, {}, 'llama_cpp_builds.b = "main": not a mapping'),
        ({}, {"m": {"hf": {"repo": "no-owner", "file": "m.gguf"}}}, 'gguf_models.m.hf.repo = "no-owner": '),
        ({}, {"m": {"hf": {"repo": "o/n", "file": "../m.gguf"}}}, 'gguf_models.m.hf.file = "../m.gguf": '),
        ({}, {"m": {"hf": {"repo": "o/n", "file": ["m.gguf", "m.gguf"]}}}, "gguf_models.m.hf.file = "),
        ({}, {"m": {"hf": {"repo": "o/n", "file": "m.gguf", "rev": "x"}}}, 'gguf_models.m.hf.rev = "x": '),
    ],
)
def test_what_cannot_be_asked_is_refused(builds: dict[str, Any], models: dict[str, Any], line: str) -> None:
    with pytest.raises(RefusedError) as caught:
        asked(builds, models)
    assert str(caught.value).startswith(line)
    assert "; fix: " in str(caught.value) and "\n" not in str(caught.value)


def test_one_name_for_two_things_is_refused() -> None:
    hosts = {
        name: {"llama_cpp_builds": {"b": {"repo": "https://x.invalid/a", "ref": name}}}
        for name in ("one", "two")
    }
    with pytest.raises(
        RefusedError, match=r'llama_cpp_builds = "b": one and two mean different things by this name'
    ):
        inventory.requests_of(hosts, hosts)


def test_two_hosts_with_the_same_data_share_an_entry() -> None:
    hosts = {
        name: {"llama_cpp_builds": {"b": {"repo": "https://x.invalid/a", "ref": "v1"}}}
        for name in ("one", "two")
    }
    assert list(inventory.requests_of(hosts, hosts).builds) == ["b"]


# --- the file ---


def test_the_file_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "group_vars/llama_hosts/lock.yml"
    lock: Lock = {
        "builds": {"b": BUILD},
        "models": {"m": model_lock(), "a.b_c-1": model_lock()},
        "headers": {},
    }
    lockfile.write(path, lockfile.render(lock, path, "the command"))
    assert lockfile.read(path) == lock
    assert [one.name for one in path.parent.iterdir()] == ["lock.yml"]
    assert list(yaml.safe_load(path.read_text())["llama_lock"]["models"]) == ["a.b_c-1", "m"]
    LockData.model_validate(yaml.safe_load(path.read_text())["llama_lock"])


def test_hashes_that_look_like_numbers_stay_text(tmp_path: Path) -> None:
    path = tmp_path / "lock.yml"
    lock: Lock = {"builds": {"b": {**BUILD, "ref": "1" * 40, "commit": "1" * 40}}, "models": {}}
    path.write_text(lockfile.render(lock, path, "the command"))
    assert lockfile.read(path)["builds"]["b"]["commit"] == "1" * 40


def test_a_lock_within_the_repository_passes_its_yaml_rules() -> None:
    path = ROOT / "inventory/production" / lockfile.LOCK_PATH
    text = lockfile.render({"builds": {"b": BUILD}, "models": {"m": model_lock()}}, path, "the command")
    assert text.startswith(
        "# yaml-language-server: $schema=../../../../docs/schema/llama_hosts.schema.json\n---\n"
    )
    linter = [sys.executable, "-m", "yamllint", "--strict", "-c", str(ROOT / ".yamllint"), "-"]
    done = subprocess.run(linter, input=text, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stdout


def test_a_write_that_fails_leaves_the_old_lock_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lock.yml"
    path.write_text("before")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        lockfile.write(path, "after")
    assert path.read_text() == "before"
    assert [one.name for one in tmp_path.iterdir()] == ["lock.yml"]


@pytest.mark.parametrize(
    "text", ["[", "llama_lock: 3", "other: {}", "llama_lock: {models: {m: {repo: x}}}", "\x00"]
)
def test_a_file_that_is_no_lock_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "lock.yml"
    path.write_text(text)
    with pytest.raises(CannotRunError, match=r"lock\.yml: .*; fix: remove"):
        lockfile.read(path)


def test_a_group_file_that_the_folder_would_hide_is_refused(tmp_path: Path) -> None:
    (tmp_path / "group_vars").mkdir()
    (tmp_path / "group_vars/llama_hosts.yml").write_text("---\n")
    with pytest.raises(CannotRunError, match=r"llama_hosts\.yml: Ansible stops reading it .* as main\.yml"):
        lockfile.path_of(tmp_path)


def test_the_differences_name_each_fact_that_changed() -> None:
    old: Lock = {"builds": {"gone": BUILD}, "models": {"m": model_lock(size=5_000_000)}}
    new: Lock = {"builds": {"b": BUILD}, "models": {"m": model_lock(size=16_800_000_000, commit=COMMIT_B)}}
    assert list(lockfile.differences(old, new)) == [
        "+ build b",
        "    repo: https://git.example.invalid/x.git",
        f"    ref: {COMMIT_A[:12]}",
        f"    commit: {COMMIT_A[:12]}",
        "- build gone",
        "~ model m",
        f"    commit: {COMMIT_A[:12]} -> {COMMIT_B[:12]}",
        f"    m.gguf: 5.0 MB, sha256 {'c' * 12} -> 16.80 GB, sha256 {'c' * 12}",
    ]
    assert list(lockfile.differences(old, old)) == []


# --- the command ---


class Box:
    """An inventory folder whose questions a test sets, and the command on it."""

    def __init__(self, folder: Path, server: LocalHub, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.server = folder, server
        self.requests = Requests({"b": BuildRequest("b", BUILD["repo"], COMMIT_A)}, {})
        patch.setattr(inventory, "read", lambda _: self.requests)

    @property
    def lock(self) -> Path:
        return self.folder / lockfile.LOCK_PATH

    def model(self, name: str, file: str = "m.gguf") -> None:
        self.requests.models[name] = ModelRequest(name, f"owner/{name}", "main", (file,))

    def run(self, *arguments: str) -> int:
        return command.main(["--inventory", str(self.folder), "--hub-endpoint", self.server.url, *arguments])


@pytest.fixture
def box(tmp_path: Path, server: LocalHub, monkeypatch: pytest.MonkeyPatch) -> Box:
    return Box(tmp_path, server, monkeypatch)


def test_write_current_stale_and_again(box: Box, capsys: pytest.CaptureFixture[str]) -> None:
    repository = box.server.add("owner/m", {"m.gguf": b"one"})
    box.model("m")
    assert box.run("--check") == 1 and not box.lock.exists()
    assert "lock.yml: missing; fix: scripts/lock_models.py --inventory" in capsys.readouterr().out
    assert box.run() == 0
    assert "written, 1 builds and 1 models locked" in capsys.readouterr().out
    before = box.lock.stat()
    assert box.run("--check") == 0 and box.run() == 0
    assert (box.lock.stat().st_ino, box.lock.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)

    commit = repository.change({"m.gguf": b"other"})
    capsys.readouterr()
    text = box.lock.read_text()
    assert box.run("--check") == 1 and box.lock.read_text() == text
    out = capsys.readouterr().out
    assert "~ model m" in out and f"-> {commit[:12]}" in out and "out of date; fix: " in out
    assert box.run() == 0
    assert lockfile.read(box.lock)["models"]["m"]["commit"] == commit


def test_a_new_commit_with_the_same_files_changes_nothing(
    box: Box, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = box.server.add("owner/m", {"m.gguf": b"one", "README.md": b"text"})
    box.model("m")
    box.run()
    first = lockfile.read(box.lock)
    commit = repository.change({"m.gguf": b"one", "README.md": b"more text"})
    assert box.run("--check") == 0 and box.run() == 0
    assert lockfile.read(box.lock) == first

    repository.past.clear()  # the history was squashed: the locked commit is gone
    assert box.run("--check") == 1 and box.run() == 0
    assert lockfile.read(box.lock)["models"]["m"]["commit"] == commit


def test_only_leaves_everything_else_as_it_is(box: Box, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("m", "n"):
        box.server.add(f"owner/{name}", {"m.gguf": name.encode()})
        box.model(name)
    assert box.run() == 0
    first = lockfile.read(box.lock)
    changed = {
        name: box.server.repositories[f"owner/{name}"].change({"m.gguf": b"new"}) for name in ("m", "n")
    }
    assert box.run("--only", "m") == 0
    after = lockfile.read(box.lock)
    assert after["models"]["m"]["commit"] == changed["m"]
    assert (after["models"]["n"], after["builds"]) == (first["models"]["n"], first["builds"])
    assert box.run("--only", "nobody") == 2
    assert (
        "--only nobody: no build with ref, no model to lock; fix: one of b, m, n" in capsys.readouterr().err
    )


def test_what_nothing_asks_for_any_more_goes(box: Box, capsys: pytest.CaptureFixture[str]) -> None:
    box.server.add("owner/m", {"m.gguf": b"one"})
    box.model("m")
    box.run()
    box.requests.models.clear()
    assert box.run() == 0
    assert lockfile.read(box.lock)["models"] == {}
    assert "- model m" in capsys.readouterr().out


def test_every_failure_is_reported_and_nothing_is_written(
    box: Box, capsys: pytest.CaptureFixture[str]
) -> None:
    box.server.add("owner/good", {"m.gguf": b"one"})
    box.model("good")
    box.model("missing")
    box.model("good-but-file", file="other.gguf")
    box.server.add("owner/good-but-file", {"m.gguf": b"one"})
    assert box.run() == 1
    refused = [line for line in capsys.readouterr().err.splitlines() if line.startswith("refused: ")]
    assert [line.split(" = ")[0] for line in refused] == [
        "refused: gguf_models.missing.hf.repo",
        "refused: gguf_models.good-but-file.hf.file",
    ]
    assert not box.lock.exists()


def test_no_answer_is_not_the_same_as_no(box: Box, capsys: pytest.CaptureFixture[str]) -> None:
    box.server.raw["/api/models/owner/m/revision/main"] = (500, {}, b"")
    box.model("m")
    assert box.run() == 2 and not box.lock.exists()
    assert box.run("--check") == 2
    assert "answered 500 for owner/m" in capsys.readouterr().err


def test_nothing_to_lock_writes_nothing(box: Box, capsys: pytest.CaptureFixture[str]) -> None:
    box.requests = Requests()
    assert box.run() == 0 and box.run("--check") == 0
    assert not box.lock.exists() and "nothing to lock" in capsys.readouterr().out


def test_a_place_that_cannot_hold_a_lock_is_one_line(box: Box, capsys: pytest.CaptureFixture[str]) -> None:
    (box.folder / "group_vars").write_text("in the way")
    assert box.run() == 2
    assert "lock.yml: Not a directory; fix: " in capsys.readouterr().err


def test_the_token_is_in_no_output(
    box: Box, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    box.server.add("owner/m", {"m.gguf": b"one"})
    box.model("m")
    box.model("missing")
    for token in ("hf_good", "hf_wrong"):
        monkeypatch.setenv("HF_TOKEN", token)
        box.run()
        captured = capsys.readouterr()
        assert token not in captured.out + captured.err
    assert {one.authorization for one in box.server.seen} == {"Bearer hf_good", "Bearer hf_wrong"}


@pytest.mark.parametrize("url", ["huggingface.co", "ftp://x", "https://user:secret@x", "https://x/?a=b"])
def test_a_hub_that_is_no_url_is_bad_usage(box: Box, url: str) -> None:
    with pytest.raises(SystemExit) as caught:
        box.run("--hub-endpoint", url)
    assert caught.value.code == 2


def test_an_inventory_that_is_not_there_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--inventory", str(tmp_path / "none")]) == 2
    assert "none: no such file or directory; fix: name the inventory's folder" in capsys.readouterr().err


def test_any_python_finds_the_controllers_environment() -> None:
    """Without site-packages, as with the system's own Python: it goes on in .venv, or says what to do."""
    bare = [sys.executable, "-I", "-S", str(SCRIPT), "--help"]
    done = subprocess.run(bare, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if (ROOT / ".venv/bin/python").exists():
        assert done.returncode == 0 and "--hub-endpoint" in done.stdout
    else:
        assert done.returncode == 2 and "fix: make setup" in done.stderr
