"""The whole site on the lab: a second run changes nothing, a dry run says so, damage is found and mended."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests import support

pytestmark = pytest.mark.usefixtures("lab")

USER_SYSTEMCTL = "sudo -u llm XDG_RUNTIME_DIR=/run/user/$(id -u llm) systemctl --user"

# Each line damages something that a role made; the second command proves that it is whole again.
# MODEL and SHA256 are those of the first preset's model.
DAMAGE = {
    "a file of the venv": (
        "echo 'raise SystemExit(9)' >> $(echo /opt/llmbox/lib/python3*/site-packages/llmbox/__init__.py)",
        "lmswitch --help > /dev/null",
    ),
    "a command of the venv": (
        "printf '#!/bin/sh\\nexit 9\\n' > /opt/llmbox/bin/lmswitch",
        "/opt/llmbox/bin/lmswitch --help > /dev/null",
    ),
    "a file in the venv that nobody installed": (
        "touch $(echo /opt/llmbox/lib/python3*/site-packages/)sitecustomize.py",
        "! test -e $(echo /opt/llmbox/lib/python3*/site-packages/)sitecustomize.py",
    ),
    "the modes of the venv": (
        "chmod -R o+w /opt/llmbox-venvs && chmod a-x /opt/llmbox/bin/llmbox-wait-ready",
        "test -x /opt/llmbox/bin/llmbox-wait-ready"
        ' && test -z "$(find /opt/llmbox-venvs ! -type l -perm /022)"',
    ),
    "a library of a release": (
        "f=$(find /opt/llama.cpp/upstream/current/ -name 'libggml-base.so*' -type f | head -n 1); : > $f",
        "/opt/llama.cpp/upstream/current/bin/llama-server --version",
    ),
    "a library of a release, with its size and time kept": (
        "f=$(find /opt/llama.cpp/tq3/current/ -name 'libllama.so*' -type f | head -n 1); cp -p $f /root/whole"
        " && printf DAMAGE | dd of=$f bs=1 seek=5000 conv=notrunc status=none && touch -r /root/whole $f"
        " && cp $f /root/damaged",
        "! cmp -s /root/damaged $(find /opt/llama.cpp/tq3/current/ -name 'libllama.so*' -type f | head -n 1)",
    ),
    "the link current": (
        "rm /opt/llama.cpp/tq3/current",
        "/opt/llama.cpp/tq3/current/bin/llama-server --version",
    ),
    "a unit": (
        "sed -i '/^Conflicts=/d' ~llm/.config/systemd/user/llama-smol.service",
        "grep -q '^Conflicts=.*llama-gemma' ~llm/.config/systemd/user/llama-smol.service",
    ),
    "the mode of a unit": (
        "chmod 0666 ~llm/.config/systemd/user/llama-gemma.service",
        "test $(stat --format=%a ~llm/.config/systemd/user/llama-gemma.service) = 644",
    ),
    "the mode of presets.json": (
        "chmod 0666 /etc/llmbox/presets.json",
        "test $(stat --format=%a%u /etc/llmbox/presets.json) = 6440",
    ),
    "a model": (
        "printf X | dd of=MODEL bs=1 seek=5000 conv=notrunc status=none",
        "test $(sha256sum < MODEL | cut -d' ' -f1) = SHA256",
    ),
    "the gateway's settings": (
        "echo '{}' > /etc/llmbox/gateway.json",
        "grep -q switch_policy /etc/llmbox/gateway.json",
    ),
    "the mode of the gateway's keys": (
        "chmod 0644 /etc/llmbox/keys.json",
        "test $(stat --format=%a /etc/llmbox/keys.json) = 640",
    ),
    "the gateway's unit": (
        "sed -i '/^Restart=/d' /etc/systemd/user/llm-gateway.service",
        "grep -q '^Restart=always' /etc/systemd/user/llm-gateway.service",
    ),
    "the gateway": (
        f"{USER_SYSTEMCTL} disable --now llm-gateway.socket llm-gateway.service",
        f"{USER_SYSTEMCTL} is-active llm-gateway.socket && {USER_SYSTEMCTL} is-enabled llm-gateway.service",
    ),
    "the command's link": ("rm /usr/local/bin/lmswitch", "test -x /usr/local/bin/lmswitch"),
    "the sudo rule": (
        "echo 'llm ALL=(ALL) NOPASSWD: ALL' > /etc/sudoers.d/llmbox",
        "! sudo -u llm sudo -n /usr/bin/true",
    ),
    "lingering": (
        "rm -f /var/lib/systemd/linger/llm",
        "test -e /var/lib/systemd/linger/llm",
    ),
    "the user's service manager": (
        "systemctl stop user@$(id -u llm).service",
        "systemctl is-active --quiet user@$(id -u llm).service",
    ),
}


def as_root(command: str, timeout: float = 60) -> support.Run:
    """Run a shell command as root on the LLM box."""
    box = support.expected()
    model = box.model_file(box.names()[0])
    command = command.replace("MODEL", f"{box.models_dir}/{model.file}").replace("SHA256", model.sha256)
    return support.on_host(support.LLM, "sudo sh -s", stdin=command + "\n", timeout=timeout)


def test_second_run_changes_nothing(ansible_playbook: Callable[..., support.PlaybookRun]) -> None:
    second = ansible_playbook("site.yml").check()
    assert second.changed == 0, second.tail()
    assert set(second.recap) == {"localhost", support.LLM, support.OCR, support.CLIENT}


def test_dry_run_of_a_converged_site_reports_no_change(
    ansible_playbook: Callable[..., support.PlaybookRun],
) -> None:
    dry = ansible_playbook("site.yml", "--check", "--diff").check()
    assert dry.changed == 0, dry.tail()


def test_damage_is_found_and_mended(ansible_playbook: Callable[..., support.PlaybookRun]) -> None:
    """No stamp skips a check of state: what somebody changed behind Ansible's back is put right."""
    for what, (damage, proof) in DAMAGE.items():
        as_root(damage).check()
        assert as_root(proof).rc != 0, f"damaging {what} had no effect: the proof cannot fail"

    dry = ansible_playbook("site.yml", "--check").check()
    # One task mends all damage of the environment (five kinds), the units (three), the releases (three).
    # The gateway is started after its unit was mended, which a dry run does not do.
    assert dry.changed >= len(DAMAGE) - 9, f"the dry run overlooks damage\n{dry.tail()}"
    ansible_playbook("site.yml", timeout=1200).check()

    broken = {
        what: as_root(proof, timeout=120).tail(3) for what, (_, proof) in DAMAGE.items() if as_root(proof).rc
    }
    assert not broken, broken
    assert ansible_playbook("site.yml").check().changed == 0


@pytest.mark.long
def test_the_service_manager_gets_groups_that_a_broken_run_left_it_without(
    ansible_playbook: Callable[..., support.PlaybookRun],
) -> None:
    """As when the play is killed between the change of the groups and its handlers."""
    process = "/proc/$(systemctl show --value --property=MainPID user@$(id -u llm).service)"
    has_it = f"grep -qw $(getent group games | cut -d: -f3) {process}/status"
    try:
        as_root(f"gpasswd -a llm games && ! {has_it}").check()
        ansible_playbook("playbooks/llm_server.yml").check()
        as_root(has_it).check()
    finally:
        as_root("gpasswd -d llm games")
    assert ansible_playbook("playbooks/llm_server.yml").check().changed == 0
