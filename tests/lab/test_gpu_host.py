"""Role gpu_host on a host of the lab: packages from a stand-in of the vendor's repository.

What belongs to the machine (kernel parameters, modules, services, network card, clock) is proved in tests/vm.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.stand_in_nvidia import DECOY, SERVED, STAND_INS, Repository, serve, take_away
from tests.support import OCR, ROOT, PlaybookRun, Run, ansible_playbook, on_host
from tests.untouched import MachineState

pytestmark = pytest.mark.usefixtures("lab")

# Everything that the role knows, as if for a machine with a card.
EVERYTHING: dict[str, Any] = {
    "gpu_host_card": "present",
    "gpu_host_repository": SERVED,
    "gpu_host_repository_key": f"{SERVED}key.asc",
    "gpu_host_driver_version": "580.1-1ubuntu1",
    "gpu_host_cuda_version": "13.0.3-1",
    "gpu_host_held_packages": ["base-files"],
    "gpu_host_power_limit": 200,
    "gpu_host_kernel_parameters": ["pcie_aspm=off"],
    "gpu_host_wake_on_lan": "host0",
    "gpu_host_hardware_clock": "local",
    "gpu_host_allow_reboot": True,
}


def as_root(command: str, stdin: str = "") -> Run:
    """Run a shell command as root on the host."""
    return on_host(OCR, f"sudo sh -c '{command}'", stdin=stdin, timeout=120)


def forget_packages() -> None:
    """As before the first run."""
    as_root(f"apt-mark unhold {STAND_INS}; dpkg --purge {STAND_INS}; rm -f /etc/apt/*/llmbox-nvidia*")


@pytest.fixture(scope="module")
def repository(lab: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Repository]:
    """The stand-in repository, served on the host. Afterwards nothing of it is left there."""
    made = Repository(tmp_path_factory.mktemp("stand-in"))
    take_away(as_root)
    made.lay_out(as_root)
    serve(as_root)
    yield made
    take_away(as_root)


def play(repository: Repository, *words: str, **changes: Any) -> PlaybookRun:
    """Run the role on the host with everything declared, but for what changes."""
    data = {"gpu_host_repository_fingerprint": repository.fingerprint, **EVERYTHING, **changes}
    playbook = ROOT / "tests/lab/gpu_host.yml"
    return ansible_playbook(playbook, "--limit", OCR, "--extra-vars", json.dumps(data), *words)


def versions() -> dict[str, str]:
    """Wish and version of each stand-in that is installed."""
    said = on_host(
        OCR, f"dpkg-query -W -f '${{Package}} ${{db:Status-Want}} ${{Version}}\\n' {STAND_INS}"
    ).stdout
    return {
        line.split()[0]: " ".join(line.split()[1:]) for line in said.splitlines() if len(line.split()) == 3
    }


def test_packages_are_pinned_held_and_upgraded_and_the_machine_is_not_touched(repository: Repository) -> None:
    """Everything is declared, as for a machine: what is the machine's is skipped and said."""
    before = MachineState.now()
    first = play(repository).check()
    for part in ("settings, services and limits", "kernel parameters", "Wake-on-LAN", "hardware clock"):
        assert f"{part}: this is a container (systemd-nspawn)" in first.stdout
    assert versions() == {
        "nvidia-open": "hold 580.1-1ubuntu1",
        "nvidia-driver-open": "hold 580.1-1ubuntu1",  # 595.1 would do for its dependency, and is there
        "nvidia-modprobe": "hold 580.1-1ubuntu1",
        "cuda-toolkit-13-0": "hold 13.0.3-1",
        "cuda-nvcc-13-0": "hold 13.0.88-1",
    }
    policy = on_host(OCR, f"apt-cache policy {DECOY[0]}").check().stdout
    assert DECOY[1] in policy, "the repository is not in use"
    assert f"Candidate: {DECOY[1]}" not in policy, "it gives what nobody asked it for"

    second = play(repository).check()
    assert second.changed == 0, second.tail()

    as_root("apt-mark unhold nvidia-driver-open").check()  # by hand: seen and mended
    changed = play(repository, gpu_host_driver_version="580.2-1ubuntu1").check()
    assert changed.changed == 1
    assert {versions()[name] for name in ("nvidia-open", "nvidia-driver-open", "nvidia-modprobe")} == {
        "hold 580.2-1ubuntu1"
    }
    left = as_root(
        "ls /etc/default/grub.d /etc/modprobe.d /etc/netplan /etc/systemd/system 2>/dev/null"
    ).stdout
    assert "llmbox-gpu" not in left and "99-llmbox" not in left and "llmbox-nvidia" not in left

    assert before.changes() == {}


@pytest.mark.long
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"gpu_host_repository_fingerprint": "0" * 40}, "has the fingerprint {fingerprint}, not 0000"),
        (
            {"gpu_host_driver_version": "581.9-1"},
            "has no nvidia-open 581.9-1, but 595.1-1ubuntu1, 580.2-1ubuntu1",
        ),
        ({"gpu_host_cuda_version": "14.1.0-1"}, "has no package cuda-toolkit-14-1"),
        ({"gpu_host_repository_key": f"{SERVED}Packages"}, "is no OpenPGP key"),
        ({"gpu_host_repository_key": f"{SERVED}none"}, "cannot be had: HTTP Error 404"),
    ],
    ids=["another key", "a missing version", "a missing toolkit", "no key", "no file"],
)
def test_what_is_refused_changes_no_package(
    repository: Repository, changes: dict[str, Any], says: str
) -> None:
    forget_packages()
    before = as_root("dpkg-query -W | sha256sum").stdout
    run = play(repository, **changes)
    assert run.rc != 0
    assert says.format(fingerprint=repository.fingerprint) in " ".join(run.stdout.split())
    assert as_root("dpkg-query -W | sha256sum").stdout == before


@pytest.mark.long
def test_a_list_that_the_key_did_not_sign_is_refused(repository: Repository, tmp_path: Path) -> None:
    """Somebody on the way serves other packages, with a signature of his own."""
    forget_packages()
    play(repository, gpu_host_driver_version="580.1-1ubuntu1").check()
    Repository(tmp_path).lay_out(as_root)
    try:
        run = play(repository, gpu_host_driver_version="580.2-1ubuntu1")
    finally:
        repository.lay_out(as_root)
    assert run.rc != 0
    assert "apt-get cannot use http://127.0.0.1:8099/" in run.stdout
    assert versions()["nvidia-open"] == "hold 580.1-1ubuntu1"


@pytest.mark.long
def test_a_dry_run_a_step_back_and_taking_it_out_of_the_data(repository: Repository) -> None:
    forget_packages()
    assert play(repository, "--check", "--diff").check().changed == 1
    assert versions() == {}
    play(repository, gpu_host_driver_version="595.1-1ubuntu1").check()
    play(repository, gpu_host_driver_version="580.1-1ubuntu1").check()
    assert versions()["nvidia-driver-open"] == "hold 580.1-1ubuntu1", "a pin goes back, too"
    as_root("apt-get install -y --allow-change-held-packages nvidia-driver-open=595.1-1ubuntu1").check()
    assert play(repository).check().changed == 1, "one package of the family, moved by hand"
    assert versions()["nvidia-driver-open"] == "hold 580.1-1ubuntu1"
    gone = play(repository, gpu_host_driver_version="", gpu_host_cuda_version="").check()
    assert gone.changed == 1
    assert (
        "llmbox-nvidia"
        not in as_root("ls /etc/apt/sources.list.d /etc/apt/preferences.d /etc/apt/keyrings").stdout
    )
