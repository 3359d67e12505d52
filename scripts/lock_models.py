#!/usr/bin/env python3
"""Write the lock file of an inventory: the commit behind each build's `ref`; the commit, the sizes and the
SHA-256 behind each model's `hf`; what the header of each model says of its memory.

    scripts/lock_models.py --inventory inventory/production [--check] [--only NAME]... [--hub-endpoint URL]

Reads `llama_cpp_builds` and `gguf_models` through ansible-inventory, asks the hub's metadata API and
`git ls-remote`, reads the headers of the models by HTTP ranges (at most 32 MB of each; no host of the
inventory is contacted) and writes `group_vars/llama_hosts/lock.yml`, whole or not at all. A build with
`commit` and a model with `path` need no lock and are left alone; of a model with `url` only the header is
kept. A header that cannot be read is told and left out.

HF_TOKEN, when set, goes to the hub and nowhere else, and only over https or to this machine.

Exit codes: 0 the lock is written, or was current; 1 --check found it out of date, or what the inventory names
cannot be locked (no such repository, file or ref; gated; no checksum published); 2 could not run (usage, an
inventory that cannot be read, no answer from the hub or from git). With 1 and 2 nothing is written.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts import _venv

if __name__ == "__main__":
    _venv.enter()
    from scripts._lock.command import main

    sys.exit(main(sys.argv[1:]))
