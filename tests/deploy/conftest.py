"""Fixtures of the deploy tests: what the inventory wants of the host that a test looks at.

`.venv/bin/pytest tests/deploy --ansible-inventory=inventory/production` works like the lab's run;
`--hosts=ansible://NAME` narrows it to one box. Nothing is changed on a host.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts._inventory import Host, InventoryUnreadable, environment, load
from scripts._llm_box import LlmBox

COMMAND = ".venv/bin/pytest tests/deploy --ansible-inventory=inventory/lab [--hosts=ansible://HOST]"
HOSTS = pytest.StashKey[list[Host]]()


def pytest_configure(config: pytest.Config) -> None:
    """Read the inventory before anything is asked: left alone, testinfra takes ansible.cfg's (production)."""
    # testinfra calls ansible-inventory by name: it must find this venv's, with the repository's settings.
    os.environ.update(environment())
    if config.getoption("help"):
        return
    path, patterns = config.getoption("ansible_inventory"), config.getoption("hosts") or ""
    try:
        if not path:
            raise InventoryUnreadable("--ansible-inventory is missing")
        limit = ",".join(pattern.partition("://")[2] for pattern in patterns.split(","))
        config.stash[HOSTS] = load(Path(path), limit=limit)
    except InventoryUnreadable as error:
        raise pytest.UsageError(f"tests/deploy: {error}; type: {COMMAND}") from None


@pytest.fixture(scope="session")
def inventory(pytestconfig: pytest.Config) -> dict[str, Host]:
    """Every host of the inventory that pytest was given, by name and by address."""
    return {key: host for host in pytestconfig.stash[HOSTS] for key in (host.address, host.name)}


@pytest.fixture(scope="module")
def wanted(inventory: dict[str, Host], host: Any) -> Host:
    """The inventory's entry of the host under test."""
    return inventory[host.backend.get_hostname()]


@pytest.fixture(scope="module")
def box(wanted: Host) -> LlmBox:
    """The LLM box that the inventory describes."""
    return LlmBox.of(wanted.variables)


@pytest.fixture(scope="module")
def as_root(host: Any) -> Callable[[str], Any]:
    """Run a shell command as root; returns testinfra's result (rc, stdout, stderr)."""

    def run(command: str) -> Any:
        with host.sudo():
            return host.run(command)

    return run


@pytest.fixture(scope="module")
def as_llm(host: Any, box: LlmBox) -> Callable[[str], Any]:
    """Run a shell command as the model server's user, without a login shell, as `ssh HOST lmswitch` does."""

    def run(command: str) -> Any:
        with host.sudo(box.user):
            return host.run(command)

    return run
