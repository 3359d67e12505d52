"""verify_health: what it makes of what a host and a server said, its exit codes and its JSON."""

from __future__ import annotations

import copy
import json
import os
import pwd
import socket
import socketserver
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from llama_common.rules import LOCK_COMMAND

from scripts import _ask_host, _command, _probe, _refusal, verify_health
from scripts._inventory import Host, parse_hosts
from scripts._llm_box import GATEWAY_UNITS, LlmBox
from scripts.verify_health import Answers, Check, HostReport

COMMIT = "4ca1d6abe6fbc56a30072a4328cfbb554cbb5ecc"
VARIABLES: dict[str, Any] = {
    "llm_user_name": "llm",
    "llm_user_home": "/home/llm",
    "llama_cpp_root": "/opt/llama.cpp",
    "gguf_models_dir": "/home/llm/models/gguf",
    "gguf_models_reserve_bytes": 1000,
    "gguf_models_install": "used",
    "gpu_guard_enabled": True,
    "llama_presets_dir": "/etc/llmbox",
    "llama_presets_listen": "/run/user/1500/llama/server.sock",
    "llm_gateway_listen": ["0.0.0.0:1234"],
    "llama_cpp_builds": {
        "upstream": {
            "repo": "git://host/upstream.git", "commit": COMMIT, "cmake_options": {"GGML_NATIVE": False},
        },
    },
    "_llama_cpp_base_options": {"CMAKE_BUILD_TYPE": "Release"},
    "_llama_cpp_owned_options": {"CMAKE_C_COMPILER_LAUNCHER": "ccache"},
    "gguf_models": {
        "small": {"url": "http://host/small.gguf", "sha256": "0" * 64, "size": 77},
        "unused": {"url": "http://host/unused.gguf", "sha256": "1" * 64, "size": 78},
    },
    "llama_presets": {
        "one": {
            "description": "the first", "build": "upstream", "model": "small", "context": 8192,
            "kv_cache_type": "f16", "agent": False, "parallel": 2,
        },
        "two": {
            "description": "the second", "build": "upstream", "model": "small", "context": 4096,
            "kv_cache_type": "f16", "agent": False,
        },
    },
}  # fmt: skip
BOX = LlmBox.of(VARIABLES)
OPTIONS = {"CMAKE_BUILD_TYPE": "Release", "CMAKE_C_COMPILER_LAUNCHER": "ccache", "GGML_NATIVE": "OFF"}
MANAGER = "/user.slice/user-1500.slice/user@1500.service"
RELEASE = f"/opt/llama.cpp/upstream/releases/{COMMIT}-0123abcd"


def preset_data(name: str) -> dict[str, Any]:
    return BOX.config.llama_presets[name].model_dump(mode="json")


def seen() -> dict[str, Any]:
    """What the probe says of a box that is as it should be."""
    unit = {"LoadState": "loaded", "UnitFileState": "static"}
    return {
        "account": {"uid": 1500, "home": "/home/llm", "groups": ["llm"], "linger": True},
        "status": {"active": "one", "state": "ready"},
        "list": {"presets": [{"name": "one"}, {"name": "two"}]},
        "presets": {"presets": {"one": preset_data("one"), "two": preset_data("two")}},
        "servers": [{"pid": 7, "uid": 1500, "listen": [],
                     "exe": f"{RELEASE}/bin/llama-server"}],
        "user_units": {"llama-one.service": dict(unit), "llama-two.service": dict(unit)},
        "boot_links": [],
        "system_units": {},
        "gateway_units": {name: {"ActiveState": "active", "UnitFileState": "enabled"}
                          for name in GATEWAY_UNITS},
        "gpu_guard": {"unit": {"ActiveState": "active", "UnitFileState": "enabled"},
                      "says": {"running": True, "level": "ok", "reason": "", "stopped": ""}},
        "ports": [{"address": "0.0.0.0:1234", "groups": [f"{MANAGER}/app.slice/llm-gateway.service",
                                                         f"{MANAGER}/init.scope"]}],
        "server": {"health": 200, "n_ctx": 4096, "error": ""},
        "builds": {"upstream": {"current": RELEASE, "previous": None,
                                "release": {"commit": COMMIT, "cmake_options": dict(OPTIONS)}}},
        "files": {"small.gguf": 77},
        "disk": {"free": 5000, "total": 10000},
    }  # fmt: skip


SERVING = ("running_release", "health", "n_ctx", "ready", "chat")
GOOD = Answers(200, 200, "one two three")


