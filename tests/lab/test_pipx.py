"""local-claude from a checkout, as its page says: the very commands, with the real pipx in a new home.

Needs no host of the lab, but a package index for pipx, setuptools and pydantic.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import support

pytestmark = pytest.mark.long

PIPX = "pipx==1.18.4"
INSTALL_TIMEOUT_S = 600
PAGE = support.ROOT / "docs/local-claude.md"


def test_the_commands_of_the_page_install_it_from_a_checkout(tmp_path: Path) -> None:
    checkout, tools = tmp_path / "checkout", tmp_path / "tools"
    for name in ("llama_common", "local_claude"):
        shutil.copytree(
            support.ROOT / "apps" / name,
            checkout / "apps" / name,
            ignore=shutil.ignore_patterns("*.egg-info", "build", "__pycache__"),
        )
    subprocess.run([sys.executable, "-m", "venv", tools], check=True, timeout=60)
    pip = str(tools / "bin/pip")
    subprocess.run([pip, "install", "--quiet", PIPX], check=True, timeout=INSTALL_TIMEOUT_S)
    (tools / "bin/claude").write_text("#!/bin/sh\n")
    (tools / "bin/claude").chmod(0o755)
    home = tmp_path / "home"
    environment = {
        "HOME": str(home),
        "PATH": f"{home}/.local/bin:{tools}/bin:/usr/bin:/bin",
        "PIPX_HOME": str(home / ".local/share/pipx"),
        "PIPX_BIN_DIR": str(home / ".local/bin"),
    }

    def local_claude(*words: str) -> support.Run:
        return support.run("local-claude", *words, env=environment)

    install, inject = re.findall(r"^\$ (pipx .+?)(?: +#.*)?$", PAGE.read_text(), re.MULTILINE)
    for command, words in ((install, ("--backend", "llama")), (inject, ("--backend", "llama", "--dry-run"))):
        done = support.run("sh", "-c", command, env=environment, cwd=checkout, timeout=INSTALL_TIMEOUT_S)
        assert done.rc == 0, done.tail()
        assert "Run Claude Code on a local model" in local_claude("--help").check().stdout
        refused = local_claude(*words)
        assert refused.rc == 78 and ("pipx inject" in refused.stderr) == (command == install), refused.tail()
    assert "there is no llama-server" in refused.stderr
