"""The wheelhouse and the module that compares a box with it agree on what counts."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import re
import shutil
import stat
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from ansible.plugins.action import ActionBase  # type: ignore[import-untyped]

from plugins.action import app_environment as action
from scripts import build_wheelhouse as wheelhouse
from tests.support import ROOT


def load(path: Path) -> ModuleType:
    """A script or module of a role, imported by its path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


venv_module = load(ROOT / "plugins/modules/app_environment.py")
LINUX = wheelhouse.Target("3.11", "x86_64")
OTHER = wheelhouse.Target("3.12", "x86_64")
MAC = wheelhouse.Target("3.13", "arm64", "Darwin")
LOCKS = sorted(path.parent.name for path in ROOT.glob("apps/*/requirements.lock"))
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
        (open_to_others, "bin could be changed by others than its owner"),
        (no_list, "cannot be read"),
        (other_list, "cannot be read"),
    ],
)
def test_damage_anywhere_is_named(made: Path, harm: Callable[[Path], None], where: str) -> None:
    assert venv_module.damage(made) == ""
    harm(made)
    assert venv_module.damage(made).endswith(where)
    assert not venv_module.whole(made)
    wanted = {"python": "3.11", "distributions": {}, "digest": ""}
    assert venv_module.difference(made, wanted, {})[0] == venv_module.damage(made)


