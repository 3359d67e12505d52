"""Drift on a real box: each kind that a hand makes is found and named, and a run of site.yml heals it."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import BIN, LAB_INVENTORY, LLM, ROOT, PlaybookRun, Run, expected, on_host, run

pytestmark = pytest.mark.usefixtures("lab")

Playbook = Callable[..., PlaybookRun]
USER_SYSTEMCTL = "sudo -u llm XDG_RUNTIME_DIR=/run/user/$(id -u llm) systemctl --user"
UNITS = "/home/llm/.config/systemd/user"
DROP_IN = f"{UNITS}/llama-smol.service.d/50-own.conf"
RELEASE, OTHER_RELEASE = (f"$(realpath /opt/llama.cpp/{build}/current)" for build in ("upstream", "tq3"))
VENV = "$(realpath /opt/llmbox)"
SMOL, GEMMA = (
    f"/home/llm/models/gguf/{name}.gguf" for name in ("smollm2-135m-instruct-q4_1", "gemma-3-270m-q4_k_m")
)

# What a hand does, as root; the path that is named, and what the words for expected and found begin with.
# Each in a place of its own: none hides another.
DRIFTS: dict[str, tuple[str, str, str, str]] = {
    "a unit is edited": (
        f"sed -i 's/^Restart=on-failure/Restart=no/' {UNITS}/llama-smol.service",
        f"{UNITS}/llama-smol.service",
        "line ",
        "line ",
    ),
    "a unit is removed": (
        f"rm {UNITS}/llama-gemma.service", f"{UNITS}/llama-gemma.service", "a file", "nothing",
    ),
    "a drop-in is added": (
        f"sudo -u llm mkdir -p {UNITS}/llama-smol.service.d && "
        f"printf '[Service]\\nNice=3\\n' | sudo -u llm tee {DROP_IN}",
        DROP_IN,
        "nothing",
        "a file",
    ),
    "a byte of a release is flipped, its time kept": (
        f"cd {RELEASE}/bin && cp -p llama-bench /root/whole && printf X |"
        " dd of=llama-bench bs=1 seek=5000 conv=notrunc status=none && touch -r /root/whole llama-bench",
        f"{RELEASE}/bin/llama-bench",
        "sha256 ",
        "sha256 ",
    ),
    "a backend is put beside a release's programs": (
        f"touch {OTHER_RELEASE}/bin/libggml-mine.so",
        f"{OTHER_RELEASE}/bin/libggml-mine.so",
        "nothing",
        "a file",
    ),
    "current leads elsewhere": (
        "ln -sfn releases/mine /opt/llama.cpp/tq3/current",
        "/opt/llama.cpp/tq3/current",
        "target releases/",
        "target releases/mine",
    ),
    "the build tool is edited": (
        "echo '# mine' >> /opt/llama.cpp/libexec/llama-build",
        "/opt/llama.cpp/libexec/llama-build",
        "the end of the file",
        "line ",
    ),
    "a byte of a model is flipped": (
        f"printf X | dd of={SMOL} bs=1 seek=50000 conv=notrunc status=none", SMOL, "sha256 b179c", "sha256 ",
    ),
    "a model is cut": (f"truncate -s 1000000 {GEMMA}", GEMMA, "253113024 bytes", "1000000 bytes"),
    "presets.json is edited": (
        "sed -i 's/\"context\": 4096/\"context\": 8192/' /etc/llmbox/presets.json",
        "/etc/llmbox/presets.json",
        "line ",
        "line ",
    ),
    "gateway.json is edited": (
        "sed -i 's/\"min_dwell\": 1/\"min_dwell\": 2/' /etc/llmbox/gateway.json",
        "/etc/llmbox/gateway.json",
        "line ",
        "line ",
    ),
    "the mode of the keys": (
        "chmod 0644 /etc/llmbox/keys.json", "/etc/llmbox/keys.json", "mode 0640", "mode 0644",
    ),
    "the gateway's socket is disabled": (
        f"{USER_SYSTEMCTL} disable llm-gateway.socket", "llm-gateway.socket of llm", "enabled", "disabled",
    ),
    "the gateway's unit is edited": (
        "sed -i '/^NoNewPrivileges=/d' /etc/systemd/user/llm-gateway.service",
        "/etc/systemd/user/llm-gateway.service",
        "line ",
        "line ",
    ),
    "the sudo rule is widened": (
        "echo 'llm ALL=(ALL) NOPASSWD: ALL' > /etc/sudoers.d/llmbox",
        "/etc/sudoers.d/llmbox",
        "sha256 ",
        "sha256 ",
    ),
    "lmswitch is another program": (
        "ln -sfn /home/llm/lmswitch /usr/local/bin/lmswitch",
        "/usr/local/bin/lmswitch",
        "target /opt/llmbox/bin/lmswitch",
        "target /home/llm/lmswitch",
    ),
    "a timer is stopped": (
        "systemctl disable --now llmbox-drift-full.timer",
        "llmbox-drift-full.timer of the system",
        "active",
        "inactive",
    ),
    "a file of the environment is edited": (
        f"echo '# mine' >> {VENV}/lib/python3*/site-packages/llmbox/switch.py",
        f"{VENV}/lib/python3*/site-packages/llmbox/switch.py",
        "sha256 ",
        "sha256 ",
    ),
    "a key of the inventory is taken out": (
        "sed -i '/^ssh-/d' /home/llm/.ssh/authorized_keys", "/home/llm/.ssh/authorized_keys", "ssh-", "ssh-",
    ),
    "a port is opened in the firewall that is loaded": (
        "nft add rule inet llmbox input tcp dport 9999 accept",
        "nftables table inet llmbox",
        "line ",
        "line ",
    ),
    "the user left a group": ("gpasswd -d llm video", "/etc/group", "llm in video", "llm not in it"),
}  # fmt: skip


def as_root(command: str, timeout: float = 60) -> str:
    """What a shell command prints that root runs on the LLM box; it must succeed."""
    return on_host(LLM, "sudo bash -s", stdin=f"set -e\n{command}\n", timeout=timeout).check().stdout.strip()


def verified() -> tuple[Run, dict[str, Any]]:
    """verify_health with --drift, and its checks by name."""
    argv = (sys.executable, ROOT / "scripts/verify_health.py", "--inventory", LAB_INVENTORY, "--limit", LLM)
    answer = run(*argv, "--drift", "--json", "-", timeout=300)
    (host,) = json.loads(answer.stdout)["hosts"]
    return answer, {check["name"]: check for check in host["checks"]}


def differences(checks: dict[str, Any]) -> dict[str, Any]:
    """The checks that name something that drifted."""
    return {name: check for name, check in checks.items() if check["detail"] == "drift"}


@pytest.fixture(scope="module")
def deployed(ansible_playbook: Playbook) -> str:
    """The box as site.yml leaves it, compared; its record."""
    as_root(f"rm -rf {Path(DROP_IN).parent}")
    ansible_playbook("site.yml", timeout=1200).check()
    _, checks = verified()
    assert (checks["drift"]["ok"], differences(checks)) == (True, {})
    return as_root("cat /var/lib/llmbox/deployed.json")


def test_drift_is_found_named_and_healed(deployed: str, ansible_playbook: Playbook) -> None:
    as_root("systemctl start llmbox-drift@full.service")
    wanted = {what: as_root(f"echo {path}") for what, (_, path, _, _) in DRIFTS.items()}
    for command, *_ in DRIFTS.values():
        as_root(command)

    answer, checks = verified()
    found = differences(checks)
    assert (answer.rc, checks["drift"]["ok"]) == (1, False)
    named = {name: (check["limit"], check["value"]) for name, check in found.items()}
    missed = {
        what: named.get(wanted[what])
        for what, (_, _, limit, value) in DRIFTS.items()
        if not starts(named.get(wanted[what]), limit, value)
    }
    assert not missed, missed
    assert named.keys() == set(wanted.values()), "something else is called drift"

    # The box finds the same by itself.
    failed = on_host(LLM, "sudo systemctl start llmbox-drift@sampled.service", timeout=120)
    assert failed.rc != 0
    report = json.loads(as_root("cat /var/lib/llmbox/drift.json"))
    assert {each["path"] for each in report["drift"]} == named.keys()
    journal = as_root("journalctl --sync; journalctl -u llmbox-drift@sampled --output=cat")
    assert f"{wanted['a model is cut']}: expected 253113024 bytes, found 1000000 bytes" in journal

    play = run(BIN / "ansible-playbook", "-i", LAB_INVENTORY, "playbooks/verify.yml", timeout=300)
    assert play.rc == 2
    assert f"{LLM}: {DROP_IN} = a file, wanted nothing: drift" in play.stdout

    ansible_playbook("site.yml", timeout=1800).check()
    answer, checks = verified()
    assert (checks["drift"]["ok"], differences(checks)) == (True, {}), answer.tail()
    assert "a local override" in checks[DROP_IN]["detail"]
    now = as_root("cat /var/lib/llmbox/deployed.json")
    assert unlike(json.loads(deployed)["entries"], json.loads(now)["entries"]) == set()

    as_root(f"rm -r {Path(DROP_IN).parent}; {USER_SYSTEMCTL} daemon-reload")
    again = ansible_playbook("site.yml").check()
    assert again.changed == 1, f"beside the record that the drop-in is gone\n{again.tail()}"


def starts(named: tuple[str, str] | None, limit: str, value: str) -> bool:
    """Whether something was named with an expected and a found that begin like that."""
    return named is not None and named[0].startswith(limit) and named[1].startswith(value)


def unlike(before: dict[str, Any], now: dict[str, Any]) -> set[str]:
    """Paths of which the records differ.

    What was mended is new as a whole: an environment has another folder, a release the time of its build.
    """
    names = {name for name in before.keys() | now.keys() if not name.startswith("/opt/llmbox")}
    return {name for name in names if before.get(name) != now.get(name) and Path(name).name != "release.json"}


def test_the_comparison_needs_no_right_that_its_unit_takes_away(deployed: str) -> None:
    """Every byte of every model is read, the user's service manager asked, and the report kept."""
    as_root("systemctl start llmbox-drift@full.service", timeout=120)
    report = json.loads(as_root("cat /var/lib/llmbox/drift.json"))
    assert (report["ok"], report["models"]) == (True, "full")
    blocks = json.loads(as_root("cat /var/lib/llmbox/model-blocks.json"))
    assert {path.rpartition("/")[2] for path in blocks} == expected().model_sizes().keys()
    # What it must not: the file systems are read-only to it, and it has no network.
    unit = as_root("cat /etc/systemd/system/llmbox-drift@.service").partition("StateDirectory=")
    lines = [line for line in "".join(unit[1:]).splitlines() if "=" in line and not line.startswith("#")]
    properties = " ".join(f"-p {shlex.quote(line)}" for line in lines)
    probe = f"sudo systemd-run --quiet --wait --collect {properties}"
    on_host(LLM, f"{probe} /bin/true").check()
    connects = "python3 -c 'import socket; socket.socket()'"
    for act in ("touch /etc/probe", "touch /home/llm/probe", "touch /opt/probe", connects):
        on_host(LLM, f"sudo sh -c {shlex.quote(act)}").check()
        assert on_host(LLM, f"{probe} /bin/sh -c {shlex.quote(act)}").rc != 0, act
    as_root("rm /etc/probe /home/llm/probe /opt/probe")


def test_verify_yml_is_content_with_a_converged_lab(deployed: str) -> None:
    on_host(LLM, f"sudo -u llm lmswitch {expected().names()[0]}", timeout=240).check()
    play = run(BIN / "ansible-playbook", "-i", LAB_INVENTORY, "playbooks/verify.yml", timeout=300)
    assert play.rc == 0, play.tail()
