"""The router with real LiteLLM, before two LLM boxes of the lab: one dies under load, requests go on.

The lab's OCR host becomes the second LLM box for this module only and is made anew afterwards; the client
host is the router. Presets, gateways and llama-servers are the real ones.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from lab.config import from_environment
from lab.inventory import inventory
from scripts._traffic import Sent, Traffic, chat
from tests import support

pytestmark = pytest.mark.long

Host = Callable[..., support.Run]
KEY, TIGHT = "router-test-key", "router-tight-key"
PORT = 4000
PRESET = "smol"
BOXES = (support.LLM, support.OCR)
PROVISION_S, ROUTER_S = 1800, 900
CLIENTS, LATE, LOAD_S = 4, 4, 300.0  # LATE: requests that begin after the death
TOOLS = [
    {"name": "Write", "input_schema": {"type": "object", "properties": {"file_path": {"type": "string"}}}}
]


@dataclass
class Place:
    """The router of the lab: its inventory, its address, and a way to the hosts."""

    inventory: Path
    url: str
    on_host: Host

    def play(self, playbook: str, *words: str, timeout: float = ROUTER_S) -> support.PlaybookRun:
        return support.ansible_playbook(playbook, *words, inventory=self.inventory, timeout=timeout)

    def log(self, name: str = "requests.jsonl") -> list[dict[str, Any]]:
        """The lines of a log."""
        shown = self.on_host(support.CLIENT, f"sudo cat /var/lib/llm-router/{name}").check().stdout
        return [json.loads(line) for line in shown.splitlines()]

    def lmswitch(self, host: str, *words: str) -> support.Run:
        return self.on_host(host, f"sudo -u llm lmswitch {' '.join(words)}", timeout=180)


def two_box_inventory(folder: Path) -> Path:
    """The lab's inventory with another sharing of roles among its hosts."""
    lab = from_environment()
    made = inventory(lab)
    groups = {"llm_servers": BOXES, "ocr_servers": (), "routers": (support.CLIENT,)}
    children: dict[str, dict[str, Any]] = {
        name: {"hosts": {host: {} for host in hosts}} for name, hosts in groups.items()
    }
    keys = [
        {"name": "test", "sha256": hashlib.sha256(KEY.encode()).hexdigest()},
        {"name": "tight", "sha256": hashlib.sha256(TIGHT.encode()).hexdigest(), "requests_per_minute": 1},
    ]
    children["routers"]["vars"] = {"litellm_router_keys": keys, "litellm_router_health_interval": 2}
    data = {
        "all": {
            "vars": made["all"]["vars"],
            "hosts": made["_meta"]["hostvars"],
            "children": {
                "llama_hosts": {
                    "children": {name: children.pop(name) for name in ("llm_servers", "ocr_servers")}
                },
                **children,
            },
        }
    }
    (folder / "hosts.yml").write_text(yaml.safe_dump(data))
    (folder / "group_vars").symlink_to(support.LAB_INVENTORY / "group_vars")
    return folder


