"""The lab's client: bash and zsh with the aliases; a person's files, changed and given back byte for byte."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import support

pytestmark = pytest.mark.usefixtures("lab")

CLIENT, LLM = support.CLIENT, support.LLM
ZSH_TIMEOUT_S = 240
VSCODE = "~/.config/Code/User/settings.json"
OPENCODE = "~/.config/opencode/opencode.json"
# Files as people have them: no line break at the end, comments, a mode of their own, a link.
PREPARE = r"""
set -e
mkdir -p ~/dotfiles ~/.config/Code/User ~/.config/opencode ~/.ssh
printf 'PROMPT="%% "\nalias llg="echo mine"' > ~/dotfiles/zshrc; ln -s dotfiles/zshrc ~/.zshrc
printf 'Host *\n  ServerAliveInterval 30\nHost lab-llm\n  User somebody' > ~/.ssh/config
chmod 0600 ~/.ssh/config
printf '{\r\n\t// mine\r\n\t"editor.fontSize": 13\r\n}' > ~/.config/Code/User/settings.json
printf '{ "provider": { "other": {"name": "x"} }, "theme": "dark" }' > ~/.config/opencode/opencode.json
"""
# Every file with its kind, mode and content; what ssh and the tests' own programs leave is nobody's file.
SURVEY = r"""cd ~
find . -mindepth 1 \( -path ./.ansible -o -path ./.cache -o -name 'known_hosts*' -o -name '.*_history' \
 -o -name '.zcompdump*' \) -prune \
 -o \( -type f -printf '%m %p ' -exec sha256sum {} \; \) -o \( -type l -printf '%p -> %l\n' \) | sort
"""


def on_client(command: str, timeout: float = 60) -> support.Run:
    """A command as the person of the client."""
    return support.on_host(CLIENT, command, timeout=timeout)


def play(name: str, *args: str) -> support.PlaybookRun:
    """A playbook on the client."""
    return support.ansible_playbook(f"playbooks/{name}.yml", *args).check()


@pytest.fixture(scope="module")
def person() -> Iterator[str]:
    """A client as a person has it, before anything of ours: its files. Afterwards as site.yml has it."""
    install = "{ sudo apt-get update -qq && sudo apt-get install -qq -y zsh; }"  # a client has no lists yet
    on_client(f"command -v zsh || {install}", ZSH_TIMEOUT_S).check()
    play("remove")
    keep = on_client("mktemp -d").check().stdout.strip()
    files = ".zshrc .ssh .config dotfiles"
    on_client(f"cd ~; for f in {files}; do [ ! -e $f ] || mv $f {keep}/; done").check()
    on_client(f"cp -r {keep}/.ssh ~/ && rm -f ~/.ssh/config; {PREPARE}").check()
    yield on_client(SURVEY).check().stdout
    on_client(f"cd ~; rm -rf {files}; mv {keep}/.[!.]* ~/; rmdir {keep}").check()
    play("client")


@pytest.fixture(scope="module")
def client(person: str) -> Iterator[str]:
    """The client with everything, and the right to run lmswitch on the box; the person's files before."""
    on_client("test -e ~/.ssh/id_test || ssh-keygen -q -t ed25519 -N '' -f ~/.ssh/id_test").check()
    key = on_client("cat ~/.ssh/id_test.pub").check().stdout.strip()
    address = support.expected_host().variables["ansible_host"]
    on_client(
        f"ssh-keyscan -t ed25519 {address} 2> /dev/null | sed 's/^[^ ]*/{address}/' >> ~/.ssh/known_hosts"
    ).check()
    support.on_host(LLM, f"echo '{key}' | sudo tee -a ~llm/.ssh/authorized_keys > /dev/null").check()
    play("client", "-e", "local_claude_vscode=true")
    yield person
    support.on_host(LLM, "sudo sed -i '/id_test\\|ops@lab-client/d' ~llm/.ssh/authorized_keys").check()


def without_comments(text: str) -> Any:
    """JSON with comments of which none is in a text."""
    return json.loads(re.sub(r"(?m)/\*.*?\*/|^\s*//.*$", "", text))


def test_a_dry_run_before_says_what_would_come_and_changes_nothing(person: str) -> None:
    run = play("client", "--check", "--diff", "-e", "local_claude_vscode=true")
    assert run.recap[CLIENT]["changed"] == 2
    assert "+alias llstatus=" in run.stdout and "ServerAliveInterval" not in run.stdout
    assert on_client(SURVEY).check().stdout == person


