#!/usr/bin/env python3
"""Check that every host is what its inventory says, and that the LLM box really answers.

    scripts/verify_health.py --inventory DIR [--limit PATTERN] [--drift] [--json FILE]

Nothing is changed. With --drift boxes and routers are also compared with what was deployed on them
(docs/drift.md). All expected values come from the inventory and the roles' defaults. A gateway that wants
a key is shown the one in the environment variable LLMBOX_KEY. Progress goes to standard error, a table and
one line for each check that fell short to standard output, JSON to FILE (`-`:
standard output, instead of the table). Exit codes: 0 all well, 1 something fell short, 2 could not run or a
host could not be reached, 130 interrupted.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lab import interrupt
from scripts import _venv

if __name__ == "__main__":
    interrupt.exit_quietly()
    _venv.enter()

import argparse
import difflib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import httpx
from llama_common.problems import InventoryError
from llmbox.drift.compare import Difference, printable

from roles.llama_cpp.library.llama_cpp_build import HostError
from scripts import _command
from scripts._ask_host import Unreachable, ask, bracketed, compare, reach
from scripts._inventory import Host, load
from scripts._llm_box import GATEWAY_UNITS, GROUP, LlmBox, gateway_units_unlike
from scripts._ocr_box import GROUP as OCR_GROUP
from scripts._ocr_box import PERSISTENCE, OcrBox
from scripts._refusal import KEY_VARIABLE, refusal
from scripts._screen import size, table

HOSTS_AT_ONCE = 8
HEALTH_TIMEOUT_S = 10.0
CHAT_TIMEOUT_S = 120.0
CLOCK_LIMIT_S = 5.0
SET_CLOCK = {"Linux": "timedatectl set-ntp true", "Darwin": "sudo sntp -sS time.apple.com"}
AWAKE_BUS = "pcie_aspm=off"
REPEATED = ("console", "earlycon", "acpi_osi")  # kernel parameters of which each word counts; as in the role
NOT_IN_EFFECT = "asked for, not in effect; fix: run site.yml with -e allow_reboot=true"
GONE = (
    "the NVIDIA card is gone from the PCI bus; fix: switch the machine off at the mains for a minute, look "
    "at the card's power and the firmware's setup; gpu_host_card: absent where there is none any more"
)
STILL_IN_EFFECT = (
    "taken out of the inventory, still in effect; fix: run site.yml with -e allow_reboot=true, or reboot it"
)
NOT_ASKED_FOR = (
    "not in effect; fix: add it to gpu_host_kernel_parameters, then run site.yml with -e allow_reboot=true"
)
RECORDED = {"llama_hosts", "routers"}  # hosts on which a play records what it deployed
CLIENTS, LOCAL_CLAUDE = "clients", "~/.local/bin/local-claude"
CHAT = {
    "messages": [{"role": "user", "content": "Count from one to five in words."}],
    "max_tokens": 12,
    "temperature": 0.0,
}

Value = str | int | float | bool | None


@dataclass(frozen=True)
class Check:
    """One thing looked at: its value beside what was wanted. `detail` says what to do when it fell short."""

    name: str
    ok: bool
    value: Value
    unit: str
    limit: Value
    detail: str = ""


@dataclass(frozen=True)
class HostReport:
    """All checks of a host; `error` when it could not be asked."""

    host: str
    checks: tuple[Check, ...] = ()
    error: str | None = None

    @property
    def ok(self) -> bool:
        """Whether it was reached and nothing fell short."""
        return self.error is None and all(check.ok for check in self.checks)

    @property
    def verdict(self) -> str:
        """One word, or two."""
        if self.error:
            return "refused" if self.error.startswith("refused:") else "unreachable"
        return "ok" if self.ok else "fell short"

    def as_json(self) -> dict[str, Any]:
        """The host's entry in the JSON report."""
        return {
            "host": self.host,
            "ok": self.ok,
            "error": self.error,
            "checks": [asdict(one) for one in self.checks],
        }


@dataclass(frozen=True)
class Answers:
    """What the gateway said over HTTP; `failure` instead of what could not be had.

    `health` and `ready` are HTTP statuses, None without an answer.
    """

    health: int | None = None
    ready: int | None = None
    text: str = ""
    failure: str = ""


# --- pure: what was seen against what the inventory wants ---


