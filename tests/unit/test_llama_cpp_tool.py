"""The build tool of role llama_cpp: real git, fake CMake, Ninja and ldd."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from llmbox import gate

from roles.llama_cpp.files import llama_build as tool
from roles.llama_cpp.library import llama_cpp_build as module
from tests.unit.test_llmbox_gate import model, preset

GIT = ["git", "-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "init.defaultBranch=master"]

# A server that says the version in ./VERSION_LINE of the tree it was built from.
FAKE_CMAKE = r"""#!/bin/sh
while [ $# -gt 0 ]; do
  case "$1" in -S) src=$2 ;; -B) out=$2 ;; -D*) echo "$1" >> "$FAKE_LOG" ;; esac
  shift
done
[ -e "$src/BROKEN_CMAKE" ] && { echo "CMake Error at CMakeLists.txt:3: no such thing"; exit 1; }
mkdir -p "$out/bin"
cp "$src/VERSION_LINE" "$out/"
"""
FAKE_NINJA = r"""#!/bin/sh
while [ $# -gt 0 ]; do case "$1" in -C) out=$2 ;; -t) list=1 ;; esac; shift; done
if [ -n "$list" ]; then printf 'llama-server: phony\nllama-bench: phony\n'; exit; fi
echo "[1/2] Building CXX object a.o"
if grep -q broken "$out/VERSION_LINE"; then
  echo "FAILED: a.o"
  echo "/usr/bin/c++ -Werror=all -c a.cpp"
  echo "a.cpp:7:3: error: expected ';'"
  echo "[2/2] Building CXX object b.o"
  echo "ninja: build stopped: subcommand failed."
  exit 1
fi
for name in llama-server llama-bench; do
  printf '#!/bin/sh\ncase "$1" in --version) echo "%s" ;; --help) echo "--flash-attn" ;; ' \
    "$(cat "$out/VERSION_LINE")" > "$out/bin/$name"
  echo '--list-devices) echo "Available devices:"; echo "  CUDA0: RTX (16 GiB)" ;; esac' >> "$out/bin/$name"
  chmod 755 "$out/bin/$name"
done
echo library > "$out/bin/libggml.so.0.1"
ln -s libggml.so.0.1 "$out/bin/libggml.so"
echo object > "$out/bin/leftover.o"
"""
FAKE_LDD = "#!/bin/sh\necho 'libggml.so => '\"$(dirname \"$1\")\"'/libggml.so (0x1)'\n"


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    """As the tool's main sets it."""
    former = os.umask(0o022)
    yield
    os.umask(former)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A git repository with one commit and upstream's kind of tag."""
    path = tmp_path / "remote"
    subprocess.run([*GIT, "init", "--quiet", str(path)], check=True)
    commit_file(path, "README", "a tree")
    return path


def commit_file(repository: Path, name: str, text: str) -> str:
    """Commit a file and return the commit."""
    (repository / name).write_text(text, encoding="utf-8")
    run_git(repository, "add", name)
    run_git(repository, "commit", "--quiet", "--message", name)
    return run_git(repository, "rev-parse", "HEAD")


def run_git(repository: Path, *args: str) -> str:
    """git in that repository; what it printed."""
    done = subprocess.run([*GIT, "-C", str(repository), *args], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def spec(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tool.Spec]:
    """A build of the repository's commit with fake programs, in directories as root prepares them."""
    programs = tmp_path / "fake-programs"
    programs.mkdir()
    for name, text in {"cmake": FAKE_CMAKE, "ninja": FAKE_NINJA, "ldd": FAKE_LDD}.items():
        (programs / name).write_text(text, encoding="utf-8")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path / "cache"))
    log = tmp_path / "definitions"
    real = tool.environment
    monkeypatch.setattr(tool, "environment", lambda each: {**real(each), "FAKE_LOG": str(log)})
    directory = tmp_path / "opt" / "up"
    for name in ("src", "build", "releases"):
        (directory / name).mkdir(parents=True)
    lock = tmp_path / "lock"
    lock.touch()
    yield pinned(
        tool.Spec(
            build="up",
            release="",
            repo=f"file://{repository}",
            commit="",
            directory=directory,
            lock=lock,
            cmake={"GGML_NATIVE": "OFF"},
            targets=("llama-server", "llama-bench", "llama-fit-params"),
            jobs=2,
            identity={"compiler": "GNU 13", "cmake_options": {"GGML_NATIVE": "OFF"}},
        ),
        repository,
    )


def pinned(spec: tool.Spec, repository: Path, version: str = "version: 7 (abcdef0)") -> tool.Spec:
    """The spec for a fresh commit whose server will print that version."""
    return replace(spec, commit=commit_file(repository, "VERSION_LINE", version), release="r1")


