"""The whole router with real LiteLLM, from its wheelhouse, before two boxes and a cloud that are played.

Needs no host of the lab, but a package index for the first wheelhouse of a machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from llama_common.router import router_files
from local_claude.servers import Model, identify
from local_claude.wire import Server

from scripts.build_wheelhouse import App, Target, cache_root, ensure
from tests import support
from tests.stub_boxes import StubBox, stub_box
from tests.unit import scripted_llm
from tests.unit.test_router_files import PRESET, options

pytestmark = pytest.mark.long

START_S = 180
GONE_S = 5.0
KEYS: dict[str, dict[str, Any]] = {"me": {}, "rich": {"cloud": True}, "tight": {"requests_per_minute": 1}}
TOOLS = {
    "/v1/messages": [{"name": "Write", "input_schema": {"type": "object"}}],
    "/v1/chat/completions": [
        {"type": "function", "function": {"name": "Write", "parameters": {"type": "object"}}}
    ],
}
PATHS = tuple(TOOLS)


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with what /opt/llm-router holds."""
    here = os.uname()
    target = Target(f"{sys.version_info.major}.{sys.version_info.minor}", here.machine)
    archive = str(ensure(App("llm_router"), target, cache_root())["archive"])
    folder = tmp_path_factory.mktemp("llm-router")
    with tarfile.open(archive) as wheels:
        wheels.extractall(folder / "wheels", filter="data")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True, timeout=60)
    (pip,) = (folder / "wheels").glob("pip-*.whl")
    others = [wheel for wheel in (folder / "wheels").glob("*.whl") if wheel != pip]
    made: Path = folder / "venv/bin/python"
    install: list[Path | str] = [
        made,
        f"{pip}/pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--no-compile",
        *others,
    ]
    subprocess.run(install, check=True, timeout=600)
    return made