def failing(data: dict[str, Any], answers: Answers = GOOD) -> dict[str, Check]:
    return {check.name: check for check in verify_health.llm_checks(BOX, data, answers) if not check.ok}


def test_a_box_as_its_inventory_wants_it_is_well() -> None:
    checks = verify_health.llm_checks(BOX, seen(), GOOD)
    assert [check.name for check in checks if not check.ok] == []
    assert len(checks) >= 15
    assert len({check.name for check in checks}) == len(checks)


@pytest.mark.parametrize(
    ("path", "value", "names"),
    [
        (("account", "linger"), False, {"lingering"}),
        (("account",), None, {"lingering", "llama_servers", "running_release", "past_gateway"}),
        (("status", "state"), "loading", {"state"}),
        (("status", "active"), None, {"active_preset", *SERVING}),
        (("status",), None, {"active_preset", "state", *SERVING}),
        (("list", "presets"), [{"name": "one"}], {"lmswitch_list"}),
        (("list",), None, {"lmswitch_list"}),
        (("presets", "presets", "three"), {}, {"presets_json"}),
        (("presets", "presets", "two", "context"), 8192, {"presets_data"}),
        (("presets",), None, {"presets_json", "presets_data"}),
        (("presets", "presets"), ["one"], {"presets_json", "presets_data"}),
        (("presets", "presets", "two"), None, {"presets_data"}),
        (("list", "presets"), {}, {"lmswitch_list"}),
        (("servers",), [], {"llama_servers", "running_release"}),
        (("servers", 0, "listen"), ["0.0.0.0:8080"], {"past_gateway"}),
        (("server", "health"), 503, {"health"}),
        (("server",), {"health": None, "n_ctx": None, "error": "no"}, {"health", "n_ctx"}),
        (("server", "n_ctx"), 8192, {"n_ctx"}),
        (("server", "n_ctx"), None, {"n_ctx"}),
        (("gateway_units",), None, {"gateway_active", "gateway_enabled"}),
        (("gateway_units", "llm-gateway.service", "ActiveState"), "failed", {"gateway_active"}),
        (("gateway_units", "llm-gateway.socket", "UnitFileState"), "disabled", {"gateway_enabled"}),
        (("gpu_guard",), None, {"gpu_guard_active", "gpu_guard_enabled", "gpu_guard"}),
        (("gpu_guard", "unit", "ActiveState"), "failed", {"gpu_guard_active"}),
        (("gpu_guard", "unit", "UnitFileState"), "disabled", {"gpu_guard_enabled"}),
        (("gpu_guard", "says"), None, {"gpu_guard"}),
        (("gpu_guard", "says", "running"), False, {"gpu_guard"}),
        (("gpu_guard", "says", "level"), "critical", {"gpu_guard"}),
        (("gpu_guard", "says", "level"), "starting", {"gpu_guard"}),
        (("gpu_guard", "says", "stopped"), "it was hot", {"gpu_guard"}),
        (("ports",), [], {"gateway_port"}),
        (("ports", 0, "address"), "127.0.0.1:1234", {"gateway_port"}),
        (("ports", 0, "groups"), [], {"gateway_port"}),
        (("ports", 0, "groups", 0), "/system.slice/lmstudio.service", {"gateway_port"}),
        (("ports", 0, "groups", 1), "/init.scope", {"gateway_port"}),
        (("user_units", "llama-two.service", "LoadState"), "not-found", {"user_units"}),
        (("user_units", "llama-two.service", "UnitFileState"), "enabled", {"units_enabled"}),
        (("user_units",), None, {"user_units", "units_enabled"}),
        (("user_units", "llama-two.service"), {"LoadState": "loaded"}, {"units_enabled"}),
        (("boot_links",), None, {"units_enabled"}),
        (("boot_links",), ["llama-two.service"], {"units_enabled"}),
        (("builds", "upstream", "release", "commit"), "f" * 40, {"build_upstream"}),
        (("builds", "upstream", "release", "cmake_options", "GGML_NATIVE"), "ON", {"build_upstream"}),
        (("builds", "upstream", "release", "cmake_options", "GGML_CUDA"), "ON", {"build_upstream"}),
        (("builds", "upstream", "release", "cmake_options"), None, {"build_upstream"}),
        (("builds", "upstream", "release"), None, {"build_upstream"}),
        (("builds", "upstream", "current"), None, {"running_release"}),
        (("builds", "upstream", "current"), f"{RELEASE[:-1]}e", {"running_release"}),
        (("files", "small.gguf"), 76, {"model_small.gguf"}),
        (("files", "small.gguf"), None, {"model_small.gguf"}),
        (("disk", "free"), 999, {"disk_free"}),
        (("disk",), None, {"disk_free"}),
    ],
)
def test_each_fault_is_found_and_nothing_else(
    path: tuple[str | int, ...], value: object, names: set[str]
) -> None:
    data = copy.deepcopy(seen())
    place: Any = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    found = failing(data)
    assert set(found) == names
    assert all("fix" in check.detail or "look with" in check.detail for check in found.values())


