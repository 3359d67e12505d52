"""The UEFI test machine: a lab host with firmware, a boot loader, a kernel of its own and a second system.

Its disk is made once per recipe: a root file system by mmdebstrap, then one start under qemu in which GRUB is
installed by Debian's own tools and the firmware learns of a second system, a stand-in for Windows. A lab's
machine is a thin layer above that disk and above the firmware's variables.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import socket
import tarfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lab import root
from lab.config import SUDO_USER, VM_BOOT_SECONDS, Lab
from lab.shell import LabError, last_line, remove_tree, run, say, ticking
from lab.state import shared_cache

NEEDED = {
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-img": "qemu-utils",
    "sfdisk": "fdisk",
    "mke2fs": "e2fsprogs",
    "/usr/share/OVMF/OVMF_CODE_4M.fd": "ovmf",
}
PACKAGES = (
    *root.PACKAGES,
    *("linux-image-cloud-amd64", "grub-efi-amd64", "efibootmgr", "dosfstools", "udev", "pciutils"),
)
WINDOWS_LABEL = "Windows Boot Manager"
WINDOWS_PROGRAM = r"\EFI\Microsoft\Boot\bootmgfw.efi"
WINDOWS_SAYS = "This is the stand-in for Windows. Restarting."  # on the serial line, each time it runs
INSTALLED = "lab: installed"
INSTALL_SECONDS = 1800
MEMORY_MIB = 1024

_FIRMWARE = Path("/usr/share/OVMF")
_DISK_MIB, _ESP_MIB = 6144, 64
_ROOT_UUID, _ESP_ID = "6c6c6d62-6f78-4c61-8b00-726f6f740000", "4C4C-4D42"
_KVM_CREATE_VM = 0xAE01
# Runs once, as the first process of the new root file system: what Debian's installer does on a UEFI machine.
_INSTALL = rf"""#!/bin/sh
trap 'sync; echo o > /proc/sysrq-trigger; sleep 60' EXIT
set -eu
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
for module in vfat nls_ascii nls_cp437 efivarfs; do modprobe $module; done
mount -t efivarfs efivarfs /sys/firmware/efi/efivars
mkfs.vfat -F 32 -n ESP -i {_ESP_ID.replace("-", "")} /dev/vda1
mkdir -p /boot/efi
mount /dev/vda1 /boot/efi
windows=/boot/efi/EFI/Microsoft/Boot
mkdir -p $windows
mv /lab/bootmgfw.efi $windows/bootmgfw.efi
echo 'boot configuration of the stand-in' > $windows/BCD
efibootmgr --quiet --create --disk /dev/vda --part 1 --label '{WINDOWS_LABEL}' --loader '{WINDOWS_PROGRAM}'
grub-install --target=x86_64-efi
update-grub
rm -r /lab
umount /boot/efi
sync
echo '{INSTALLED}'
"""
_WINDOWS_CONFIG = f'echo "{WINDOWS_SAYS}"\nreboot\n'
_FILES = {
    "lab/install": _INSTALL,
    "lab/windows.cfg": _WINDOWS_CONFIG,
    "etc/fstab": f"UUID={_ROOT_UUID} / ext4 errors=remount-ro 0 1\n"
    f"UUID={_ESP_ID} /boot/efi vfat umask=0077 0 1\n",
    # What a cloud image sets: everything on the serial line.
    "etc/default/grub.d/10-lab.cfg": "GRUB_TIMEOUT=0\nGRUB_TERMINAL=console\n"
    'GRUB_CMDLINE_LINUX="console=ttyS0"\n',
    # Emulated on a loaded machine it may need several times what systemd waits for a disk or a service.
    "etc/systemd/system.conf.d/lab.conf": "[Manager]\n"
    f"DefaultDeviceTimeoutSec={VM_BOOT_SECONDS}s\nDefaultTimeoutStartSec={VM_BOOT_SECONDS}s\n",
    # What makes the machine this lab's (keys, address) comes on a second disk, as a tar archive.
    "etc/systemd/system/lab-identity.service": """[Unit]
DefaultDependencies=no
After=systemd-remount-fs.service dev-vdb.device
Requires=dev-vdb.device
Before=network-pre.target sysinit.target systemd-networkd.service ssh.service
Wants=network-pre.target
ConditionPathExists=!/var/lib/lab-identity

[Service]
Type=oneshot
StandardError=journal+console
ExecStart=/bin/tar --extract --file=/dev/vdb --directory=/
ExecStart=/bin/touch /var/lib/lab-identity

