"""The wheelhouse and the module that compares a box with it agree on what counts."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import shutil
import stat
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tests.support import ROOT


def load(path: Path) -> ModuleType:
    """A script or module of a role, imported by its path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


wheelhouse = load(ROOT / "scripts/build_wheelhouse.py")
venv_module = load(ROOT / "roles/llmbox/library/llmbox_venv.py")
FILES = {
    "tool/__init__.py": b"print('hello')\n",
    "tool-1.0.dist-info/METADATA": b"Name: tool\n",
    "tool-1.0.dist-info/entry_points.txt": b"[console_scripts]\ntool = tool:main\n",
}


def record(files: dict[str, bytes]) -> str:
    """The RECORD of these files."""
    digests = {name: base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
               for name, data in files.items()}  # fmt: skip
    lines = [f"{name},sha256={digests[name]},{len(data)}" for name, data in files.items()]
    return "\n".join([*lines, "tool-1.0.dist-info/RECORD,,"]) + "\n"


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A small wheel."""
    path = tmp_path / "tool-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in FILES.items():
            archive.writestr(name, data)
        archive.writestr("tool-1.0.dist-info/RECORD", record(FILES))
    return path


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The same, as pip installs it."""
    packages = tmp_path / "venv/lib/python3.11/site-packages"
    for name, data in FILES.items():
        (packages / name).parent.mkdir(parents=True, exist_ok=True)
        (packages / name).write_bytes(data)
    extra = "../../../bin/tool,sha256=x,1\ntool/__pycache__/__init__.cpython-311.pyc,,\n"
    extra += "tool-1.0.dist-info/INSTALLER,sha256=x,4\n"
    (packages / "tool-1.0.dist-info/RECORD").write_text(record(FILES) + extra)
    return tmp_path / "venv"


def test_what_pip_installed_has_the_wheel_s_digest(wheel: Path, installed: Path) -> None:
    wanted = wheelhouse.manifest("3.11", [wheel])
    digest, distributions = venv_module.installed_digest(installed, "3.11")
    assert distributions == wanted["distributions"] == {"tool": "1.0"}
    assert digest == wanted["digest"]


def test_a_changed_file_is_noticed_whatever_record_says(wheel: Path, installed: Path) -> None:
    (installed / "lib/python3.11/site-packages/tool/__init__.py").write_text("print('other')\n")
    assert (
        venv_module.installed_digest(installed, "3.11")[0] != wheelhouse.manifest("3.11", [wheel])["digest"]
    )


def test_a_missing_file_is_noticed(installed: Path) -> None:
    (installed / "lib/python3.11/site-packages/tool/__init__.py").unlink()
    with pytest.raises(FileNotFoundError):
        venv_module.installed_digest(installed, "3.11")


def overwritten(venv: Path) -> None:
    (venv / "bin/lmswitch").write_text("#!/bin/sh\nexit 9\n")


def extra(venv: Path) -> None:
    (venv / "lib/python3.11/site-packages/sitecustomize.py").write_text("raise SystemExit(9)\n")


def compiled(venv: Path) -> None:
    (venv / "lib/python3.11/site-packages/tool/__pycache__/__init__.cpython-311.pyc").write_bytes(b"other")


def not_executable(venv: Path) -> None:
    (venv / "bin/lmswitch").chmod(0o644)


def removed(venv: Path) -> None:
    (venv / "bin/lmswitch").unlink()


def other_target(venv: Path) -> None:
    (venv / "bin/python").unlink()
    (venv / "bin/python").symlink_to("/bin/sh")


def open_to_others(venv: Path) -> None:
    (venv / "bin").chmod(0o777)


def no_list(venv: Path) -> None:
    venv_module.manifest(venv).unlink()


def other_list(venv: Path) -> None:
    venv_module.manifest(venv).write_text("not JSON")


