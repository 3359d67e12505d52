"""inventory/production: refused without a lock, and the very command that the refusal names mends it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.local_hub import LocalHub
from tests.support import BIN, ROOT, environment

PRODUCTION = ROOT / "inventory/production"
LOCK = Path("group_vars/llama_hosts/lock.yml")
TIMEOUT_S = 60
REFUSED = re.compile(r"^refused: .*$", re.MULTILINE)


@pytest.fixture
def production(tmp_path: Path) -> Path:
    """A copy of inventory/production, without the lock that its user may have written."""
    copy = tmp_path / "production"
    shutil.copytree(PRODUCTION, copy, ignore=shutil.ignore_patterns(LOCK.name))
    return copy


def group_data(folder: Path, name: str) -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load((folder / "group_vars/llama_hosts" / name).read_text())
    return data


def git(*arguments: str) -> str:
    """Run git with an identity of its own. Returns what it printed."""
    command = ["git", "-c", "user.name=lab", "-c", "user.email=lab", *arguments]
    return subprocess.run(
        command, check=True, timeout=TIMEOUT_S, capture_output=True, text=True
    ).stdout.strip()


def local_remotes(folder: Path, builds: dict[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """A repository on this machine for each build.

    Returns the commit of each ref, and the environment in which git finds them under the inventory's URLs.
    """
    commits, settings = {}, {"GIT_CONFIG_COUNT": str(len(builds))}
    for number, (name, entry) in enumerate(builds.items()):
        place = folder / f"{name}.git"
        git("init", "-q", f"--initial-branch={entry['ref']}", str(place))
        git("-C", str(place), "commit", "-q", "--allow-empty", "-m", name)
        commits[name] = git("-C", str(place), "rev-parse", "HEAD")
        settings[f"GIT_CONFIG_KEY_{number}"] = f"url.{place.as_uri()}.insteadOf"
        settings[f"GIT_CONFIG_VALUE_{number}"] = entry["repo"]
    return commits, settings


def validate(inventory: Path) -> tuple[int, list[str], str]:
    """Run validate.yml. Returns its exit code, the lines that refuse, and the whole output."""
    done = subprocess.run(
        [str(BIN / "ansible-playbook"), "playbooks/validate.yml", "-i", str(inventory)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    output = done.stdout + done.stderr
    return done.returncode, REFUSED.findall(output), output


def test_the_refusal_names_the_command_that_mends_it(production: Path, tmp_path: Path) -> None:
    code, refused, output = validate(production)
    assert code != 0 and len(refused) == 1, output
    named = re.search(r"fix: run (scripts/lock_models\.py --inventory \S+)", refused[0])
    assert named is not None, refused[0]

    models = group_data(production, "models.yml")["gguf_models"]
    commits, settings = local_remotes(tmp_path, group_data(production, "builds.yml")["llama_cpp_builds"])
    with LocalHub() as hub:
        for entry in models.values():
            hub.add(entry["hf"]["repo"], {entry["hf"]["file"]: entry["hf"]["repo"].encode()})
        inherited = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
        variables = {**inherited, **settings, "HF_ENDPOINT": hub.url, "NO_PROXY": "127.0.0.1"}
        done = subprocess.run(
            [sys.executable, *shlex.split(named.group(1))],
            cwd=ROOT,
            env=variables,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    lock = yaml.safe_load((production / LOCK).read_text())["llama_lock"]
    assert {name: entry["commit"] for name, entry in lock["builds"].items()} == commits
    assert set(lock["models"]) == set(models)
    assert f"--inventory {production}" in (production / LOCK).read_text().splitlines()[1]

    code, refused, output = validate(production)
    assert (code, refused) == (0, []), output


def test_production_invents_no_commit_and_no_checksum() -> None:
    """Whatever is pinned comes from the lock, and that one is its user's."""
    for path in sorted(PRODUCTION.rglob("*.yml")):
        if path.name != LOCK.name:
            assert not re.search(r"\b[0-9a-f]{40}(?:[0-9a-f]{24})?\b", path.read_text()), path
