"""The firewall's rules from data, what of it is refused, and what the module takes for another firewall."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from llama_common import firewall
from llama_common.roles import RoleVariables

from roles.firewall.library import firewall_rules as module
from tests.support import ROOT

ROLE = ROOT / "roles/firewall"


def variables(**changes: Any) -> dict[str, Any]:
    """A sound host's, with `changes`."""
    return {
        "firewall_enabled": True,
        "firewall_networks": {
            "lan": {"interface": "eno1", "addresses": ["192.168.1.0/24", "192.168.0.0/24", "fd00:1::/64"]},
            "tailnet": {"interface": "tailscale0"},
        },
        "firewall_services": {
            "ssh": [22],
            "llm_gateway": ["100.64.0.10:1234", "127.0.0.1:1234", "[::1]:1234"],
            "system_presets": ["127.0.0.1:8090", "/run/vision.sock"],
            "tailscale": ["41641/udp"],
        },
        "firewall_ports": {},
        "firewall_allow": {"ssh": ["lan", "tailnet"], "llm_gateway": ["tailnet"], "tailscale": ["lan"]},
        **changes,
    }


def accepted(text: str) -> list[str]:
    """The lines of the table that let a network in."""
    return [line.strip() for line in text.splitlines() if "comment" in line]


def test_each_network_reaches_its_ports_in_both_families_and_nothing_else_does() -> None:
    text = firewall.rules(variables())
    assert accepted(text) == [
        'iifname "eno1" ip saddr { 192.168.0.0/23 } tcp dport { 22 } accept comment "lan"',
        'iifname "eno1" ip saddr { 192.168.0.0/23 } udp dport { 41641 } accept comment "lan"',
        'iifname "eno1" ip6 saddr { fd00:1::/64 } tcp dport { 22 } accept comment "lan"',
        'iifname "eno1" ip6 saddr { fd00:1::/64 } udp dport { 41641 } accept comment "lan"',
        'iifname "tailscale0" tcp dport { 22, 1234 } accept comment "tailnet"',
    ]
    assert "policy drop" in text
    # What is loaded is replaced in one step, and no other table is touched.
    assert text.startswith("table inet llmbox\ndelete table inet llmbox\ntable inet llmbox {")
    assert "flush" not in text


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({"firewall_allow": {"llm_gateway": ["lan"]}}, "firewall_allow.ssh", "SSH is missing"),
        ({"firewall_allow": {"ssh": []}}, "firewall_allow.ssh", "SSH is missing"),
        ({"firewall_allow": {"ssh": ["lan", "wan"]}}, "firewall_allow.ssh.1", "no network of"),
        ({"firewall_allow": {"ssh": ["lan"], "web": ["lan"]}}, "firewall_allow.web", "no service"),
        (
            {
                "firewall_allow": {"ssh": ["lan"], "llm_gateway": ["lan"], "lmstudio": ["lan"]},
                "firewall_ports": {"lmstudio": [1234]},
            },
            "firewall_allow.lmstudio",
            "1234/tcp is there twice: llm_gateway has it",
        ),
        (
            {"firewall_allow": {"ssh": ["lan"], "system_presets": ["lan"]}},
            "firewall_allow.system_presets",
            "listens nowhere that other machines reach",
        ),
        ({"firewall_ports": {"web": ["80/sctp"]}}, "firewall_ports.web.0", "no port"),
        ({"firewall_ports": {"web": [0]}}, "firewall_ports.web.0", "no port"),
        ({"firewall_ports": {"web": [65536]}}, "firewall_ports.web.0", "no port"),
        ({"firewall_ports": {"web": ["http"]}}, "firewall_ports.web.0", "no port"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], key: str, words: str) -> None:
    wrong = firewall.problems(variables(**changes))
    assert [problem.key for problem in wrong] == [key]
    assert words in wrong[0].message and wrong[0].fix
    with pytest.raises(ValueError, match="refused"):
        firewall.rules(variables(**changes))


def test_a_host_without_the_firewall_has_nothing_to_refuse() -> None:
    assert firewall.problems(variables(firewall_enabled=False, firewall_allow={})) == []
    assert firewall.problems(variables()) == []


def test_the_same_port_for_tcp_and_udp_is_none_twice() -> None:
    changes = {"firewall_ports": {"quic": ["22/udp"]}, "firewall_allow": {"ssh": ["lan"], "quic": ["lan"]}}
    assert firewall.problems(variables(**changes)) == []


