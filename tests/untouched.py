"""What a lab or a machine must never touch on the machine that runs it."""

from __future__ import annotations

import hashlib
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

# Boot files, modules and their settings, clock settings, firmware variables, networks, packages' sources.
PLACES = (
    *("/boot", "/efi", "/etc/default", "/etc/grub.d", "/etc/kernel", "/sys/firmware/efi/efivars"),
    *("/etc/modules", "/etc/modules-load.d", "/etc/modprobe.d", "/lib/modules", "/etc/initramfs-tools"),
    *("/etc/sysctl.conf", "/etc/sysctl.d", "/etc/adjtime", "/etc/localtime", "/etc/timezone", "/etc/fstab"),
    *("/etc/netplan", "/etc/systemd/network", "/etc/apt"),
)
UNITS = Path("/etc/systemd/system")
# What the kernel loads by itself when a lab asks for an interface, a table or an overlay.
LOADED_ON_USE = (
    *("tun", "tap", "bridge", "stp", "llc", "veth", "overlay", "nf", "nft", "xt", "kvm", "irqbypass"),
)
CLOCK_S = 2.0
# Counters and pools of the kernel; and what a lab registers and takes back, which test_hygiene looks at.
MOVING = (
    *("dentry-state", "file-nr", "inode-nr", "inode-state", "aio-nr", "random/", "ns_last_pid", "pty/nr"),
    *(
        "sched_",
        "nf_conntrack_count",
        "fs/quota/",
        "perf_event_max_sample_rate",
        "perf_cpu_time_max_percent",
        "lost_mem",
    ),
    "/fs/binfmt_misc/",
)
# Of the network: the settings of a lab's own interfaces, bridge and hosts; and those that come with a module.
LAB_INTERFACE = re.compile(
    r"/proc/sys/net/\w+/(conf|neigh)/(llmbox-[^/]+|vb-[^/]+-(llm|ocr|cli|vm))/.*"  # lab/config.py names them
)
COMES_ON_USE = re.compile(r"/proc/sys/net/(netfilter/|bridge/|nf_conntrack_max$).*")
# What a lab borrows and gives back, and what the kernel changes along with it: lab/network.py.
FORWARD = "/proc/sys/net/ipv4/ip_forward"
FORWARDED = re.compile(r"/proc/sys/net/ipv4/(ip_forward|conf/[^/]+/forwarding|conf/all/accept_redirects)")


@dataclass(frozen=True)
class MachineState:
    """One look at this machine."""

    files: dict[str, str]
    sysctls: dict[str, str]
    modules: frozenset[str]
    clock_offset: float  # of the wall clock against the time since the machine was started

    @classmethod
    def now(cls) -> MachineState:
        """Look."""
        clock = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
        return cls(_files(), _sysctls(), _modules(), clock)

    def changes(self) -> dict[str, tuple[object, object]]:
        """What is otherwise now: a role that ran on the wrong side, a lab that reached out of its places."""
        now = MachineState.now()
        before, after = self.files | self.sysctls, now.files | now.sysctls
        found: dict[str, tuple[object, object]] = {
            name: (before.get(name), after.get(name))
            for name in before.keys() | after.keys()
            if before.get(name) != after.get(name)
            and not LAB_INTERFACE.fullmatch(name)
            and not (name not in before and COMES_ON_USE.fullmatch(name))
        }
        if FORWARD in found:
            found = {name: values for name, values in found.items() if not FORWARDED.fullmatch(name)}
        for module in self.modules ^ now.modules:
            if module in self.modules or not module.startswith(LOADED_ON_USE):
                found[f"module {module}"] = (module in self.modules, module in now.modules)
        if abs(now.clock_offset - self.clock_offset) >= CLOCK_S:
            found["clock"] = (self.clock_offset, now.clock_offset)
        return found


def _files() -> dict[str, str]:
    found: dict[str, str] = {}
    for place in map(Path, PLACES):
        for path in sorted([place, *place.rglob("*")]) if place.is_dir() else [place]:
            if path.is_symlink():
                found[str(path)] = f"link to {path.readlink()}"
            elif path.is_file():
                found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    found |= {str(unit): "" for unit in UNITS.rglob("*llmbox*")}
    return found | {"/proc/cmdline": Path("/proc/cmdline").read_text()}


def _sysctls() -> dict[str, str]:
    found: dict[str, str] = {}
    for folder, _, names in os.walk("/proc/sys"):
        for name in names:
            path = Path(folder, name)
            if any(part in str(path) for part in MOVING):
                continue
            try:
                found[str(path)] = path.read_text(errors="replace")
            except OSError:
                continue  # write-only, or not for this kernel
    return found


def _modules() -> frozenset[str]:
    listed = Path("/proc/modules")  # not there where the kernel has everything built in
    lines = listed.read_text().splitlines() if listed.exists() else []
    return frozenset(line.split()[0] for line in lines)