@pytest.fixture(scope="module")
def place(on_host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Two boxes that serve the same preset, and the router before them."""
    found = two_box_inventory(tmp_path_factory.mktemp("two-boxes"))
    router = Place(found, f"http://{from_environment().host(support.CLIENT).address}:{PORT}", on_host)
    try:
        router.play("playbooks/llm_server.yml", "--limit", support.OCR, timeout=PROVISION_S).check()
        router.play("playbooks/router.yml").check()
        for host in BOXES:
            router.lmswitch(host, PRESET).check()
        yield router
    finally:
        units = "/etc/systemd/system/llm-router.service"
        folders = "/opt/llm* /etc/llm-router /var/lib/llm* /usr/local/bin/{lmswitch,llmbox-*,gpu-guard}"
        timers = "llmbox-drift-sampled.timer llmbox-drift-full.timer"
        on_host(support.CLIENT, f"sudo systemctl disable --now llm-router {timers}", timeout=180)
        on_host(
            support.CLIENT, f"sudo rm -rf {folders} {units} /etc/systemd/system/llmbox-drift*", timeout=180
        )
        on_host(support.CLIENT, "sudo systemctl daemon-reload; sudo userdel llm-router", timeout=180)
        on_host(support.LLM, "sudo -u llm lmswitch off", timeout=180)
        support.run("python3", "-m", "lab", "up", "--only", support.OCR, "--fresh", support.OCR, timeout=600)


def client(place: Place, key: str = KEY) -> httpx.Client:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.Client(base_url=place.url, headers=headers, timeout=180, trust_env=False)


def ask(http: httpx.Client, **more: Any) -> httpx.Response:
    messages = [{"role": "user", "content": "Say hello."}]
    return http.post(
        "/v1/chat/completions", json={"model": PRESET, "messages": messages, "max_tokens": 8, **more}
    )


def test_the_models_are_those_of_the_inventory_and_both_protocols_answer(place: Place) -> None:
    with client(place) as http:
        models = {model["id"]: model for model in http.get("/v1/models").json()["data"]}
        presets = support.expected().config.llama_presets
        contexts = {name: preset.context_per_slot for name, preset in presets.items()}
        assert {name: model["context"] for name, model in models.items()} == contexts
        assert [name for name, model in models.items() if model["state"] == "active"] == [PRESET]
        assert re.fullmatch(r"b\d+-\w+", http.get("/props").json()["build_info"])  # both boxes have the same
        assert ask(http).json()["choices"][0]["message"]["content"]
        body = {"model": PRESET, "max_tokens": 8, "messages": [{"role": "user", "content": "Hello"}]}
        reply = http.post("/v1/messages", json=body)
        assert reply.status_code == 200 and reply.json()["content"][0]["text"], reply.text
        streamed = http.post("/v1/messages", json={**body, "stream": True}).text
        assert "event: message_stop" in streamed
        counted = http.post("/v1/messages/count_tokens", json=body)
        assert counted.status_code == 200 and counted.json()["input_tokens"] > 0, counted.text
        for path in ("/v1/chat/completions", "/v1/messages", "/v1/messages/count_tokens"):
            for other in ("cloud", "anthropic/claude-haiku-4-5", f"{PRESET},{PRESET}"):
                refused = http.post(path, json={**body, "model": other})
                assert refused.status_code == 404 and "no such model" in refused.text, (
                    path,
                    other,
                    refused.text,
                )
        assert http.get("/ui").status_code == http.get("/model/info").status_code == 404
    with client(place, "unknown") as http:
        assert ask(http).status_code == 401
    with client(place, TIGHT) as http:
        assert ask(http).status_code == 200
        assert ask(http).status_code == 429


def test_an_answer_to_tools_is_judged_before_it_leaves(place: Place) -> None:
    """No model of the lab calls tools; what matters is that each answer has its verdict in the log."""
    with client(place) as http:
        body = {"model": PRESET, "max_tokens": 24, "messages": [{"role": "user", "content": "Write a file."}]}
        for stream in (False, True):
            reply = http.post("/v1/messages", json={**body, "tools": TOOLS, "stream": stream})
            assert reply.status_code == 200, reply.text
    lines = [line for line in place.log() if line.get("tools")][-2:]
    assert len(lines) == 2 and all(line["judged"] or line["passed_on"] for line in lines), lines


def test_a_second_run_and_a_dry_run_change_nothing(place: Place) -> None:
    assert place.play("playbooks/router.yml").check().changed == 0
    assert place.play("playbooks/router.yml", "--check", "--diff").check().changed == 0


def test_the_unit_holds_the_router_and_no_secret_is_readable(place: Place) -> None:
    on_host = place.on_host
    exposure = on_host(
        support.CLIENT, "systemd-analyze security llm-router.service --no-pager | tail -1"
    ).stdout
    print(exposure)
    assert float(exposure.split("llm-router.service:")[1].split()[0]) < 3, exposure
    for file in (
        "/etc/llm-router/config.yaml",
        "/etc/llm-router/router.json",
        "/var/lib/llm-router/requests.jsonl",
    ):
        assert on_host(support.CLIENT, f"cat {file}").rc != 0, f"{file} can be read by anybody"
    owner = on_host(support.CLIENT, "ps -o user= -C llm-router").stdout.split()
    assert set(owner) == {"llm-router"}, owner


def test_what_was_deployed_on_the_router_is_compared_with_what_is_there(place: Place) -> None:
    compare = "sudo llmbox-drift check"
    place.on_host(support.CLIENT, compare).check()
    timers = place.on_host(support.CLIENT, "systemctl is-active llmbox-drift-{sampled,full}.timer").check()
    assert timers.stdout.split() == ["active", "active"]
    unit = "/etc/systemd/system/llm-router.service"
    place.on_host(support.CLIENT, f"sudo sed -i s/^Restart=.*/Restart=no/ {unit}").check()
    found = place.on_host(support.CLIENT, compare)
    assert found.rc == 1 and f"{unit}: expected line " in found.stdout, found.tail()
    words = ("--inventory", place.inventory, "--limit", support.CLIENT, "--drift")
    verified = support.run(support.BIN / "python", "scripts/verify_health.py", *words, timeout=120)
    assert verified.rc == 1 and f"{unit} = line " in verified.stdout, verified.tail()
    place.play("playbooks/router.yml", "--limit", support.CLIENT).check()
    place.on_host(support.CLIENT, compare).check()


def test_one_box_dies_under_load_and_requests_go_on(place: Place) -> None:
    """Whole answers and streams at once; the first box is powered down in the middle, not in order."""
    traffic = Traffic()
    began = time.monotonic()
    gone: list[float] = []  # when the box was

    def late() -> list[Sent]:
        return [one for one in traffic.sent if gone and one.began > gone[0]]

    async def one(number: int, http: httpx.AsyncClient) -> None:
        while len(late()) < LATE and time.monotonic() - began < LOAD_S:
            traffic.sent.append(await chat(http, PRESET, stream=number % 2 == 0, tokens=24))

    async def die() -> None:
        while len(traffic.sent) < CLIENTS and time.monotonic() - began < LOAD_S:
            await asyncio.sleep(1)
        kill = (
            "sudo pkill -KILL -u llm -f 'llmbox-gateway|llama-server'; sudo systemctl stop user@$(id -u llm)"
        )
        await asyncio.to_thread(place.on_host, support.OCR, kill, timeout=60)
        gone.append(time.monotonic())

    async def load() -> None:
        headers = {"Authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(
            base_url=place.url, headers=headers, timeout=180, trust_env=False
        ) as http:
            await asyncio.gather(die(), *(one(number, http) for number in range(CLIENTS)))

    asyncio.run(load())
    print(traffic.summary())
    lines = place.log()[-len(traffic.sent) :]
    by_box = {name: sum(line.get("box") == name for line in lines) for name in BOXES}
    print(by_box, [line["faults"] for line in lines if line["faults"]][:10])
    assert all(by_box.values()), f"only one box had answered: {by_box}"
    assert len(late()) >= LATE and all(one.ok for one in late()), [one for one in late() if not one.ok]
    # A stream whose words had begun to arrive from the box that died ends with an error; nothing else does.
    broken = [one for one in traffic.sent if not one.ok]
    assert all(one.stream and one.tokens > 0 for one in broken), broken
    assert len(broken) <= CLIENTS // 2