def test_the_page_names_every_service_that_has_a_port_by_itself() -> None:
    services = yaml.safe_load((ROLE / "defaults/main.yml").read_text())["firewall_services"]
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/firewall.md").read_text(), re.M)
    assert rows == list(services)


def test_the_specification_repeats_the_defaults_and_knows_the_limits() -> None:
    specs = yaml.safe_load((ROLE / "meta/argument_specs.yml").read_text())
    options = specs["argument_specs"]["main"]["options"]
    defaults = yaml.safe_load((ROLE / "defaults/main.yml").read_text())
    assert {name: option["default"] for name, option in options.items()} == defaults
    roles = RoleVariables.of({"firewall": specs})
    assert roles.check({"firewall_networks": variables()["firewall_networks"]}) == []
    wrong = roles.check({"firewall_networks": {"lan": {}, "Wan!": {"addresses": ["1.2.3.4/24"]}}})
    assert {problem.path[1] for problem in wrong} == {"lan", "Wan!"}


def chain(family: str, table: str, name: str, policy: str = "drop", hook: str = "input") -> dict[str, Any]:
    return {"chain": {"family": family, "table": table, "name": name, "hook": hook, "policy": policy}}


def rule(chain: str, *statements: dict[str, Any], table: str = "filter") -> dict[str, Any]:
    return {"rule": {"family": "ip", "table": table, "chain": chain, "expr": list(statements)}}


SSH = {"match": {"op": "==", "left": {"payload": {"protocol": "tcp", "field": "dport"}}, "right": 22}}
COUNTED = {"counter": {"packets": 0, "bytes": 0}}
REJECT = {"reject": {"type": "icmp", "expr": "host-prohibited"}}
DOCKER = {"chain": {"family": "ip", "table": "filter", "name": "DOCKER-USER"}}
UFW = {"chain": {"family": "ip", "table": "filter", "name": "ufw-before-input"}}


@pytest.mark.parametrize(
    ("chains", "ufw", "active", "legacy", "words"),
    [
        ([], "ENABLED=yes\n", set(), {}, "ufw disable"),
        ([chain("ip", "filter", "INPUT"), UFW], "", set(), {}, "ufw disable"),
        ([], "", {"firewalld.service"}, {}, "disable --now firewalld"),
        ([], "", {"nftables.service"}, {}, "disable nftables.service"),
        ([chain("ip", "filter", "FORWARD", hook="forward"), DOCKER], "", set(), {}, "docker.socket"),
        ([DOCKER], "", set(), {}, "docker.socket"),  # it drops nothing where somebody else forwards
        ([chain("ip6", "mine", "in")], "", set(), {}, "chain ip6 mine in"),
        ([chain("ip", "mine", "pre", hook="prerouting")], "", set(), {}, "chain ip mine pre"),
        ([chain("ip", "mine", "through", hook="forward")], "", set(), {}, "chain ip mine through"),
        ([chain("netdev", "mine", "early", hook="ingress")], "", set(), {}, "chain netdev mine early"),
        (
            [
                chain("ip", "filter", "in", "accept"),
                rule("in", SSH, {"accept": None}),
                rule("in", {"drop": None}),
            ],
            "",
            set(),
            {},
            "chain ip filter in",
        ),
        (
            [chain("ip", "filter", "in", "accept"), rule("in", COUNTED, REJECT)],
            "",
            set(),
            {},
            "chain ip filter in",
        ),
        (
            [],
            "",
            set(),
            {"iptables-legacy-save": ":INPUT ACCEPT\n-A INPUT -p tcp -j ACCEPT\n-A INPUT -j REJECT --x y\n"},
            "iptables-legacy INPUT",
        ),
        (
            [],
            "",
            set(),
            {"iptables-legacy-save": "*filter\n:FORWARD DROP [0:0]\n"},
            "iptables-legacy FORWARD",
        ),
        ([], "", set(), {"iptables-legacy-save": ":FORWARD DROP\n:DOCKER-USER - \n"}, "docker.socket"),
    ],
)
def test_another_firewall_is_refused_with_the_fix(
    chains: list[dict[str, Any]], ufw: str, active: set[str], legacy: dict[str, str], words: str
) -> None:
    (reason,) = module.others({"nftables": chains}, ufw, active, legacy)
    assert words in reason and "fix: " in reason and "\n" not in reason