def test_another_owner_is_named(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(venv_module.os, "geteuid", lambda: 4_000_000)
    assert venv_module.damage(made) == f"{made} could be changed by others than its owner"


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


def test_removal_takes_what_leads_into_it_and_nothing_else(tmp_path: Path) -> None:
    store = tmp_path / "store"
    (store / "3.11-x/bin").mkdir(parents=True)
    (tmp_path / "active").symlink_to(store)
    (tmp_path / "ours").symlink_to(tmp_path / "active/bin/tool")
    (tmp_path / "theirs").symlink_to("/usr/bin/true")
    links = {str(tmp_path / name): f"{tmp_path}/active/bin/tool" for name in ("ours", "theirs", "none")}
    expected = [str(tmp_path / name) for name in ("ours", "active", "store")]
    assert venv_module.remove(tmp_path / "active", store, links, dry=True) == expected
    assert (tmp_path / "ours").is_symlink()
    assert venv_module.remove(tmp_path / "active", store, links, dry=False) == expected
    assert venv_module.remove(tmp_path / "active", store, links, dry=False) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


@pytest.fixture
def llmbox(tmp_path: Path) -> Any:
    """A copy of the app llmbox and of what it needs."""
    for name in ("llama_common", "llmbox"):
        shutil.copytree(ROOT / "apps" / name, tmp_path / "apps" / name)
    return wheelhouse.App("llmbox", tmp_path)


def test_the_fingerprint_follows_sources_and_target(llmbox: Any) -> None:
    before = wheelhouse.fingerprint(llmbox, LINUX)
    assert before == wheelhouse.fingerprint(llmbox, LINUX)
    assert len({before, *(wheelhouse.fingerprint(llmbox, other) for other in (MAC, OTHER))}) == 3
    (llmbox.root / "apps/llama_common/src/llama_common/plain.py").open("a").write("# more\n")
    assert before != wheelhouse.fingerprint(llmbox, LINUX)


def test_an_app_comes_with_what_it_needs_of_this_repository(llmbox: Any) -> None:
    assert [app.name for app in llmbox.packages()] == ["llama_common", "llmbox"]
    assert [app.name for app in wheelhouse.App("llama_common", llmbox.root).packages()] == ["llama_common"]


@pytest.mark.parametrize(
    ("name", "target", "refusal"),
    [
        (
            "llmbox",
            wheelhouse.Target("3.9", "arm64", "Darwin"),
            "Python 3.9 is there, llmbox needs >=3.11; fix: ",
        ),
        ("llama_common", LINUX, "apps/llama_common/requirements.lock is not there; fix: "),
        ("nothing", LINUX, "apps/nothing/pyproject.toml is not there; fix: "),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(
    llmbox: Any, name: str, target: Any, refusal: str
) -> None:
    with pytest.raises(wheelhouse.BuildError, match=f"^{re.escape(refusal)}.+$"):
        wheelhouse.App(name, llmbox.root).check(target)


def test_a_lock_s_markers_are_read_for_the_target() -> None:
    lock = """# a comment
everywhere==1 \\
    --hash=sha256:aa \\
    --hash=sha256:bb
mac==2 ; sys_platform == 'darwin' and platform_machine == "arm64" \\
    --hash=sha256:cc
old==3; python_version < "3.12" --hash=sha256:dd
"""
    assert [line.split() for line in wheelhouse.pins(lock, MAC).splitlines()] == [
        ["everywhere==1", "--hash=sha256:aa", "--hash=sha256:bb"],
        ["mac==2", "--hash=sha256:cc"],
    ]
    assert [line.split()[0] for line in wheelhouse.pins(lock, LINUX).splitlines()] == [
        "everywhere==1",
        "old==3",
    ]
    with pytest.raises(wheelhouse.BuildError, match=r"^marker 'nonsense': "):
        wheelhouse.pins("a==1; nonsense --hash=sha256:aa\n", LINUX)


def test_each_system_has_its_own_wheels() -> None:
    assert MAC.platforms() == ["macosx_13_0_arm64"]
    assert {"manylinux2014_x86_64", "manylinux_2_17_x86_64", "manylinux_2_36_x86_64"} <= {*LINUX.platforms()}


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("tool/__init__.py", "tool/__init__.py"),
        ("tool-1.0.data/purelib/tool/more.py", "tool/more.py"),
        ("tool-1.0.data/platlib/tool/fast.so", "tool/fast.so"),
        ("tool-1.0.data/scripts/tool", ""),
        ("tool-1.0.data/data/share/man/man1/tool.1", ""),
    ],
)
def test_where_pip_puts_a_file_of_a_wheel(path: str, place: str) -> None:
    assert wheelhouse.destination(path) == place


@pytest.mark.parametrize("app", LOCKS)
def test_the_lock_pins_every_dependency_with_hashes(app: str) -> None:
    text = (ROOT / "apps" / app / "requirements.lock").read_text()
    entries = [
        entry for entry in text.replace("\\\n", " ").splitlines() if entry and not entry.startswith("#")
    ]
    names = {entry.partition("==")[0] for entry in entries}
    assert all("==" in entry and "--hash=sha256:" in entry for entry in entries)
    packages = wheelhouse.App(app).packages()
    needed = set().union(*(package.needs() for package in packages))
    assert {"pip", *needed} <= names | {package.name.replace("_", "-") for package in packages}


@pytest.mark.parametrize("app", LOCKS)
def test_the_lock_s_versions_are_the_controller_s(app: str) -> None:
    pinned = {line.partition("==")[0].lower().replace("_", "-"): line.partition("==")[2].split()[0]
              for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line}  # fmt: skip
    lock = (ROOT / "apps" / app / "requirements.lock").read_text().splitlines()
    versions = {line.partition("==")[0]: line.partition("==")[2].split()[0] for line in lock if "==" in line}
    shared = versions.keys() & pinned.keys()
    assert "pydantic" in shared
    assert {name: versions[name] for name in shared} == {name: pinned[name] for name in shared}


FACTS = {"python": {"version": {"major": 3, "minor": 13}}, "machine": "arm64", "system": "Darwin"}


class Host:
    """Answers the module's calls from a script, and records them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *reasons: str, check_mode: bool = False) -> None:
        self.calls: list[dict[str, Any]] = []
        self.shipped: list[tuple[str, str]] = []
        self.built: list[Any] = []
        self._reasons = list(reasons)
        self.plugin = action.ActionModule.__new__(action.ActionModule)
        self.plugin._task = SimpleNamespace(args={"app": "llmbox"}, check_mode=check_mode)
        self.plugin._connection = SimpleNamespace(
            _shell=SimpleNamespace(join_path=lambda *parts: "/".join(parts))
        )
        self.plugin._execute_module = self.answer
        self.plugin._make_tmp_path = lambda: "/tmp/x"
        self.plugin._transfer_file = lambda here, there: self.shipped.append((here, there))
        self.plugin._fixup_perms2 = lambda paths: None
        monkeypatch.setattr(ActionBase, "run", lambda *_, **__: {})
        monkeypatch.setattr(action, "ensure", self.ensure)

    def ensure(self, app: Any, target: Any, cache: Path) -> dict[str, Any]:
        self.built.append((app.name, target))
        return {
            "archive": "/cache/wheelhouse.tar",
            "python": target.python,
            "digest": "d",
            "distributions": {},
        }

    def answer(self, module_name: str, module_args: dict[str, Any], task_vars: object) -> dict[str, Any]:
        assert module_name == "app_environment"
        self.calls.append(module_args)
        return {"changed": "archive" in module_args, "reason": self._reasons.pop(0)}


def test_an_environment_that_is_whole_costs_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(monkeypatch, "")
    assert host.plugin.run(task_vars={"ansible_facts": FACTS}) == {"changed": False, "reason": ""}
    assert host.built == [("llmbox", wheelhouse.Target("3.13", "arm64", "Darwin"))]
    assert [call["wheelhouse"]["digest"] for call in host.calls] == ["d"]
    assert not host.shipped


def test_what_differs_is_shipped_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(monkeypatch, "damaged", "damaged")
    assert host.plugin.run(task_vars={"ansible_facts": FACTS})["changed"]
    assert host.shipped == [("/cache/wheelhouse.tar", "/tmp/x/wheelhouse.tar")]
    assert [call.get("archive") for call in host.calls] == [None, "/tmp/x/wheelhouse.tar"]


def test_a_dry_run_tells_of_the_change_and_ships_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(monkeypatch, "damaged", check_mode=True)
    assert host.plugin.run(task_vars={"ansible_facts": FACTS}) == {"changed": True, "reason": "damaged"}
    assert (len(host.calls), host.shipped) == (1, [])


@pytest.mark.parametrize(
    ("facts", "refusal"),
    [
        ({}, "the host's facts are not known; fix: "),
        ({**FACTS, "system": "FreeBSD"}, "the host is FreeBSD; "),
    ],
)
def test_a_host_that_no_wheelhouse_fits_is_refused(
    monkeypatch: pytest.MonkeyPatch, facts: dict[str, Any], refusal: str
) -> None:
    host = Host(monkeypatch)
    result = host.plugin.run(task_vars={"ansible_facts": facts})
    assert result["failed"] and result["msg"].startswith(refusal)
    assert not host.calls