def test_a_build_with_other_options_names_them() -> None:
    data = seen()
    data["builds"]["upstream"]["release"]["cmake_options"]["GGML_NATIVE"] = "ON"
    (check,) = failing(data).values()
    assert (check.value, check.limit) == (f"{COMMIT[:12]} GGML_NATIVE=ON", f"{COMMIT[:12]} GGML_NATIVE=OFF")


def test_a_disk_that_cannot_be_read_is_no_pass_for_lack_of_a_reserve() -> None:
    box = LlmBox.of({**VARIABLES, "gguf_models_reserve_bytes": 0})
    checks = verify_health.model_checks(box, {**seen(), "disk": None})
    assert [check.name for check in checks if not check.ok] == ["disk_free"]


@pytest.mark.parametrize("status", [None, {"active": None}, {"active": "else"}])
def test_no_check_is_absent_when_nothing_serves(status: object) -> None:
    wanted = [check.name for check in verify_health.llm_checks(BOX, seen(), GOOD)]
    nothing: dict[str, Any] = {
        **seen(), "account": None, "status": status, "list": None, "presets": None, "servers": [],
        "user_units": None, "boot_links": None, "builds": {}, "files": {}, "disk": None,
        "gateway_units": None, "gpu_guard": None, "ports": [],
        "server": {"health": None, "n_ctx": None, "error": ""},
    }  # fmt: skip
    checks = verify_health.llm_checks(BOX, nothing, Answers())
    assert [check.name for check in checks] == wanted
    assert not [check.name for check in checks if check.ok]


def test_a_box_without_a_card_needs_no_guard() -> None:
    box = LlmBox.of({**VARIABLES, "gpu_guard_enabled": False})
    names = [check.name for check in verify_health.llm_checks(box, {**seen(), "gpu_guard": None}, GOOD)]
    assert not any("guard" in name for name in names)


def test_two_servers_are_one_too_many_but_those_of_others_do_not_count() -> None:
    data = seen()
    data["servers"].append({**data["servers"][0], "pid": 8, "uid": 999})
    assert failing(data) == {}
    data["servers"].append({**data["servers"][0], "pid": 9})
    assert "7, 9" in failing(data)["llama_servers"].detail


def test_an_old_release_that_still_runs_is_found() -> None:
    data = seen()
    data["servers"][0]["exe"] = f"/opt/llama.cpp/upstream/releases/{'a' * 40}-1/bin/llama-server (deleted)"
    assert set(failing(data)) == {"running_release"}


@pytest.mark.parametrize(
    ("answers", "names"),
    [
        (Answers(503, None, "", "HTTPStatusError: 503"), {"gateway_health", "ready", "chat"}),
        (Answers(failure="ConnectError"), {"gateway_health", "ready", "chat"}),
        (Answers(200, 503, "", "HTTP 503: a preset is loading"), {"ready", "chat"}),
        (Answers(200, 200, " \n"), {"chat"}),
    ],
)
def test_answers_that_fall_short(answers: Answers, names: set[str]) -> None:
    assert set(failing(seen(), answers)) == names


def test_what_every_host_must_fulfil() -> None:
    def bad(units: list[str] | None, offset: float) -> set[str]:
        said = {"failed_units": units, "system": "Linux", "systemd": True}
        return {one.name for one in verify_health.host_checks(said, offset) if not one.ok}

    assert bad([], 0.2) == set()
    assert bad(["x.service"], 0.2) == {"failed_units"}
    assert bad([], -60) == {"clock_offset"}
    assert bad(None, 0) == {"failed_units"}, "systemctl that fails or hangs is no proof of health"


