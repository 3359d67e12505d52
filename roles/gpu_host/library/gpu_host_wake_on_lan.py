#!/usr/bin/python3
"""Ansible module: a network card wakes the machine by magic packet, now and after every boot."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ansible.module_utils.basic import AnsibleModule  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from roles.gpu_host.module_utils.gpu_host_tools import Refused, converge, must, present, run, work
else:
    from ansible.module_utils.gpu_host_tools import Refused, converge, must, present, run, work

DOCUMENTATION = r"""
---
module: gpu_host_wake_on_lan
short_description: Wake-on-LAN by netplan where that has the card, else by a file of systemd's for the link
description:
  - With netplan one file of its own adds to the card's definition. It is tried in a folder of its own before
    it is written, and nothing is applied to the connection.
  - ethtool sets it for now, and judges whether the card has taken it.
options:
  interface: {description: "The card; empty takes away what was set before.", type: str, required: true}
author: [llmbox]
"""

EXAMPLES = r"""
- name: Let a magic packet wake the machine
  gpu_host_wake_on_lan:
    interface: eno1
"""

RETURN = "by: {description: The file that keeps it., returned: always, type: str}"

NETPLAN = Path("/etc/netplan/90-llmbox-wake-on-lan.yaml")
NETPLAN_MODE = 0o600
NETPLAN_FOLDERS = (
    "lib/netplan",
    "etc/netplan",
    "run/netplan",
)  # a later one's file replaces one of the same name
LINK = Path("/etc/systemd/network/50-llmbox-wake-on-lan.link")
DEFAULT_LINKS = (
    Path("/usr/lib/systemd/network/99-default.link"),
    Path("/lib/systemd/network/99-default.link"),
)
INTERFACES = Path("/sys/class/net")
MAGIC = "g"
MANAGED = "# Managed by llmbox: roles/gpu_host.\n"


# --- pure ---


def merged(definitions: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """netplan's ethernets by their ID, each amended by what later files say of it."""
    found: dict[str, dict[str, Any]] = {}
    for one in definitions:
        for name, values in ((one.get("network") or {}).get("ethernets") or {}).items():
            found.setdefault(str(name), {}).update(values or {})
    return found


def matches(name: str, values: Mapping[str, Any], interface: str, mac: str) -> bool:
    """Whether a definition is for this card."""
    match = values.get("match")
    if not match:
        return name == interface
    names = match.get("name") or []
    patterns = names if isinstance(names, list) else [names]
    by_mac = match.get("macaddress")
    if by_mac and str(by_mac).lower() != mac:
        return False
    if patterns and not any(fnmatchcase(interface, str(one)) for one in patterns):
        return bool(by_mac) and values.get("set-name") == interface
    return bool(by_mac or patterns or match.get("driver"))


def owner(ethernets: Mapping[str, Mapping[str, Any]], interface: str, mac: str) -> str | None:
    """The ID of the definition that has the card; None when netplan does not have it. Raises Refused."""
    owners = [name for name, values in ethernets.items() if matches(name, values, interface, mac)]
    if len(owners) > 1:
        raise Refused(f"netplan has {interface} in {' and in '.join(owners)}; fix: leave it in one of them")
    if not owners:
        return None
    match = ethernets[owners[0]].get("match") or {}
    names = match.get("name") or []
    several = not match.get("macaddress") and any(
        set("*?[") & set(str(one)) for one in (names if isinstance(names, list) else [names])
    )
    if several or (match and not match.get("macaddress") and not names):
        raise Refused(
            f"netplan's definition {owners[0]} is for more cards than {interface}, which would lose their "
            f"network; fix: give {interface} a definition of its own in /etc/netplan"
        )
    return owners[0]


def netplan_text(identity: str, interface: str, mac: str) -> str:
    """By address: netplan's documentation calls wakeonlan unreliable for a card found by its name alone."""
    return (
        f"{MANAGED}network:\n  version: 2\n  ethernets:\n    {identity}:\n"
        f'      match: {{macaddress: "{mac}"}}\n      set-name: {interface}\n      wakeonlan: true\n'
    )


def link_text(default: str, mac: str) -> str:
    """The system's own settings for links, which the first file that matches replaces, and waking."""
    section = re.search(r"^\[Link\]\n(.*?)(?=^\[|\Z)", default, re.MULTILINE | re.DOTALL)
    lines = [
        line
        for line in (section[1] if section else "").splitlines()
        if "=" in line and not line.startswith("#")
    ]
    kept = "".join(f"{line}\n" for line in lines if not line.startswith("WakeOnLan="))
    return f"{MANAGED}[Match]\nPermanentMACAddress={mac}\n\n[Link]\n{kept}WakeOnLan=magic\n"


def wake_on(said: str) -> tuple[str, str]:
    """What a card can be woken by and what it is, in ethtool's letters."""
    supports = re.search(r"^\s*Supports Wake-on:\s*(\S+)", said, re.MULTILINE)
    now = re.search(r"^\s*Wake-on:\s*(\S+)", said, re.MULTILINE)
    return supports[1] if supports else "", now[1] if now else ""