def test_our_own_table_and_chains_that_accept_are_no_other_firewall() -> None:
    chains = [
        {"metainfo": {"version": "1.0.6"}},
        chain("inet", "llmbox", "input"),
        chain("ip", "filter", "ts-input", policy="accept"),
        chain("ip", "nat", "out", hook="output"),
        chain("ip", "guard", "in", policy="accept"),
        rule("in", SSH, {"drop": None}, table="guard"),
        rule("in", {"limit": {"rate": 5, "per": "second"}}, {"drop": None}, table="guard"),
        rule("in", COUNTED, table="guard"),
        rule("own", {"drop": None}, table="guard"),  # of a chain that only a match leads to
    ]
    legacy = {"iptables-legacy-save": ":INPUT ACCEPT [0:0]\n-A INPUT -s 192.0.2.7/32 -j DROP\n"}
    assert list(module.others({"nftables": chains}, "ENABLED=no\n", set(), legacy)) == []


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"is-active firewalld.service": "active"}, "disable --now firewalld"),
        ({"is-enabled firewalld.service": "enabled"}, "disable --now firewalld"),
        ({"is-active nftables.service": "active"}, "disable nftables.service"),
        ({"is-enabled nftables.service": "enabled"}, "disable nftables.service"),
        ({"ufw": "ENABLED=yes\n"}, "ufw disable"),
        ({"-j list ruleset": json.dumps({"nftables": [chain("ip", "mine", "in")]})}, "chain ip mine in"),
        ({"-t filter": ":FORWARD DROP [0:0]\n"}, "iptables-legacy FORWARD"),
        ({}, ""),
    ],
    ids=lambda value: next(iter(value), "nothing") if isinstance(value, dict) else "",
)
def test_a_host_is_looked_at_for_other_firewalls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: dict[str, str], words: str
) -> None:
    """One that only the next boot starts counts, too."""

    def run(*argv: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        line = " ".join(argv[1:])
        default = "disabled\n" if "is-enabled" in line else "inactive\n" if "is-active" in line else ""
        return subprocess.CompletedProcess(argv, 0, said.get(line, default), "")

    (tmp_path / "ufw.conf").write_text(said.get("ufw", "ENABLED=no\n"))
    (tmp_path / "tables").write_text("nat\nfilter\n")
    monkeypatch.setattr(module, "run", run)
    monkeypatch.setattr(module, "UFW_CONF", tmp_path / "ufw.conf")
    monkeypatch.setattr(module, "LEGACY", {"iptables-legacy-save": str(tmp_path / "tables")})
    if not words:
        module.look_for_others()
        return
    with pytest.raises(module.Refused, match=re.escape(words)):
        module.look_for_others()


class Kernel:
    """A host's nft and systemd, told by their command lines; a rule set is its own listing."""

    def __init__(self) -> None:
        self.loaded, self.armed, self.enabled = "former", False, False
        self.broken = self.full = self.hangs = False
        self.told: list[str] = []

    def run(self, *argv: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        line = " ".join(argv)
        self.told.append(line)
        code, said = 0, ""
        if argv[0] == "unshare":
            said = stdin
        elif line.startswith("nft --stateless list"):
            code, said = (0, self.loaded) if self.loaded else (1, "")
        elif line == f"nft -f {module.FORMER}":
            self.loaded = module.FORMER.read_text().removeprefix(module.EMPTY)
        elif line == "nft -f -":
            code, said = (1, "syntax error") if self.broken else (0, "")
            self.loaded = self.loaded if self.broken else stdin
        elif argv[0] == "systemd-run":
            self.armed = True
        elif line.startswith("systemctl stop llmbox-firewall-revert"):
            self.armed = False
        elif line.startswith("systemctl is-active llmbox-firewall-revert"):
            said = "active" if self.armed else "inactive"
        elif line.startswith("systemctl show"):
            said = f"ActiveState={'active' if self.enabled else 'inactive'}\nUnitFileState=enabled\n"
        elif line.startswith("systemctl enable"):
            if self.hangs:
                raise subprocess.TimeoutExpired(argv, 60)
            code, said = (1, "no room") if self.full else (0, "")
            self.enabled = not self.full
        return subprocess.CompletedProcess(argv, code, said, "")

    def position(self, start: str) -> int:
        return next(index for index, line in enumerate(self.told) if line.startswith(start))


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel()
    monkeypatch.setattr(module, "run", made.run)
    monkeypatch.setattr(module, "look_for_others", lambda: None)
    monkeypatch.setattr(module, "connection", lambda: "10.0.0.1 40002 10.0.0.2 22")
    monkeypatch.setattr(module, "FORMER", tmp_path / "run/former.nft")
    monkeypatch.setattr(module, "SYSTEM_DIR", tmp_path)
    monkeypatch.setattr("shutil.which", lambda *_, **__: "/usr/sbin/nft")
    return made


def host(tmp_path: Path, rules: str = "wanted") -> module.Firewall:
    return module.Firewall(
        {
            "rules": rules,
            "file": tmp_path / "llmbox/firewall.nft",
            "unit": "llmbox-firewall.service",
            "unit_text": "[Service]\n",
            "confirm_timeout": 30,
        }
    )


def test_the_way_back_is_armed_before_new_rules_and_disarmed_by_a_new_connection_alone(
    kernel: Kernel, tmp_path: Path
) -> None:
    assert host(tmp_path).apply(check=False)["pending"]
    assert kernel.position("systemd-run") < kernel.position("nft -f -")
    assert "--on-active=30s" in kernel.told[kernel.position("systemd-run")]
    assert module.FORMER.read_text().endswith("former") and kernel.loaded == "wanted"
    assert not (tmp_path / "llmbox").exists(), "no boot knows the rules yet"

    with pytest.raises(module.Refused, match="proves nothing"):
        host(tmp_path).confirm("10.0.0.1 40002 10.0.0.2 22")
    assert kernel.armed and not (tmp_path / "llmbox").exists()

    assert host(tmp_path).confirm("10.0.0.1 40001 10.0.0.2 22")["changed"]
    assert not kernel.armed and kernel.enabled
    assert (tmp_path / "llmbox/firewall.nft").read_text().endswith("wanted")
    assert host(tmp_path).apply(check=False) == {"changed": False, "diff": []}


@pytest.mark.parametrize("former", ["former", ""])
def test_the_way_back_leaves_nothing_of_the_rules_on_trial(
    kernel: Kernel, tmp_path: Path, former: str
) -> None:
    """nft adds to a table that is there: the former one comes back alone, or none does."""
    kernel.loaded = former
    host(tmp_path).apply(check=False)
    assert module.FORMER.read_text() == f"table inet llmbox\ndelete table inet llmbox\n{former}"


@pytest.mark.parametrize("check", [True, False])
def test_rules_are_not_loaded_beside_another_firewall(
    kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, check: bool
) -> None:
    def refuse() -> None:
        raise module.Refused("ufw is enabled; fix: ufw disable")

    monkeypatch.setattr(module, "look_for_others", refuse)
    with pytest.raises(module.Refused, match="ufw disable"):
        host(tmp_path).apply(check=check)
    assert kernel.loaded == "former" and not kernel.armed
    assert host(tmp_path, rules="").apply(check=check)["changed"], "none of ours may always be taken away"


def test_a_confirmation_after_the_former_rules_is_none(kernel: Kernel, tmp_path: Path) -> None:
    host(tmp_path).apply(check=False)
    kernel.armed = False
    with pytest.raises(module.Refused, match="too late"):
        host(tmp_path).confirm("another")
    kernel.armed, kernel.loaded = True, "former"  # the timer was faster than its end
    with pytest.raises(module.Refused, match="too late"):
        host(tmp_path).confirm("another")
    assert not (tmp_path / "llmbox").exists()


def test_rules_that_nft_refuses_disarm_the_timer(kernel: Kernel, tmp_path: Path) -> None:
    kernel.broken = True
    with pytest.raises(module.Refused, match="syntax error"):
        host(tmp_path).apply(check=False)
    assert not kernel.armed and kernel.loaded == "former"


def test_a_dry_run_loads_nothing(kernel: Kernel, tmp_path: Path) -> None:
    shown = host(tmp_path).apply(check=True)
    assert shown["changed"] and shown["diff"][0]["after"] == "wanted"
    assert kernel.loaded == "former" and not kernel.armed


def test_two_runs_at_once_do_not_take_each_other_s_way_back(kernel: Kernel, tmp_path: Path) -> None:
    kernel.armed = True
    with pytest.raises(module.Refused, match="another run"):
        host(tmp_path).apply(check=False)
    assert kernel.loaded == "former"


def test_the_rules_of_a_run_that_died_are_not_kept_by_the_next_one(kernel: Kernel, tmp_path: Path) -> None:
    assert host(tmp_path).apply(check=False)["pending"]
    with pytest.raises(module.Refused, match="another run"):
        host(tmp_path).apply(check=False)
    assert kernel.armed and not kernel.enabled and not (tmp_path / "llmbox").exists()
    with pytest.raises(module.Refused, match="another run"):  # the timer would put the former rules back
        host(tmp_path, rules="").apply(check=False)


@pytest.mark.parametrize("hangs", [False, True])
def test_rules_that_cannot_be_kept_for_a_boot_are_taken_back(
    kernel: Kernel, tmp_path: Path, *, hangs: bool
) -> None:
    host(tmp_path).apply(check=False)
    kernel.full, kernel.hangs = True, hangs
    with pytest.raises((module.Refused, subprocess.TimeoutExpired), match=r"no room|timed out"):
        host(tmp_path).confirm("another")
    assert kernel.loaded == "former" and not kernel.armed


def test_what_boots_is_as_it_was_when_new_rules_cannot_be_kept(kernel: Kernel, tmp_path: Path) -> None:
    """Else a boot would load the rules that the run says were taken back."""
    host(tmp_path).apply(check=False)
    host(tmp_path).confirm("another")
    unit, file = tmp_path / "llmbox-firewall.service", tmp_path / "llmbox/firewall.nft"
    before = (unit.read_text(), file.read_text())
    host(tmp_path, rules="newer").apply(check=False)
    kernel.full = True
    with pytest.raises(module.Refused, match="no room"):
        host(tmp_path, rules="newer").confirm("another")
    assert kernel.loaded == "wanted"
    assert (unit.read_text(), file.read_text()) == before


def test_a_unit_that_was_not_there_is_not_there_after_a_failure(kernel: Kernel, tmp_path: Path) -> None:
    host(tmp_path).apply(check=False)
    kernel.full = True
    with pytest.raises(module.Refused, match="no room"):
        host(tmp_path).confirm("another")
    assert not (tmp_path / "llmbox-firewall.service").exists()
    assert not (tmp_path / "llmbox/firewall.nft").exists()
    assert "systemctl disable --quiet llmbox-firewall.service" in kernel.told


@pytest.mark.parametrize("second", [False, True])
def test_files_whose_writing_breaks_off_are_none(
    kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, second: bool
) -> None:
    """The disk has a file before it gets its name, and all of them before one gets it."""
    host(tmp_path).apply(check=False)
    written: list[int] = []

    def fsync(handle: int) -> None:
        written.append(handle)
        if len(written) == 1 + second:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fsync)
    with pytest.raises(OSError, match="No space"):
        host(tmp_path).confirm("another")
    assert kernel.loaded == "former"
    assert list((tmp_path / "llmbox").iterdir()) == []
    assert list(tmp_path.glob("*.service*")) + list(tmp_path.glob(".*")) == []


def test_without_ssh_there_is_no_new_connection_that_could_prove_anything(
    kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "connection", lambda: "")
    assert host(tmp_path).apply(check=True)["changed"]
    with pytest.raises(module.Refused, match=r"^this run did not come over SSH.*; fix: ") as refused:
        host(tmp_path).apply(check=False)
    assert "\n" not in str(refused.value)
    assert not kernel.armed and kernel.loaded == "former"

    kernel.armed, kernel.loaded = True, "wanted"
    for applied_over in ("", "10.0.0.1 40001 10.0.0.2 22"):
        with pytest.raises(module.Refused, match="did not come over SSH"):
            host(tmp_path).confirm(applied_over)
    monkeypatch.setattr(module, "connection", lambda: "10.0.0.1 40002 10.0.0.2 22")
    with pytest.raises(module.Refused, match="did not come over SSH"):
        host(tmp_path).confirm("")
    assert kernel.armed and not (tmp_path / "llmbox").exists()
    kernel.armed = False
    assert host(tmp_path).apply(check=False)["changed"], "nothing new is loaded: nothing has to be proved"


def test_the_connection_is_found_behind_a_sudo_that_cleans_the_environment() -> None:
    program = "from roles.firewall.library.firewall_rules import connection; print(connection())"
    clean = f"env -i {shlex.quote(sys.executable)} -c {shlex.quote(program)}; true"  # the shell stays
    over = "10.0.0.1 40001 10.0.0.2 22"
    done = subprocess.run(
        ["sh", "-c", clean],
        env={**os.environ, "SSH_CONNECTION": over},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == over
