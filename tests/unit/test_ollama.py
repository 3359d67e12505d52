"""Role ollama's module and the pipeline's Ollama backend against a scripted server, and the role's data."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
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
from tests.support import ROOT

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
