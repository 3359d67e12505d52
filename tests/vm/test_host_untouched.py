"""The machine that runs the lab keeps its boot files, modules, sysctls and clock. Runs last."""

from __future__ import annotations

from tests.vm.machine import Machine
from tests.vm.untouched import MachineState

# What the kernel loads by itself when a lab asks for an interface, a table or an overlay.
LOADED_ON_USE = (
    "tun",
    "bridge",
    "stp",
    "llc",
    "veth",
    "overlay",
    "nf",
    "nft",
    "xt",
    "tap",
    "kvm",
    "irqbypass",
)


def different(before: dict[str, str], after: dict[str, str]) -> dict[str, tuple[str | None, str | None]]:
    return {
        name: (before.get(name), after.get(name))
        for name in before.keys() | after.keys()
        if before.get(name) != after.get(name)
    }


def test_the_machine_that_runs_the_lab_is_as_it_was(before_anything: MachineState, machine: Machine) -> None:
    """A role that ran on the wrong side, or a lab that reached out of its places, would show here."""
    assert machine.out("hostname") == "lab-vm"
    after = MachineState.now()
    assert different(before_anything.files, after.files) == {}
    assert different(before_anything.sysctls, after.sysctls) == {}
    assert before_anything.modules <= after.modules
    new = {name for name in after.modules - before_anything.modules if not name.startswith(LOADED_ON_USE)}
    assert new == set()
    assert abs(after.clock_offset - before_anything.clock_offset) < 2
