#!/usr/bin/python3
"""Ansible module: one nftables table of our own, tried first, kept once a new connection came through."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule  # type: ignore[import-untyped]

DOCUMENTATION = r"""
---
module: firewall_rules
short_description: Have an nftables table as it should be, without locking anybody out
description:
  - O(phase=apply) compares the table that is loaded, whole, with O(rules). When they differ it arms a timer
    that puts the former table back, and loads the new one. It is C(pending) then, and no boot keeps it.
  - O(phase=confirm), which must come over another SSH connection than the first, disarms the timer, and keeps
    the rules in O(file), loaded at boot by O(unit).
  - O(phase=look) says whether a timer is armed.
  - Without O(rules) the table, the file and the unit are removed.
  - Refuses a host on which another firewall drops packets or empties every table.
options:
  rules: {description: The table as nft reads it; empty to have none., type: str, required: true}
  file: {description: Where the rules are kept., type: path, required: true}
  unit: {description: Name of the unit that loads them at boot., type: str, required: true}
  unit_text: {description: Text of that unit., type: str, required: true}
  confirm_timeout: {description: Seconds until the former rules come back., type: int, required: true}
  phase: {description: What to do., type: str, choices: [apply, confirm, look], default: apply}
  applied_over: {description: The connection of the first phase., type: str, default: ""}
author: [llmbox]
"""

EXAMPLES = r"""
- name: Let in what is declared
  firewall_rules:
    rules: "table inet llmbox { ... }"
    file: /etc/llmbox/firewall.nft
    unit: llmbox-firewall.service
    unit_text: "[Service] ..."
    confirm_timeout: 30
