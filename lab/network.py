"""The lab's own bridge and nftables table, and the machine's forwarding switch, borrowed and given back."""

from __future__ import annotations

import ipaddress
import json
import socket
from pathlib import Path
from typing import Any

from lab.config import Lab
from lab.shell import LabError, run
from lab.state import Claims, machine_ledger

_IPV4 = Path("/proc/sys/net/ipv4")


def table_text(lab: Lab) -> str:
    """The lab's nftables table: lets the lab out and answers in, hides it behind the machine's address."""
    return f"""table ip {lab.table} {{
  chain forward {{
    type filter hook forward priority filter; policy accept;
    iifname "{lab.bridge}" oifname != "{lab.bridge}" tcp flags syn tcp option maxseg size set rt mtu
    iifname "{lab.bridge}" accept
    oifname "{lab.bridge}" ct state established,related accept
    oifname "{lab.bridge}" drop
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr {lab.subnet} ip daddr != {lab.subnet} masquerade
  }}
}}
"""


def firewall_block(ruleset: dict[str, Any], lab: Lab) -> str | None:
    """Name the tables that drop what the lab sends to or through this machine, and the fix, or None.

    `ruleset` is what `nft -j list ruleset` prints. A rule for that hook that names the bridge settles it.
    """
    found = ruleset["nftables"]
    chains = [item["chain"] for item in found if "chain" in item]
    rules = [item["rule"] for item in found if "rule" in item and item["rule"]["table"] != lab.table]
    names = {chain["name"] for chain in chains}
    owner = "ufw" if "ufw-before-forward" in names else "Docker" if "DOCKER-USER" in names else "a firewall"
    dropping: list[str] = []
    fixes: list[str] = []
    for hook in ("input", "forward"):
        let_through = any(
            f'"{lab.bridge}"' in json.dumps(rule)
            and (hook in rule["chain"].lower() or (hook == "forward" and rule["chain"] == "DOCKER-USER"))
            for rule in rules
        )
        places = [
            f"{chain['family']} {chain['table']} {chain['name']}"
            for chain in chains
            if chain.get("hook") == hook and chain.get("policy") == "drop" and chain["family"] != "ip6"
        ]
        if places and not let_through:
            dropping += places
            fixes += _firewall_fixes(owner, hook, lab.bridge)
    if not dropping:
        return None
    return f"{owner} drops packets of the lab hosts (chain {', '.join(dropping)}); fix: {'; '.join(fixes)}"


def _firewall_fixes(owner: str, hook: str, bridge: str) -> list[str]:
    if owner == "ufw":
        kinds = {"input": ["allow in"], "forward": ["route allow in", "route allow out"]}[hook]
        return [f"ufw {kind} on {bridge}" for kind in kinds]
    chain = "DOCKER-USER" if owner == "Docker" and hook == "forward" else hook.upper()
    ways = ["-i"] if hook == "input" else ["-i", "-o"]
    return [f"iptables -I {chain} {way} {bridge} -j ACCEPT" for way in ways]


def overlapping(routes: list[dict[str, Any]], lab: Lab) -> str | None:
    """Name what already uses the lab's subnet, or None; input is `ip -j -4 route show table all`.

    A wide route (a company's 10.0.0.0/8, say) is no clash: the lab's /24 is the more specific one.
    """
    subnet = ipaddress.ip_network(lab.subnet)
    for route in routes:
        target = route.get("dst", "default")
        if target == "default" or route.get("dev") == lab.bridge:
            continue
        network = ipaddress.ip_network(target, strict=False)
        if network.prefixlen >= 16 and network.overlaps(subnet):
            return f"{target} on {route.get('dev', '?')}"
    return None


def up(lab: Lab, claims: Claims) -> None:
    """Make bridge, table and forwarding what the lab needs; a no-op when they are."""
    ruleset = json.loads(run(["nft", "-j", "list", "ruleset"]).stdout or '{"nftables": []}')
    blocked = firewall_block(ruleset, lab)
    if blocked:
        raise LabError(blocked, 2)
    clash = overlapping(
        json.loads(run(["ip", "-j", "-4", "route", "show", "table", "all"]).stdout or "[]"), lab
    )
    if clash:
        raise LabError(
            f"the lab's subnet {lab.subnet} is in use already ({clash}); choose another LAB_NAME", 2
        )

    claims.claim("interface", lab.bridge, exists=_interface_exists(lab.bridge))
    if not _interface_exists(lab.bridge):
        run(["ip", "link", "add", lab.bridge, "type", "bridge"])
    run(["ip", "link", "set", lab.bridge, "addrgenmode", "none"])
    run(["ip", "addr", "replace", f"{lab.gateway}/24", "dev", lab.bridge])
    run(["ip", "link", "set", lab.bridge, "up"])

    tables = {item["table"]["name"] for item in ruleset["nftables"] if "table" in item}
    claims.claim("table", lab.table, exists=lab.table in tables)
    # One transaction: packets in flight never see the table missing.
    run(["nft", "-f", "-"], text_in=f"table ip {lab.table}\ndelete table ip {lab.table}\n{table_text(lab)}")
    _borrow_forwarding(lab)


def down(lab: Lab, claims: Claims) -> None:
    """Remove what `up` made; what is gone already is fine."""
    for table in claims.of("table"):
        run(["nft", "delete", "table", "ip", table], check=False)
        claims.release("table", table)
    for interface in claims.of("interface"):
        if _interface_exists(interface):
            run(["ip", "link", "delete", interface])
        claims.release("interface", interface)
    _return_forwarding(lab)


def _interface_exists(name: str) -> bool:
    return name in {interface for _, interface in socket.if_nameindex()}


def _forwarding_ledger() -> str:
    """Forwarding belongs to a network namespace, so each has a ledger."""
    return f"forwarding-{Path('/proc/self/ns/net').stat().st_ino}"


def _borrow_forwarding(lab: Lab) -> None:
    """Switch forwarding on; the first lab writes down how it found the machine."""
    with machine_ledger(_forwarding_ledger()) as ledger:
        if not ledger:
            ledger.update(labs=[], before=_forwarding_values())
        if lab.name not in ledger["labs"]:
            ledger["labs"].append(lab.name)
    # Written after the ledger is on disk: a kill in between loses nothing.
    if (_IPV4 / "ip_forward").read_text().strip() != "1":
        (_IPV4 / "ip_forward").write_text("1")


def _return_forwarding(lab: Lab) -> None:
    """The last lab puts forwarding back."""
    with machine_ledger(_forwarding_ledger()) as ledger:
        if lab.name not in ledger.get("labs", []):
            return
        if ledger["labs"] == [lab.name]:
            before: dict[str, str] = ledger["before"]
            # The kernel resets the others whenever ip_forward changes, so it comes first.
            for path in sorted(before, key=lambda name: name != "ip_forward"):
                place = _IPV4 / path
                if place.exists() and place.read_text().strip() != before[path]:
                    place.write_text(before[path])
            ledger.clear()
        else:
            ledger["labs"].remove(lab.name)


def _forwarding_values() -> dict[str, str]:
    """ip_forward and every setting that the kernel changes along with it."""
    places = [_IPV4 / "ip_forward", _IPV4 / "conf/all/accept_redirects", *_IPV4.glob("conf/*/forwarding")]
    return {str(place.relative_to(_IPV4)): place.read_text().strip() for place in places}
