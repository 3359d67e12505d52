"""Role llm_gateway on a host: an address that appears later, keys, a service manager that starts anew."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import support
from tests.lab.test_lmswitch import play_of

Host = Callable[..., support.Run]
IDLE_S, UNLOAD_LIMIT_S = 4, 15
NOT_THERE_YET = "203.0.113.7"  # TEST-NET-3


class Box:
    """lab-llm, its gateway as a test wants it."""

    def __init__(self, on_host: Host, folder: Path) -> None:
        self.on_host = on_host
        self.folder = folder
        self.wanted = support.expected()
        self.url = self.wanted.url(support.expected_host().address)
        user = self.wanted.user
        self.manager = f"sudo -u {user} XDG_RUNTIME_DIR=/run/user/$(id -u {user}) systemctl --user"

    def run(self, command: str) -> support.Run:
        """A shell command as the sudo user; it must succeed."""
        return self.on_host(support.LLM, command, timeout=120).check()

    def play(self, **variables: Any) -> int:
        """The role with these variables. Returns how many tasks changed something."""
        playbook = play_of(self.folder, "llm_gateway")
        words = ("--limit", support.LLM, "-e", json.dumps(variables))
        return support.ansible_playbook(playbook, *words, timeout=200).check().changed

    def asks_itself(self, url: str) -> None:
        """The host gets an answer from this URL."""
        self.run(f"python3 -c \"from urllib.request import urlopen; urlopen('{url}', timeout=30)\"")

    def models(self, key: str = "") -> httpx.Response:
        """A request that needs a key where there are keys."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.get(f"{self.url}/v1/models", headers=headers, timeout=30, trust_env=False)


@pytest.fixture
def box(on_host: Host, tmp_path: Path) -> Iterator[Box]:
    """The box; the gateway is as the inventory wants it afterwards."""
    box = Box(on_host, tmp_path)
    box.play()
    yield box
    box.play()
    assert box.models().status_code == 200


@pytest.mark.long
def test_an_address_that_appears_later(box: Box) -> None:
    """That of a tailnet does; nobody restarts anything then."""
    port = box.wanted.front.port
    assert box.play(llm_gateway_listen=[f"{NOT_THERE_YET}:{port}", f"127.0.0.1:{port}"]) == 2
    box.asks_itself(f"http://127.0.0.1:{port}/health")
    with pytest.raises(httpx.ConnectError):
        box.models()
    box.run(f"sudo ip address add {NOT_THERE_YET}/32 dev lo")
    try:
        box.asks_itself(f"http://{NOT_THERE_YET}:{port}/health")
    finally:
        box.run(f"sudo ip address del {NOT_THERE_YET}/32 dev lo")


@pytest.mark.long
def test_only_another_address_opens_the_port_anew(box: Box) -> None:
    """A socket that is closed takes along what waits in its backlog."""

    def opened() -> str:
        return box.run(f"{box.manager} show --value --property=InvocationID llm-gateway.socket").stdout

    before = opened()
    box.run("echo '# an older version of the role' | sudo tee -a /etc/systemd/user/llm-gateway.socket")
    assert box.play() == 2, "the unit, and the gateway's restart without loss"
    assert opened() == before
    listen = [*box.wanted.config.llm_gateway_listen, "[::1]:4321"]
    assert box.play(llm_gateway_listen=listen) == 2
    assert opened() != before
    box.asks_itself("http://[::1]:4321/health")
    assert box.models().status_code == 200


