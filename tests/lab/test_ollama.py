"""Role ollama on the OCR host, with a stand-in for Ollama's archive: nobody's registry has the real one."""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import stand_in_ollama as stand_in
from tests.support import PlaybookRun, ansible_playbook

OCR = "lab-ocr"
ON_HOST = "/var/tmp/stand-in-ollama.tgz"
OnHost = Callable[..., Any]


def play(folder: Path, *options: str, **variables: Any) -> PlaybookRun:
    """The role, with these variables of its own."""
    file = folder / "variables.json"
    file.write_text(json.dumps({f"ollama_{name}": value for name, value in variables.items()}))
    return ansible_playbook("tests/lab/ollama.yml", "-e", f"@{file}", *options, timeout=180)


def models_of(on_host: OnHost) -> set[str]:
    """The models that the server lists."""
    asked = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:11434/api/tags').read().decode())"
    listed = json.loads(on_host(OCR, f"python3 -c {shlex.quote(asked)}").check().stdout)
    return {model["name"] for model in listed["models"]}


@pytest.fixture
def archive(on_host: OnHost, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The stand-in archive on the host; nothing of it stays."""
    data = stand_in.archive()
    on_host(OCR, f"base64 -d > {ON_HOST}", stdin=base64.b64encode(data).decode()).check()
    yield {"url": f"file://{ON_HOST}", "sha256": hashlib.sha256(data).hexdigest()}
    on_host(OCR, f"rm -f {ON_HOST}").check()
    play(tmp_path).check()


@pytest.mark.long
def test_an_archive_is_verified_run_and_given_its_models(
    on_host: OnHost, archive: dict[str, str], tmp_path: Path
) -> None:
    refused = play(tmp_path, archive={**archive, "sha256": "0" * 64})
    assert refused.rc == 2
    assert "checksum" in refused.stdout
    assert on_host(OCR, "ls /opt/ollama/releases/*/* /usr/local/bin/ollama").rc != 0, "nothing of it was kept"

    models = [{"name": "qwen2.5:14b", "digest": stand_in.digest("qwen2.5:14b")}, {"name": "tiny"}]
    assert play(tmp_path, "--check", archive=archive, models=models).check().changed > 0
    assert play(tmp_path, archive=archive, models=models).check().changed > 0
    shown = on_host(
        OCR, "systemctl show -p User,NoNewPrivileges,ProtectSystem,ActiveState,UnitFileState ollama"
    )
    assert set(shown.check().stdout.split()) == {
        *("User=ollama", "NoNewPrivileges=yes", "ProtectSystem=strict", "ActiveState=active"),
        "UnitFileState=enabled",
    }
    assert models_of(on_host) == {"qwen2.5:14b", "tiny:latest"}
    assert on_host(OCR, "test -e /opt/ollama/releases/*.archive").rc != 0
    again = play(tmp_path, archive=archive, models=models).check()
    assert again.changed == 0

    other = play(tmp_path, archive=archive, models=[{"name": "tiny", "digest": "1" * 64}])
    assert other.rc == 2
    assert "tiny has the digest" in other.stdout
    assert models_of(on_host) == {"qwen2.5:14b"}, "deleted again"
