#!/usr/bin/env python3
"""Ansible inventory of the lab that LAB_NAME names (standard library only)."""

import json
import sys
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lab.config import from_environment  # noqa: E402 - found through the line above
from lab.inventory import inventory  # noqa: E402
from lab.shell import LabError  # noqa: E402

try:
    print(json.dumps(inventory(from_environment()), indent=1))
except LabError as error:
    sys.exit(f"lab: {error}")
