"""A signed apt repository of empty packages that stand in for NVIDIA's: same names and dependencies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.stand_in_apt import AptRepository
from tests.support import Run

AsRoot = Callable[[str, str], Run]
SERVED = "http://127.0.0.1:8099/"
STAND_INS = "nvidia-open nvidia-driver-open nvidia-modprobe cuda-toolkit-13-0 cuda-nvcc-13-0"

# Name, version, dependencies. As the vendor's do, these ask for "this version or a later one" of each other.
DRIVERS = ("580.1-1ubuntu1", "580.2-1ubuntu1", "595.1-1ubuntu1")
TOOLKITS = ("13.0.2-1", "13.0.3-1")
# Higher than the distribution's: what nobody asked this repository for must not come from it.
DECOY = ("dash", "99.0-1")
# Makes the node that the driver's own would make, of the null device.
MODPROBE = '#!/bin/sh\n[ "$1" != -u ] || [ -e /dev/nvidia-uvm ] || mknod /dev/nvidia-uvm c 1 3\n'
# What a service of the driver's does on a machine without a card.
UNIT = (
    "[Unit]\nDescription=Stand-in of {name}\n"
    "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/true\n{install}"
)
SERVICES = {
    "nvidia-persistenced.service": "[Install]\nWantedBy=multi-user.target\n",
    "nvidia-suspend.service": "[Install]\nWantedBy=systemd-suspend.service\n",
    "nvidia-resume.service": "[Install]\nWantedBy=systemd-suspend.service\n",
    "nvidia-hibernate.service": "[Install]\nWantedBy=systemd-hibernate.service\n",
}


class Repository(AptRepository):
    """The vendor's repository is a flat one."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (self.folder / "key.asc").write_bytes(self.armoured_key())
        for version in DRIVERS:
            self.package("nvidia-open", version, depends=f"nvidia-driver-open (>= {version})")
            self.package("nvidia-driver-open", version, _services())
            self.package("nvidia-modprobe", version, {"usr/bin/nvidia-modprobe": MODPROBE})
        for version in TOOLKITS:
            self.package("cuda-toolkit-13-0", version, depends="cuda-nvcc-13-0")
        self.package("cuda-nvcc-13-0", "13.0.88-1")
        self.package(*DECOY)
        self.sign()

    def lay_out(self, as_root: AsRoot) -> None:
        """Copy it to a host."""
        command = (
            "rm -rf /srv/stand-in && mkdir -p /srv/stand-in && cd /srv/stand-in &&"
            " base64 -d | tar -xz --no-same-owner && chmod -R a+rX ."
        )
        as_root(command, self.packed()).check()


def serve(as_root: AsRoot) -> None:
    """Serve on the host, to the host, what was laid out there."""
    as_root(
        "systemd-run --quiet --unit=stand-in python3 -m http.server"
        " --directory /srv/stand-in --bind 127.0.0.1 8099 &&"
        ' echo "Acquire::http::Proxy::127.0.0.1 DIRECT;" > /etc/apt/apt.conf.d/99stand-in',
        "",
    ).check()


def take_away(as_root: AsRoot) -> None:
    """Leave nothing of it on the host, nor of a run that was broken off."""
    as_root(
        f"systemctl stop stand-in; apt-mark unhold base-files {STAND_INS}; dpkg --purge {STAND_INS};"
        " rm -rf /srv/stand-in /etc/apt/apt.conf.d/99stand-in /etc/apt/*/llmbox-nvidia*"
        " /var/lib/apt/lists/127.0.0.1*",
        "",
    )


def _services() -> dict[str, str]:
    return {
        f"lib/systemd/system/{name}": UNIT.format(name=name, install=install)
        for name, install in SERVICES.items()
    }
