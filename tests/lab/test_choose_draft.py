"""`draft: auto` on a real box: a draft is found by its tokenizer, started, measured, rejected or kept.

The draft has random weights, so that hardly a token of it is accepted: it makes the preset slower. The one
that is kept has a synthetic acceptance (--spec-synth-len of llama-server). Where others use the machine so
much that the runs leave it undecided, the verdict of a quiet one stands in; the verdict itself is tested with
injected timings (tests/unit/test_choose_draft.py).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from llama_common.draft import tokenizer_facts
from llama_common.gguf import Header
from llama_common.model import Model

from scripts import _measure, _tiny_models, choose_draft
from scripts._draft_choice import Judged, Word
from scripts._header import client, read_file, read_url
from scripts._lock import lockfile
from scripts._verdict import LEAST_PAIRS
from tests.support import LAB_INVENTORY, LLM, ROOT, Run, ansible_playbook, expected, expected_host, on_host

pytestmark = [pytest.mark.usefixtures("lab"), pytest.mark.long]

MEASURE = choose_draft.measure
NAME, LIKE, DRAFT = "drafted", "smol-upstream", "tiny-draft"
MODELS, PRESETS = "group_vars/llama_hosts/models.yml", "group_vars/llm_servers/presets.yml"
ON_THE_HOST = f"/var/tmp/{DRAFT}.gguf"
PLAY = "playbooks/llm_server.yml"


def lmswitch(words: str) -> Run:
    """Run lmswitch as the presets' user."""
    return on_host(LLM, f"sudo -u {expected().user} lmswitch {words}", timeout=180)


def facts(header: Header, sha256: str) -> dict[str, Any]:
    """A header as the lock has it."""
    return {"sha256": sha256, **Model.of([header]).facts(), "tokenizer": tokenizer_facts(header)}


