#!/usr/bin/env python3
"""Write the lock file of an inventory: the commit behind each build's `ref`; the commit, the sizes and the
SHA-256 behind each model's `hf`.

    scripts/lock_models.py --inventory inventory/production [--check] [--only NAME]... [--hub-endpoint URL]

Reads `llama_cpp_builds` and `gguf_models` through ansible-inventory, asks the hub's metadata API and
`git ls-remote` (nothing is downloaded, no host of the inventory is contacted) and writes
`group_vars/llama_hosts/lock.yml`, whole or not at all. A build with `commit` and a model with `url`, `path`
or `files` need no lock and are left alone.

HF_TOKEN, when set, goes to the hub and nowhere else, and only over https or to this machine.

Exit codes: 0 the lock is written, or was current; 1 --check found it out of date, or what the inventory names
cannot be locked (no such repository, file or ref; gated; no checksum published); 2 could not run (usage, an
inventory that cannot be read, no answer from the hub or from git). With 1 and 2 nothing is written.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV_PYTHON = ROOT / ".venv/bin/python"
NEEDED = ("httpx", "llama_common", "yaml")


def main() -> int:
    """Run the command with the controller's environment, whichever Python it was called with."""
    if all(importlib.util.find_spec(module) for module in NEEDED):
        sys.path.insert(0, str(ROOT))
        from scripts._lock.command import main as command

        return command(sys.argv[1:])
    if VENV_PYTHON.exists() and Path(sys.prefix) != VENV_PYTHON.parent.parent:
        os.execv(VENV_PYTHON, [str(VENV_PYTHON), *sys.argv])  # noqa: S606 - no shell: the same command again
    print("refused: the controller's environment is missing or incomplete; fix: make setup", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
