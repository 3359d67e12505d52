"""What a lab is called and where its parts lie; everything follows from LAB_NAME and the suite."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lab.shell import LabError

DEFAULT_NAME = "lab"
SUITES = ("bookworm", "trixie")
HTTP_PORT = 8088
GIT_PORT = 9418
SUDO_USER = "ops"
VM_BOOT_SECONDS = 900  # emulated: 22 s on two idle cores, several minutes on loaded ones
REPO_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Host:
    """One lab host: its inventory name, the short name used for machine and interface, its address."""

    name: str
    short: str
    address: str
    builds: bool  # compiles llama.cpp, so it gets the shared ccache
    boot_seconds: int = 120  # how long it may take to answer over ssh; a loaded 2-core machine needs about 15


@dataclass(frozen=True)
class Lab:
    """Names, addresses and paths of one lab."""

    name: str
    suite: str
    cache: Path
    hosts: tuple[Host, ...] = field(init=False)
    vm: Host = field(init=False)  # the UEFI machine, booted only when it is asked for

    def __post_init__(self) -> None:
        prefix = f"10.213.{third_octet(self.name)}"
        object.__setattr__(
            self,
            "hosts",
            (
                Host("lab-llm", "llm", f"{prefix}.11", builds=True),
                Host("lab-ocr", "ocr", f"{prefix}.12", builds=True),
                Host("lab-client", "cli", f"{prefix}.13", builds=False),
            ),
        )
        machine = Host("lab-vm", "vm", f"{prefix}.14", builds=False, boot_seconds=VM_BOOT_SECONDS)
        object.__setattr__(self, "vm", machine)

    @property
    def every_host(self) -> tuple[Host, ...]:
        return (*self.hosts, self.vm)

    @property
    def gateway(self) -> str:
        """The machine's own address in the lab: router and source server."""
        return f"10.213.{third_octet(self.name)}.1"

    @property
    def subnet(self) -> str:
        return f"10.213.{third_octet(self.name)}.0/24"

    @property
    def bridge(self) -> str:
        return f"llmbox-{self.name}"

    @property
    def table(self) -> str:
        return f"llmbox_lab_{self.name}"

    @property
    def state(self) -> Path:
        return self.cache / "lab" / self.name

    @property
    def claims(self) -> Path:
        """The list of what this lab made on the machine."""
        return self.state / "claims.json"

    @property
    def ssh_key(self) -> Path:
        return self.state / "ssh/id_ed25519"

    @property
    def ssh_public_key(self) -> str:
        """The key as a line of authorized_keys; empty while there is no lab, or none of this user's."""
        try:
            return self.ssh_key.with_suffix(".pub").read_text().strip()
        except OSError:
            return ""

    @property
    def known_hosts(self) -> Path:
        return self.state / "ssh/known_hosts"

    @property
    def control_dir(self) -> Path:
        """Where ssh keeps its control sockets; short, because a socket's path has at most 107 bytes."""
        return self.state / "cm"

    @property
    def source_git(self) -> str:
        return f"git://{self.gateway}"

    @property
    def source_http(self) -> str:
        return f"http://{self.gateway}:{HTTP_PORT}"

    def host_dir(self, host: Host) -> Path:
        return self.state / "hosts" / host.name

    def machine(self, host: Host) -> str:
        return f"{self.name}-{host.short}"

    def host(self, name: str) -> Host:
        """Find a host by inventory name (`lab-llm`) or the part after the dash (`llm`)."""
        for host in self.every_host:
            if name in (host.name, host.name.removeprefix("lab-")):
                return host
        known = ", ".join(host.name for host in self.every_host)
        raise LabError(f"no lab host {name!r}; there are {known}", 2)

    def ssh_options(self) -> list[str]:
        """Options that make ssh use this lab's key, pinned host keys and control sockets, nothing else."""
        return [
            "-F",
            "/dev/null",
            *(
                f"-o{option}"
                for option in (
                    f"UserKnownHostsFile={self.known_hosts}",
                    "GlobalKnownHostsFile=/dev/null",
                    "StrictHostKeyChecking=yes",
                    "IdentitiesOnly=yes",
                    "ControlMaster=auto",
                    "ControlPersist=120s",
                    f"ControlPath={self.control_dir}/%C",
                    "ConnectTimeout=10",
                )
            ),
        ]


def third_octet(name: str) -> int:
    """Third number of the lab's 10.213.N.0/24: 77 for the default lab, from the name for any other."""
    return 77 if name == DEFAULT_NAME else 100 + zlib.crc32(name.encode()) % 100


def typed(words: str, name: str | None = None) -> str:
    """A command as a person types it, so that it goes to the lab `name` (default: the one of LAB_NAME)."""
    name = name or os.environ.get("LAB_NAME") or DEFAULT_NAME
    return words if name == DEFAULT_NAME else f"LAB_NAME={name} {words}"


def from_environment(environ: Mapping[str, str] = os.environ, suite: str | None = None) -> Lab:
    """Build the Lab that LAB_NAME, LAB_SUITE and XDG_CACHE_HOME describe.

    Raises LabError (exit status 2) for a name or suite that cannot be used.
    """
    name = environ.get("LAB_NAME") or DEFAULT_NAME
    if not re.fullmatch(r"[a-z0-9]{1,6}", name):
        raise LabError(f"LAB_NAME = {name!r}: must be 1 to 6 characters of a-z and 0-9", 2)
    wanted = suite or environ.get("LAB_SUITE") or SUITES[0]
    if wanted not in SUITES:
        raise LabError(f"suite {wanted!r} is not known; choose one of {', '.join(SUITES)}", 2)
    caches = environ.get("XDG_CACHE_HOME") or ""
    base = Path(caches) if caches.startswith("/") else Path(environ.get("HOME") or Path.home()) / ".cache"
    return Lab(name, wanted, base / "llmbox")
