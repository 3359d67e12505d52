"""Git repositories made from sdists, the same on every machine."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from lab import sources
from lab.shell import LabError
from lab.sources import MODELS, REPOSITORIES, TreeFile, make_repository, tree_of_sdist

FILES = [
    TreeFile("src/b.c", "100644", b"int b;\n"),
    TreeFile("a.sh", "100755", b"#!/bin/sh\n"),
    TreeFile("link", "120000", b"src/b.c"),
    TreeFile('odd "name\\.txt', "100644", b"\x00\xff\n"),
    TreeFile("empty", "100644", b""),
]
needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def git(repository: Path, *words: str) -> str:
    return subprocess.run(
        ["git", "-C", repository, *words], capture_output=True, text=True, timeout=20, check=True
    ).stdout


@needs_git
def test_equal_trees_give_equal_commits_whatever_the_order(tmp_path: Path) -> None:
    one = make_repository(tmp_path / "one.git", FILES, "message", "v1")
    two = make_repository(tmp_path / "two.git", FILES[::-1], "message", "v1")
    assert one == two == "4da4312d3de842b72e4c73b8a144aa772e566ce7"  # what plain git says of this tree too
    listed = git(tmp_path / "one.git", "ls-tree", "-r", "-z", "v1").split("\0")[:-1]
    assert [line.split()[0] for line in listed] == ["100755", "100644", "120000", "100644", "100644"]
    assert git(tmp_path / "one.git", "cat-file", "blob", "v1:link") == "src/b.c"
    assert git(tmp_path / "one.git", "rev-parse", "master").strip() == one


@needs_git
def test_one_byte_more_gives_another_commit(tmp_path: Path) -> None:
    other = [*FILES[1:], TreeFile("src/b.c", "100644", b"int b; \n")]
    assert make_repository(tmp_path / "one.git", FILES, "m", "v1") != make_repository(
        tmp_path / "two.git", other, "m", "v1"
    )


@needs_git
def test_a_commit_other_than_the_pinned_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake_download(_packages: object, folder: Path, _root: Path) -> list[Path]:
        return [make_sdist(folder / "p.tar.gz", {"top/llama.cpp/CMakeLists.txt": 0o644})]

    monkeypatch.setattr(sources, "_download", fake_download)
    pinned = REPOSITORIES[0]
    with pytest.raises(LabError, match=rf"upstream.git: commit is [0-9a-f]{{40}}, expected {pinned.commit}"):
        sources.prepare(tmp_path, tmp_path)


def make_sdist(path: Path, members: dict[str, int]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, mode in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = 1, mode
            archive.addfile(info, io.BytesIO(b"x"))
        link = tarfile.TarInfo("top/llama.cpp/link")
        link.type, link.linkname = tarfile.SYMTYPE, "../../etc/passwd"
        archive.addfile(link)
    return path


def test_only_the_tree_is_taken_from_an_sdist(tmp_path: Path) -> None:
    sdist = make_sdist(
        tmp_path / "p.tar.gz",
        {
            "top/PKG-INFO": 0o644,
            "top/llama.cpp/a": 0o600,
            "top/llama.cpp/b.sh": 0o711,
            "top/llama.cpp/.git": 0o644,
            "top/llama.cpp/sub/.git/config": 0o644,
            "top/llama.cpp/../../evil": 0o644,
            "top/llama.cpp-other/c": 0o644,
        },
    )
    assert {(file.path, file.mode) for file in tree_of_sdist(sdist, "llama.cpp")} == {
        ("a", "100644"),
        ("b.sh", "100755"),
        ("link", "120000"),  # a link is a blob in git: nothing is ever written through it
    }


def test_every_source_is_pinned() -> None:
    for repository in REPOSITORIES:
        assert len(repository.commit) == 40
        assert len(repository.package.sha256) == 64
    for model in MODELS:
        assert len(model.sha256) == 64
        assert model.size > 0
        assert all(len(package.sha256) == 64 for package, _ in model.parts)