def as_dict(value: object) -> Mapping[str, Any]:
    """`value` when it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def equal(name: str, value: Value, wanted: Value, detail: str, unit: str = "") -> Check:
    """A check that two values are the same."""
    return Check(name, value == wanted, value, unit, wanted, "" if value == wanted else detail)


def host_checks(seen: Mapping[str, Any], offset_s: float, *, client: bool = False) -> list[Check]:
    """What every host must fulfil. A client may be a Mac, or a Linux without systemd: it has no units."""
    checks = [] if client and not seen["systemd"] else [units_check(seen["failed_units"])]
    offset = round(abs(offset_s), 1)
    set_clock = SET_CLOCK.get(seen["system"], SET_CLOCK["Linux"])
    detail = "" if offset <= CLOCK_LIMIT_S else f"its clock and this machine's differ; fix: {set_clock}"
    return [*checks, Check("clock_offset", not detail, offset, "s", CLOCK_LIMIT_S, detail)]


def units_check(failed: Sequence[str] | None) -> Check:
    """No system unit has failed."""
    if failed is None:
        detail = "systemctl on the host gave no answer; look with: systemctl list-units --failed"
    else:
        detail = f"{', '.join(failed)}; look with: systemctl status {failed[0]}" if failed else ""
    count = None if failed is None else len(failed)
    return Check("failed_units", count == 0, count, "units", 0, detail)


def client_checks(answer: Mapping[str, Any] | None) -> list[Check]:
    """What a client must fulfil besides: its local-claude runs. `answer` is what it said to --help."""
    code = answer["rc"] if answer else None
    detail = f"{LOCAL_CLAUDE}: {(answer or {}).get('err') or 'is missing'}; fix: run playbooks/client.yml"
    return [equal("local_claude", code, 0, " ".join(detail.split()), "exit code")]


def firewall_check(seen: Mapping[str, str] | None) -> Check:
    """The table that is loaded is, whole, what the inventory's rules make."""
    if seen is None:
        return Check("firewall", False, None, "lines", 0, "nft gave no answer; fix: run site.yml")
    lines = difflib.unified_diff(seen["wanted"].splitlines(), seen["loaded"].splitlines(), n=0, lineterm="")
    differing = [one for one in lines if one[:1] in "+-" and one[:3] not in ("+++", "---")]
    shown = "; ".join(" ".join(one.split()) for one in differing[:2])
    detail = f"the loaded rules differ from the inventory's: {shown}; fix: run site.yml" if differing else ""
    return Check("firewall", not differing, len(differing), "lines", 0, detail)


def kernel_check(parameter: str, command_line: Sequence[str], detail: str = NOT_IN_EFFECT) -> Check:
    """The kernel was started with this parameter, and no later word of its name takes its place."""
    name = parameter.partition("=")[0]
    given = [word for word in command_line if word.partition("=")[0] == name]
    value = parameter if parameter in (given if name in REPEATED else given[-1:]) else "".join(given[-1:])
    return equal(f"kernel_{name}", value, parameter, detail)


def removed_checks(removed: Sequence[str], wanted: Sequence[str], command_line: Sequence[str]) -> list[Check]:
    """What is no longer asked for and only a reboot takes away; another value has a check of its own."""
    asked = {one.partition("=")[0] for one in wanted}
    left = {one.partition("=")[0]: one for one in removed if one in command_line}
    return [
        equal(f"kernel_{name}", one, "", STILL_IN_EFFECT) for name, one in left.items() if name not in asked
    ]


def machine_checks(
    declared: Mapping[str, Any], seen: Mapping[str, Any], command_line: Sequence[str]
) -> list[Check]:
    """What role gpu_host was asked for, and whether it is in effect: a reboot or the firmware may lack."""
    if seen["container"]:  # the machine is somebody else's: the role has skipped it, and said so
        return []
    checks = [kernel_check(one, command_line) for one in declared["parameters"]]
    lost = [one["device"] for one in seen["links"] if one["gone"]]
    if AWAKE_BUS in declared["parameters"]:
        checks += [aspm_check(one["device"], one["link"]) for one in seen["links"] if not one["gone"]]
    # What was set up for a card had one: without it now, it fell off the bus, or the firmware has lost it.
    set_up = declared["driver"] and (seen["links"] or seen["card_set_up"])
    if declared["card"] == "present" or (declared["card"] == "auto" and set_up):
        card = f"{' '.join(lost)} does not answer" if lost else "there" if seen["links"] else "none"
        checks.append(equal("nvidia_card", card, "there", GONE))
    if declared["driver"] and seen["links"] and not lost:
        version = declared["driver"].partition("-")[0]
        checks.append(equal("nvidia_driver", seen["driver"], version, NOT_IN_EFFECT))
        fix = "fix: systemctl restart llmbox-gpu-devices.service"
        checks.append(equal("nvidia_uvm", seen["uvm"], True, f"/dev/nvidia-uvm is missing; {fix}"))
        if declared["suspend"]:
            checks.append(equal("nvidia_suspend", seen["suspend"], "1", NOT_IN_EFFECT))
    if declared["power"] and seen["links"] and not lost:
        checks.append(power_check(declared["power"], seen["power_limits"]))
    if declared["wake"]:
        on = seen["wake_on"] or ""
        detail = (
            "" if "g" in on else f"a magic packet will not wake it; look with: ethtool {declared['wake']}"
        )
        checks.append(Check("wake_on_lan", not detail, on, "", "g", detail))
    return checks


