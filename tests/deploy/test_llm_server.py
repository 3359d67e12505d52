"""The LLM box is what its inventory says: user, releases, models, units, rights, and what listens."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from typing import Any

import pytest

from scripts._ask_host import bracketed, probe_source
from scripts._inventory import Host
from scripts._llm_box import GATEWAY_UNITS, GROUP, LlmBox

testinfra_hosts = [f"ansible://{GROUP}"]

Run = Callable[[str], Any]


@pytest.fixture(scope="module")
def seen(box: LlmBox, as_root: Run) -> dict[str, Any]:
    """What the box says of itself, in one command."""
    program = probe_source({"llm": box.request()})
    answer = as_root(f"python3 -c {shlex.quote(program)}")
    assert answer.rc == 0, answer.stderr
    data: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])["llm"]
    return data


@pytest.fixture(scope="module")
def units(box: LlmBox, as_root: Run) -> dict[str, dict[str, list[str]]]:
    """Each user unit as written: section lines by key."""
    folder = unit_folder(box)
    texts = {}
    for name in box.names("user"):
        text = output(as_root(f"cat {folder}/{box.unit(name)}"))
        keys: dict[str, list[str]] = {}
        for line in text.splitlines():
            key, sign, value = line.partition("=")
            if sign and not line.startswith("#"):
                keys.setdefault(key, []).append(value)
        texts[name] = keys
    return texts


def output(answer: Any) -> str:
    """What a command printed; it must have succeeded."""
    assert answer.rc == 0, f"{answer.command}: rc {answer.rc}: {answer.stderr}"
    text: str = answer.stdout
    return text


def unit_folder(box: LlmBox) -> str:
    return f"{box.home}/.config/systemd/user"


def test_the_user_and_its_groups(host: Any, box: LlmBox, wanted: Host) -> None:
    user = host.user(box.user)
    assert user.exists
    assert user.uid == wanted.variables["llm_user_uid"] >= 1000
    assert user.home == box.home
    assert set(wanted.variables["llm_user_groups"]) <= set(user.groups)
    assert not {"sudo", "root", "adm"} & set(user.groups)


def test_its_systemd_lives_without_a_login(seen: dict[str, Any], as_root: Run, box: LlmBox) -> None:
    assert seen["account"]["linger"]
    unit = f"user@{seen['account']['uid']}.service"
    assert output(as_root(f"systemctl is-active {unit}")).strip() == "active"


def test_each_build_is_the_pinned_release(box: LlmBox, seen: dict[str, Any], as_root: Run) -> None:
    for name, commit in box.commits().items():
        build = seen["builds"][name]
        assert build["current"].startswith(f"{box.builds_root}/{name}/releases/{commit}-")
        assert build["release"]["commit"] == commit
        assert as_root(f"test -L {box.builds_root}/{name}/current").rc == 0
        version = as_root(f"{build['current']}/bin/llama-server --version")
        assert version.rc == 0, version.stderr


def test_cmake_options_of_each_release_are_the_inventorys(box: LlmBox, seen: dict[str, Any]) -> None:
    for name, build in box.config.llama_cpp_builds.items():
        built = seen["builds"][name]["release"]["cmake_options"]
        for option, value in build.cmake_options.items():
            text = {True: "ON", False: "OFF"}[value] if isinstance(value, bool) else str(value)
            assert built[option] == text, f"{name}: {option}"


def test_models_are_whole_and_belong_to_the_user(
    box: LlmBox, seen: dict[str, Any], as_root: Run, wanted: Host
) -> None:
    assert seen["files"] == box.model_sizes()
    owner = wanted.variables["gguf_models_owner"]
    for name in box.model_sizes():
        path = shlex.quote(f"{box.models_dir}/{name}")
        assert output(as_root(f"stat -L --format=%U {path}")).strip() in (owner, "root")


def test_the_presets_on_the_box_are_the_inventorys(box: LlmBox, seen: dict[str, Any], host: Any) -> None:
    written = seen["presets"]["presets"]
    assert list(written) == box.names()
    for name, preset in box.config.llama_presets.items():
        data = preset.model_dump(mode="json", exclude={"listen"})
        assert {key: written[name].get(key) for key in data} == data
    file = host.file(box.presets_json)
    assert (file.user, file.mode & 0o022) == ("root", 0)


def test_lmswitch_knows_every_preset_and_alias(box: LlmBox, as_llm: Run) -> None:
    answer = as_llm("lmswitch list --json")
    assert answer.rc == 0, answer.stderr
    listed = {one["name"]: one["aliases"] for one in json.loads(answer.stdout)["presets"]}
    assert listed == {name: preset.aliases for name, preset in box.config.llama_presets.items()}


def test_each_preset_has_a_unit_that_excludes_all_others(
    box: LlmBox, units: dict[str, dict[str, list[str]]], wanted: Host
) -> None:
    foreign = set(wanted.variables["llama_presets_foreign_units"])
    names = box.names("user")
    for name, keys in units.items():
        others = {box.unit(other) for other in names if other != name}
        before = {box.unit(other) for other in names if other < name}
        assert set(" ".join(keys.get("Conflicts", [])).split()) == others | foreign
        assert before | foreign <= set(" ".join(keys.get("After", [])).split())
        binary = f"{box.builds_root}/{box.config.llama_presets[name].build}/current/bin/llama-server"
        assert binary in keys["ExecStart"][0]
        assert keys["Restart"] == ["on-failure"]


def test_units_are_known_to_systemd_and_do_not_start_at_boot(
    box: LlmBox, seen: dict[str, Any], as_root: Run
) -> None:
    for name in box.names("user"):
        unit = seen["user_units"][box.unit(name)]
        assert unit["LoadState"] == "loaded"
        assert unit["UnitFileState"] != "enabled"
    assert output(as_root(f"find {unit_folder(box)} -name 'llama-*' -type l")) == ""


def test_the_user_cannot_change_what_it_runs(box: LlmBox, as_root: Run, wanted: Host) -> None:
    places = [box.builds_root, wanted.variables["llmbox_path"] + "/", wanted.variables["llmbox_store"],
              box.presets_json, "/usr/local/bin/lmswitch", "/etc/sudoers.d",
              wanted.variables["llama_presets_dir"],
              *(f"/etc/systemd/user/{unit}" for unit in GATEWAY_UNITS)]  # fmt: skip
    paths = " ".join(shlex.quote(place) for place in places)
    # Root lists, so that a path that is missing is an error and a closed folder none; the user tries each.
    tries = shlex.quote('for path do test ! -w "$path" || echo "$path"; done')
    run = f"runuser -u {shlex.quote(box.user)} -- sh -c {tries} sh {{}} +"
    assert output(as_root(f"find {paths} -not -type l -exec {run}")) == ""


def test_sudo_allows_exactly_what_is_declared(
    box: LlmBox, wanted: Any, as_root: Run, as_llm: Run, host: Any
) -> None:
    allowed = [
        line.strip() for line in output(as_root(f"sudo -l -U {box.user}")).splitlines() if "NOPASSWD" in line
    ]
    declared = {"(root) NOPASSWD: /usr/bin/systemctl suspend"}
    if wanted.variables.get("dual_boot_enabled"):
        declared.add('(root) NOPASSWD: /usr/local/sbin/llmbox-bootwin ""')
    assert {*allowed} == declared
    assert as_llm("sudo -n -l /usr/bin/systemctl suspend").rc == 0
    for wider in (
        "/usr/bin/systemctl suspend --force",
        "/usr/bin/systemctl poweroff",
        "/bin/sh",
        "-u root /usr/bin/id",
    ):
        assert as_llm(f"sudo -n -l {wider}").rc != 0
    with host.sudo():
        assert host.file("/etc/sudoers.d/llmbox").mode == 0o440
    assert as_root("visudo -c").rc == 0


def test_one_preset_serves_where_the_inventory_says_and_no_other(box: LlmBox, seen: dict[str, Any]) -> None:
    status = seen["status"]
    running = [unit for unit, state in seen["user_units"].items() if state["ActiveState"] == "active"]
    own = [one for one in seen["servers"] if one["uid"] == seen["account"]["uid"]]
    if status["active"] is None:
        assert (running, own) == ([], [])
        pytest.skip("no preset is active on this box: lmswitch PRESET")
    assert running == [box.unit(status["active"])]
    assert len(own) == 1
    assert own[0]["listen"] == [], "a preset can be reached without the gateway"
    assert seen["server"]["health"] == 200, seen["server"]


def test_nobody_but_the_user_reaches_a_preset_s_socket(box: LlmBox, seen: dict[str, Any], host: Any) -> None:
    if seen["status"]["active"] is None:
        pytest.skip("no preset is active on this box: lmswitch PRESET")
    with host.sudo():
        socket = host.file(box.config.llama_presets_listen)
        assert (socket.is_socket, socket.user, socket.mode & 0o077) == (True, box.user, 0)


def test_the_gateway_runs_and_starts_at_boot(seen: dict[str, Any]) -> None:
    states = {
        name: (unit["ActiveState"], unit["UnitFileState"]) for name, unit in seen["gateway_units"].items()
    }
    assert states == dict.fromkeys(GATEWAY_UNITS, ("active", "enabled"))


def test_the_port_is_the_gateway_s(box: LlmBox, seen: dict[str, Any]) -> None:
    held = {one["address"]: one["groups"] for one in seen["ports"]}
    assert held.keys() == {f"{bracketed(front.host)}:{front.port}" for front in box.fronts}
    for groups in held.values():
        assert {group.rpartition("/")[2] for group in groups} == {"init.scope", "llm-gateway.service"}
        assert all(f"user@{seen['account']['uid']}.service" in group for group in groups)


def test_keys_are_root_s_and_nobody_else_s_to_read(
    host: Any, box: LlmBox, as_root: Run, wanted: Host
) -> None:
    folder = wanted.variables["llama_presets_dir"]
    assert output(as_root(f"stat --format='%U %G %a' {folder}/keys.json")).split() == [
        "root",
        box.user,
        "640",
    ]
    assert output(as_root(f"stat --format='%U %G %a' {folder}/gateway.json")).split() == [
        "root",
        "root",
        "644",
    ]


def test_the_running_server_is_the_pinned_release(box: LlmBox, seen: dict[str, Any]) -> None:
    active = seen["status"]["active"]
    if active is None:
        pytest.skip("no preset is active on this box: lmswitch PRESET")
    commit = box.config.commit(box.config.llama_presets[active].build)
    assert seen["status"]["commit"] == commit
    assert [f"/releases/{commit}-" in one["exe"] for one in seen["servers"]] == [True]
