"""Role ollama's module and the pipeline's Ollama backend against a scripted server, and the role's data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from llama_common.roles import RoleVariables
from ocr_pipeline import grounding, templates
from ocr_pipeline.errors import BackendError
from ocr_pipeline.servers import ServerReasoner
from ocr_pipeline.settings import ReasoningSettings
from ocr_pipeline.stages import Deadline, Line, PoleIdContext

from roles.ollama.library import ollama_models as module
from tests import stand_in_ollama as stand_in
from tests.ocr.servers import free_port
from tests.support import ROOT, PlaybookRun, ansible_playbook

ROLE = ROOT / "roles/ollama"
WANTED = {"start_timeout": 10, "stall_timeout": 5}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The stand-in, as its unit runs it."""
    place = f"127.0.0.1:{free_port()}"
    environment = {
        **os.environ,
        "OLLAMA_HOST": place,
        "OLLAMA_MODELS": str(tmp_path_factory.mktemp("models")),
    }
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "tests/stand_in_ollama.py"), "serve"], env=environment
    )
    try:
        deadline = time.monotonic() + 30
        while not answers(f"http://{place}"):
            assert time.monotonic() < deadline and server.poll() is None
            time.sleep(0.05)
        yield f"http://{place}"
    finally:
        server.kill()
        server.wait(10)


def answers(url: str) -> bool:
    """Whether the stand-in listens yet."""
    with suppress(httpx.TransportError):
        return httpx.get(f"{url}/api/version", trust_env=False, timeout=5).is_success
    return False


def test_a_model_is_pulled_once(url: str) -> None:
    wanted = {**WANTED, "url": url, "models": [{"name": "tiny", "digest": stand_in.digest("tiny:latest")}]}
    assert module.apply(wanted, check=False) == {"changed": True, "pulled": ["tiny"]}
    assert module.apply(wanted, check=False) == {"changed": False, "pulled": []}
    assert module.apply(wanted, check=True) == {"changed": False, "pulled": []}


def test_one_that_does_not_exist_is_named(url: str) -> None:
    with pytest.raises(
        module.Refused, match="none:1 was not pulled: pull model manifest: file does not exist"
    ):
        module.apply({**WANTED, "url": url, "models": [{"name": "none:1"}]}, check=False)


def test_another_model_under_a_wanted_name_does_not_stay(url: str) -> None:
    wanted = {**WANTED, "url": url, "models": [{"name": "tiny", "digest": "0" * 64}]}
    assert module.apply(wanted, check=True)["changed"]
    with pytest.raises(module.Refused, match=f"has the digest {stand_in.digest('tiny:latest')}, not 0000"):
        module.apply(wanted, check=False)
    assert "tiny:latest" not in module.present(url)


def test_a_server_that_does_not_answer_is_told_and_a_dry_run_says_what_it_would_do() -> None:
    wanted = {"url": f"http://127.0.0.1:{free_port()}", "models": [{"name": "tiny"}], "start_timeout": 0.1}
    assert module.apply(wanted, check=True) == {"changed": True, "pulled": ["tiny"]}
    started = time.monotonic()
    with pytest.raises(module.Refused, match="journalctl -u ollama"):
        module.apply(wanted, check=False)
    assert time.monotonic() - started < 5


def test_the_pipeline_speaks_ollamas_protocol_and_grounds_the_answer(url: str) -> None:
    module.pull(url, "qwen2.5:14b", 5)
    settings = ReasoningSettings(backend="ollama", url=url, model="qwen2.5:14b")
    lines = [Line("WEG"), Line("POTÊNCIA: 75 kVA")]
    found = ServerReasoner(settings, templates.load()).extract(lines, PoleIdContext.NAMEPLATE, Deadline(10))
    assert found.candidates["potencia_kva"].value == 75
    assert found.candidates["numero_serie"].value == stand_in.MADE_UP
    values, reasons = grounding.settle(found, lines)
    assert (values["potencia_kva"], values["numero_serie"]) == (75, None)
    assert "not_grounded:numero_serie" in reasons


def test_a_model_that_the_server_lacks_is_the_backends_fault(url: str) -> None:
    reasoner = ServerReasoner(ReasoningSettings(backend="ollama", url=url, model="none"), templates.load())
    with pytest.raises(BackendError, match="404"):
        reasoner.extract([Line("WEG")], PoleIdContext.NAMEPLATE, Deadline(10))
    assert httpx.get(f"{url}/api/version", trust_env=False).status_code == 200


# --- the role's data ---