def power_check(watts: int, limits: Sequence[str] | None) -> Check:
    """No card may draw more, or less, than was asked for. nvidia-smi writes 250 W as 250.00."""
    value = "unknown" if limits is None else ", ".join(dict.fromkeys(limits))
    detail = (
        "nvidia-smi does not say; look with: nvidia-smi --query-gpu=power.limit --format=csv"
        if limits is None
        else "asked for, not in effect; fix: systemctl restart llmbox-gpu-limits.service"
    )
    well = bool(limits) and all(limit == f"{watts}.00" for limit in limits or ())
    return Check("nvidia_power_limit", well, value, "W", watts, "" if well else detail)


def aspm_check(device: str, link: Mapping[str, int] | None) -> Check:
    """Whether a link really does without ASPM: pcie_aspm=off only keeps the kernel's hands off it."""
    wanted = "ASPM Disabled"
    name = f"aspm_{device}"
    if link is None:
        return Check(name, False, None, "", wanted, f"LnkCtl cannot be read; try: lspci -vv -s {device}")
    value = (wanted, "ASPM L0s Enabled", "ASPM L1 Enabled", "ASPM L0s L1 Enabled")[link["on"]]
    detail = (
        "asked for, not in effect: the firmware has switched it on, and pcie_aspm=off keeps the kernel from "
        f"switching it off; fix: ASPM in the firmware's setup; look with: lspci -vv -s {device}"
    )
    return equal(name, value, wanted, detail)


