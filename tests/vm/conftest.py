"""The UEFI machine for tests. The first one makes the machine of the lab that LAB_NAME names, anew.

`LAB_NAME=x .venv/bin/python -m pytest tests/vm/test_machine.py`, then `LAB_NAME=x python3 -m lab down`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.untouched import MachineState
from tests.vm.machine import Machine


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What compares this machine with what it was before comes last."""
    items.sort(key=lambda item: "test_host_untouched" in item.nodeid)


@pytest.fixture(scope="session")
def before_anything() -> MachineState:
    """This machine before the first test has asked for a lab."""
    return MachineState.now()


@pytest.fixture(scope="session")
def _booted(before_anything: MachineState) -> Machine:
    if os.geteuid() != 0:
        pytest.skip("the UEFI machine needs root")
    machine = Machine()
    machine.make()
    machine.snapshot("fresh")
    return machine


@pytest.fixture(scope="module")
def machine(_booted: Machine) -> Iterator[Machine]:
    """The running machine as it was right after its first start: disk, firmware variables and memory."""
    _booted.restore("fresh")
    yield _booted
    _booted.keep_console()


@pytest.fixture
def restored(machine: Machine) -> Machine:
    """The same, for a single test."""
    machine.restore("fresh")
    return machine