@dataclass
class Router:
    """The running router, and the boxes behind it."""

    url: str
    folder: Path
    one: StubBox
    two: StubBox
    cloud: StubBox

    def ask(
        self,
        text: str,
        path: str = PATHS[0],
        key: str = "me",
        headers: Mapping[str, str] | None = None,
        timeout: float = 60,
        **more: Any,
    ) -> httpx.Response:
        """One request with tools."""
        body = {"model": "coder", "max_tokens": 50, "messages": [{"role": "user", "content": text}]}
        body |= {"tools": TOOLS[path], **more}
        shown = {"x-api-key": key, **(headers or {})}
        return httpx.post(f"{self.url}{path}", json=body, headers=shown, timeout=timeout, trust_env=False)

    def lines(self, name: str = "requests.jsonl") -> list[dict[str, Any]]:
        """A log."""
        file = self.folder / name
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def router(python: Path, tmp_path: Path) -> Iterator[Router]:
    """The program as its unit starts it."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with ExitStack() as stack:
        one, two, cloud = (stack.enter_context(stub_box(name)) for name in ("one", "two", "cloud"))
        keys = [
            {"name": name, "sha256": hashlib.sha256(name.encode()).hexdigest(), **more}
            for name, more in KEYS.items()
        ]
        boxes = [
            {
                "name": box.name,
                "address": "127.0.0.1",
                "listen": ["203.0.113.1:1"],
                "presets": {"coder": PRESET},
            }
            for box in (one, two)
        ]
        made = router_files(
            boxes,
            options(
                listen=address,
                keys=keys,
                health_interval=1,
                state_dir=str(tmp_path),
                cloud_model="anthropic/claude-haiku-4-5",
                cloud_api_base=cloud.url,
                cloud_key="cloud-key",
            ),
        )
        text = {name: json.dumps(content) for name, content in made.items()}
        for model, box in zip(made["config.yaml"]["model_list"][:4], (one, one, two, two), strict=True):
            model["litellm_params"]["api_base"] = box.url + (
                "/v1" if "/v1" in model["litellm_params"]["api_base"] else ""
            )
        for listed, box in zip(made["router.json"]["boxes"], (one, two), strict=True):
            listed["url"] = box.url
        for name in text:
            (tmp_path / name).write_text(json.dumps(made[name]))
        log = stack.enter_context((tmp_path / "out").open("w"))
        files = ["--config", str(tmp_path / "config.yaml"), "--settings", str(tmp_path / "router.json")]
        process = subprocess.Popen(
            [python, "-m", "llm_router.serve", *files],
            env={"PATH": os.defpath, "HOME": str(tmp_path)},
            stdout=log,
            stderr=log,
        )
        try:
            wait_for(f"http://{address}/health", process, tmp_path / "out")
            yield Router(f"http://{address}", tmp_path, one, two, cloud)
        finally:
            process.terminate()
            process.wait(30)


def wait_for(url: str, process: subprocess.Popen[bytes], out: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        assert process.poll() is None and time.monotonic() < deadline, out.read_text()[-3000:]
        try:
            if httpx.get(url, timeout=2, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.2)


def test_what_a_client_gets(router: Router) -> None:
    for path in PATHS:
        for stream in (False, True):
            how: dict[str, Any] = {"path": path, "stream": stream}
            assert "hello" in router.ask(f"hi {how}", **how).text
            assert router.ask(f"call {how}", **how).text.count("Write") >= 1
            for fault in ("leak", "unparsed", "empty", "malformed"):
                if fault == "malformed" and not stream:
                    continue  # a whole answer of Anthropic's protocol cannot say it
                again = router.ask(f"{fault} once {how}", **how)
                assert (
                    again.status_code == 200
                    and "unused49" not in again.text
                    and "tool_call>" not in again.text
                )
                line = router.lines()[-1]
                assert line["judged"] and len(line["faults"]) == 1 and not line["cloud"], (fault, how, line)
            always = router.ask(f"leak always {how}", **how)
            assert "unused49" in always.text and router.lines()[-1]["passed_on"]
            assert not router.cloud.asked and not router.lines("egress.jsonl")


def test_the_cloud_is_asked_for_a_key_that_may_and_it_is_written_down(router: Router) -> None:
    for path in PATHS:
        for stream in (False, True):
            for trouble in ("leak", "refuse"):
                text = f"{trouble} always {path}{stream}"
                reply = router.ask(
                    text, path, "rich", stream=stream, metadata={"user_id": "u1", "headers": 1}, user="bob"
                )
                assert reply.status_code == 200 and "unused49" not in reply.text, reply.text
                assert router.lines()[-1]["cloud"]
                left = router.lines("egress.jsonl")[-1]
                assert left["key"] == "rich" and text in json.dumps(left["content"]["messages"])
                sent = router.cloud.asked[-1]
                assert sent.keys() <= left["content"].keys(), sent
                if path == PATHS[0]:  # OpenAI's protocol is translated for this cloud
                    assert {**sent, "model": left["to"]} == left["content"]
    for file in ("egress.jsonl", "requests.jsonl"):
        assert "cloud-key" not in (router.folder / file).read_text()
    for path in PATHS:  # a living box has read it: it is told to the client, and stays here
        for stream in (False, True):
            asked = len(router.cloud.asked), len(router.lines("egress.jsonl"))
            said = router.ask(f"too long {path}{stream}", path, "rich", stream=stream)
            assert said.status_code == 400 and "exceeds the context" in said.text, said.text
            assert (len(router.cloud.asked), len(router.lines("egress.jsonl"))) == asked
    refused = router.ask("refuse always", key="me")
    assert refused.status_code == 503 and router.lines()[-1]["status"] == 503


def test_every_answer_is_booked_that_a_server_made(router: Router) -> None:
    """The stand-ins tell 60 tokens for each; what the cloud took is booked apart too."""
    before = [0, 0]
    for path in PATHS:
        for stream in (False, True):
            for trouble, tokens, cloud in (("hi", 60, 0), ("leak", 180, 60), ("refuse", 60, 60)):
                assert router.ask(f"{trouble} always", path, "rich", stream=stream).status_code == 200
                used = json.loads((router.folder / "usage.json").read_text())["rich"][1:]
                assert [used[0] - before[0], used[1] - before[1]] == [tokens, cloud], (path, stream, trouble)
                before = used


def test_a_conversation_stays_with_the_box_that_has_its_prompt(router: Router) -> None:
    for path in PATHS:
        for talk in range(4):
            before = [len(box.asked) for box in (router.one, router.two)]
            said: list[dict[str, Any]] = []
            for turn in range(5):
                said.append({"role": "user", "content": f"hi {path} {talk} {turn}"})
                answer = router.ask("", path, messages=said, stream=bool(turn % 2))
                assert answer.status_code == 200
                said.append({"role": "assistant", "content": "hello"})
            asked = [len(box.asked) - had for box, had in zip((router.one, router.two), before, strict=True)]
            assert sorted(asked) == [0, 5], (path, talk, asked)


def test_a_client_that_leaves_while_a_box_reads_its_prompt_keeps_none_busy(router: Router) -> None:
    """Esc in the long part of a turn: the box is told, asked no second time, and has the next turn."""
    boxes = (router.one, router.two)
    for path in PATHS:
        for stream in (False, True):
            before = [len(box.asked) for box in boxes]
            said = [{"role": "user", "content": f"hi {path} {stream}"}]
            assert router.ask("", path, messages=said, stream=stream).status_code == 200
            (box,) = [box for box, had in zip(boxes, before, strict=True) if len(box.asked) > had]
            more = [*said, {"role": "assistant", "content": "hello"}, {"role": "user", "content": "think"}]
            with ThreadPoolExecutor() as pool:
                asking = pool.submit(router.ask, "", path, messages=more, stream=stream, timeout=2)
                time.sleep(1)
                port = box.url.rpartition(":")[2]
                timers = support.run("ss", "-tno", "state", "established", "dport", "=", f":{port}").stdout
                assert re.search(r"timer:\(keepalive,[0-9]", timers), (path, stream, timers)
                assert isinstance(asking.exception(), httpx.ReadTimeout)
            deadline = time.monotonic() + GONE_S
            while not box.left or router.lines()[-1]["status"] != 499:
                assert time.monotonic() < deadline, (path, stream, box.left, router.lines()[-1])
                time.sleep(0.05)
            box.left.clear()
            assert router.ask("", path, messages=[*said, *said], stream=stream).status_code == 200
            now = [len(one.asked) - had for one, had in zip(boxes, before, strict=True)]
            assert sorted(now) == [0, 3] and len(box.asked) - before[boxes.index(box)] == 3, (
                path,
                stream,
                now,
            )


def test_a_box_that_falls_silent_keeps_no_request(router: Router) -> None:
    """They were sent before the router's next look."""
    for _ in range(3):  # both are known to live and to serve; a stream's connection is not kept
        assert router.ask("hi", stream=True).status_code == 200
        time.sleep(1)
    silent = router.one.fall_silent()
    asked = len(router.two.asked)
    try:
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda n: router.ask(f"hi {n}", PATHS[n % 2], timeout=120), range(8)))
    finally:
        for one in silent:
            one.close()
    assert {answer.status_code for answer in answers} == {200} and len(router.two.asked) - asked == 8
    took = max(line["seconds"] for line in router.lines()[-8:])
    assert took > 20, "none was sent to the silent box"


