"""The lab's nftables table, and what on a machine stands in its way."""

from __future__ import annotations

from typing import Any

import pytest

from lab import network
from lab.config import Lab, from_environment

LAB: Lab = from_environment({"HOME": "/h", "LAB_NAME": "t1"})


def test_the_table_touches_only_the_labs_own_bridge_and_subnet() -> None:
    text = network.table_text(LAB)
    assert text.startswith("table ip llmbox_lab_t1 {")
    rules = [line for line in text.splitlines() if "    " in line and "hook" not in line]
    assert rules
    assert all('"llmbox-t1"' in rule or "10.213.179.0/24" in rule for rule in rules)
    assert text.count("policy accept") == 2
    assert text.count("{") == text.count("}")


def chain(family: str, table: str, name: str, **more: str) -> dict[str, Any]:
    return {"chain": {"family": family, "table": table, "name": name, **more}}


def forward(policy: str, *more: dict[str, Any]) -> dict[str, Any]:
    first = chain("ip", "filter", "FORWARD", type="filter", hook="forward", policy=policy)
    return {"nftables": [{"metainfo": {}}, {"table": {"family": "ip", "name": "filter"}}, first, *more]}


def test_a_machine_that_forwards_is_fine() -> None:
    assert network.firewall_block({"nftables": []}, LAB) is None
    assert network.firewall_block(forward("accept"), LAB) is None


@pytest.mark.parametrize(
    ("marker", "owner", "fix"),
    [
        ("DOCKER-USER", "Docker", "iptables -I DOCKER-USER -i llmbox-t1 -j ACCEPT"),
        ("ufw-before-forward", "ufw", "ufw route allow in on llmbox-t1"),
        ("mine", "a firewall", "iptables -I FORWARD -i llmbox-t1 -j ACCEPT"),
    ],
)
def test_a_drop_is_named_with_its_owner_and_the_fix(marker: str, owner: str, fix: str) -> None:
    line = network.firewall_block(forward("drop", chain("ip", "filter", marker)), LAB)
    assert line is not None
    assert line.startswith(owner)
    assert fix in line
    assert "\n" not in line


def test_a_drop_that_lets_the_bridge_through_is_fine() -> None:
    rule = {
        "rule": {
            "family": "ip",
            "table": "filter",
            "chain": "DOCKER-USER",
            "expr": [{"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": "llmbox-t1"}}],
        }
    }
    assert network.firewall_block(forward("drop", chain("ip", "filter", "DOCKER-USER"), rule), LAB) is None


def test_a_rule_in_the_labs_own_table_lets_nothing_through_elsewhere() -> None:
    rule = {
        "rule": {"family": "ip", "table": LAB.table, "chain": "forward", "expr": [{"iifname": "llmbox-t1"}]}
    }
    assert network.firewall_block(forward("drop", rule), LAB) is not None


def test_ufw_drops_what_hosts_send_to_the_machine_too() -> None:
    """Seen on Ubuntu 24.04: with only `route allow`, hosts reached the world but not the source server."""
    incoming = chain("ip", "filter", "INPUT", type="filter", hook="input", policy="drop")
    marker = chain("ip", "filter", "ufw-before-forward")
    forwarding = {
        "rule": {"family": "ip", "table": "filter", "chain": "ufw-user-forward", "expr": ["llmbox-t1"]}
    }
    line = network.firewall_block(forward("drop", marker, incoming, forwarding), LAB)
    assert line == (
        "ufw drops packets of the lab hosts (chain ip filter INPUT); fix: ufw allow in on llmbox-t1"
    )
    allowed = {"rule": {"family": "ip", "table": "filter", "chain": "ufw-user-input", "expr": ["llmbox-t1"]}}
    assert network.firewall_block(forward("drop", marker, incoming, forwarding, allowed), LAB) is None


def test_a_drop_for_ipv6_alone_is_no_matter() -> None:
    six = chain("ip6", "filter", "FORWARD", type="filter", hook="forward", policy="drop")
    assert network.firewall_block({"nftables": [six]}, LAB) is None


@pytest.mark.parametrize(
    ("target", "device", "clash"),
    [
        ("10.213.179.0/24", "docker0", True),
        ("10.213.179.7", "eth0", True),
        ("10.213.0.0/16", "wg0", True),
        ("10.0.0.0/8", "tun0", False),
        ("10.213.180.0/24", "br0", False),
        ("default", "eth0", False),
        ("10.213.179.0/24", "llmbox-t1", False),
    ],
)
def test_a_subnet_in_use_is_named(target: str, device: str, clash: bool) -> None:
    found = network.overlapping([{"dst": target, "dev": device}], LAB)
    assert found == (f"{target} on {device}" if clash else None)
