#!/usr/bin/python3
"""Ansible module: kernel parameters in a file of their own, and GRUB's configuration that gives them."""

from __future__ import annotations

import contextlib
import re
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ansible.module_utils.basic import AnsibleModule  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from roles.gpu_host.module_utils.gpu_host_tools import FILE_MODE, Refused, must, present, run, write
else:
    from ansible.module_utils.gpu_host_tools import FILE_MODE, Refused, must, present, run, write

DOCUMENTATION = r"""
---
module: gpu_host_kernel_parameters
short_description: Kernel parameters by a file of GRUB's that owns only itself
description:
  - C(phase=file) writes, or without parameters removes, one file of F(/etc/default/grub.d), which adds to
    what others say. It is changed, too, when the configuration that boots is older than that folder, lacks a
    parameter, or does not parse.
  - C(phase=generate), for a handler, has a new configuration made beside the one that boots, and puts it in
    its place only when it parses, boots something and gives the parameters.
  - C(phase=check) refuses to go on, before a reboot, with a configuration that does not parse, and says
    whether its menu starts Windows by itself.
  - What was taken out stands in a file until a reboot, so that a later run still knows that one is due.
options:
  phase: {description: What to do., type: str, choices: [file, generate, check], required: true}
  parameters: {description: "Like C(pcie_aspm=off).", type: list, elements: str, required: true}
author: [llmbox]
"""

EXAMPLES = r"""
- name: Keep the kernel's hands off ASPM
  gpu_host_kernel_parameters:
    phase: file
    parameters: [pcie_aspm=off]
"""

RETURN = r"""
pending: {description: Words of the command line that a reboot would add (+) or take away (-)., type: list}
windows: {description: That GRUB's menu starts Windows by itself and the fix; of C(phase=check)., type: str}
"""

SETTINGS = Path("/etc/default/grub")
FOLDER = Path("/etc/default/grub.d")
OWN = FOLDER / "99-llmbox.cfg"
BOOTS = Path("/boot/grub/grub.cfg")
FRESH = Path("/boot/grub/llmbox-new.cfg")
ENVIRONMENT = Path("/boot/grub/grubenv")
COMMAND_LINE = Path("/proc/cmdline")
# What was taken out of the data and was given to the kernel that runs. In memory: a boot forgets it.
REMOVED = Path("/run/llmbox-kernel-parameters-removed")
HANDOFF = "vt.handoff="  # what Ubuntu's $vt_handoff becomes where there is a splash screen
REPEATED = ("console", "earlycon", "acpi_osi")  # each of these words counts
# What the menu starts by itself comes from one of these, or from GRUB_DEFAULT; and what changes it.
CHOSEN_BY = {
    "${next_entry}": "let that start first, or sudo grub-editenv - unset next_entry",
    "${saved_entry}": "sudo grub-set-default 0",
}
ENTRY = re.compile(r"""(?:menuentry|submenu) (['"])(.*?)\1(?:.*(?:\$menuentry_id_option|--id) '?([^' ]+))?""")
# os-prober looks at every partition.
GENERATE_TIMEOUT_S = 600


def drop_in(parameters: Sequence[str]) -> str | None:
    """The text of our file: it adds to what /etc/default/grub, and files before it, say."""
    if not parameters:
        return None
    return (
        "# Managed by llmbox: roles/gpu_host. For all entries, the recovery ones too.\n"
        f'GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX {" ".join(parameters)}"\n'
    )


def parameters_of(text: str) -> list[str]:
    """The parameters in the text of our file."""
    found = re.search(r'^GRUB_CMDLINE_LINUX="\$GRUB_CMDLINE_LINUX (.*)"$', text, re.MULTILINE)
    return found[1].split() if found else []


def command_line(configuration: str) -> list[str] | None:
    """What the first entry that boots Linux gives the kernel; None without such an entry."""
    for line in configuration.splitlines():
        words = line.split()
        if words[:1] in (["linux"], ["linuxefi"]) and len(words) > 1:
            with contextlib.suppress(ValueError):  # GRUB's own quoting; the plain words will do
                words = shlex.split(line)
            return words[2:]
    return None


def entries(configuration: str) -> list[tuple[str, str, str]]:
    """Title, ID and text of each entry of GRUB's menu; a submenu is one."""
    found: list[tuple[str, str, str]] = []
    depth = 0
    for line in map(str.strip, configuration.splitlines()):
        if depth == 0 and (start := ENTRY.match(line)):
            found.append((start[2], start[3] or "", ""))
        if found:
            title, name, text = found.pop()
            found.append((title, name, f"{text}{line}\n"))
        depth += line.endswith("{") - (line == "}")
    return found


