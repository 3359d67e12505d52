"""The module gguf_models: what it hands to the download, and what of that others can see."""

from __future__ import annotations

import hashlib
import json
import os
import pwd
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from roles.gguf_models.module_utils import gguf_files
from roles.gguf_models.module_utils.gguf_files import store, worker

SECRET = "http://user:hunter2@proxy.example:3128"
TOKEN = "hf_sesame"


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The module, with its package where Ansible puts it, and its own state directory."""
    monkeypatch.setitem(sys.modules, "ansible.module_utils.gguf_files", gguf_files)
    from roles.gguf_models.library import gguf_models

    monkeypatch.setattr(gguf_models, "STATE_DIRECTORY", tmp_path / "state")
    (tmp_path / "state").mkdir()
    return gguf_models


def parameters(directory: Path) -> dict[str, Any]:
    return {
        "models": [], "directory": str(directory), "owner": pwd.getpwuid(os.getuid()).pw_name,
        "reserve_bytes": 0, "verify": "stat", "remove_unused": False, "keep": [], "hf_endpoint": store.HUB,
        "hf_token": TOKEN, "hf_token_file": None, "environment": {"https_proxy": SECRET, "TRIES": 3},
        "connect_timeout": 30, "stall_timeout": 60, "retries": 6, "step": "all", "follow_seconds": 5,
    }  # fmt: skip


def test_secrets_are_credentials_and_on_no_command_line(
    library: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    given: dict[str, str] = {}

    def run(argv: list[str], **_more: object) -> subprocess.CompletedProcess[str]:
        commands.append(argv)
        for word in argv:
            if word.startswith("--property=LoadCredential="):
                name, _, path = word.removeprefix("--property=LoadCredential=").partition(":")
                given[name] = Path(path).read_text()
                assert Path(path).stat().st_mode & 0o777 == 0o600
        return subprocess.CompletedProcess(argv, 0, "", "")

    monkeypatch.setattr(library.subprocess, "run", run)
    module = SimpleNamespace(params=parameters(tmp_path), check_mode=False)
    task = library.Task(module)
    task.start(pwd.getpwuid(os.getuid()))
    shown = json.dumps([commands, module.params["environment"]])
    assert commands[-1][0] == "systemd-run"
    assert "hunter2" not in shown and TOKEN not in shown
    assert module.params["environment"] == ["TRIES", "https_proxy"], "what -vvv prints: the names"
    assert json.loads(given[worker.ENVIRONMENT_CREDENTIAL]) == {"https_proxy": SECRET, "TRIES": "3"}
    assert given[worker.TOKEN_CREDENTIAL] == TOKEN
    left = [file.name for file in (tmp_path / "state").iterdir() if "hunter2" in file.read_text("latin-1")]
    assert left == [], "the file is gone once the unit has it"


def test_no_environment_is_no_credential(
    library: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run(argv: list[str], **_more: object) -> subprocess.CompletedProcess[str]:
        commands.append(argv)
        return subprocess.CompletedProcess(argv, 0, "", "")

    monkeypatch.setattr(library.subprocess, "run", run)
    module = SimpleNamespace(params={**parameters(tmp_path), "environment": {}}, check_mode=False)
    library.Task(module).start(pwd.getpwuid(os.getuid()))
    assert "LoadCredential=environment" not in " ".join(commands[-1])


def test_the_download_takes_the_environment_from_its_credential(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    credentials, runtime = tmp_path / "credentials", tmp_path / "runtime"
    credentials.mkdir()
    runtime.mkdir()
    plan = store.Plan(str(tmp_path), ())
    (credentials / worker.PLAN_CREDENTIAL).write_text(plan.to_json())
    (credentials / worker.ENVIRONMENT_CREDENTIAL).write_text(json.dumps({"https_proxy": SECRET}))
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(credentials))
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(runtime))
    monkeypatch.setenv("https_proxy", "")
    monkeypatch.setattr(signal, "signal", lambda *_args: None)
    seen: list[str | None] = []

    def bring_in(*_args: object, **_more: object) -> dict[str, list[str]]:
        seen.append(os.environ.get("https_proxy"))
        return {"verified": [], "installed": [], "refusals": []}

    monkeypatch.setattr(worker, "bring_in", bring_in)
    assert worker.main() == 0
    assert seen == [SECRET]
    assert "hunter2" not in (runtime / worker.RESULT_NAME).read_text()


@pytest.mark.parametrize("used", [True, False], ids=["used by a preset", "used by none"])
def test_the_source_of_a_model_is_never_unused(
    used: bool, library: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tmp_path / "models"
    models.mkdir(mode=0o755)
    content = b"the only copy"
    (models / "source.gguf").write_bytes(content)
    (models / "waste.gguf").write_bytes(b"12345")
    source = str(models / "source.gguf")
    file = {
        "file": "copy.gguf", "url": None, "path": source,
        "sha256": hashlib.sha256(content).hexdigest(), "size": len(content),
    }  # fmt: skip
    params = {
        **parameters(models),
        "models": [{"name": "m", "files": [file]}] if used else [],
        "keep": [] if used else [source],
        "remove_unused": True,
    }
    monkeypatch.setattr(library, "show_unit", lambda: {"ActiveState": "inactive"})
    monkeypatch.setattr(library.Task, "start", lambda *_args: None)
    result = library.Task(SimpleNamespace(params=params, check_mode=False)).begin()
    assert [entry["file"] for entry in result["removed"]] == ["waste.gguf"]
    assert (models / "source.gguf").read_bytes() == content
    assert not (models / "waste.gguf").exists()


def test_unused_models_are_a_warning_and_no_key_of_the_result(
    library: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tmp_path / "models"
    models.mkdir(mode=0o755)
    (models / "waste.gguf").write_bytes(b"12345")
    warned: list[str] = []
    monkeypatch.setattr(library, "show_unit", lambda: {"ActiveState": "inactive"})
    module = SimpleNamespace(params=parameters(models), check_mode=False, warn=warned.append)
    result = library.Task(module).begin()
    assert result["unused"] == [{"file": "waste.gguf", "bytes": 5}]
    assert "warnings" not in result, "Ansible calls that key deprecated, in two lines each run"
    (said,) = warned
    assert "no preset uses waste.gguf" in said
    assert (models / "waste.gguf").exists()


def test_mending_a_mode_removes_nothing(
    library: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tmp_path / "models"
    models.mkdir(mode=0o755)
    content = b"a model"
    (models / "m.gguf").write_bytes(content)
    (models / "m.gguf").chmod(0o600)
    (models / "waste.gguf").write_bytes(b"12345")
    file = {
        "file": "m.gguf", "url": "http://h/m.gguf", "path": None,
        "sha256": hashlib.sha256(content).hexdigest(), "size": len(content),
    }  # fmt: skip
    params = {**parameters(models), "models": [{"name": "m", "files": [file]}], "remove_unused": False}
    monkeypatch.setattr(library, "show_unit", lambda: {"ActiveState": "inactive"})
    monkeypatch.setattr(library.Task, "start", lambda *_args: None)
    module = SimpleNamespace(params=params, check_mode=False, warn=lambda _text: None)
    library.Task(module).begin()
    assert (models / "m.gguf").stat().st_mode & 0o777 != 0o600, "the mode was not mended"
    assert (models / "waste.gguf").exists()