def test_local_claude_knows_what_the_router_knows(router: Router) -> None:
    """The inventory's context and the boxes' build, past the router: no model call to find out."""
    where = Server("http", "127.0.0.1", int(router.url.rpartition(":")[2]), "me")
    deadline = time.monotonic() + GONE_S
    while not (found := identify(where)).models[0].ready:
        assert time.monotonic() < deadline, found
        time.sleep(0.1)
    assert found.kind.name == "gateway" and found.version == "b1-one, b1-two"
    assert found.models == (Model("coder", PRESET["context"], ready=True),)


def test_who_gets_in(router: Router) -> None:
    assert router.ask("hi", key="tight").status_code == 200
    assert (router.ask("hi", key="tight")).status_code == 429
    assert router.ask("hi", key="nobody").status_code == 401
    assert (
        router.ask("hi", model="cloud").status_code
        == router.ask("hi", model="coder@messages").status_code
        == 404
    )
    assert router.ask("hi", api_base=router.cloud.url).status_code >= 400  # LiteLLM itself says 500
    assert not router.cloud.asked
    with httpx.Client(base_url=router.url, headers={"x-api-key": "me"}, trust_env=False) as http:
        assert [one["id"] for one in http.get("/v1/models").json()["data"]] == ["coder"]
        assert {http.get(path).status_code for path in ("/ui", "/model/info", "/key/list", "/docs")} == {404}


def test_a_header_of_a_client_does_not_steer_litellm(router: Router) -> None:
    """LiteLLM takes the name of a request from it: of two under one name, one was judged and booked."""
    steers = {"x-litellm-call-id": "same", "x-litellm-timeout": "abc"}
    texts = [f"leak once slow {number}" for number in range(2)]
    with ThreadPoolExecutor() as pool:
        asks = [pool.submit(router.ask, text, stream=True, headers=steers) for text in texts]
        replies = [ask.result() for ask in asks]
    assert all(reply.status_code == 200 and "unused49" not in reply.text for reply in replies)
    lines = router.lines()
    assert len({line["request"] for line in lines}) == 2
    assert all(line["judged"] and len(line["faults"]) == 1 for line in lines)