def windows_by_itself(configuration: str, environment: str) -> str:
    """That GRUB's menu starts Windows unless somebody chooses, and the fix; empty where it does not."""
    saved = dict(re.findall(r"^(\w+)=(.*)$", environment, re.MULTILINE))
    for setting in re.findall(r'^\s*set default="(.*)"$', configuration, re.MULTILINE):
        if chosen := saved.get(setting[2:-1], "") if setting in CHOSEN_BY else setting:
            break
    else:
        chosen, setting = "0", ""
    place = chosen.partition(">")[0]
    menu = entries(configuration)
    named = (entry for at, entry in enumerate(menu) if place in (str(at), *entry[:2]))
    title, _, text = next(named, menu[0] if menu else ("", "", ""))
    # By its program or os-prober's class: a title is a person's.
    if "/efi/microsoft/" not in text.lower() and "--class windows" not in text:
        return ""
    fix = CHOSEN_BY.get(setting, f"GRUB_DEFAULT in {SETTINGS}, then sudo update-grub")
    return f"GRUB's menu starts '{title}', Windows, by itself; fix: {fix}"


def lacking(parameters: Sequence[str], configuration: str) -> list[str]:
    """Parameters that the first Linux entry does not give."""
    given = command_line(configuration) or []
    return [one for one in parameters if one not in given]


def overruled(parameters: Sequence[str], configuration: str) -> list[tuple[str, str]]:
    """Parameters with the later word of the same name that the kernel takes instead, in the first entry."""
    given = command_line(configuration) or []
    last = {word.partition("=")[0]: word for word in given}
    return [
        (one, last[name])
        for one in parameters
        if one in given and (name := one.partition("=")[0]) not in REPEATED and last[name] != one
    ]


def pending(parameters: Sequence[str], configuration: str, running: str) -> list[str]:
    """What the next boot would change: words to come with +, words that would go with -."""
    given = command_line(configuration)
    if given is None:
        return []
    try:
        started = shlex.split(running)  # `acpi_osi="Windows 2009"` is one word, as in GRUB's configuration
    except ValueError:
        started = running.split()
    now = [word for word in started if not word.startswith(("BOOT_IMAGE=", HANDOFF))]
    # GRUB's variables are resolved at boot: such a word is not known here, but for Ubuntu's for the splash.
    open_words = any("$" in word for word in given if word != "$vt_handoff")
    return [
        *(f"+{one}" for one in given if one not in now and "$" not in one),
        *(f"-{one}" for one in now if one not in given and not open_words),
        *(f"+{one}" for one in parameters if one not in given and one not in now),
    ]


def shell_fault(files: Sequence[Path]) -> str | None:
    """The first of GRUB's settings that sh cannot read; grub-mkconfig reads them with it."""
    for file in files:
        done = run("sh", "-n", str(file))
        if done.returncode != 0:
            said = (done.stderr.strip().splitlines() or ["it is no shell text"])[0]
            return f"{file}: {said.removeprefix(f'{file}: ')}"
    return None


def script_fault(file: Path) -> str | None:
    """Why GRUB could not read a configuration."""
    if not file.exists():
        return f"{file} is missing"
    done = run("grub-script-check", str(file))
    if done.returncode == 0:
        return None
    said = [line for line in done.stderr.splitlines() if line.strip()]
    return f"{file}: {said[0].strip() if said else 'it does not parse'}"


def settings() -> list[Path]:
    """What grub-mkconfig reads, in its order."""
    return [SETTINGS, *sorted(FOLDER.glob("*.cfg"))]


def read(path: Path) -> str:
    """The text of a file; empty when it is not there."""
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return ""


