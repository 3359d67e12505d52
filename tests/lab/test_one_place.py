"""One place per fact: a preset added to the data file appears everywhere, and no other file changes."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from tests import support

pytestmark = pytest.mark.usefixtures("lab")

NAME = "added"
PRESETS = "group_vars/llm_servers/presets.yml"


@pytest.fixture
def copied_inventory() -> Iterator[Path]:
    """A copy of the lab inventory with one more preset; the host is put back afterwards."""
    copy = support.ROOT / "build" / "inventory-with-one-more"  # hosts.py finds the repository two folders up
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(support.LAB_INVENTORY, copy)
    data = yaml.safe_load((copy / PRESETS).read_text())
    data["llama_presets"][NAME] = {
        **data["llama_presets"]["smol"],
        "description": "One more preset",
        "aliases": ["ad"],
    }
    (copy / PRESETS).write_text("---\n" + yaml.safe_dump(data, sort_keys=False))
    yield copy
    support.ansible_playbook("playbooks/llm_server.yml").check()
    shutil.rmtree(copy)


def lmswitch(*words: str) -> dict[str, object]:
    """Run `lmswitch … --json` on the box as its user."""
    done = support.on_host(
        support.LLM, f"sudo -iu llm lmswitch {' '.join(words)} --json", timeout=120
    ).check()
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


def url() -> str:
    """The gateway, from this machine."""
    return support.expected().url(support.expected_host().address)


def tracked() -> dict[str, str]:
    """Every file of the repository that is under version control, and the hash of its content."""
    listed = support.run("git", "-C", support.ROOT, "ls-files", "-z").check().stdout
    paths = [support.ROOT / name for name in listed.split("\0") if name]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.is_file()}


def unit(preset: str) -> str:
    """The text of a preset's unit on the box."""
    return support.on_host(support.LLM, f"sudo cat {unit_path(preset)}").check().stdout


def unit_path(preset: str) -> str:
    """Where a preset's unit is on the box."""
    box = support.expected()
    return f"{box.home}/.config/systemd/user/{box.unit(preset)}"


def test_one_entry_appears_everywhere(copied_inventory: Path) -> None:
    before = tracked()
    support.ansible_playbook("playbooks/llm_server.yml", inventory=copied_inventory).check()

    others = list(yaml.safe_load((support.LAB_INVENTORY / PRESETS).read_text())["llama_presets"])
    own = unit(NAME)
    for other in others:
        conflicts = [line for line in unit(other).splitlines() if line.startswith("Conflicts=")]
        assert f"llama-{NAME}.service" in " ".join(conflicts), f"{other} does not exclude {NAME}"
        assert f"llama-{other}.service" in own

    assert NAME in json.dumps(lmswitch("list"))
    lmswitch("ad")  # by its alias
    status = lmswitch("status")
    assert (status["active"], status["state"]) == (NAME, "ready")
    models = httpx.get(f"{url()}/v1/models", timeout=30, trust_env=False).raise_for_status().json()["data"]
    assert {model["id"]: model["state"] for model in models}[NAME] == "active"

    table = support.run(
        support.BIN / "python",
        "scripts/render_docs.py",
        "--inventory",
        copied_inventory,
        "--output",
        copied_inventory / "presets.md",
    ).check()
    assert f"`{NAME}`" in table.stdout

    assert tracked() == before, "something wrote into the repository"
    changed = [
        str(path.relative_to(support.LAB_INVENTORY))
        for path in support.LAB_INVENTORY.rglob("*.*")
        if path.is_file() and path.suffix != ".pyc"
        if path.read_bytes() != (copied_inventory / path.relative_to(support.LAB_INVENTORY)).read_bytes()
    ]
    assert changed == [PRESETS]  # the one file in which the fact stands


def test_a_removed_entry_disappears(copied_inventory: Path) -> None:
    support.ansible_playbook("playbooks/llm_server.yml", inventory=copied_inventory).check()
    support.ansible_playbook("playbooks/llm_server.yml").check()
    gone = support.on_host(support.LLM, f"sudo test ! -e {unit_path(NAME)}")
    gone.check()
    assert NAME not in json.dumps(lmswitch("list"))
