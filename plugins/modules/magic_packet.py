#!/usr/bin/python3
"""Ansible module: send the magic packet that wakes a machine, from the host on which this runs."""

from __future__ import annotations

import socket

from ansible.module_utils.basic import AnsibleModule  # type: ignore[import-untyped]

DOCUMENTATION = r"""
---
module: magic_packet
short_description: Wake a machine over the network
description:
  - Sends one magic packet to each address, over UDP. Nobody answers one.
options:
  mac: {description: MAC address of the network card that is to wake., type: str, required: true}
  addresses:
    description: Broadcast addresses of its network, or its own address.
    type: list
    elements: str
    required: true
  port: {description: UDP port., type: int, default: 9}
author: [llmbox]
"""

EXAMPLES = r"""
- name: Wake the box
  magic_packet:
    mac: "02:00:5e:10:00:01"
    addresses: [192.168.1.255]
"""

RETURN = "# nothing"

REPEATED = 16


def packet(mac: str) -> bytes:
    """Six bytes of ones, then the address sixteen times. Raises ValueError."""
    address = bytes.fromhex(mac.replace(":", "").replace("-", ""))
    if len(address) != 6:
        raise ValueError(f"{mac!r} is no MAC address; write it like 02:00:5e:10:00:01")
    return b"\xff" * 6 + address * REPEATED


def send(mac: str, addresses: list[str], port: int) -> None:
    """One packet to each address. Raises ValueError, OSError."""
    data = packet(mac)
    for address in addresses:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as sender:
            sender.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            sender.sendto(data, (address, port))


def main() -> None:
    """Module entry point."""
    module = AnsibleModule(
        argument_spec={
            "mac": {"type": "str", "required": True},
            "addresses": {"type": "list", "elements": "str", "required": True},
            "port": {"type": "int", "default": 9},
        },
        supports_check_mode=True,
    )
    try:
        if not module.check_mode:
            send(module.params["mac"], module.params["addresses"], module.params["port"])
    except (OSError, ValueError) as error:
        module.fail_json(msg=f"the magic packet was not sent: {error}")
    module.exit_json(changed=True)


if __name__ == "__main__":
    main()
