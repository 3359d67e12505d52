"""`draft: auto` on a real box: a draft is found by its tokenizer, started, measured, rejected or kept.

Two pairs, of which real runs say what everybody would: a draft with random weights, of which hardly a token
is accepted, makes its preset slower; a model drafts for a deeper one that writes the same as it does, and
makes it faster. Where others use the machine so much that the runs leave it undecided, the verdict of a quiet
one stands in; the verdict itself is tested with injected timings (tests/unit/test_choose_draft.py).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
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
from scripts._header import client, read_file
from scripts._lock import lockfile
from scripts._verdict import LEAST_PAIRS
from tests.support import LAB_INVENTORY, LLM, ROOT, Run, ansible_playbook, expected, expected_host, on_host

pytestmark = [pytest.mark.usefixtures("lab"), pytest.mark.long]

MEASURE = choose_draft.measure
NAME, LIKE, DRAFT, DEEPER = "drafted", "smol-upstream", "tiny-draft", "deeper"
MORE_BLOCKS = 120  # to the 30 of SmolLM2: its answers take five times as long
MODELS, PRESETS = "group_vars/llama_hosts/models.yml", "group_vars/llm_servers/presets.yml"
PLAY = "playbooks/llm_server.yml"


def lmswitch(words: str) -> Run:
    """Run lmswitch as the presets' user."""
    return on_host(LLM, f"sudo -u {expected().user} lmswitch {words}", timeout=180)


def facts(header: Header, sha256: str) -> dict[str, Any]:
    """A header as the lock has it."""
    return {"sha256": sha256, **Model.of([header]).facts(), "tokenizer": tokenizer_facts(header)}


def original(folder: Path) -> tuple[str, dict[str, Any], Path]:
    """The model of the preset LIKE: its key, its data, and the file."""
    name = yaml.safe_load((LAB_INVENTORY / PRESETS).read_text())["llama_presets"][LIKE]["model"]
    entry = expected_host().variables["gguf_models"][name]
    whole = folder / "model.gguf"
    with client() as web:
        whole.write_bytes(web.get(entry["url"]).raise_for_status().content)
    return name, entry, whole


@contextmanager
def inventory_with(lab: str, new: str, file: Path, model: str, known: dict[str, Any]) -> Iterator[Path]:
    """A copy of the lab's inventory with the model `new` and a preset with `draft: auto`, of `model`.

    `known` are headers for the lock beside that of `new`.
    """
    copy = ROOT / "build" / f"inventory-draft-{lab}"  # hosts.py finds the repository two folders up
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(LAB_INVENTORY, copy)
    presets = yaml.safe_load((copy / PRESETS).read_text())
    models = yaml.safe_load((copy / MODELS).read_text())
    digest, on_the_host = hashlib.sha256(file.read_bytes()).hexdigest(), f"/var/tmp/{new}.gguf"
    with file.open("rb") as content:
        argv = expected_host().ssh(f"cat > {on_the_host}")
        subprocess.run(argv, stdin=content, check=True, timeout=300)
    models["gguf_models"][new] = {"path": on_the_host, "sha256": digest, "size": file.stat().st_size}
    presets["llama_presets"][NAME] = {
        **presets["llama_presets"][LIKE],
        "description": "A preset with a draft",
        "model": model,
        "aliases": ["dr"],
        "draft": "auto",
    }
    (copy / MODELS).write_text("---\n" + yaml.safe_dump(models, sort_keys=False))
    (copy / PRESETS).write_text("---\n" + yaml.safe_dump(presets, sort_keys=False))
    headers = {**known, new: facts(read_file(file), digest)}
    path = lockfile.path_of(copy)
    path.write_text(lockfile.render({"builds": {}, "models": {}, "headers": headers}, path, "a test"))
    before = json.loads(lmswitch("status --json").check().stdout)["active"]
    yield copy
    ansible_playbook(PLAY).check()
    lmswitch(before or "off")
    on_host(LLM, f"sudo rm -f {on_the_host} {expected().models_dir}/{new}.gguf").check()
    shutil.rmtree(copy)


@pytest.fixture
def bad_draft(lab: str, tmp_path: Path) -> Iterator[Path]:
    """A preset of the original, and a draft that guesses."""
    name, entry, whole = original(tmp_path)
    known = {name: facts(read_file(whole), entry["sha256"])}
    draft = _tiny_models.write_draft(whole, tmp_path)
    with inventory_with(lab, DRAFT, draft, name, known) as inventory:
        yield inventory


@pytest.fixture
def good_draft(lab: str, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A preset of a model that is deeper than the original, which is its draft."""
    name, entry, whole = original(tmp_path)
    known = {name: facts(read_file(whole), entry["sha256"])}
    deeper = _tiny_models.write_deeper(whole, tmp_path, MORE_BLOCKS)
    with inventory_with(lab, DEEPER, deeper, DEEPER, known) as inventory:
        yield inventory, name


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


def test_a_draft_that_guesses_wrong_is_rejected(
    bad_draft: Path, short: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ansible_playbook(PLAY, inventory=bad_draft).check()
    told = status()
    assert (told["setting"], told["type"], told["choice"]) == ("auto", None, None)
    assert "auto has not been measured" in lmswitch("status").stdout
    file = bad_draft / "host_vars" / LLM / "drafts.yml"

    # Really started, measured, rejected, and never started again.
    expect("rejected", monkeypatch)
    code, check, said = choose(bad_draft, capsys)
    assert (code, check["ok"]) == (0, True), said
    assert f"{DRAFT} rejected: an answer comes" in check["detail"]
    rejected = file.read_text()
    code, check, said = choose(bad_draft, capsys)
    assert code == 0 and "rejected already" in said and "generation" not in said.split("rejected already")[0]
    assert file.read_text() == rejected

    play = ansible_playbook(PLAY, inventory=bad_draft).check()
    assert play.changed >= 1
    told = status()
    assert (told["type"], told["choice"]["verdict"], told["fresh"]) == (None, "rejected", True)
    assert f"{DRAFT}, rejected" in lmswitch("status").stdout
    assert DRAFT not in argv()
    assert ansible_playbook(PLAY, inventory=bad_draft).check().changed == 0


def test_a_draft_that_guesses_right_is_kept(
    good_draft: tuple[Path, str],
    short: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    inventory, draft = good_draft
    ansible_playbook(PLAY, inventory=inventory).check()
    expect("kept", monkeypatch)
    code, check, said = choose(inventory, capsys)
    assert (code, check["ok"]) == (0, True), said
    assert f"{draft} kept: an answer comes" in check["detail"]

    dry = ansible_playbook(PLAY, "--check", "--diff", inventory=inventory).check()
    assert dry.changed >= 1 and "--spec-draft-model" in dry.stdout
    ansible_playbook(PLAY, inventory=inventory).check()
    told = status()
    assert (told["type"], told["choice"]["verdict"], told["fresh"]) == ("draft-simple", "kept", True)
    assert f"--spec-draft-model {expected().models_dir}/{draft}.gguf" in argv()
    assert ansible_playbook(PLAY, inventory=inventory).check().changed == 0
    on_host(LLM, "sudo llmbox-drift check", timeout=120).check()