@pytest.fixture
def made(installed: Path) -> Path:
    """An environment as the module leaves it, with a command, an interpreter and compiled files."""
    cache = installed / "lib/python3.11/site-packages/tool/__pycache__"
    (installed / "bin").mkdir()
    cache.mkdir()
    (cache / "__init__.cpython-311.pyc").write_bytes(b"compiled")
    (installed / "bin/lmswitch").write_text("#!/bin/sh\n")
    (installed / "bin/lmswitch").chmod(0o755)
    (installed / "bin/python").symlink_to(sys.executable)
    for path, status in venv_module.walk(installed):
        if not stat.S_ISLNK(status.st_mode):
            Path(path).chmod(status.st_mode & 0o755)
    venv_module.write_manifest(installed)
    return installed


@pytest.mark.parametrize(
    ("harm", "where"),
    [
        (overwritten, "bin/lmswitch was changed"),
        (extra, "sitecustomize.py does not belong there"),
        (compiled, "__init__.cpython-311.pyc was changed"),
        (not_executable, "bin/lmswitch was changed"),
        (removed, "bin/lmswitch is missing"),
        (other_target, "bin/python was changed"),
        (open_to_others, "bin could be changed by others than root"),
        (no_list, "cannot be read"),
        (other_list, "cannot be read"),
    ],
)
def test_damage_anywhere_is_named(made: Path, harm: Callable[[Path], None], where: str) -> None:
    assert venv_module.damage(made) == ""
    harm(made)
    assert venv_module.damage(made).endswith(where)
    assert not venv_module.whole(made)
    wanted = {"python": "3.11", "distributions": {}, "digest": "", "links": {}}
    assert venv_module.difference(made, wanted)[0] == venv_module.damage(made)


def test_another_owner_is_named(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(venv_module.os, "geteuid", lambda: 4_000_000)
    assert venv_module.damage(made) == f"{made} could be changed by others than root"


def test_the_store_and_the_link_are_looked_at(made: Path, tmp_path: Path) -> None:
    link = tmp_path / "elsewhere/link"
    link.parent.mkdir()
    link.symlink_to(made)
    tmp_path.chmod(0o755)
    link.parent.chmod(0o755)
    assert venv_module.misplaced(link, tmp_path) == ""
    assert "leads out of" in venv_module.misplaced(link, tmp_path / "elsewhere")
    venv_module.manifest(made).chmod(0o666)
    assert venv_module.misplaced(link, tmp_path).startswith(f"{venv_module.manifest(made)} could be changed")


def test_only_the_wanted_environments_and_their_lists_stay(made: Path, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old.json").touch()
    venv_module.prune(tmp_path, {made})
    assert sorted(path.name for path in tmp_path.iterdir()) == [made.name, f"{made.name}.json"]


def test_the_fingerprint_follows_the_sources(tmp_path: Path) -> None:
    for app in wheelhouse.APPS:
        shutil.copytree(ROOT / "apps" / app, tmp_path / "apps" / app)
    before = wheelhouse.fingerprint("3.11", "x86_64", tmp_path)
    assert before == wheelhouse.fingerprint("3.11", "x86_64", tmp_path)
    assert before != wheelhouse.fingerprint("3.12", "x86_64", tmp_path)
    (tmp_path / "apps/llmbox/src/llmbox/cli.py").open("a").write("# more\n")
    assert before != wheelhouse.fingerprint("3.11", "x86_64", tmp_path)


def test_the_lock_pins_every_dependency_with_hashes() -> None:
    text = (ROOT / "apps/llmbox/requirements.lock").read_text()
    entries = [
        entry for entry in text.replace("\\\n", " ").splitlines() if entry and not entry.startswith("#")
    ]
    names = {entry.partition("==")[0] for entry in entries}
    assert all("==" in entry and "--hash=sha256:" in entry for entry in entries)
    assert {"httpx", "pydantic", "pydantic-core", "pip", "starlette", "uvicorn", "click"} <= names


def test_the_lock_s_versions_are_the_controller_s() -> None:
    pinned = {line.partition("==")[0].lower().replace("_", "-"): line.partition("==")[2].split()[0]
              for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line}  # fmt: skip
    lock = (ROOT / "apps/llmbox/requirements.lock").read_text().splitlines()
    versions = {line.partition("==")[0]: line.partition("==")[2].split()[0] for line in lock if "==" in line}
    shared = versions.keys() & pinned.keys()
    assert "pydantic" in shared
    assert {name: versions[name] for name in shared} == {name: pinned[name] for name in shared}