@pytest.fixture
def any_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake server cannot know the commit that it is part of."""
    monkeypatch.setattr(tool, "_VERSION_COMMIT", re.compile(r"(?P<commit>)version"))


def test_the_tensor_types_of_a_release_are_those_of_its_source(tmp_path: Path) -> None:
    header = tmp_path / "ggml.h"
    header.write_text(
        "enum ggml_type {\n    GGML_TYPE_F32     = 0,\n    // GGML_TYPE_Q4_2 = 4, support has been removed\n"
        "    GGML_TYPE_TQ3_4S  = 46,\n    GGML_TYPE_COUNT = 47,\n};\n"
    )
    assert tool.tensor_types(header) == {"0": "f32", "46": "tq3_4s"}
    assert tool.tensor_types(tmp_path / "none.h") == {}


@pytest.mark.usefixtures("any_version")
def test_a_release_is_finished_whole_and_recognized_by_the_module(
    spec: tool.Spec, capsys: pytest.CaptureFixture[str]
) -> None:
    tool.build(spec)
    stamp = json.loads((spec.final / "release.json").read_text(encoding="utf-8"))
    assert stamp["commit"] == spec.commit
    assert stamp["compiler"] == "GNU 13"
    assert stamp["targets"] == ["llama-server", "llama-bench"]
    assert stamp["devices"] == ["CUDA0: RTX (16 GiB)"]
    assert sorted(stamp["files"]) == [
        "bin/libggml.so",
        "bin/libggml.so.0.1",
        "bin/llama-bench",
        "bin/llama-server",
        "help.txt",
    ]
    assert (spec.final / "help.txt").read_text(encoding="utf-8") == "--flash-attn\n"
    assert module.damage(spec.final) is None
    assert [path.name for path in spec.final.parent.iterdir()] == ["r1"]
    assert list(spec.tree.iterdir()) == []
    phases = [line for line in capsys.readouterr().out.splitlines() if line.startswith("llama-build: phase")]
    assert [phase.split("phase ")[1] for phase in phases] == [
        "fetch",
        "configure",
        "compile",
        "install",
        "smoke test",
    ]


@pytest.mark.usefixtures("any_version")
def test_the_gate_before_a_switch_finds_the_tensor_types_of_a_release(
    spec: tool.Spec, repository: Path
) -> None:
    (repository / "ggml/include").mkdir(parents=True)
    commit = commit_file(
        repository, "ggml/include/ggml.h", "    GGML_TYPE_F32 = 0,\n    GGML_TYPE_COUNT = 1,\n"
    )
    tool.build(replace(spec, commit=commit))
    assert "types.json" in json.loads((spec.final / "release.json").read_text(encoding="utf-8"))["files"]
    known, unknown = (
        gate.refusal(preset([str(spec.final / "bin/llama-server")], models=[model("m", kind)]))
        for kind in (0, 46)
    )
    assert known == ""
    assert unknown.startswith("m has tensors of type 46, which the build upstream does not know; use a build")


@pytest.mark.usefixtures("any_version")
def test_a_finished_release_is_never_built_again(spec: tool.Spec) -> None:
    tool.build(spec)
    before = (spec.final / "release.json").stat().st_mtime_ns
    tool.build(spec)
    assert (spec.final / "release.json").stat().st_mtime_ns == before


@pytest.mark.usefixtures("any_version")
def test_a_release_without_a_stamp_is_replaced(spec: tool.Spec) -> None:
    (spec.final / "bin").mkdir(parents=True)
    (spec.final / "bin" / "rubbish").touch()
    tool.build(spec)
    assert module.damage(spec.final) is None
    assert not (spec.final / "bin" / "rubbish").exists()
    assert [path.name for path in spec.final.parent.iterdir()] == ["r1"]


def test_a_server_that_names_another_commit_is_refused_and_nothing_is_left(spec: tool.Spec) -> None:
    with pytest.raises(tool.BuildError, match="does not name commit"):
        tool.build(spec)
    assert list(spec.final.parent.iterdir()) == []
    assert list(spec.tree.iterdir()) == []


def test_a_compiler_error_is_the_reason_and_nothing_is_left(spec: tool.Spec, repository: Path) -> None:
    broken = pinned(spec, repository, "broken")
    with pytest.raises(tool.BuildError) as error:
        tool.build(broken)
    assert str(error.value) == "ninja: exit code 1: a.cpp:7:3: error: expected ';'"
    assert list(spec.final.parent.iterdir()) == []
    assert list(spec.tree.iterdir()) == []


def test_a_cmake_error_is_the_reason(spec: tool.Spec, repository: Path) -> None:
    broken = replace(spec, commit=commit_file(repository, "BROKEN_CMAKE", ""))
    with pytest.raises(tool.BuildError, match=r"^cmake: exit code 1: CMake Error at CMakeLists\.txt:3"):
        tool.build(broken)


def test_the_tags_number_is_handed_to_cmake(spec: tool.Spec, repository: Path, tmp_path: Path) -> None:
    run_git(repository, "tag", "b11434")
    tool.fetch(spec)
    tool.configure(spec)
    definitions = (tmp_path / "definitions").read_text(encoding="utf-8").splitlines()
    assert definitions == ["-DGGML_NATIVE=OFF", "-DLLAMA_BUILD_NUMBER=11434"]


def test_the_number_of_another_commits_tag_is_not_used() -> None:
    ours, other = "a" * 40, "b" * 40
    tags = f"{other}\trefs/tags/b7\n{ours}\trefs/tags/b8\n{ours}\trefs/tags/v9\n"
    assert tool.build_number(tags, ours) == 8
    assert tool.build_number(tags, "c" * 40) is None


def test_exactly_the_pinned_commit_is_checked_out(spec: tool.Spec, repository: Path) -> None:
    commit_file(repository, "later", "not wanted")
    tool.fetch(spec)
    assert not (spec.source / "later").exists()
    assert run_git(spec.source, "rev-parse", "HEAD") == spec.commit


def test_local_changes_and_leftovers_do_not_survive(spec: tool.Spec) -> None:
    tool.fetch(spec)
    (spec.source / "VERSION_LINE").write_text("tampered", encoding="utf-8")
    (spec.source / "extra").touch()
    (spec.source / ".git" / "index.lock").touch()
    (spec.source / ".git" / "the-same-checkout").touch()
    tool.fetch(spec)
    assert (spec.source / ".git" / "the-same-checkout").exists()
    assert not (spec.source / "extra").exists()
    assert (spec.source / "VERSION_LINE").read_text(encoding="utf-8").startswith("version:")


def test_a_checkout_beyond_repair_is_fetched_anew(spec: tool.Spec) -> None:
    tool.fetch(spec)
    (spec.source / ".git" / "HEAD").write_bytes(b"\0\0\0")
    tool.fetch(spec)
    assert run_git(spec.source, "rev-parse", "HEAD") == spec.commit


def test_all_branches_are_fetched_where_the_server_hands_out_no_hashes(
    spec: tool.Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tool.git

    def refusing(spec: tool.Spec, *args: str) -> str:
        if "--depth" in args:
            raise tool.BuildError("Server does not allow request for unadvertised object")
        return real(spec, *args)

    monkeypatch.setattr(tool, "git", refusing)
    tool.fetch(spec)
    assert run_git(spec.source, "rev-parse", "HEAD") == spec.commit


def test_a_commit_that_is_not_there_is_named_with_its_key(spec: tool.Spec) -> None:
    with pytest.raises(
        tool.BuildError, match=r"^llama_cpp_builds\.up\.commit = 0{40}: not in file://.*; fix:"
    ):
        tool.fetch(replace(spec, commit="0" * 40))


def test_a_library_from_the_build_directory_is_refused(spec: tool.Spec, tmp_path: Path) -> None:
    ldd = tmp_path / "fake-programs" / "ldd"
    ldd.write_text(f"#!/bin/sh\necho 'libggml.so => {spec.tree}/bin/libggml.so (0x1)'\n", encoding="utf-8")
    with pytest.raises(tool.BuildError, match="would not run on its own"):
        tool.build(spec)


def test_an_error_is_the_last_line_and_the_exit_code_is_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert tool.main(["llama-build", str(tmp_path / "nothing.json")]) == 1
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert capsys.readouterr().out.splitlines()[-1].startswith("llama-build: error: ")


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["FAILED: x", "c++ -Werror -c x", "In file included", "x.cpp:1: error: a", "y.cpp:2: error: b"],
         "x.cpp:1: error: a"),
        (["FAILED: x", "c++ x", "ld: undefined reference to `f'", "ninja: build stopped: error"],
         "ld: undefined reference to `f'"),
        (["fatal: unable to connect to host"], "fatal: unable to connect to host"),
        (["something else"], "something else"),
        ([], "it printed nothing"),
    ],
)  # fmt: skip
def test_the_cause_is_the_compilers_line(lines: list[str], expected: str) -> None:
    assert tool.cause(lines) == expected


@pytest.mark.parametrize(
    ("version", "commit"),
    [
        ("version: 4589 (3f2a1b0c)\nbuilt with cc for x86_64", "3f2a1b0c"),
        ("version: 0.6.0-dev (build 11434, commit 4ca1d6a)\nbuilt with GNU 12.2.0", "4ca1d6a"),
    ],
)
def test_the_commit_is_read_from_either_kind_of_version_line(version: str, commit: str) -> None:
    found = tool._VERSION_COMMIT.search(version)
    assert found is not None
    assert found["commit"] == commit