[Install]
WantedBy=sysinit.target
""",
}


def kvm_works(cpuinfo: Path = Path("/proc/cpuinfo"), kvm: Path = Path("/dev/kvm")) -> bool:
    """Whether this machine can run a guest on its processor.

    /dev/kvm that makes a guest is not enough: without vmx or svm (paravirtual KVM) the firmware does not run.
    """
    if not {"vmx", "svm"} & set(cpuinfo.read_text().split()):
        return False
    try:
        with kvm.open("rb+", buffering=0) as device:
            os.close(fcntl.ioctl(device, _KVM_CREATE_VM, 0))
    except OSError:
        return False
    return True


def image(lab: Lab) -> None:
    """Make sure the disk image is there, and is the base of the lab's machine if that is not made yet."""
    folder = lab.cache / "images"
    with shared_cache(folder, "the image of the UEFI machine"):
        command = root.build_command(lab, PACKAGES, _hooks(lab, folder / f"{lab.suite}.files"))
        recipe = json.dumps([command, _FILES, root.local_cas_text(), _DISK_MIB, _ESP_MIB])
        current = folder / f"{lab.suite}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
        if not current.exists():
            _build(lab, command, current)
        place = lab.host_dir(lab.vm)
        if not root.made(lab, lab.vm):
            place.mkdir(parents=True, exist_ok=True)
            (place / "base").unlink(missing_ok=True)
            (place / "base").symlink_to(current)
        root.delete_unused(lab, folder, current)


def _hooks(lab: Lab, files: Path) -> list[str]:
    grub = "--format=x86_64-efi --prefix=/ --config=/lab/windows.cfg --output=/lab/bootmgfw.efi"
    return [
        f'cp --recursive {files}/. "$1"/ && chmod 0755 "$1"/lab/install',
        f'chroot "$1" grub-mkimage {grub} echo reboot',
        f'echo {lab.vm.name} > "$1"/etc/hostname',
        'chroot "$1" systemctl enable lab-identity.service serial-getty@ttyS0.service',
        # What only costs time at each start.
        'chroot "$1" systemctl disable apt-daily.timer apt-daily-upgrade.timer e2scrub_reap.service',
    ]


def _build(lab: Lab, command: list[str], target: Path) -> None:
    say(f"making the image of the UEFI machine {target.name} (once)")
    begun = time.monotonic()
    work = target.with_name(f"{lab.suite}.tmp")
    files = target.with_name(f"{lab.suite}.files")
    for folder in (work, files):
        remove_tree(folder)
    for name, text in _FILES.items():
        (files / name).parent.mkdir(parents=True, exist_ok=True)
        (files / name).write_text(text)
    root.build(command, work / "tree", work / "mmdebstrap")
    disk, nvram = work / "disk.raw", work / "nvram.raw"
    with disk.open("wb") as stream:
        stream.truncate(_DISK_MIB << 20)
    layout = f"label: gpt\nsize={_ESP_MIB}MiB, type=uefi, name=ESP\ntype=linux, name=root\n"
    run(["sfdisk", "--quiet", disk], text_in=layout)
    start = (1 + _ESP_MIB) << 20  # sfdisk aligns to 1 MiB, and leaves as much at the end
    size = (_DISK_MIB << 20) - start - (1 << 20)
    with ticking("mke2fs"):
        run(
            [
                *("mke2fs", "-q", "-t", "ext4", "-U", _ROOT_UUID, "-d", work / "tree"),
                *("-E", f"offset={start},root_owner=0:0", disk, f"{size >> 10}k"),
            ],
            timeout=600,
        )
    run(["cp", _FIRMWARE / "OVMF_VARS_4M.fd", nvram])
    (kernel,) = (work / "tree/boot").glob("vmlinuz-*")
    (initrd,) = (work / "tree/boot").glob("initrd.img-*")
    log = work / "install.log"
    with ticking("the installation of GRUB"):
        run(
            [
                *_qemu(log, disks=[(disk, "raw", False)], nvram=(nvram, "raw")),
                *("-kernel", kernel, "-initrd", initrd),
                *("-append", "root=/dev/vda2 rw console=ttyS0 quiet init=/lab/install"),
            ],
            timeout=INSTALL_SECONDS,
        )
    said = log.read_text(errors="replace")
    if INSTALLED not in said:
        raise LabError(f"the UEFI machine's system was not installed: {last_line(said)}; all of it: {log}")
    remove_tree(work / "tree")
    log.unlink()
    work.rename(target)
    remove_tree(files)
    say(f"image made, {time.monotonic() - begun:.0f} s")


def _qemu(log: Path, *, disks: Sequence[tuple[Path, str, bool]], nvram: tuple[Path, str]) -> list[str | Path]:
    """A q35 machine with OVMF; `disks` are (file, format, whether it is only read)."""
    # One processor where it is emulated: on a busy machine the firmware waits for ever for a second one that
    # missed its start-up (edk2, pull request 13164), so that a reboot ended before GRUB.
    accelerator = (
        ["-accel", "kvm", "-cpu", "host", "-smp", "2"]
        if kvm_works()
        else ["-accel", "tcg", "-cpu", "max", "-smp", "1"]
    )
    code = _FIRMWARE / "OVMF_CODE_4M.fd"
    words: list[str | Path] = [
        *("qemu-system-x86_64", "-machine", "q35", *accelerator, "-m", f"{MEMORY_MIB}M"),
        *("-nodefaults", "-no-user-config", "-display", "none"),
        *("-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={code}"),
        *("-drive", f"if=pflash,unit=1,format={nvram[1]},file={nvram[0]}"),
        *("-chardev", f"file,id=serial,path={log},append=on", "-serial", "chardev:serial"),
        *("-device", "virtio-rng-pci"),
    ]
    for number, (file, kind, read_only) in enumerate(disks):
        only = ",readonly=on" if read_only else ""
        words += ["-drive", f"if=none,id=disk{number},format={kind},file={file}{only}"]
        words += ["-device", f"virtio-blk-pci,drive=disk{number}"]
    return words


