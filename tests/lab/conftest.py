"""Fixtures of the tests that run on the hosts of a lab.

The lab must be up and provisioned with the same LAB_NAME as the tests:
`python3 -m lab up && .venv/bin/ansible-playbook -i inventory/lab site.yml`. The gate does both
before it runs them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests import support

_UP_TIMEOUT_S = 30


@pytest.fixture(scope="session")
def lab(lab_name: str) -> str:
    """The name of a lab whose LLM box answers; any test on hosts depends on it."""
    answer = support.on_host(support.LLM, "true", timeout=_UP_TIMEOUT_S)
    if answer.rc != 0:
        hint = f"LAB_NAME={lab_name} python3 -m lab up"
        pytest.fail(f"lab '{lab_name}' does not answer: {hint}\n{answer.tail(5)}", pytrace=False)
    return lab_name


@pytest.fixture(scope="session")
def lab_hostvars(lab: str) -> dict[str, dict[str, Any]]:
    """What inventory/lab/hosts.py says of each host of the running lab (untemplated)."""
    listed = support.run(support.BIN / "ansible-inventory", "-i", support.LAB_INVENTORY, "--list").check()
    hostvars: dict[str, dict[str, Any]] = json.loads(listed.stdout)["_meta"]["hostvars"]
    return hostvars


@pytest.fixture(scope="session")
def on_host(lab: str) -> Callable[..., support.Run]:
    """`on_host("lab-llm", "sudo ls /root", timeout=60) -> Run` over ssh, as the ordinary sudo user."""
    return support.on_host