# --- this host ---


def permanent_address(interface: str) -> str:
    """The address that the card was made with. Raises Refused."""
    found = re.search(
        r"(?:[0-9a-f]{2}:){5}[0-9a-f]{2}", must("ethtool", "--show-permaddr", interface).lower()
    )
    if not found or found[0] == "00:00:00:00:00:00":
        raise Refused(f"{interface} has no address of its own: it is no network card")
    return found[0]


def netplan_definitions(root: Path = Path("/")) -> list[dict[str, Any]]:
    """What netplan's files say, without ours, in its order. Raises Refused."""
    import yaml  # netplan itself needs it

    files: dict[str, Path] = {}
    for folder in NETPLAN_FOLDERS:
        files |= {file.name: file for file in (root / folder).glob("*.yaml")}
    try:
        return [
            yaml.safe_load(files[name].read_text()) or {} for name in sorted(files) if name != NETPLAN.name
        ]
    except (OSError, yaml.YAMLError) as error:
        raise Refused(f"netplan's files cannot be read: {' '.join(str(error).split())}") from None


def try_netplan(text: str) -> None:
    """Let netplan judge its files together with ours, in a folder of its own. Raises Refused."""
    with tempfile.TemporaryDirectory(prefix="llmbox-netplan-", dir="/run") as folder:
        for name in NETPLAN_FOLDERS:
            if Path("/", name).is_dir():
                shutil.copytree(Path("/", name), Path(folder, name))
        trial = Path(folder, "etc/netplan", NETPLAN.name)
        trial.parent.mkdir(parents=True, exist_ok=True)
        trial.write_text(text)
        trial.chmod(NETPLAN_MODE)
        must("netplan", "generate", "--root-dir", folder)


def kept_by(interface: str, mac: str) -> tuple[Path, str]:
    """The file that keeps it on this host, and its text. Raises Refused."""
    if shutil.which("netplan"):
        identity = owner(merged(netplan_definitions()), interface, mac)
        if identity is not None:
            return NETPLAN, netplan_text(identity, interface, mac)
    default = next((file.read_text() for file in DEFAULT_LINKS if file.is_file()), "")
    return LINK, link_text(default, mac)


def apply(asked: Mapping[str, Any], check: bool) -> dict[str, Any]:
    """Compare, and unless this is a dry run, converge. Raises Refused, OSError."""
    interface: str = asked["interface"]
    wanted: dict[Path, str | None] = {NETPLAN: None, LINK: None}
    by, set_now = "", False
    if interface:
        if not (INTERFACES / interface).exists():
            there = ", ".join(sorted(one.name for one in INTERFACES.iterdir() if (one / "device").exists()))
            raise Refused(f"this host has no {interface}, but {there}; fix: gpu_host_wake_on_lan")
        if check and not shutil.which("ethtool"):
            return {"changed": True, "diff": [], "by": ""}
        file, text = kept_by(interface, permanent_address(interface))
        wanted[file], by = text, str(file)
        supports, now = wake_on(must("ethtool", interface))
        if MAGIC not in supports:
            raise Refused(
                f"{interface} cannot be woken by magic packet (Supports Wake-on: {supports or 'nothing'}); "
                'fix: switch it on in the firmware\'s setup, or gpu_host_wake_on_lan: ""'
            )
        set_now = MAGIC not in now
        if file == NETPLAN and present(NETPLAN, NETPLAN_MODE) != text:
            try_netplan(text)
    diffs = converge({NETPLAN: wanted[NETPLAN]}, check=check, mode=NETPLAN_MODE)
    netplan_changed = bool(diffs)
    diffs += converge({LINK: wanted[LINK]}, check=check)
    if not check:
        if netplan_changed:
            must("netplan", "generate")
        if diffs:
            must("udevadm", "control", "--reload")
        if set_now:
            must("ethtool", "--change", interface, "wol", MAGIC)
            _, now = wake_on(must("ethtool", interface))
            if MAGIC not in now:
                raise Refused(f"{interface} does not take it: ethtool says Wake-on: {now} after it was set")
        if interface:
            ours_wins(interface)
    return {"changed": bool(diffs) or set_now, "diff": diffs, "by": by}


def ours_wins(interface: str) -> None:
    """Refuse when another file decides over the link at boot. Raises Refused."""
    said = run("udevadm", "test-builtin", "net_setup_link", f"/sys/class/net/{interface}")
    found = re.search(r"^ID_NET_LINK_FILE=(\S+)", said.stdout + said.stderr, re.MULTILINE)
    if found and "WakeOnLan=magic" not in Path(found[1]).read_text():
        raise Refused(
            f"at boot {found[1]} decides over {interface}, not our file; fix: WakeOnLan=magic there"
        )


def main() -> None:
    """Module entry point."""
    module = AnsibleModule(
        argument_spec={"interface": {"type": "str", "required": True}}, supports_check_mode=True
    )
    work(module, apply)


if __name__ == "__main__":
    main()