def make(lab: Lab) -> None:
    """Make the lab's machine: layers above disk and firmware variables, and its identity."""
    if root.made(lab, lab.vm):
        return
    place = lab.host_dir(lab.vm)
    half = place / "partial"
    remove_tree(half)
    half.mkdir()
    for part in ("disk", "nvram"):
        backing = ["-b", f"../base/{part}.raw", "-F", "raw"]  # as seen from `partial`, and from `vm`
        run(["qemu-img", "create", "-q", "-f", "qcow2", *backing, half / f"{part}.qcow2"])
    files = root.identity(lab, lab.vm, "en*") | {"etc/resolv.conf": root.resolv_conf(Path("/"))}
    write_identity(half / "identity.tar", files)
    half.rename(place / "vm")


def write_identity(archive: Path, files: Mapping[str, str]) -> None:
    """Write the files (path below the root, text) as a tar archive with the owners and modes sshd wants."""
    home = f"home/{SUDO_USER}"
    with tarfile.open(archive, "w") as tar:
        for name in (f"{home}/.ssh", *files):
            info = tarfile.TarInfo(name)
            private = name.startswith(home) or name.endswith("_key")
            info.mode = 0o600 if private else 0o644
            if name.startswith(home):
                info.uid = info.gid = 1000  # the first user of a Debian system
            if name in files:
                info.size = len(files[name].encode())
                tar.addfile(info, io.BytesIO(files[name].encode()))
            else:
                info.type, info.mode = tarfile.DIRTYPE, 0o700
                tar.addfile(info)


def command(lab: Lab) -> list[str | Path]:
    """The command that powers the machine on, on the lab's bridge."""
    place = lab.host_dir(lab.vm)
    join = place / "vm/join-bridge"
    join.write_text(f'#!/bin/sh\nip link set "$1" addrgenmode none master {lab.bridge} up\n')
    join.chmod(0o755)
    disks = [(place / "vm/disk.qcow2", "qcow2", False), (place / "vm/identity.tar", "raw", True)]
    interface = f"vb-{lab.machine(lab.vm)}"  # qemu makes it, and it goes with qemu
    return [
        *_qemu(place / "console.log", disks=disks, nvram=(place / "vm/nvram.qcow2", "qcow2")),
        *("-netdev", f"tap,id=net,ifname={interface},script={join},downscript=no"),
        # A slot of its own, as a real card has: a link with ASPM to look at.
        *("-device", "pcie-root-port,id=root0"),
        *("-device", f"vmxnet3,netdev=net,bus=root0,mac={mac(lab)},romfile="),
        *("-qmp", f"unix:{_qmp_socket(lab)},server=on,wait=off"),
    ]


def mac(lab: Lab) -> str:
    """The machine's hardware address, from its address in the lab."""
    return "52:54:" + ":".join(f"{int(part):02x}" for part in lab.vm.address.split("."))


def _qmp_socket(lab: Lab) -> Path:
    return lab.host_dir(lab.vm) / "qmp"


def control(lab: Lab, execute: str, timeout: float = 60, **arguments: Any) -> Any:
    """Give qemu one command of its machine protocol and return the answer.

    Raises LabError when the machine does not run or qemu refuses.
    """
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(timeout)
            connection.connect(str(_qmp_socket(lab)))
            with connection.makefile() as stream:
                stream.readline()
                for message in (
                    {"execute": "qmp_capabilities"},
                    {"execute": execute, "arguments": arguments},
                ):
                    connection.sendall(json.dumps(message).encode() + b"\n")
                    answer = json.loads(stream.readline())
                    while "event" in answer:
                        answer = json.loads(stream.readline())
    except (OSError, ValueError) as error:
        raise LabError(f"lab-vm does not answer `{execute}` ({error})") from error
    if "error" in answer:
        raise LabError(f"lab-vm refuses `{execute}`: {answer['error']['desc']}")
    return answer["return"]


def snapshot(lab: Lab, name: str) -> None:
    """Keep the running machine, memory and firmware variables included, under a name."""
    _monitor(lab, f"savevm {name}")


def restore(lab: Lab, name: str) -> None:
    """Put the running machine back to what `snapshot` kept."""
    _monitor(lab, f"loadvm {name}")


def _monitor(lab: Lab, line: str) -> None:
    said = control(lab, "human-monitor-command", timeout=120, **{"command-line": line})
    if said.strip():
        raise LabError(f"lab-vm refuses `{line}`: {last_line(said)}")
