"""Fixtures for every kind of test. The functions behind them are in tests/support.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import support


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return support.ROOT


@pytest.fixture(scope="session")
def lab_name() -> str:
    """The lab that LAB_NAME chooses."""
    return support.lab_name()


@pytest.fixture(scope="session")
def ansible_playbook() -> Callable[..., support.PlaybookRun]:
    """`ansible_playbook("site.yml", "--check", timeout=300) -> PlaybookRun` against inventory/lab."""
    return support.ansible_playbook
