"""The commit behind a ref: real git repositories, asked over file:// and by git's own protocol."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts._lock import CannotRunError, RefusedError, git
from scripts._lock.inventory import BuildRequest

TIMEOUT_S = 20


def run_git(folder: Path, *arguments: str) -> str:
    """Run git in `folder`, away from this machine's settings. Returns what it printed."""
    identity = {f"GIT_{who}_{what}": "lab" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    environment = {**os.environ, **identity, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        env=environment,
        timeout=TIMEOUT_S,
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a light and an annotated tag, names that end alike, and a name used twice."""
    folder = tmp_path_factory.mktemp("git") / "upstream"
    folder.mkdir()
    run_git(folder, "init", "--quiet", "--initial-branch=main")
    for message in ("first", "second", "third"):
        run_git(folder, "commit", "--quiet", "--allow-empty", "-m", message)
    run_git(folder, "tag", "light", "HEAD~2")
    run_git(folder, "tag", "-a", "-m", "a release", "annotated", "HEAD~1")
    run_git(folder, "branch", "side/main", "HEAD~2")
    run_git(folder, "branch", "twice", "HEAD~1")
    run_git(folder, "tag", "twice", "HEAD~2")
    return folder


def commit_in(folder: Path, name: str) -> str:
    return run_git(folder, "rev-parse", name)


def request(repository: str | Path, ref: str) -> BuildRequest:
    return BuildRequest("upstream", repository if isinstance(repository, str) else repository.as_uri(), ref)


@pytest.mark.parametrize(
    ("ref", "commit"),
    [
        ("main", "main"),  # and not side/main, which ends alike
        ("side/main", "main~2"),
        ("light", "main~2"),
        ("annotated", "main~1"),  # the tag's commit, not the tag
        ("refs/tags/twice", "main~2"),
        ("refs/heads/twice", "main~1"),
    ],
)
def test_a_ref_becomes_its_commit(repository: Path, ref: str, commit: str) -> None:
    entry = git.resolve(request(repository, ref))
    assert entry == {"repo": repository.as_uri(), "ref": ref, "commit": commit_in(repository, commit)}


def test_a_tag_object_is_never_taken_for_a_commit(repository: Path) -> None:
    assert git.resolve(request(repository, "annotated"))["commit"] != commit_in(repository, "annotated")


def test_a_whole_commit_is_not_asked_for() -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert git.resolve(request("https://nowhere.invalid/x.git", commit))["commit"] == commit


def test_a_name_of_branch_and_tag_is_refused(repository: Path) -> None:
    with pytest.raises(RefusedError) as caught:
        git.resolve(request(repository, "twice"))
    line = str(caught.value)
    assert line.startswith('llama_cpp_builds.upstream.ref = "twice": both a branch and a tag have this name')
    assert line.endswith("fix: write refs/heads/twice or refs/tags/twice")
    assert "\n" not in line


def test_an_unknown_ref_is_refused(repository: Path) -> None:
    with pytest.raises(RefusedError) as caught:
        git.resolve(request(repository, "b99999"))
    url = repository.as_uri()
    problem = f'llama_cpp_builds.upstream.ref = "b99999": no such tag or branch in {url}'
    assert str(caught.value) == f"{problem}; fix: git ls-remote {url} lists them"


def test_a_repository_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CannotRunError) as caught:
        git.resolve(request(tmp_path / "none", "main"))
    line = str(caught.value)
    assert line.startswith('llama_cpp_builds.upstream.repo = "file://') and "does not appear to be" in line
    assert "; fix: check the URL" in line and "\n" not in line


def test_the_environment_of_git_holds_no_token_and_asks_nothing(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = tmp_path / "git"
    spy.write_text(f'#!/bin/sh\nenv > {tmp_path}/environment\nexec /usr/bin/env PATH="$OLD_PATH" git "$@"\n')
    spy.chmod(0o755)
    monkeypatch.setenv("OLD_PATH", os.environ["PATH"])
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    git.resolve(request(repository, "main"))
    environment = (tmp_path / "environment").read_text()
    assert "GIT_TERMINAL_PROMPT=0" in environment and "BatchMode=yes" in environment
    assert "hf_secret" not in environment


def test_a_url_cannot_run_a_program(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    for url in (f"ext::touch {proof}", f"--upload-pack=touch {proof}"):
        with pytest.raises(CannotRunError):
            git.resolve(request(url, "main"))
    assert not proof.exists()


@pytest.fixture
def daemon(repository: Path) -> Iterator[str]:
    """`git daemon` on this machine; its URL of the repository."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        "git",
        "daemon",
        f"--base-path={repository.parent}",
        "--export-all",
        "--reuseaddr",
        "--listen=127.0.0.1",
        f"--port={port}",
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + TIMEOUT_S
            while time.monotonic() < deadline:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.02)
            yield f"git://127.0.0.1:{port}/{repository.name}"
        finally:
            process.terminate()


def test_git_daemon_is_asked_the_same_way(repository: Path, daemon: str) -> None:
    assert git.resolve(request(daemon, "annotated"))["commit"] == commit_in(repository, "main~1")


def test_a_server_that_never_answers_ends_at_the_time_limit() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"git://127.0.0.1:{silent.getsockname()[1]}/x.git"
        started = time.monotonic()
        with pytest.raises(CannotRunError, match=r"git gave no answer within 0\.3 s; fix: check the network"):
            git.resolve(request(url, "main"), timeout_s=0.3)
        assert time.monotonic() - started < TIMEOUT_S / 4