@pytest.fixture(scope="module")
def inventory(lab: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the lab's inventory with a draft model, a lock and a preset with `draft: auto`."""
    folder = tmp_path_factory.mktemp("draft")
    copy = ROOT / "build" / f"inventory-draft-{lab}"  # hosts.py finds the repository two folders up
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(LAB_INVENTORY, copy)
    presets = yaml.safe_load((copy / PRESETS).read_text())
    models = yaml.safe_load((copy / MODELS).read_text())
    name = presets["llama_presets"][LIKE]["model"]
    entry = expected_host().variables["gguf_models"][name]
    whole = folder / "model.gguf"
    with client() as web:
        header = read_url(web, entry["url"], entry["size"])
        whole.write_bytes(web.get(entry["url"]).raise_for_status().content)
    draft = _tiny_models.write_draft(whole, folder)
    digest = hashlib.sha256(draft.read_bytes()).hexdigest()
    argv = expected_host().ssh(f"cat > {ON_THE_HOST}")
    with draft.open("rb") as content:
        subprocess.run(argv, stdin=content, check=True, timeout=60)
    models["gguf_models"][DRAFT] = {"path": ON_THE_HOST, "sha256": digest, "size": draft.stat().st_size}
    presets["llama_presets"][NAME] = {
        **presets["llama_presets"][LIKE],
        "description": "A preset with a draft",
        "aliases": ["dr"],
        "draft": "auto",
    }
    (copy / MODELS).write_text("---\n" + yaml.safe_dump(models, sort_keys=False))
    (copy / PRESETS).write_text("---\n" + yaml.safe_dump(presets, sort_keys=False))
    headers = {name: facts(header, entry["sha256"]), DRAFT: facts(read_file(draft), digest)}
    path = lockfile.path_of(copy)
    path.write_text(lockfile.render({"builds": {}, "models": {}, "headers": headers}, path, "a test"))
    before = json.loads(lmswitch("status --json").check().stdout)["active"]
    yield copy
    ansible_playbook(PLAY).check()
    lmswitch(before or "off")
    on_host(LLM, f"sudo rm -f {ON_THE_HOST} {expected().models_dir}/{DRAFT}.gguf").check()
    shutil.rmtree(copy)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs so short that a slow machine ends them before their lease does."""
    monkeypatch.setattr(_measure, "SHORT_TOKENS", 96)
    monkeypatch.setattr(_measure, "SHORT_GENERATE", 48)


def choose(
    inventory: Path, capsys: pytest.CaptureFixture[str], *more: str
) -> tuple[int, dict[str, Any], str]:
    """Exit code, the entry of the preset in the report, and what was told."""
    code = choose_draft.main(["--inventory", str(inventory), "--json", "-", *more])
    said = capsys.readouterr()
    assert said.out, said.err
    (report,) = (one for one in json.loads(said.out)["hosts"] if one["host"] == LLM)
    assert report["error"] is None, report
    (check,) = report["checks"]
    return code, check, said.err


def expect(word: Word, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have both sides run and be judged; only where that leaves it undecided the verdict is `word`."""

    def judged(*args: Any) -> Judged:
        found = MEASURE(*args)
        assert found.word in (word, "undecided") and found.pairs >= LEAST_PAIRS, found
        return replace(found, word=word)

    monkeypatch.setattr(choose_draft, "measure", judged)


def status() -> dict[str, Any]:
    """What lmswitch says of the draft of the preset, which serves then; and that the words say it too."""
    lmswitch(NAME).check()
    shown = json.loads(lmswitch("status --json").check().stdout)
    assert (shown["active"], shown["state"]) == (NAME, "ready")
    draft: dict[str, Any] = shown["draft"]
    return draft


def argv() -> str:
    """The command line of the server that runs."""
    return on_host(LLM, "sudo pgrep -a -x llama-server").check().stdout


def test_a_draft_is_measured_and_the_box_follows(
    inventory: Path, short: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ansible_playbook(PLAY, inventory=inventory).check()
    told = status()
    assert (told["setting"], told["type"], told["choice"]) == ("auto", None, None)
    assert "auto has not been measured" in lmswitch("status").stdout
    file = inventory / "host_vars" / LLM / "drafts.yml"

    # A draft that guesses wrong makes it slower: really started, measured, rejected, and never started again.
    expect("rejected", monkeypatch)
    code, check, said = choose(inventory, capsys)
    assert (code, check["ok"]) == (0, True), said
    assert f"{DRAFT} rejected: an answer comes" in check["detail"]
    rejected = file.read_text()
    code, check, said = choose(inventory, capsys)
    assert code == 0 and "rejected already" in said and "generation" not in said.split("rejected already")[0]
    assert file.read_text() == rejected

    play = ansible_playbook(PLAY, inventory=inventory).check()
    assert play.changed >= 1
    told = status()
    assert (told["type"], told["choice"]["verdict"], told["fresh"]) == (None, "rejected", True)
    assert f"{DRAFT}, rejected" in lmswitch("status").stdout
    assert DRAFT not in argv()
    assert ansible_playbook(PLAY, inventory=inventory).check().changed == 0

    # Two of three guesses accepted make it faster.
    commands = choose_draft.commands

    def synthetic(*args: Any) -> choose_draft.Commands:
        without, drafted = commands(*args)
        return without, [*drafted, "--spec-synth-len", "3.5"]

    monkeypatch.setattr(choose_draft, "commands", synthetic)
    expect("kept", monkeypatch)
    code, check, said = choose(inventory, capsys, "--again")
    assert (code, check["ok"]) == (0, True), said
    assert f"{DRAFT} kept: an answer comes" in check["detail"]

    dry = ansible_playbook(PLAY, "--check", "--diff", inventory=inventory).check()
    assert dry.changed >= 1 and "--spec-draft-model" in dry.stdout
    ansible_playbook(PLAY, inventory=inventory).check()
    told = status()
    assert (told["type"], told["choice"]["verdict"], told["fresh"]) == ("draft-simple", "kept", True)
    assert f"--spec-draft-model {expected().models_dir}/{DRAFT}.gguf" in argv()
    assert ansible_playbook(PLAY, inventory=inventory).check().changed == 0
    on_host(LLM, "sudo llmbox-drift check", timeout=120).check()