def test_a_box_dies_under_load_and_requests_go_on(router: Router) -> None:
    replies: list[tuple[float, bool, httpx.Response | Exception]] = []
    began = time.monotonic()
    done = threading.Event()

    def one(number: int) -> None:
        count = 0
        while not done.is_set():
            count += 1
            stream = bool(number % 2)
            started = time.monotonic() - began
            try:
                path = PATHS[number // 2 % 2]
                replies.append((started, stream, router.ask(f"slow {number} {count}", path, stream=stream)))
            except httpx.HTTPError as error:
                replies.append((started, stream, error))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    while min(len(router.one.asked), len(router.two.asked)) < 3:
        assert time.monotonic() - began < 60, (len(router.one.asked), len(router.two.asked))
        time.sleep(0.05)
    before = len(router.two.asked)
    router.one.die()
    died = time.monotonic() - began
    time.sleep(4)
    done.set()
    for thread in threads:
        thread.join(120)
    bad = [
        reply for *_, reply in replies if not isinstance(reply, httpx.Response) or reply.status_code != 200
    ]
    print(
        f"{len(replies)} requests, {len(bad)} failed; "
        f"two was asked {before} times before, {len(router.two.asked)} in all"
    )
    assert router.one.asked and len(router.two.asked) > before and len(replies) >= 8
    assert not bad, bad[:3]
    late = [
        reply.text for started, _, reply in replies if started > died and isinstance(reply, httpx.Response)
    ]
    assert late and all("two" in text for text in late), late[:2]


# --- the same LiteLLM in front of a server for local-claude's session ---

FIELDS = {
    "model",
    "messages",
    "max_tokens",
    "stream",
    "stream_options",
    "tools",
    "tool_choice",
    "temperature",
}
# In claude's place: sends what Claude Code sends, and tells what came.
ASKS = f"""#!{sys.executable}
import json, os, sys, urllib.request
if "--help" in sys.argv:
    sys.exit()
body = {{
    "model": os.environ["ANTHROPIC_MODEL"], "max_tokens": 50, "metadata": {{"user_id": "x"}},
    "system": [{{"type": "text", "text": "Be brief.", "cache_control": {{"type": "ephemeral"}}}}],
    "messages": [{{"role": "user", "content": "Hi"}}], "thinking": {{"type": "adaptive"}},
    "context_management": {{"edits": []}}, "output_config": {{"effort": "high"}},
}}
request = urllib.request.Request(os.environ["ANTHROPIC_BASE_URL"] + "/v1/messages", json.dumps(body).encode())
request.add_header("Authorization", "Bearer " + os.environ["ANTHROPIC_AUTH_TOKEN"])
request.add_header("Content-Type", "application/json")
request.add_header("anthropic-beta", "context-management-2025-06-27")
print(urllib.request.urlopen(request, timeout=60).read().decode())
sys.exit(7)
"""


def strict(body: dict[str, Any]) -> Any:
    """OpenAI's protocol, and nothing beside it."""
    if more := sorted(body.keys() - FIELDS):
        return 422, {"error": {"message": f"Extra inputs are not permitted: {', '.join(more)}"}}
    message = {"role": "assistant", "content": "Hello."}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    return 200, {"id": "c", "object": "chat.completion", "model": "a", "choices": [choice], "usage": usage}


def test_local_claude_puts_it_in_front_of_a_strict_server(python: Path, tmp_path: Path) -> None:
    """Fields that such a server refuses are taken out; exit code 7 is claude's, and nothing is left."""
    (tmp_path / "claude").write_text(ASKS)
    (tmp_path / "claude").chmod(0o755)
    answers: dict[str, Any] = {
        "/v1/models": scripted_llm.models({"id": "a"}),
        "/v1/chat/completions": strict,
    }
    environment = {
        "PATH": f"{tmp_path}:{os.defpath}",
        "HOME": str(tmp_path),
        "LOCAL_CLAUDE_LITELLM": str(python.parent / "litellm"),
    }
    with scripted_llm.ScriptedLlm(answers) as server:
        words = ("--port", str(server.port), "--skip-checks", "-p", "x")
        done = subprocess.run(
            [support.BIN / "local-claude", *words],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=START_S,
            check=False,
        )
    assert done.returncode == 7, done.stderr[-2000:]
    assert json.loads(done.stdout)["content"][0]["text"] == "Hello."
    until, files = time.monotonic() + GONE_S, tmp_path / ".claude-local/local-claude"
    while support.run("pgrep", "-f", f"litellm.*{tmp_path}").stdout or list(files.glob("litellm-*")):
        assert time.monotonic() < until, list(files.iterdir())
        time.sleep(0.1)