def test_a_second_run_changes_nothing(client: str) -> None:
    assert play("client", "-e", "local_claude_vscode=true", "--diff").changed == 0


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_has_aliases_that_reach_the_box(client: str, shell: str) -> None:
    login = "-n -o IdentityFile=~/.ssh/id_test"
    # As typed: an interactive shell reads its start file, and the alias in the next line.
    typed = f"alias ssh='ssh {login}'\nllstatus --json\nalias srl-gemma\nlocal-claude --help\n"
    done = support.on_host(CLIENT, f"{shell} -i", stdin=typed, timeout=60)
    status, _, rest = done.stdout.partition("srl-gemma=")
    assert json.loads(status[status.index("{") : status.rindex("}") + 1]).keys() >= {"active", "state"}, (
        done.tail()
    )
    assert "specstory run claude -c" in rest and "--model gemma" in rest
    assert "usage: local-claude" in rest


def test_what_the_person_wrote_wins_in_their_shell(client: str) -> None:
    assert "echo mine" in support.on_host(CLIENT, "zsh -i", stdin="alias llg\n").stdout
    assert on_client("readlink ~/.zshrc").stdout.strip() == "dotfiles/zshrc"


def test_ssh_knows_the_boxes_and_the_person_s_own_login(client: str) -> None:
    told = on_client("ssh -G lab-llm; ssh -G lab-ocr").check().stdout.splitlines()
    addresses = [line.split()[1] for line in told if line.startswith("hostname ")]
    assert all(re.fullmatch(r"[\d.]+", address) for address in addresses) and len(set(addresses)) == 2
    assert "user somebody" in told and "serveraliveinterval 30" in told


def test_editors_are_told_the_presets(client: str) -> None:
    presets = support.expected().config.llama_presets
    settings = without_comments(on_client(f"cat {VSCODE}").check().stdout)
    told = {item["name"]: item["value"] for item in settings["claudeCode.environmentVariables"]}
    assert settings["editor.fontSize"] == 13
    assert told["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == str(presets["gemma"].context_per_slot)
    url = f"{told['ANTHROPIC_BASE_URL']}/v1/models"
    ask = f"import urllib.request as r; print(r.urlopen('{url}', timeout=20).status)"
    assert on_client(f'python3 -c "{ask}"').check().stdout.strip() == "200"
    opencode = without_comments(on_client(f"cat {OPENCODE}").check().stdout)
    models = opencode["provider"]["llmbox-lab-llm"]["models"]
    assert {name: one["limit"]["context"] for name, one in models.items()} == {
        name: preset.context_per_slot for name, preset in presets.items()
    }
    assert opencode["theme"] == "dark" and "other" in opencode["provider"]


def test_a_file_that_cannot_be_changed_is_named_and_nothing_is_touched(client: str) -> None:
    on_client(f"cp -p {OPENCODE} ~/kept; echo '{{ \"theme\" ' > {OPENCODE}").check()
    run = support.ansible_playbook("playbooks/client.yml", "-e", "local_claude_alias_prefix=xx")
    on_client(f"mv ~/kept {OPENCODE}").check()
    assert run.rc == 2 and "opencode.json:2: cannot be read as JSON" in run.stdout
    assert on_client("grep -c 'alias xx' ~/.config/llmbox/shell.sh").stdout.strip() == "0"


def test_a_preset_that_is_none_is_refused_before_the_client_is_contacted(client: str) -> None:
    run = support.ansible_playbook("playbooks/client.yml", "-e", "local_claude_model=nobody")
    assert run.rc != 0 and CLIENT not in run.recap
    said = [line for line in (run.stdout + run.stderr).splitlines() if "refused:" in line]
    assert len(said) == 1 and 'local_claude_model = "nobody": is no preset of lab-llm' in said[0]


def test_a_client_that_is_off_does_not_keep_others_from_theirs(client: str, tmp_path: Path) -> None:
    (tmp_path / "hosts.yml").write_text(
        "clients: {hosts: {mac: {ansible_host: 127.0.0.1, ansible_port: 9, ansible_ssh_retries: 0}}}\n"
    )
    run = support.ansible_playbook("playbooks/client.yml", "-i", tmp_path, "-e", "local_claude_vscode=true")
    assert run.recap["mac"]["unreachable"] == 1
    assert run.recap[CLIENT] | {"ok": 0} == dict.fromkeys(run.recap[CLIENT], 0)


def test_removal_gives_every_file_back_byte_for_byte(client: str) -> None:
    on_client("rm -f ~/.ssh/id_test ~/.ssh/id_test.pub").check()
    assert play("remove").recap[CLIENT]["changed"] == 2
    assert on_client(SURVEY).check().stdout == client
    assert play("remove").changed == 0