def machine_asked(variables: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the inventory asks of the machine below the services; None for nothing that can be checked."""
    asked = {
        "parameters": list(variables.get("gpu_host_kernel_parameters") or []),
        "driver": str(variables.get("gpu_host_driver_version") or ""),
        "wake": str(variables.get("gpu_host_wake_on_lan") or ""),
        "card": str(variables.get("gpu_host_card") or "auto"),
        "suspend": bool(variables.get("gpu_host_suspend")),
        "power": int(variables.get("gpu_host_power_limit") or 0),
    }
    if asked["card"] == "auto" and variables.get("llama_presets_gpu_memory_mib"):
        asked["card"] = "present"
    asks = asked["card"] == "present" or any(
        asked[name] for name in ("parameters", "driver", "wake", "power")
    )
    return asked if asks else None


def llm_checks(box: LlmBox, seen: Mapping[str, Any], answers: Answers) -> list[Check]:
    """What an LLM box must fulfil besides."""
    return [
        *account_checks(seen),
        *build_checks(box, seen),
        *model_checks(box, seen),
        *preset_checks(box, seen),
        *serving_checks(box, seen),
        *server_checks(box, seen),
        *gateway_checks(box, seen),
        *guard_checks(box, seen),
        *answer_checks(box, seen, answers),
    ]


def account_checks(seen: Mapping[str, Any]) -> list[Check]:
    """The user of the model server, whose systemd lives without a login."""
    linger = bool((seen["account"] or {}).get("linger"))
    return [equal("lingering", linger, True, "without it nothing runs after a logout; fix: run site.yml")]


def build_checks(box: LlmBox, seen: Mapping[str, Any]) -> list[Check]:
    """Each build's current release is the pinned commit, built with the options of the inventory."""
    checks = []
    options = box.cmake_options()
    for name, commit in box.commits().items():
        stamp = (seen["builds"].get(name) or {}).get("release") or {}
        found = stamp.get("cmake_options") or {}
        differing = [
            key
            for key in sorted(found.keys() | options[name].keys())
            if found.get(key) != options[name].get(key)
        ]

        def told(commit: str, values: Mapping[str, str], keys: Sequence[str] = tuple(differing)) -> str:
            return " ".join([commit[:12], *(f"{key}={values.get(key, 'unset')}" for key in keys)])

        if found:
            value, wanted = told(str(stamp.get("commit", "")), found), told(commit, options[name])
        else:
            value, wanted = str(stamp.get("commit") or "")[:12], f"{commit[:12]} with its CMake options"
        detail = f"{box.builds_root}/{name}/current is not what the inventory pins; fix: run site.yml"
        checks.append(equal(f"build_{name}", value, wanted, detail))
    return checks


def model_checks(box: LlmBox, seen: Mapping[str, Any]) -> list[Check]:
    """Each model file has the size of the inventory, and the disk its reserve."""
    checks = []
    for name, wanted in box.model_sizes().items():
        found = seen["files"].get(name)
        state = "is missing" if found is None else "has the wrong size"
        checks.append(
            equal(f"model_{name}", found, wanted, f"{box.models_dir}/{name} {state}; fix: run site.yml", "B")
        )
    free = (seen["disk"] or {}).get("free")
    if free is None:
        detail = f"the free space of {box.models_dir} cannot be read; look with: df {box.models_dir}"
    elif free < box.reserve_bytes:
        detail = (
            f"{size(free)} free in {box.models_dir}, {size(box.reserve_bytes)} wanted; "
            "fix: remove models that no preset uses, or lower gguf_models_reserve_bytes"
        )
    else:
        detail = ""
    checks.append(Check("disk_free", not detail, free, "B", box.reserve_bytes, detail))
    return checks


def preset_checks(box: LlmBox, seen: Mapping[str, Any]) -> list[Check]:
    """presets.json, lmswitch and the units know the inventory's presets and nothing else."""
    wanted = ",".join(sorted(box.names()))
    written = as_dict((seen["presets"] or {}).get("presets"))
    presets = (seen["list"] or {}).get("presets")
    listed = [str(as_dict(one).get("name")) for one in presets] if isinstance(presets, list) else []
    differing = [
        f"{name}.{key}"
        for name, preset in box.config.llama_presets.items()
        for key, value in preset.model_dump(mode="json").items()
        if value is not None and as_dict(written.get(name)).get(key) != value
    ]
    checks = [
        equal(
            "presets_json",
            ",".join(sorted(written)),
            wanted,
            f"{box.presets_json} is stale; fix: run site.yml",
        ),
        equal(
            "presets_data",
            f"{len(differing)}: {', '.join(differing[:5])}" if differing else "",
            "",
            f"{box.presets_json} differs from the inventory; fix: run site.yml",
        ),
        equal(
            "lmswitch_list",
            ",".join(sorted(listed)),
            wanted,
            "lmswitch knows other presets; fix: run site.yml",
        ),
    ]
    for scope in ("user", "system"):
        units = seen[f"{scope}_units"] or {}
        names = [box.unit(name) for name in box.names(scope)]
        missing = [name for name in names if units.get(name, {}).get("LoadState") != "loaded"]
        if names:
            checks.append(
                Check(
                    f"{scope}_units",
                    not missing,
                    len(names) - len(missing),
                    "units",
                    len(names),
                    f"not loaded: {', '.join(missing)}; fix: run site.yml" if missing else "",
                )
            )
        if scope == "user":
            checks.append(boot_check(names, units, seen["boot_links"]))
    return checks


def boot_check(names: Sequence[str], units: Mapping[str, Any], links: Sequence[str] | None) -> Check:
    """None of the user's units `names` starts at boot: whoever logs in decides what serves."""
    if links is None or any("UnitFileState" not in units.get(name, {}) for name in names):
        detail = "what starts at boot cannot be read; look with: systemctl --user list-unit-files 'llama-*'"
        return Check("units_enabled", False, None, "units", 0, detail)
    enabled = [name for name in names if name in links or units[name]["UnitFileState"] == "enabled"]
    fix = f"they would start at boot; fix: systemctl --user disable {' '.join(enabled)}" if enabled else ""
    return Check("units_enabled", not enabled, len(enabled), "units", 0, fix)


def serving_checks(box: LlmBox, seen: Mapping[str, Any]) -> list[Check]:
    """One known preset is ready, and one llama-server of the current release runs."""
    status = seen["status"] or {}
    active, state = status.get("active"), status.get("state")
    choice = "|".join(box.names("user"))
    if not seen["status"]:
        unknown = "lmswitch status --json gave no answer; fix: run site.yml"
    else:
        unknown = f"no preset of the inventory serves; fix: lmswitch {choice}"
    known = active in box.names()
    checks = [
        Check("active_preset", known, active, "", choice, "" if known else unknown),
        equal("state", state, "ready", "look with: lmswitch logs"),
    ]
    user_servers = [one for one in seen["servers"] if is_own(one, seen)]
    pids = ", ".join(str(one["pid"]) for one in user_servers)
    checks.append(
        equal(
            "llama_servers",
            len(user_servers),
            1,
            f"llama-server of {box.user}: {pids or 'none'}; fix: lmswitch off, then lmswitch {choice}",
            "processes",
        )
    )
    if known:
        current = (seen["builds"].get(box.config.llama_presets[str(active)].build) or {}).get("current")
        wanted = Path(str(current)).name if current else None
        running = running_release(user_servers)
        detail = f"another release than `current` still runs; fix: lmswitch --restart {active}"
        good = running is not None and running == wanted
        checks.append(Check("running_release", good, running, "", wanted, "" if good else detail))
    else:
        checks.append(Check("running_release", False, None, "", "that of the active preset", unknown))
    return checks


def running_release(servers: Sequence[Mapping[str, Any]]) -> str | None:
    """The release in the running executable's path: …/releases/<commit>-<config hash>/bin/llama-server."""
    for server in servers:
        parts = Path(str(server["exe"])).parts
        if "releases" in parts[:-1]:
            return parts[parts.index("releases") + 1]
    return None


def server_checks(box: LlmBox, seen: Mapping[str, Any]) -> list[Check]:
    """What the active preset's own server says on its socket, which only the gateway uses."""
    active = (seen["status"] or {}).get("active")
    tcp = [address for one in seen["servers"] if is_own(one, seen) for address in one["listen"]]
    if tcp:
        detail = f"clients get past the gateway there; fix: run site.yml, then lmswitch --restart {active}"
    else:
        detail = "" if seen["account"] else f"the user {box.user} is missing; fix: run site.yml"
    past = Check("past_gateway", not detail, ", ".join(tcp), "", "", detail)
    if active not in box.names():
        return [
            Check("health", False, None, "HTTP status", 200, nothing_serves(box)),
            Check("n_ctx", False, None, "tokens", "the preset's", nothing_serves(box)),
            past,
        ]
    where = box.address(active).host
    hint = f"{seen['server']['error']}; look with: lmswitch logs".removeprefix("; ")
    context = seen["server"]["n_ctx"]
    return [
        equal(
            "health",
            seen["server"]["health"],
            200,
            f"GET /health on {where} on the host: {hint}",
            "HTTP status",
        ),
        equal(
            "n_ctx",
            context,
            box.slot_context(active),
            "a request has another context than the preset says: the model was trained for less, or an older "
            f"unit runs; fix: lmswitch --restart {active}"
            if context
            else f"GET /props on {where} on the host: {hint}",
            "tokens",
        ),
        past,
    ]


def is_own(server: Mapping[str, Any], seen: Mapping[str, Any]) -> bool:
    """Whether a llama-server is one of the model user's."""
    return bool(server["uid"] == (seen["account"] or {}).get("uid"))


def nothing_serves(box: LlmBox) -> str:
    """Why nothing can be asked."""
    return f"there is nothing to ask; fix: lmswitch {'|'.join(box.names('user'))}"


def gateway_checks(box: LlmBox, seen: Mapping[str, Any]) -> list[Check]:
    """The gateway's units run, now and after a boot, and nobody else listens on its ports."""
    checks = []
    for name, key, wanted, fix in (
        ("gateway_active", "ActiveState", "active", "systemctl --user start"),
        ("gateway_enabled", "UnitFileState", "enabled", "systemctl --user enable"),
    ):
        short = gateway_units_unlike(seen["gateway_units"], key, wanted)
        detail = f"not {wanted}: {', '.join(short)}; fix: {fix} {' '.join(short)}" if short else ""
        count = len(GATEWAY_UNITS)
        checks.append(Check(name, not short, count - len(short), "units", count, detail))
    wanted_addresses = {f"{bracketed(front.host)}:{front.port}" for front in box.fronts}
    found = {one["address"]: one["groups"] for one in seen["ports"]}
    faults = [f"nobody listens on {address}" for address in sorted(wanted_addresses - found.keys())]
    for address, groups in found.items():
        others = [group.rpartition("/")[2] or "somebody" for group in groups if not is_gateway(group)]
        if others or not groups:
            faults.append(f"{address} is held by {', '.join(others) or 'somebody'}")
        elif address not in wanted_addresses:
            faults.append(f"{address} is not in llm_gateway_listen")
    fix = "; fix: end what holds it, then run site.yml and systemctl --user restart " + " ".join(
        GATEWAY_UNITS
    )
    detail = f"{', '.join(faults)}{fix}" if faults else ""
    value, limit = ", ".join(sorted(found)), ", ".join(sorted(wanted_addresses))
    checks.append(Check("gateway_port", not faults, value, "", limit, detail))
    return checks


def guard_checks(box: LlmBox, seen: Mapping[str, Any]) -> list[Check]:
    """Where there is an NVIDIA card, its guard runs, now and after a boot, and has nothing to object to."""
    if not box.gpu_guard:
        return []
    found = as_dict(seen["gpu_guard"])
    unit, says = as_dict(found.get("unit")), as_dict(found.get("says"))
    stopped, level = says.get("stopped"), says.get("level")
    if not says.get("running"):
        detail = "nobody watches the card; look with: journalctl --user -u gpu-guard; fix: run site.yml"
    elif stopped:
        detail = f"{stopped}; fix: mend that, then as {box.user}: gpu-guard clear"
    else:
        detail = "" if level in ("ok", "warning") else f"{says.get('reason')}; look with: gpu-guard status"
    value = "out of service" if stopped else level
    return [
        equal(
            "gpu_guard_active",
            unit.get("ActiveState"),
            "active",
            "fix: systemctl --user start gpu-guard",
        ),
        equal(
            "gpu_guard_enabled",
            unit.get("UnitFileState"),
            "enabled",
            "fix: systemctl --user enable gpu-guard",
        ),
        Check("gpu_guard", not detail, value, "", "ok or warning", detail),
    ]


def ocr_checks(box: OcrBox, seen: Mapping[str, Any], command_line: Sequence[str]) -> list[Check]:
    """Each layer that protects the GPU of an OCR box is there; those of its host where it has a card."""
    found = as_dict(seen.get("check"))
    lock, state_dir = str(found.get("gpu_lock") or ""), Path(box.state_dir)
    silent = "the installed program does not say; fix: run site.yml" if not found else ""
    turns = silent or str(found.get("semaphore"))
    if not turns and not Path(lock).is_relative_to(state_dir):
        # Each worker has a /tmp of its own, and can write nowhere else.
        turns = f"gpu_lock = {lock} is not in {state_dir}, the one folder that all workers share"
    hang = silent or str(found.get("hang"))
    missing = sorted(
        {
            unit
            for shown in seen["before_start"] or [""]
            for unit in box.competing_units
            if f"systemctl stop {unit} " not in f"{shown} "
        }
    )
    short = f"not stopped before a worker starts: {', '.join(missing)}; fix: run site.yml" if missing else ""
    fix = "; fix: gpu_lock in ocr_service_pipeline, or run site.yml"
    checks = [
        Check("gpu_semaphore", not turns, lock, "", f"a file in {state_dir}", turns and turns + fix),
        Check("gpu_hang_error", not hang, hang or "told", "", "told", hang),
        Check(
            "competing_units",
            not missing,
            len(box.competing_units) - len(missing),
            "units",
            len(box.competing_units),
            short,
        ),
    ]
    if box.card:
        checks += card_checks(seen, command_line)
    return checks


def ocr_ready_check(box: OcrBox, answers: Answers) -> Check:
    """The OCR service would read a photo now: a worker is there, and its backends answer."""
    detail = f"GET /ready on {bracketed(box.host)}:{box.port}: {answers.failure}"
    return equal("ocr_ready", answers.ready, 200, detail, "HTTP status")


def card_checks(seen: Mapping[str, Any], command_line: Sequence[str]) -> list[Check]:
    """What a host with an NVIDIA card needs: the driver stays loaded, and the bus awake."""
    unit = as_dict(seen["persistence"])
    state = f"{unit.get('UnitFileState', 'unknown')}, {unit.get('ActiveState', 'unknown')}"
    held = unit.get("ActiveState") == "active" and unit.get("UnitFileState") in ("enabled", "static")
    return [
        Check(
            "persistence",
            held,
            state,
            "",
            "enabled, active",
            "" if held else f"fix: systemctl enable --now {PERSISTENCE}",
        ),
        kernel_check(AWAKE_BUS, command_line, NOT_ASKED_FOR),
    ]


def is_gateway(group: str) -> bool:
    """Whether a control group is the gateway's, or that of the service manager that holds its sockets."""
    *_, manager, last = ("", *group.split("/"))
    return last in GATEWAY_UNITS or (last == "init.scope" and manager.startswith("user@"))


def answer_checks(box: LlmBox, seen: Mapping[str, Any], answers: Answers) -> list[Check]:
    """What came over HTTP, through the port that clients use."""
    where = f"{bracketed(box.front.host)}:{box.front.port}"
    hint = answers.failure or "look with: journalctl --user -u llm-gateway as the user"
    checks = [
        equal("gateway_health", answers.health, 200, f"GET /health on {where}: {hint}", "HTTP status"),
    ]
    if (seen["status"] or {}).get("active") not in box.names():
        return [
            *checks,
            Check("ready", False, answers.ready, "HTTP status", 200, nothing_serves(box)),
            Check("chat", False, None, "", "a non-empty answer", nothing_serves(box)),
        ]
    text = answers.text.strip()
    detail = "" if text else f"POST /v1/chat/completions on {where}: {hint}"
    return [
        *checks,
        equal("ready", answers.ready, 200, f"GET /ready on {where}: {hint}", "HTTP status"),
        Check("chat", bool(text), text[:40], "", "a non-empty answer", detail),
    ]


def drift_checks(report: Mapping[str, Any]) -> list[Check]:
    """What differs from what was deployed, each under its path; `report` as llmbox.drift made it."""
    if error := report.get("error"):
        return [Check("drift", False, None, "differences", 0, error)]
    found = [Difference(**each) for each in report["drift"]]
    fix = f"deployed {report['deployed']}; fix: run site.yml (it keeps drop-ins)" if found else ""
    return [
        Check("drift", not found, len(found), "differences", 0, fix),
        *(Check(printable(one.path), False, one.found, "", one.expected, "drift") for one in found),
        *(
            Check(printable(path), True, "", "", "", "a local override, as it was when last deployed")
            for path in report["overrides"]
        ),
    ]


# --- asking the hosts ---


def question(url: str, *, chat: bool = True) -> Answers:
    """Health, readiness and one real answer of the gateway at `url`. Never raises for its failure."""
    health: int | None = None
    ready: int | None = None
    key = os.environ.get(KEY_VARIABLE)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with httpx.Client(base_url=url, timeout=HEALTH_TIMEOUT_S, trust_env=False, headers=headers) as client:
            health = client.get("/health").status_code
            reply = client.get("/ready")
            ready = reply.status_code
            if not chat or ready != 200:
                return Answers(health, ready, "", refusal(reply))
            reply = client.post("/v1/chat/completions", json=CHAT, timeout=CHAT_TIMEOUT_S)
        if reply.status_code != 200:
            return Answers(health, ready, "", refusal(reply))
        message = reply.json()["choices"][0]["message"]
        text = str(message.get("content") or message.get("reasoning_content") or "")
        return Answers(health, ready, text, "the answer was empty")
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        return Answers(health, ready, "", f"{type(error).__name__}: {error}".splitlines()[0])


def readiness(host: Host, box: OcrBox) -> Answers:
    """Whether the OCR service is ready. Never raises for its failure."""
    try:
        with (
            reach(host, box.host, box.port) as url,
            httpx.Client(base_url=url, timeout=HEALTH_TIMEOUT_S, trust_env=False) as client,
        ):
            reply = client.get("/ready")
    except (httpx.HTTPError, Unreachable) as error:
        return Answers(failure=f"{type(error).__name__}: {error}".splitlines()[0])
    return Answers(ready=reply.status_code, failure="" if reply.status_code == 200 else refusal(reply))


def verify(host: Host, *, drift: bool = False) -> HostReport:
    """Everything about one host. Never raises for what is wrong there."""
    llm = GROUP in host.groups
    try:
        box = LlmBox.of(host.variables) if llm else None
        before = time.time()
        request: dict[str, Any] = {"llm": box.request()} if box else {}
        client = CLIENTS in host.groups and host.variables.get("local_claude_state") != "absent"
        if client:
            request["client"] = {"local_claude": LOCAL_CLAUDE}
        if rules := str(host.variables.get("_firewall_rules") or ""):
            request["firewall"] = rules
        ocr = OcrBox.of(host.variables) if OCR_GROUP in host.groups else None
        if ocr:
            request["ocr"] = ocr.request()
        asked = machine_asked(host.variables)
        if asked:
            request["machine"] = {"wake": asked["wake"], "power": bool(asked["power"])}
        seen = ask(host, request, become=llm or bool(rules) or bool(ocr) or asked is not None)
        offset = max(before - seen["time"], seen["time"] - time.time(), 0.0)
        checks = host_checks(seen, offset, client=CLIENTS in host.groups and not llm)
        if asked:
            checks += machine_checks(asked, seen["machine"], seen["command_line"])
        wanted = asked["parameters"] if asked else []
        checks += removed_checks(seen["removed_parameters"], wanted, seen["command_line"])
        if client:
            checks += client_checks(seen["local_claude"])
        if ocr:
            there = {one.name for one in checks}  # the same parameter may be asked for, too
            layers = ocr_checks(ocr, seen["ocr"], seen["command_line"])
            checks += [one for one in layers if one.name not in there]
            checks.append(ocr_ready_check(ocr, readiness(host, ocr)))
        if rules:
            checks.append(firewall_check(seen["firewall"]))
        if box:
            checks += llm_checks(box, seen["llm"], over_http(host, box, seen["llm"]))
        if drift and RECORDED & set(host.groups):
            checks += drift_checks(compare(host))
    except (InventoryError, HostError, Unreachable) as error:
        return HostReport(host.name, error=str(error))
    return HostReport(host.name, tuple(checks))


def over_http(host: Host, box: LlmBox, seen: Mapping[str, Any]) -> Answers:
    """What the gateway says over HTTP; a chat is sent when a preset of the inventory is active."""
    active = (seen["status"] or {}).get("active")
    try:
        with reach(host, box.front.host, box.front.port) as url:
            return question(url, chat=active in box.names())
    except Unreachable as error:
        return Answers(failure=str(error))


def verify_all(
    hosts: Sequence[Host], progress: Callable[[str], None], *, drift: bool = False
) -> list[HostReport]:
    """All hosts, several at once, in the order given."""
    reports: dict[str, HostReport] = {}
    pool = ThreadPoolExecutor(min(HOSTS_AT_ONCE, len(hosts)))
    try:
        futures = {pool.submit(verify, host, drift=drift): host.name for host in hosts}
        for number, future in enumerate(as_completed(futures), 1):
            report = reports[futures[future]] = future.result()
            short = sum(not check.ok for check in report.checks)
            verdict = report.error or (
                f"{short} of {len(report.checks)} checks fell short"
                if short
                else f"{len(report.checks)} checks, all well"
            )
            progress(f"[{number}/{len(hosts)}] {report.host}: {verdict}")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # an interruption does not wait for hosts that hang
    return [reports[host.name] for host in hosts]


# --- showing ---


def exit_code(reports: Sequence[HostReport]) -> int:
    """0 all well, 1 something fell short, 2 a host could not be asked."""
    if any(report.error is not None for report in reports):
        return 2
    return 0 if all(report.ok for report in reports) else 1


def as_json(reports: Sequence[HostReport]) -> str:
    """The report for programs."""
    data = {"ok": all(report.ok for report in reports), "hosts": [report.as_json() for report in reports]}
    return json.dumps(data, indent=2) + "\n"


def screen(reports: Sequence[HostReport]) -> str:
    """One row for each host, then one line for each check that fell short."""
    rows = []
    lines = []
    for report in reports:
        good = sum(check.ok for check in report.checks)
        verdict = report.verdict
        rows.append([report.host, verdict, f"{good}/{len(report.checks)}" if report.checks else "-"])
        if report.error:
            could_not = "" if verdict == "refused" else "could not be asked: "
            lines.append(f"{report.host}: {could_not}{report.error}")
        lines += [f"{report.host}: {line(check)}" for check in report.checks if not check.ok]
        lines += [
            f"{report.host}: {one.name}: {one.detail}" for one in report.checks if one.ok and one.detail
        ]
    return "\n".join([table(["host", "verdict", "checks"], rows), *([""] if lines else []), *lines])


def line(check: Check) -> str:
    """A check that fell short: name, value, limit, fix."""
    unit = f" {check.unit}" if check.unit else ""
    value = "none" if check.value in (None, "") else check.value
    limit = "none" if check.limit in (None, "") else check.limit
    return f"{check.name} = {value}{unit}, wanted {limit}{unit}: {check.detail}"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = _command.parser(__doc__, "0 all well, 1 something fell short, 2 could not run")
    parser.add_argument("--drift", action="store_true", help="also compare with what was deployed")
    parser.add_argument("--json", metavar="FILE", help="write the report there; - is standard output")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verification."""
    args = parse(argv)
    return _command.attempt("verify_health", args.inventory, lambda: report(args))


def report(args: argparse.Namespace) -> int:
    """Ask the hosts and show what they are. Raises InventoryUnreadable, OSError."""

    def progress(text: str) -> None:
        print(_command.typed(text, args.inventory), file=sys.stderr, flush=True)

    file = Path(args.json) if args.json and args.json != "-" else None
    if file is not None:
        ensure_writable(file)
    progress(f"reading {args.inventory}")
    hosts = load(args.inventory, limit=args.limit)
    progress(f"asking {', '.join(host.name for host in hosts)}")
    reports = [
        replace(one, error=one.error and _command.typed(one.error, args.inventory))
        for one in verify_all(hosts, progress, drift=args.drift)
    ]
    print(
        as_json(reports) if args.json == "-" else screen(reports),
        end="" if args.json == "-" else "\n",
        flush=True,
    )
    if file is not None:
        with naming_the_option(file):
            file.write_text(as_json(reports))
    return exit_code(reports)


def ensure_writable(file: Path, option: str = "--json") -> None:
    """Find out before the checks whether the report can be written. Raises OSError; leaves no file."""
    with naming_the_option(file, option):
        new = not file.exists()
        file.open("a").close()
        if new:
            file.unlink()


@contextmanager
def naming_the_option(file: Path, option: str = "--json") -> Iterator[None]:
    """Raises OSError that names the option and the fix, in place of one that only names the file."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{option} {file}: {error.strerror}; fix: give a file that can be written") from None


if __name__ == "__main__":
    _command.end(main)