def test_keys_are_in_force_without_a_restart_and_nowhere_to_be_read(box: Box) -> None:
    since = box.run("date +%s").stdout.strip()
    made = box.run(f"sudo -u {box.wanted.user} llmbox-key new laptop").stdout
    key = next(line for line in made.splitlines() if line.startswith("llmbox-"))
    entry = json.loads(made.splitlines()[-1].removeprefix("- "))
    assert entry["name"] == "laptop" and key not in json.dumps(entry)
    started = box.run(f"{box.manager} show --property=MainPID llm-gateway.service").stdout

    assert box.play(llm_gateway_keys=[entry]) == 1
    box.run("sleep 2")
    assert box.run(f"{box.manager} show --property=MainPID llm-gateway.service").stdout == started
    assert box.models().status_code == 401
    assert box.models("llmbox-wrong").status_code == 401
    assert box.models(key).status_code == 200
    assert httpx.get(f"{box.url}/health", timeout=30, trust_env=False).status_code == 200

    bearer = {"Authorization": f"Bearer {key}"}
    asked = httpx.post(
        f"{box.url}/tokenize", json={"content": "x"}, headers=bearer, timeout=60, trust_env=False
    )
    assert asked.status_code in (200, 503), "a preset answers, or none is active"

    told = box.run(
        f"sudo journalctl --since=@{since} --output=cat; sudo cat ~llm/.local/state/llmbox/audit.jsonl"
    )
    assert key not in told.stdout and '"key": "laptop"' in told.stdout
    readers = box.on_host(support.LLM, "cat /etc/llmbox/keys.json")
    assert readers.rc != 0, "any user can read the keys' file"


def test_a_key_that_cannot_be_meant_changes_nothing(box: Box) -> None:
    variables = json.dumps({"llm_gateway_keys": [{"name": "laptop", "sha256": "llmbox-pasted-by-mistake"}]})
    refused = support.ansible_playbook("playbooks/llm_server.yml", "--limit", support.LLM, "-e", variables)
    assert refused.rc != 0
    assert "refused: --extra-vars: llm_gateway_keys.0.sha256" in refused.stdout + refused.stderr
    assert "pasted" not in refused.stdout + refused.stderr
    assert box.models().status_code == 200


@pytest.mark.long
def test_an_idle_preset_is_unloaded_and_the_next_request_loads_it_again(box: Box) -> None:
    def ask() -> dict[str, Any]:
        body = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 2}
        answer = httpx.post(f"{box.url}/v1/chat/completions", json=body, timeout=120, trust_env=False)
        found: dict[str, Any] = answer.raise_for_status().json()
        return found

    def active() -> str | None:
        command = f"sudo -u {box.wanted.user} lmswitch status --json"
        name: str | None = json.loads(box.run(command).stdout)["active"]
        return name

    preset = box.wanted.names("user")[0]
    box.run(f"sudo -u {box.wanted.user} lmswitch {preset}")
    box.play(llm_gateway_idle_unload=IDLE_S)
    assert ask()["choices"]
    assert active() == preset
    deadline = time.monotonic() + IDLE_S + UNLOAD_LIMIT_S
    while active() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert active() is None, f"nobody asked for {IDLE_S} s and {preset} still serves"
    assert not box.on_host(support.LLM, "pgrep -x llama-server").stdout, "its memory is not free"
    box.run(f"{box.manager} restart llm-gateway.service")
    assert ask()["choices"]
    assert active() == preset


def test_a_service_manager_that_starts_anew_has_the_port_again(box: Box) -> None:
    """As after a boot: nobody logs in."""
    box.run(f"sudo systemctl restart user@$(id -u {box.wanted.user}).service")
    up = f"{box.manager} is-active --quiet"
    box.run(
        f"timeout 30 sh -c 'until {up} llm-gateway.socket && {up} llm-gateway.service; do sleep 0.2; done'"
    )
    assert box.models().status_code == 200


@pytest.mark.long
def test_a_box_without_presets_has_no_gateway(box: Box) -> None:
    """It would have nothing to listen before; a preset brings it back."""
    assert box.play(llama_presets={}) == 1
    shown = box.on_host(support.LLM, f"{box.manager} is-active llm-gateway.socket llm-gateway.service").stdout
    assert shown.split() == ["inactive", "inactive"]
    assert box.play() == 1
    assert box.models().status_code == 200