def modified(path: Path) -> int:
    """When a file or folder was last changed."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def put(parameters: Sequence[str], check: bool) -> dict[str, Any]:
    """The file, and whether the configuration follows from it. Raises Refused."""
    wanted, found = drop_in(parameters), present(OWN)
    differs = found != wanted or (wanted is None and OWN.exists())
    if wanted is not None and differs:
        with tempfile.NamedTemporaryFile("w", suffix=".cfg") as trial:
            trial.write(wanted)
            trial.flush()
            if fault := shell_fault([Path(trial.name)]):
                raise Refused(f"{OWN} would not be shell text: {fault}; fix: gpu_host_kernel_parameters")
    if differs and not check:
        # First: broken off after it, the next run does both again.
        gone = [one for one in parameters_of(read(OWN)) if one not in parameters]
        remember([*read(REMOVED).split(), *gone])
        if wanted is None:
            OWN.unlink(missing_ok=True)
        else:
            write(OWN, wanted)
    booting = read(BOOTS)
    stale = (
        modified(BOOTS) < modified(FOLDER)
        or bool(lacking(parameters, booting) or overruled(parameters, booting))
        or bool(script_fault(BOOTS))
    )
    diff = {"before_header": str(OWN), "after_header": str(OWN), "before": found or "", "after": wanted or ""}
    return {
        "changed": differs or stale,
        "diff": [diff] if differs else [],
        "pending": pending(parameters, booting, read(COMMAND_LINE)),
    }


def remember(removed: Sequence[str]) -> None:
    """Write down what only a reboot takes away; no file for nothing."""
    if removed:
        write(REMOVED, "".join(f"{one}\n" for one in dict.fromkeys(removed)))
    else:
        REMOVED.unlink(missing_ok=True)


def settle(due: Sequence[str]) -> None:
    """Forget what a reboot would not take away: it is asked for again, or by somebody else too."""
    remember([one for one in read(REMOVED).split() if f"-{one}" in due])


def generate(parameters: Sequence[str]) -> dict[str, Any]:
    """A new configuration in the place of the one that boots, once it has proved itself. Raises Refused."""
    keeps = f"{BOOTS} is as it was, and boots as before"
    if fault := shell_fault(settings()):
        raise Refused(f"{fault}; {keeps}; fix: that line, then run this again")
    try:
        must("grub-mkconfig", "--output", str(FRESH), timeout_s=GENERATE_TIMEOUT_S)
        if fault := script_fault(FRESH):
            raise Refused(fault)
        made = read(FRESH)
        if command_line(made) is None:
            raise Refused("it has no entry that boots Linux")
        if missing := lacking(parameters, made):
            raise Refused(
                f"its first entry does not give {' '.join(missing)}: a later file of {FOLDER} takes them away"
            )
        for ours, theirs in overruled(parameters, made):
            raise Refused(
                f"{theirs} takes the place of {ours}: it comes after it (GRUB_CMDLINE_LINUX_DEFAULT does); "
                "take one of them out"
            )
        FRESH.chmod(BOOTS.stat().st_mode & 0o7777 if BOOTS.exists() else FILE_MODE)
        must("sync", "--file-system", str(FRESH))
        FRESH.replace(BOOTS)
    except Refused as error:
        raise Refused(
            f"GRUB's new configuration is refused: {error}; {keeps}; "
            f"fix: {SETTINGS}, {FOLDER} or /etc/grub.d, then run this again"
        ) from None
    finally:
        for left in (FRESH, FRESH.with_name(f"{FRESH.name}.new")):
            left.unlink(missing_ok=True)
    return {"changed": True, "diff": [], "pending": pending(parameters, made, read(COMMAND_LINE))}


def before_reboot(parameters: Sequence[str]) -> dict[str, Any]:
    """Refuses a reboot into a configuration that does not parse. Raises Refused.

    A host that does not boot with GRUB has none.
    """
    if not SETTINGS.exists():
        return {"changed": False, "diff": [], "pending": []}
    booting = read(BOOTS)
    fault = script_fault(BOOTS) or shell_fault(settings())
    if fault is None and command_line(booting) is None:
        fault = f"{BOOTS} has no entry that boots Linux"
    if fault:
        raise Refused(f"no reboot: {fault}; fix: that line, then run this again")
    due = pending(parameters, booting, read(COMMAND_LINE))
    windows = windows_by_itself(booting, read(ENVIRONMENT))
    return {"changed": False, "diff": [], "pending": due, "windows": windows}


def main() -> None:
    """Module entry point."""
    module = AnsibleModule(
        argument_spec={
            "phase": {"type": "str", "required": True, "choices": ["file", "generate", "check"]},
            "parameters": {"type": "list", "elements": "str", "required": True},
        },
        supports_check_mode=True,
    )
    parameters = module.params["parameters"]
    try:
        if module.params["phase"] == "file":
            result = put(parameters, module.check_mode)
        elif module.params["phase"] == "check" or module.check_mode:
            result = before_reboot(parameters)
            if not module.check_mode:
                settle(result["pending"])
        else:
            result = generate(parameters)
    except (Refused, OSError) as error:
        module.fail_json(msg=str(error))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