def test_a_mac_is_judged_by_what_it_has() -> None:
    said = {"failed_units": None, "system": "Darwin", "systemd": False}
    (clock,) = verify_health.host_checks(said, 9, client=True)
    assert clock.name == "clock_offset" and clock.detail.endswith("fix: sudo sntp -sS time.apple.com")
    box = verify_health.host_checks({**said, "system": "Linux"}, 0)
    assert [one.ok for one in box] == [False, True], "a box without systemd serves nothing"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (None, "is missing; fix: "),
        ({"rc": 1, "out": "", "err": "no module\nnamed x"}, "no module named x; fix: run playbooks/"),
        ({"rc": None, "out": "", "err": "timeout after 20 s"}, "timeout after 20 s"),
        ({"rc": 0, "out": "usage", "err": ""}, None),
    ],
)
def test_a_client_has_local_claude(answer: dict[str, Any] | None, said: str | None) -> None:
    (check,) = verify_health.client_checks(answer)
    assert check.ok == (said is None) and (said or "") in check.detail


def test_the_loaded_firewall_is_compared_whole() -> None:
    rules = "table inet llmbox {\n\tchain input {\n\t\ttcp dport 22 accept\n\t}\n}\n"
    assert verify_health.firewall_check({"wanted": rules, "loaded": rules}).ok
    opened = rules.replace("22 accept", "22 accept\n\t\ttcp dport 9999 accept")
    check = verify_health.firewall_check({"wanted": rules, "loaded": opened})
    assert not check.ok and check.value == 1 and "+ tcp dport 9999 accept" in check.detail
    emptied = verify_health.firewall_check({"wanted": rules, "loaded": ""})
    assert not emptied.ok and emptied.value == 5
    assert not verify_health.firewall_check(None).ok


def test_exit_codes_and_json() -> None:
    well = HostReport("a", (Check("x", True, 1, "B", 1),))
    short = HostReport("b", (Check("x", False, 1, "tokens", 2, "fix: y"),))
    gone = HostReport("c", error="no route")
    codes = [verify_health.exit_code(reports) for reports in ([well], [well, short], [short, gone])]
    assert codes == [0, 1, 2]
    data = json.loads(verify_health.as_json([short, gone]))
    assert data == {
        "ok": False,
        "hosts": [
            {"host": "b", "ok": False, "error": None, "checks": [
                {"name": "x", "ok": False, "value": 1, "unit": "tokens", "limit": 2, "detail": "fix: y"}]},
            {"host": "c", "ok": False, "error": "no route", "checks": []},
        ],
    }  # fmt: skip
    assert json.loads(verify_health.as_json([well]))["ok"] is True
    shown = verify_health.screen([well, short, gone]).splitlines()
    assert shown[-2:] == ["b: x = 1 tokens, wanted 2 tokens: fix: y", "c: could not be asked: no route"]


class FakeGateway(BaseHTTPRequestHandler):
    """As much of the gateway as the verification asks; it wants a key when it has one."""

    key = ""
    chats: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        shown = self.headers.get("Authorization", "")
        if self.path != "/health" and self.key and shown != f"Bearer {self.key}":
            self.reply({"error": {"message": "a key is needed"}}, 401)
        else:
            self.reply({"status": "ok"})

    def do_POST(self) -> None:
        self.chats.append(self.path)
        self.rfile.read(int(self.headers["Content-Length"]))
        self.reply({"choices": [{"message": {"content": "", "reasoning_content": "hello"}}]})

    def reply(self, body: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_args: object) -> None:
        """Quiet."""


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.delenv(_refusal.KEY_VARIABLE, raising=False)
    monkeypatch.setattr(FakeGateway, "chats", [])
    with ThreadingHTTPServer(("127.0.0.1", 0), FakeGateway) as http:
        threading.Thread(target=http.serve_forever, args=[0.01], daemon=True).start()
        yield f"http://127.0.0.1:{http.server_address[1]}"
        http.shutdown()


def test_a_gateway_is_asked_three_things(gateway: str) -> None:
    answers = verify_health.question(gateway)
    assert (answers.health, answers.ready, answers.text) == (200, 200, "hello")
    assert failing(seen(), answers) == {}


def test_a_chat_is_not_sent_where_nothing_serves(gateway: str) -> None:
    """It would start a preset: the verification changes nothing."""
    assert verify_health.question(gateway, chat=False).health == 200
    assert FakeGateway.chats == []


def test_a_gateway_that_wants_a_key(gateway: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeGateway, "key", "k-1")
    found = failing(seen(), verify_health.question(gateway))
    assert found.keys() == {"ready", "chat"}
    assert "HTTP 401: a key is needed; fix: LLMBOX_KEY=KEY" in found["ready"].detail
    monkeypatch.setenv(_refusal.KEY_VARIABLE, "k-1")
    assert failing(seen(), verify_health.question(gateway)) == {}


