"""A foreign unit that is the system's cannot conflict with a preset, and is refused on the host."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from roles.llama_presets.library import llama_foreign_units as module

SYSTEM = "usr/lib/systemd/system"


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root folder of a host that has the user llm."""

    def look_up(user: str) -> SimpleNamespace:
        if user != "llm":
            raise KeyError(user)
        return SimpleNamespace(pw_dir=str(tmp_path / "home/llm"), pw_uid=1500)

    monkeypatch.setattr("pwd.getpwnam", look_up)
    return tmp_path


def put(host: Path, folder: str, name: str, target: str | None = None) -> None:
    (host / folder).mkdir(parents=True, exist_ok=True)
    if target:
        (host / folder / name).symlink_to(target)
    else:
        (host / folder / name).write_text("[Service]\n")


@pytest.mark.parametrize("folder", [SYSTEM, "etc/systemd/system", "run/systemd/generator.late"])
def test_a_system_unit_is_refused_in_one_line_with_its_fix(host: Path, folder: str) -> None:
    put(host, folder, "ssh.service")
    (line,) = module.refusals("llm", ["lmstudio.service", "ssh.service"], host)
    assert line.startswith("refused: llama_presets_foreign_units.1 = ssh.service: it is a system unit here")
    assert line.partition("; fix: ")[2].endswith("systemctl disable --now ssh.service")
    assert line.isprintable()


def test_the_instance_of_a_system_template_is_refused(host: Path) -> None:
    put(host, SYSTEM, "model@.service")
    assert len(module.refusals("llm", ["model@1.service", "model.service"], host)) == 1


@pytest.mark.parametrize(
    "folder", ["home/llm/.config/systemd/user", "etc/systemd/user", "run/user/1500/systemd/transient"]
)
def test_what_is_a_user_unit_too_is_allowed(host: Path, folder: str) -> None:
    put(host, SYSTEM, "ollama.service")
    put(host, folder, "ollama.service")
    assert module.refusals("llm", ["ollama.service"], host) == []


def test_unknown_and_masked_units_are_allowed(host: Path) -> None:
    put(host, SYSTEM, "ollama.service")
    put(host, "etc/systemd/system", "ollama.service", "/dev/null")
    assert module.refusals("llm", ["ollama.service", "lmstudio.service"], host) == []


def test_a_host_without_the_user_yet_is_judged_by_its_folders(host: Path) -> None:
    put(host, SYSTEM, "ssh.service")
    put(host, SYSTEM, "dbus.service")
    put(host, "usr/lib/systemd/user", "dbus.service")
    assert len(module.refusals("nobody-yet", ["ssh.service", "dbus.service"], host)) == 1
