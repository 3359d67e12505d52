"""The firewall of a host: which networks reach which ports, from the inventory's data. Pure.

Nothing but what is declared gets in; what the host itself began, loopback, ICMP and the answers of DHCP do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_address, ip_network
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, model_validator

from llama_common.fields import Address, Network, Text, refuse
from llama_common.problems import Problem

TABLE: Final = "inet llmbox"
SSH: Final = "ssh"
VARIABLES: Final = (
    "firewall_enabled",
    "firewall_networks",
    "firewall_services",
    "firewall_ports",
    "firewall_allow",
)
PORT_FIX: Final = "write it like 8091, 41641/udp or 100.64.0.10:1234"

Port = tuple[str, int]  # protocol, number

NetworkName = Annotated[
    str,
    Text(
        r"[a-z][a-z0-9_-]{0,31}", "a network's name: a-z, 0-9, _ and -, a letter first", "write it like lan"
    ),
]
InterfaceName = Annotated[
    str,
    Text(
        r"[A-Za-z0-9][A-Za-z0-9_.-]{0,14}",
        "the name of a network interface, 1 to 15 characters",
        "write it like eno1",
    ),
]


class FirewallNetwork(BaseModel):
    """Where packets of a network come from; with both, both must fit."""

    model_config = ConfigDict(extra="forbid", strict=True)

    interface: InterfaceName | None = None
    addresses: list[Network] = []

    @model_validator(mode="after")
    def _says_something(self) -> FirewallNetwork:
        if self.interface is None and not self.addresses:
            raise refuse("names neither an interface nor addresses", "write it like {interface: tailscale0}")
        return self


def port_of(listen: str | int) -> Port | None:
    """The port that a service listens on: 22, "41641/udp", "100.64.0.10:1234".

    None for what only the box itself reaches: loopback, the path of a socket. Raises ValueError.
    """
    text = str(listen)
    if text.startswith("/"):
        return None
    number, slash, protocol = text.partition("/")
    if ":" in text:
        address = Address.parse(text)
        if ip_address(address.host).is_loopback:
            return None
        number, slash = str(address.port), ""
    if (slash and protocol not in ("tcp", "udp")) or not number.isascii() or not number.isdigit():
        raise ValueError(f"{text!r} is no port")
    if not 1 <= int(number) <= 65535:
        raise ValueError(f"{number} is no port: 1 to 65535")
    return (protocol if slash else "tcp"), int(number)


def services_of(variables: Mapping[str, Any]) -> dict[str, list[Any]]:
    """What may be allowed, by name: what the roles open, and what the inventory adds or says otherwise."""
    return {**variables["firewall_services"], **variables["firewall_ports"]}


def ports_of(listens: Sequence[str | int]) -> list[Port]:
    """Each port once, as they come. Raises ValueError."""
    return list(dict.fromkeys(port for listen in listens if (port := port_of(listen))))


def problems(variables: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with the rules that VARIABLES, with the roles' defaults, ask for."""
    if not variables["firewall_enabled"]:
        return []
    found = [*_wrong_ports(variables["firewall_ports"])]
    return found or [*_wrong_rules(variables)]


def _wrong_ports(ports: Mapping[str, Any]) -> Iterator[Problem]:
    for name, listens in ports.items():
        for index, listen in enumerate(listens):
            try:
                port_of(listen)
            except ValueError:
                path = ("firewall_ports", name, str(index))
                yield Problem(path, listen, "is no port: 1 to 65535, /udp behind it for UDP", PORT_FIX)


def _wrong_rules(variables: Mapping[str, Any]) -> Iterator[Problem]:
    networks, services = variables["firewall_networks"], services_of(variables)
    allow = variables["firewall_allow"]
    if not allow.get(SSH):
        yield Problem(
            ("firewall_allow", SSH),
            allow.get(SSH, "(missing)"),
            "SSH is missing from the rules: nobody could log in any more",
            "name the network that this machine comes from, for example ssh: [lan]",
        )
    owners: dict[Port, str] = {}
    for name, wanted in allow.items():
        if name not in services:
            known = ", ".join(sorted(services))
            fix = f"there is: {known}; others go into firewall_ports"
            yield Problem(("firewall_allow", name), name, "is no service that the firewall knows", fix)
            continue
        for index, network in enumerate(wanted):
            if network not in networks:
                known = ", ".join(sorted(networks)) or "none"
                path = ("firewall_allow", name, str(index))
                yield Problem(path, network, "is no network of firewall_networks", f"there is: {known}")
        ports = ports_of(services[name])
        if not ports:
            yield Problem(
                ("firewall_allow", name),
                name,
                "listens nowhere that other machines reach",
                "have it listen on an address of the box, or take it out",
            )
        for protocol, number in ports:
            if (protocol, number) in owners:
                yield Problem(
                    ("firewall_allow", name),
                    name,
                    f"port {number}/{protocol} is there twice: {owners[protocol, number]} has it too",
                    "open each port under one name",
                )
            owners[protocol, number] = name


def rules(variables: Mapping[str, Any]) -> str:
    """The table as nft reads it, its place taken in one step. Raises ValueError for what `problems` names."""
    if wrong := problems(variables):
        raise ValueError(wrong[0].line("inventory"))
    services = services_of(variables)
    opened: dict[str, set[Port]] = {}
    for name, networks in variables["firewall_allow"].items():
        for network in networks:
            opened.setdefault(network, set()).update(ports_of(services[name]))
    lines = [
        line
        for network in sorted(opened)
        for line in _accepting(network, variables["firewall_networks"][network], opened[network])
    ]
    body = "\n".join(f"\t\t{line}" for line in [*_ALWAYS, *lines])
    return f"table {TABLE}\ndelete table {TABLE}\ntable {TABLE} {{\n\tchain input {{\n{body}\n\t}}\n}}\n"


_ALWAYS: Final = (
    "type filter hook input priority filter; policy drop;",
    "ct state established,related accept",
    'iifname "lo" accept',
    "meta l4proto { icmp, ipv6-icmp } accept",
    # Offers of a DHCP server answer a broadcast: no connection that is known.
    "udp sport 67 udp dport 68 accept",
    "ip6 saddr fe80::/10 udp sport 547 udp dport 546 accept",
)


def _accepting(name: str, network: Mapping[str, Any], ports: set[Port]) -> Iterator[str]:
    """The rules of one network: a line for each family of its addresses and each protocol."""
    interface = [f'iifname "{network["interface"]}"'] if network.get("interface") else []
    parsed = [ip_network(one) for one in network.get("addresses") or []]
    # Sets of nft's must not overlap.
    narrow = list(collapse_addresses(one for one in parsed if isinstance(one, IPv4Network)))
    wide = list(collapse_addresses(one for one in parsed if isinstance(one, IPv6Network)))
    sources = [f"ip saddr {_set(narrow)}"] if narrow else []
    sources += [f"ip6 saddr {_set(wide)}"] if wide else []
    for source in sources or [""]:
        for protocol in ("tcp", "udp"):
            numbers = [str(number) for kind, number in sorted(ports) if kind == protocol]
            if numbers:
                words = [*interface, source, f"{protocol} dport {_set(numbers)}", f'accept comment "{name}"']
                yield " ".join(word for word in words if word)


def _set(values: Sequence[object]) -> str:
    return f"{{ {', '.join(map(str, values))} }}"
