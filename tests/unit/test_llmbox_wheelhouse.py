"""The wheelhouse and the module that compares a box with it agree on what counts."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import shutil
import sys
import zipfile
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
    assert {"httpx", "pydantic", "pydantic-core", "pip"} <= names


def test_the_lock_s_versions_are_the_controller_s() -> None:
    pinned = {line.partition("==")[0].lower().replace("_", "-"): line.partition("==")[2].split()[0]
              for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line}  # fmt: skip
    lock = (ROOT / "apps/llmbox/requirements.lock").read_text().splitlines()
    versions = {line.partition("==")[0]: line.partition("==")[2].split()[0] for line in lock if "==" in line}
    shared = versions.keys() & pinned.keys()
    assert "pydantic" in shared
    assert {name: versions[name] for name in shared} == {name: pinned[name] for name in shared}