def read(path: str) -> Any:
    return yaml.safe_load((ROLE / path).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def variables() -> RoleVariables:
    return RoleVariables.of({"ollama": read("meta/argument_specs.yml")})


def test_the_defaults_are_repeated_and_valid(variables: RoleVariables) -> None:
    options = read("meta/argument_specs.yml")["argument_specs"]["main"]["options"]
    assert {name: option["default"] for name, option in options.items()} == read("defaults/main.yml")
    assert variables.check(read("defaults/main.yml")) == []


@pytest.mark.parametrize(
    ("name", "value", "where"),
    [
        ("ollama_archive", {"url": "https://h/o.tgz"}, "ollama_archive"),
        ("ollama_archive", {"sha256": "0" * 64}, "ollama_archive"),
        ("ollama_archive", {"url": "https://h/install.sh", "sha256": "0" * 64}, "ollama_archive"),
        ("ollama_archive", {"url": "https://h/o.tgz", "sha256": "latest"}, "ollama_archive"),
        ("ollama_models", [{"name": "a b"}], "ollama_models"),
        ("ollama_models", [{"name": "a", "digest": "1"}], "ollama_models"),
        ("ollama_models", ["a"], "ollama_models"),
        ("ollama_host", "localhost", "ollama_host"),
        ("ollama_state_dir", "/", "ollama_state_dir"),
        ("ollama_environment", {"OLLAMA_HOST": "0.0.0.0"}, "ollama_environment"),
        ("ollama_environment", {"LD_PRELOAD": "x"}, "ollama_environment"),
        ("ollama_environment", {"OLLAMA_KEEP_ALIVE": 'x"\nExecStart=y'}, "ollama_environment"),
        ("ollama_user", "root", "ollama_user"),
    ],
)
def test_bad_data_is_refused_before_the_box_is_contacted(
    variables: RoleVariables, name: str, value: Any, where: str
) -> None:
    found = variables.check({name: value})
    assert [problem.path[0] for problem in found] == [where]
    assert all(problem.fix for problem in found)


def test_an_archive_and_its_models(variables: RoleVariables) -> None:
    archive = {"url": "https://example.org/ollama-linux-amd64.tar.zst", "sha256": "0" * 64}
    models = [{"name": "qwen2.5:14b"}, {"name": "hf.co/a/b:Q4", "digest": "f" * 64}]
    assert variables.check({"ollama_archive": archive, "ollama_models": models}) == []


# --- an Ollama that is not asked for ---

MARK = "# Managed by llmbox: roles/ollama."


class Box:
    """Where the role looks for an Ollama when the inventory asks for none; its systemctl is a stand-in."""

    def __init__(self, folder: Path) -> None:
        self.unit, self.link, self.root = folder / "ollama.service", folder / "bin/ollama", folder / "opt"
        self._folder, self._said = folder, folder / "systemctl.log"
        (self.root / "current/bin").mkdir(parents=True)
        self.link.parent.mkdir()
        systemctl = folder / "path/systemctl"
        systemctl.parent.mkdir()
        systemctl.write_text(
            f'#!/bin/sh\necho "$*" >> {self._said}\n'
            "case $1 in\n  show) echo LoadState=loaded; echo ActiveState=active ;;\n"
            "  is-enabled) echo enabled ;;\nesac\n"
        )
        systemctl.chmod(0o755)

    def play(self) -> PlaybookRun:
        """The role with its defaults."""
        task = {"name": "The role", "ansible.builtin.include_role": {"name": "ollama"}}
        play = [{"hosts": "all", "gather_facts": False, "connection": "local", "tasks": [task]}]
        (self._folder / "play.yml").write_text(yaml.safe_dump(play))
        (self._folder / "inventory.yml").write_text(yaml.safe_dump({"all": {"hosts": {"box": {}}}}))
        places = {"_ollama_unit": self.unit, "_ollama_link": self.link, "ollama_root": self.root}
        given = {"ansible_become": False, **{name: str(path) for name, path in places.items()}}
        return ansible_playbook(
            *(self._folder / "play.yml", "-e", json.dumps(given)),
            inventory=self._folder / "inventory.yml",
            env={"PATH": f"{self._folder}/path:{os.environ['PATH']}"},
            timeout=120,
        ).check()

    def asked_to(self) -> set[str]:
        """What systemd was asked to do."""
        lines = self._said.read_text().splitlines() if self._said.exists() else []
        return {line for line in lines if line.split()[0] in ("stop", "disable")}


@pytest.mark.parametrize(
    "text",
    ["[Unit]\nDescription=Ollama Service\n", f"[Unit]\n{MARK}\n", ""],
    ids=["the vendor's", "the mark elsewhere", "empty"],
)
def test_an_ollama_that_is_not_ours_stays_and_is_told(tmp_path: Path, text: str) -> None:
    box = Box(tmp_path)
    box.unit.write_text(text)
    box.link.write_text("its program")
    done = box.play()
    assert done.changed == 0 and box.asked_to() == set()
    assert f"{box.unit} stays with its program" in " ".join(done.stdout.split())
    assert box.unit.read_text() == text and box.link.read_text() == "its program" and box.root.exists()


def test_ours_goes_and_leaves_a_program_of_another(tmp_path: Path) -> None:
    box = Box(tmp_path)
    template = (ROLE / "templates/ollama.service.j2").read_text()
    assert template.startswith("{{ _ollama_mark }}") and read("vars/main.yml")["_ollama_mark"] == MARK
    box.unit.write_text(f"{MARK} Put local changes elsewhere.\n[Unit]\n")
    box.link.write_text("another's program")
    (box.root / "releases/abc").mkdir(parents=True)
    (box.root / "theirs").touch()  # ollama_root may be a folder that others use
    assert box.play().changed > 0
    assert box.asked_to() == {"stop ollama.service", "disable ollama.service"}
    assert not box.unit.exists() and box.link.read_text() == "another's program"
    assert [path.name for path in box.root.iterdir()] == ["theirs"]
    assert box.play().changed == 0

    box.unit.write_text(f"{MARK}\n")
    box.link.unlink()
    box.link.symlink_to(box.root / "current/bin/ollama")
    box.play()
    assert not box.link.is_symlink()