def test_a_gateway_that_is_not_there_is_an_answer() -> None:
    answers = verify_health.question("http://127.0.0.1:9")
    assert answers.health is None
    assert answers.failure.startswith("ConnectError")


@pytest.mark.parametrize(
    ("listen", "front", "url"),
    [
        (["0.0.0.0:1234"], "0.0.0.0", "http://192.0.2.1:1234"),
        (["127.0.0.1:1234", "100.64.0.10:1300"], "100.64.0.10", "http://100.64.0.10:1300"),
        (["[::]:1234"], "::", "http://192.0.2.1:1234"),
        (["127.0.0.1:1234", "[fd00::1]:1234"], "fd00::1", "http://[fd00::1]:1234"),
        (["127.0.0.1:1234"], "127.0.0.1", "http://127.0.0.1:1234"),
    ],
)
def test_where_other_machines_reach_the_gateway(listen: list[str], front: str, url: str) -> None:
    box = LlmBox.of({**VARIABLES, "llm_gateway_listen": listen})
    assert (box.front.host, box.url("192.0.2.1")) == (front, url)


def local(**variables: Any) -> Host:
    return Host("box", frozenset({"llm_servers"}), {**VARIABLES, "ansible_host": "192.0.2.1", **variables})


def test_ssh_uses_the_inventorys_own_arguments() -> None:
    host = local(
        ansible_user="ops", ansible_port=2222, ansible_ssh_private_key_file="/k/id",
        ansible_ssh_common_args="-F /dev/null -oUserKnownHostsFile=/k/known -o StrictHostKeyChecking=yes",
    )  # fmt: skip
    argv = host.ssh("true")
    assert argv[-3:] == ["192.0.2.1", "--", "true"]
    assert {"-p", "2222", "-l", "ops", "/k/id", "BatchMode=yes", "-oUserKnownHostsFile=/k/known"} <= set(argv)
    assert host.ssh_option("UserKnownHostsFile") == "/k/known"
    assert host.ssh_option("stricthostkeychecking") == "yes"
    assert host.ssh_option("ProxyJump") is None


def test_an_unreachable_host_is_an_entry_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def ssh(self: Host, command: str) -> list[str]:
        return ["sh", "-c", "echo 'ssh: connect to host 192.0.2.1 port 22: No route to host' >&2; exit 255"]

    monkeypatch.setattr(Host, "ssh", ssh)
    report = verify_health.verify(local())
    assert report.error == "ssh: connect to host 192.0.2.1 port 22: No route to host; try: ssh 192.0.2.1"
    assert verify_health.exit_code([report]) == 2


def test_refused_data_is_an_entry_with_one_line() -> None:
    report = verify_health.verify(local(llama_presets={"one": {"description": "x"}}))
    assert report.error is not None
    assert report.error.startswith("refused: ")
    assert "\n" not in report.error


def test_the_probe_runs_as_it_is_sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What goes over ssh, run here: it answers every part, also on a machine that has none of it."""
    user = pwd.getpwuid(os.getuid()).pw_name
    host = local(ansible_python_interpreter="python3", llm_user_name=user, gguf_models_dir=str(tmp_path))
    monkeypatch.setattr(Host, "ssh", lambda self, command: ["sh", "-c", command])
    (tmp_path / "small.gguf").write_bytes(b"x" * 77)
    request = LlmBox.of(host.variables).request()
    answer = _ask_host.ask(host, {"llm": request, "gpu": True}, become=False)
    assert answer["llm"].keys() == seen().keys()
    assert answer["llm"]["files"] == {"small.gguf": 77}
    assert answer["llm"]["builds"]["upstream"]["current"] is None
    assert answer["llm"]["account"]["uid"] == os.getuid()
    assert answer["llm"]["disk"]["free"] > 0


class SocketServer(socketserver.ThreadingUnixStreamServer):
    """A server on the path of a socket, which has no client's address to show."""

    def get_request(self) -> tuple[socket.socket, Any]:
        return super().get_request()[0], ("socket", 0)


class FakeServer(FakeGateway):
    """As much of llama-server as the probe asks."""

    props: ClassVar[Any] = {"default_generation_settings": {"n_ctx": 4096}}

    def do_GET(self) -> None:
        self.reply(self.props if self.path == "/props" else {"status": "ok"})


