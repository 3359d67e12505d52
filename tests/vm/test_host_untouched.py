"""The machine that runs the lab keeps its boot files, modules, sysctls and clock. Runs last."""

from __future__ import annotations

from tests.untouched import MachineState
from tests.vm.machine import NAME, Machine


def test_the_machine_that_runs_the_lab_is_as_it_was(before_anything: MachineState, machine: Machine) -> None:
    assert machine.out("hostname") == NAME
    assert before_anything.changes() == {}