"""

RETURN = r"""
pending: {description: The rules are on trial., returned: always, type: bool}
connection: {description: SSH_CONNECTION of this run; empty without SSH., returned: always, type: str}
"""

TABLE = ("inet", "llmbox")
HEADER = "#!/usr/sbin/nft -f\n# Managed by llmbox: roles/firewall.\n"
EMPTY = "table {0}\ndelete table {0}\n".format(" ".join(TABLE))
SYSTEM_DIR = Path("/etc/systemd/system")
FORMER = Path("/run/llmbox-firewall/former.nft")
REVERT = "llmbox-firewall-revert"
UFW_CONF = Path("/etc/ufw/ufw.conf")
WAYS_IN = ("ingress", "prerouting", "input", "forward")
LEGACY = {
    "iptables-legacy-save": "/proc/net/ip_tables_names",
    "ip6tables-legacy-save": "/proc/net/ip6_tables_names",
}
TIMEOUT_S = 60
TOO_LATE = "too late, the former rules are back"
NO_SSH = (
    "this run did not come over SSH (SSH_CONNECTION is empty), so that no new connection can prove that the "
    "rules let one in; fix: give this host an address that SSH reaches (ansible_host, no ansible_connection)"
)


class Refused(Exception):
    """Something is not as it must be; the text is one line for the person."""


FAILURES = (OSError, Refused, subprocess.TimeoutExpired)


def run(*argv: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run a program. Raises OSError, subprocess.TimeoutExpired."""
    environment = {**os.environ, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
    return subprocess.run(
        argv, input=stdin, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=environment
    )


def must(*argv: str, stdin: str = "") -> str:
    """The output of a program. Raises Refused with its first complaint when it fails."""
    done = run(*argv, stdin=stdin)
    if done.returncode != 0:
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise Refused(f"{' '.join(argv[:3])}: {said[0].strip() if said else f'exit code {done.returncode}'}")
    return done.stdout


def connection() -> str:
    """SSH_CONNECTION of this session: sudo takes it out of the environment, not out of /proc."""
    pid = os.getpid()
    while pid > 1:
        with contextlib.suppress(OSError):
            for word in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                if word.startswith(b"SSH_CONNECTION="):
                    return word.partition(b"=")[2].decode(errors="replace")
        try:
            # The name in parentheses may hold anything: what counts stands behind the last one.
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            break
    return ""


def listing() -> str:
    """The table that is loaded, in nft's own words; empty when there is none."""
    done = run("nft", "--stateless", "list", "table", *TABLE)
    return done.stdout if done.returncode == 0 else ""


def listed(rules: str) -> str:
    """`rules` in nft's own words: loaded in a network namespace of their own. Raises Refused."""
    script = f"nft -f - && nft --stateless list table {' '.join(TABLE)}"
    return must("unshare", "--net", "--", "sh", "-c", script, stdin=rules)


def drops_all(statements: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a rule drops or rejects whatever comes to it, as the last one of many rule sets does."""
    kinds = {kind for statement in statements for kind in statement}
    return kinds <= {"counter", "log", "drop", "reject"} and bool(kinds & {"drop", "reject"})


def others(
    ruleset: Mapping[str, Any], ufw: str, active: set[str], legacy: Mapping[str, str]
) -> Iterator[str]:
    """What else decides about packets here, each with its fix.

    `ruleset` is what `nft -j list ruleset` prints, `ufw` its ufw.conf, `active` units that run or would at
    boot, `legacy` what the programs of the older iptables print.
    """
    if "ENABLED=yes" in ufw.splitlines():
        yield "ufw is enabled and drops what these rules let in; fix: ufw disable"
    if "firewalld.service" in active:
        yield ("firewalld rejects what these rules let in; fix: systemctl disable --now firewalld.service")
    if "nftables.service" in active:
        yield (
            "nftables.service empties every table when it starts; fix: put its rules into a table and a unit "
            "of their own, then systemctl disable nftables.service"
        )
    chains = [one["chain"] for one in ruleset["nftables"] if "chain" in one]
    names = {chain["name"] for chain in chains}
    ending = {
        (rule["family"], rule["table"], rule["chain"])
        for one in ruleset["nftables"]
        if (rule := one.get("rule")) and drops_all(rule["expr"])
    }
    dropping = [
        f"{chain['family']} {chain['table']} {chain['name']}"
        for chain in chains
        if chain.get("hook") in WAYS_IN
        and (chain.get("policy") == "drop" or (chain["family"], chain["table"], chain["name"]) in ending)
        and (chain["family"], chain["table"]) != TABLE
    ]
    for program, text in legacy.items():
        dropping += [
            f"{program.removesuffix('-save')} {name}"
            for name in ("INPUT", "FORWARD")
            if re.search(rf"^:{name} DROP|^-A {name} -j (DROP|REJECT)\b", text, re.MULTILINE)
        ]
        names |= {"DOCKER-USER"} if ":DOCKER-USER " in text else set()
    if dropping and "ufw-before-input" in names:
        yield f"ufw drops what these rules let in (chain {dropping[0]}); fix: ufw disable"
    elif "DOCKER-USER" in names:  # whether or not it drops what is forwarded
        yield (
            "Docker leads what it publishes past these rules (chain DOCKER-USER); fix: "
            "systemctl disable --now docker.socket docker.service and reboot, or firewall_enabled: false here"
        )
    elif dropping:
        yield (
            f"another firewall drops what these rules let in (chain {dropping[0]} drops); fix: "
            "remove it, or firewall_enabled: false here"
        )


def look_for_others() -> None:
    """Refuse a host with another firewall. Raises Refused."""
    legacy = {}
    for program, tables in LEGACY.items():
        with contextlib.suppress(OSError):  # no such kernel module, or no such program
            if "filter" in Path(tables).read_text().split():
                legacy[program] = run(program, "-t", "filter").stdout
    active = set()
    for unit in ("firewalld.service", "nftables.service"):
        states = (run("systemctl", verb, unit).stdout.strip() for verb in ("is-active", "is-enabled"))
        if any(state in ("active", "enabled") for state in states):
            active.add(unit)
    ufw = UFW_CONF.read_text(errors="replace") if UFW_CONF.exists() else ""
    ruleset = json.loads(must("nft", "-j", "list", "ruleset") or '{"nftables": []}')
    for reason in others(ruleset, ufw, active, legacy):
        raise Refused(reason)


def armed() -> bool:
    """Whether the former rules are about to come back."""
    return run("systemctl", "is-active", f"{REVERT}.timer").stdout.strip() == "active"


def write(texts: Mapping[Path, str], mode: int = 0o644) -> None:
    """Write files, each in one step, and none before all of them are on the disk. Raises OSError."""
    fresh = {path: path.with_name(f".{path.name}.new") for path in texts}
    try:
        for path, text in texts.items():
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            fresh[path].unlink(missing_ok=True)
            fresh[path].touch(mode)
            with fresh[path].open("w") as handle:
                handle.write(text)
                handle.flush()
                os.fsync(handle.fileno())
            fresh[path].chmod(mode)
        for path in texts:
            fresh[path].replace(path)
    finally:
        for left in fresh.values():
            left.unlink(missing_ok=True)


def text_of(path: Path) -> str:
    """What a file holds; empty when it is not there."""
    return path.read_text(errors="replace") if path.exists() else ""


class Firewall:
    """What the host has beside what it should have."""

    def __init__(self, wanted: Mapping[str, Any]) -> None:
        self.rules = str(wanted["rules"])
        self.file, self.unit = Path(wanted["file"]), str(wanted["unit"])
        self.unit_text, self.timeout_s = str(wanted["unit_text"]), int(wanted["confirm_timeout"])
        self.files = {self.file: HEADER + self.rules, SYSTEM_DIR / self.unit: self.unit_text}

    def apply(self, *, check: bool) -> dict[str, Any]:
        """The first phase. Raises Refused, OSError, subprocess.TimeoutExpired."""
        if not check and armed():  # whatever they are, nobody has confirmed them
            raise Refused("rules of another run wait for their confirmation; fix: try again in a minute")
        if not self.rules:
            return self.remove(check=check)
        if check and not shutil.which("nft", path="/usr/sbin:/usr/bin"):  # a new host
            return {"changed": True, "diff": diff("", self.rules)}
        look_for_others()
        loaded, wanted = listing(), listed(self.rules)
        if loaded == wanted:
            return {"changed": self.keep(check=check), "diff": []}
        shown = {"changed": True, "diff": diff(loaded, wanted)}
        if check:
            return shown
        if not connection():
            raise Refused(NO_SSH)
        write({FORMER: EMPTY + loaded}, 0o600)
        run("systemctl", "reset-failed", f"{REVERT}.service")
        must(
            *("systemd-run", "--quiet", f"--unit={REVERT}", f"--on-active={self.timeout_s}s"),
            *("--timer-property=AccuracySec=100ms", "--description=Put the former firewall rules back"),
            *("/usr/sbin/nft", "-f", str(FORMER)),
        )
        try:
            must("nft", "-f", "-", stdin=self.rules)
        except Refused:
            must("systemctl", "stop", f"{REVERT}.timer")
            raise
        return {**shown, "pending": True}

    def confirm(self, applied_over: str) -> dict[str, Any]:
        """The second phase. Raises Refused, OSError, subprocess.TimeoutExpired."""
        over = connection()
        if not (over and applied_over):
            raise Refused(NO_SSH)
        if over == applied_over:
            raise Refused("this is the connection over which the rules came: it proves nothing")
        if not armed():
            raise Refused(TOO_LATE)
        must("systemctl", "stop", f"{REVERT}.timer")
        if listing() != listed(self.rules):  # the timer was faster
            raise Refused(TOO_LATE)
        former = {path: text_of(path) for path in self.files}
        try:
            self.keep(check=False)
        except FAILURES:  # rules that no boot would load: the timer that took them back has stopped
            try:
                must("nft", "-f", str(FORMER))
            finally:
                self.put_back(former)
            raise
        FORMER.unlink(missing_ok=True)
        return {"changed": True}

    def keep(self, *, check: bool) -> bool:
        """Have the rules loaded at boot. Returns whether that was not so."""
        differing = [path for path, text in self.files.items() if text_of(path) != text]
        shown = must("systemctl", "show", "--property=ActiveState,UnitFileState", self.unit).split()
        runs = shown == ["ActiveState=active", "UnitFileState=enabled"]
        if check or (runs and not differing):
            return not runs or bool(differing)
        write({path: self.files[path] for path in differing})
        must("systemctl", "daemon-reload")
        must("systemctl", "enable", "--quiet", "--now", self.unit)
        return True

    def put_back(self, former: Mapping[Path, str]) -> None:
        """Have a boot load what it would have loaded before; what cannot be told to systemd it reads then."""
        write({path: text for path, text in former.items() if text and text_of(path) != text})
        if not former[SYSTEM_DIR / self.unit]:
            with contextlib.suppress(*FAILURES):
                must("systemctl", "disable", "--quiet", self.unit)
        for path, text in former.items():
            if not text:
                path.unlink(missing_ok=True)
        with contextlib.suppress(*FAILURES):
            must("systemctl", "daemon-reload")

    def remove(self, *, check: bool) -> dict[str, Any]:
        """Have neither table nor unit: nobody is locked out by that."""
        there = [path for path in self.files if path.exists()]
        loaded = listing() if shutil.which("nft", path="/usr/sbin:/usr/bin") else ""
        if not check and (there or loaded):
            if SYSTEM_DIR / self.unit in there:
                must("systemctl", "disable", "--quiet", "--now", self.unit)
            for path in there:
                path.unlink()
            with contextlib.suppress(OSError):  # others keep their settings there
                self.file.parent.rmdir()
            must("systemctl", "daemon-reload")
            if listing():
                must("nft", "delete", "table", *TABLE)
        return {"changed": bool(there or loaded), "diff": diff(loaded, "")}


def diff(before: str, after: str) -> list[dict[str, str]]:
    """The loaded table, for --diff."""
    name = f"table {' '.join(TABLE)}"
    return [{"before_header": name, "after_header": name, "before": before, "after": after}]


def main() -> None:
    """Module entry point."""
    module = AnsibleModule(
        argument_spec={
            "rules": {"type": "str", "required": True},
            "file": {"type": "path", "required": True},
            "unit": {"type": "str", "required": True},
            "unit_text": {"type": "str", "required": True},
            "confirm_timeout": {"type": "int", "required": True},
            "phase": {"type": "str", "choices": ["apply", "confirm", "look"], "default": "apply"},
            "applied_over": {"type": "str", "default": ""},
        },
        supports_check_mode=True,
    )
    firewall, phase = Firewall(module.params), module.params["phase"]
    try:
        if phase == "apply":
            result = firewall.apply(check=module.check_mode)
        elif phase == "confirm":
            result = firewall.confirm(module.params["applied_over"])
        else:
            result = {"changed": False, "pending": armed()}
    except (Refused, OSError, ValueError, subprocess.TimeoutExpired) as error:
        module.fail_json(msg=str(error), pending=False, connection="")
    module.exit_json(**{"pending": False, "connection": connection(), **result})


if __name__ == "__main__":
    main()