@pytest.mark.parametrize(
    ("props", "n_ctx", "error"),
    [
        (FakeServer.props, 4096, ""),
        ({}, None, "its answer is not llama-server's"),
        ([], None, "its answer is not llama-server's"),
    ],
)
def test_the_probe_asks_the_server_behind_its_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, props: Any, n_ctx: int | None, error: str
) -> None:
    monkeypatch.setattr(FakeServer, "props", props)
    path = str(tmp_path / "server.sock")
    assert _probe.server(path)["error"].startswith("FileNotFoundError")
    with SocketServer(path, FakeServer) as http:
        threading.Thread(target=http.serve_forever, args=[0.01], daemon=True).start()
        assert _probe.server(path) == {"health": 200, "n_ctx": n_ctx, "error": error}
        http.shutdown()


def test_the_probe_tells_who_holds_a_port() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as one,
        socket.create_server(("::1", 0), family=socket.AF_INET6) as two,
    ):
        ports = [one.getsockname()[1], two.getsockname()[1]]
        own = _probe.control_group(Path("/proc/self"))
        found = {entry["address"]: entry["groups"] for entry in _probe.holders(ports)}
        ours = {
            f"127.0.0.1:{ports[0]}",
            f"[::1]:{ports[1]}",
        }  # another may hold one in the other family
        assert ours <= found.keys() and all(own in found[address] for address in ours)
        assert all(int(address.rpartition(":")[2]) in ports for address in found)
        assert ours <= set(_probe.listeners(Path("/proc/self")))
    assert not ours & {entry["address"] for entry in _probe.holders(ports)}


def test_the_probe_never_waits_for_a_program_that_hangs() -> None:
    answer = _probe.command(["sleep", "30"], timeout=0.2)
    assert answer is not None and answer["rc"] is None
    assert _probe.command(["no-such-program"]) is None


@pytest.mark.parametrize("script", ["exit 1", "sleep 30"])
def test_systemctl_that_fails_or_hangs_is_said(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "systemctl"
    program.write_text(f"#!/bin/sh\nexec {script}\n" if "sleep" in script else f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(_probe.command, "__defaults__", (0.3,))
    assert _probe.failed_units() is None
    assert _probe.units(["a.service"], None) is None


def test_json_that_is_no_object_is_as_good_as_none(tmp_path: Path) -> None:
    for text in ("[]", "null", "3", "{"):
        (tmp_path / "x.json").write_text(text)
        assert _probe.read_json(str(tmp_path / "x.json")) is None
        assert _probe.parsed({"out": text}) is None
        release = tmp_path / "build" / "current"
        release.mkdir(parents=True, exist_ok=True)
        (release / "release.json").write_text(text)
        assert _probe.builds(str(tmp_path), ["build"])["build"]["release"] is None


def test_a_report_that_cannot_be_written_is_refused_before_the_checks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_health, "load", lambda *_args, **_more: pytest.fail("the checks began"))
    for report in (tmp_path, tmp_path / "nowhere" / "x.json"):
        assert verify_health.main(["--inventory", "inventory/lab", "--json", str(report)]) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert len(shown.err.splitlines()) == 1 and f"--json {report}: " in shown.err
    verify_health.ensure_writable(tmp_path / "new.json")
    assert not (tmp_path / "new.json").exists()


def test_hosts_are_read_from_what_the_playbook_prints() -> None:
    shown = {
        "a": {
            "groups": ["llm_servers"],
            "variables": {"ansible_host": "10.0.0.1", "llama_presets": {"z": 1, "b": 2}},
        },
        "b": {"groups": [], "variables": {}},
    }
    output = "".join(
        f"\nok: [{name}] => " + json.dumps({"msg": json.dumps(value)}, indent=4)
        for name, value in shown.items()
    )
    first, second = parse_hosts(output)
    assert (first.name, first.address) == ("a", "10.0.0.1")
    assert first.groups == {"llm_servers"}
    assert list(first.variables["llama_presets"]) == ["z", "b"], "the order of the data is kept"
    assert (second.name, second.address) == ("b", "b")


def test_an_inventory_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_health.main(["--inventory", "inventory/nowhere"]) == 2
    assert "inventory/nowhere: no such file" in capsys.readouterr().err


def test_refused_data_is_not_called_unreachable_and_names_the_command() -> None:
    line = f"refused: inventory: llama_lock: is missing; fix: run {LOCK_COMMAND}"
    (report,) = [HostReport("box", error=_command.typed(line, Path("inventory/x")))]
    text = verify_health.screen([report])
    assert report.verdict == "refused" and "unreachable" not in text and "could not be asked" not in text
    assert text.endswith("fix: run scripts/lock_models.py --inventory inventory/x")
