"""lmswitch and the preset units on a real host: failure and the way back, locks, sleep, drop-ins, roles."""

from __future__ import annotations

import base64
import json
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests import support

Host = Callable[..., support.Run]
SWITCH_LIMIT_S = 90
FAILURES, FAILURE_BAR_S = 3, 3.0
REASON = "error: this preset cannot load"
USER_SYSTEMCTL = "sudo -u llm XDG_RUNTIME_DIR=/run/user/$(id -u llm) systemctl --user"
PLAYBOOK = "playbooks/llm_server.yml"


def play_of(folder: Path, *roles: str) -> Path:
    """A playbook in which all roles of the box stand, and of which `roles` run."""
    (play,) = (play for play in yaml.safe_load((support.ROOT / PLAYBOOK).read_text()) if "roles" in play)
    play["roles"] = [{"role": name, "when": name in roles} for name in play["roles"]]
    del play["post_tasks"]  # which record what all roles deployed
    file = folder / "play.yml"
    file.write_text(yaml.safe_dump([play]))
    return file


class Box:
    """lab-llm as these tests use it."""

    def __init__(self, on_host: Host, hostvars: dict[str, Any]) -> None:
        self.on_host = on_host
        self.presets: dict[str, Any] = hostvars["llama_presets"]
        self.hostvars = hostvars
        self.wanted = support.expected()
        self.units = f"{self.wanted.home}/.config/systemd/user"
        self.first, self.second, *_ = self.presets

    def run(self, command: str, *, timeout: float = SWITCH_LIMIT_S, stdin: str = "") -> support.Run:
        """A shell command as the sudo user."""
        return self.on_host(support.LLM, command, timeout=timeout, stdin=stdin)

    def lmswitch(self, *words: str) -> support.Run:
        """lmswitch as the LLM user."""
        return self.run(f"sudo -u llm lmswitch {shlex.join(words)}")

    def status(self) -> dict[str, Any]:
        """`lmswitch status --json`."""
        answer: dict[str, Any] = json.loads(self.lmswitch("status", "--json").check().stdout)
        return answer

    def write_drop_in(self, preset: str, text: str) -> str:
        """Write a drop-in as the LLM user and reload. Returns its path."""
        folder = f"{self.units}/llama-{preset}.service.d"
        path = f"{folder}/50-test.conf"
        encoded = base64.b64encode(text.encode()).decode()
        self.run(
            f"sudo -u llm mkdir -p {folder} && echo {encoded} | base64 -d | sudo -u llm tee {path} >/dev/null"
            f" && {USER_SYSTEMCTL} daemon-reload"
        ).check()
        return path

    def remove_drop_in(self, preset: str) -> None:
        """Remove it again."""
        self.run(f"sudo rm -rf {self.units}/llama-{preset}.service.d; {USER_SYSTEMCTL} daemon-reload").check()

    def complete(self) -> str:
        """A real completion through the port that clients use."""
        reply = httpx.post(
            f"{self.wanted.url(self.hostvars['ansible_host'])}/completion",
            json={"prompt": "The capital of France is", "n_predict": 8, "temperature": 0.0},
            timeout=60,
            trust_env=False,
        )
        reply.raise_for_status()
        answer: str = reply.json()["content"]
        return answer

    def timeline(self, command: str) -> tuple[int, list[tuple[float, str]]]:
        """Run a command on the host; each line of its output with its second, measured there."""
        script = (
            "import json,subprocess,sys,time\n"
            "t=time.monotonic(); p=subprocess.Popen(sys.argv[1],shell=True,text=True,"
            "stdout=subprocess.PIPE,stderr=subprocess.STDOUT)\n"
            "lines=[(round(time.monotonic()-t,2),l.rstrip()) for l in p.stdout]\n"
            "print(json.dumps([p.wait(),lines]))\n"
        )
        done = self.run(f"python3 - {shlex.quote(command)}", stdin=script).check()
        code, lines = json.loads(done.stdout)
        return code, [(moment, line) for moment, line in lines]

    def play(self, folder: Path, presets: dict[str, Any], *roles: str) -> support.PlaybookRun:
        """Roles (default: those without downloads and builds) with these presets for the inventory's."""
        variables = json.dumps({"llama_presets": presets})
        playbook = play_of(folder, *(roles or ("llm_user", "llmbox", "llama_presets", "llm_gateway")))
        return support.ansible_playbook(playbook, "--limit", support.LLM, "-e", variables, timeout=300)


@pytest.fixture
def box(on_host: Host, lab_hostvars: dict[str, dict[str, Any]]) -> Box:
    """The LLM box."""
    return Box(on_host, lab_hostvars[support.LLM])


@pytest.fixture
def broken(box: Box) -> Iterator[str]:
    """A preset whose command dies 1 s after exec, while the first preset serves."""
    box.write_drop_in(
        box.second,
        f"[Service]\nExecStart=\nExecStart=/bin/sh -c 'sleep 1; echo \"{REASON}\" >&2; exit 7'\n",
    )
    box.lmswitch(box.first).check()
    yield box.second
    box.remove_drop_in(box.second)
    box.lmswitch(box.first).check()


def test_failing_preset_is_reported_and_the_former_serves_again(box: Box, broken: str) -> None:
    reasons: list[float] = []
    for _ in range(FAILURES):
        code, lines = box.timeline(f"sudo -u llm lmswitch {broken}")
        text = "\n".join(f"{moment:5.2f} {line}" for moment, line in lines)
        print(text)
        assert code == 1, text
        told = next(moment for moment, line in lines if REASON in line)
        back = next(moment for moment, line in lines if "going back" in line)
        reasons.append(told)
        assert told < 10 and told <= back, text
        assert "exited with status 7" in text and f"{box.first} serves again" in lines[-1][1]
    what = "reason of a failing preset, 1 s of it the preset's own"
    print(support.keep_figures("failing-preset", what, reasons, FAILURE_BAR_S))
    assert box.status()["active"] == box.first
    assert box.complete()


def test_failing_preset_as_json(box: Box, broken: str) -> None:
    done = box.lmswitch(broken, "--json")
    answer = json.loads(done.stdout)
    assert done.rc == 1 and answer["ok"] is False and answer["serving"] == box.first
    assert REASON in answer["reason"]


def test_a_preset_that_never_answers_is_told_with_the_fix(box: Box) -> None:
    """Its process is well, so the wait's own line is the only one that says what is wrong."""
    box.lmswitch(box.first).check()
    (wait,) = (
        box.run(f"grep ^ExecStartPost= {box.units}/llama-{box.second}.service").check().stdout.splitlines()
    )
    short = re.sub(r"(--timeout\W+)\d+", r"\g<1>2", wait)
    assert short != wait
    box.write_drop_in(
        box.second, f"[Service]\nExecStart=\nExecStart=/bin/sleep 60\nExecStartPost=\n{short}\n"
    )
    try:
        done = box.lmswitch(box.second)
        answer = json.loads(box.lmswitch(box.second, "--json").stdout)
    finally:
        box.remove_drop_in(box.second)
    assert done.rc == 1 and "it did not become ready" in done.stderr, done.tail()
    assert "not ready after 2 s: no answer from /health" in done.stderr, done.tail()
    assert "raise start_timeout" in done.stderr
    assert any("not ready after 2 s" in line for line in answer["reason"]), answer
    assert box.status()["active"] == box.first


def test_a_failed_preset_does_not_restart_later(box: Box, broken: str) -> None:
    box.lmswitch("off").check()
    assert "nothing serves now" in box.lmswitch(broken).stderr
    time.sleep(7)
    assert box.status()["state"] == "stopped"


def test_ten_switches_in_a_row_are_never_refused(
    box: Box, record_testsuite_property: Callable[[str, object], None]
) -> None:
    """Ten to and fro, then ten starts of one unit: more of each unit than its start limit grants."""
    done = box.run(f"{USER_SYSTEMCTL} show -p StartLimitBurst llama-{box.first}.service").check()
    assert int(done.stdout.strip().partition("=")[2]) < 10
    box.lmswitch("off").check()
    series = [f"lmswitch {name}" for name in [box.first, box.second] * 5]
    repeated = [f"lmswitch --restart {box.first}"] * 10
    seconds = []
    for commands in (series, repeated):
        done = box.run("set -e; " + "; ".join(f"sudo -u llm {each}" for each in commands), timeout=300)
        assert done.rc == 0, done.tail()
        seconds.append(done.seconds)
    record_testsuite_property("ten_switches_s", round(seconds[0], 1))
    print(f"ten switches: {seconds[0]:.1f} s; ten restarts: {seconds[1]:.1f} s")


def test_the_ready_preset_is_left_alone(box: Box) -> None:
    box.lmswitch(box.first).check()
    before = box.status()
    assert "already" in box.lmswitch(box.first).check().stdout
    assert box.status()["since"] == before["since"]


HOLD_THE_LOCK = """
import os, pathlib, time
from llmbox.lock import held
flag = pathlib.Path("/tmp/switch-lock")
with held(pathlib.Path(os.environ["XDG_RUNTIME_DIR"]), "another"):
    flag.touch()
    while flag.exists():
        time.sleep(0.05)
"""


def test_two_at_once(box: Box) -> None:
    """While one switch holds the lock, which is all that the other one sees of it."""
    before = box.status()["active"]
    done = box.run(
        "hold() { sudo -u llm XDG_RUNTIME_DIR=/run/user/$(id -u llm) /opt/llmbox/bin/python -I -c "
        f"{shlex.quote(HOLD_THE_LOCK)}; }}; hold & "
        "until test -e /tmp/switch-lock; do sleep 0.05; done; "
        f"sudo -u llm lmswitch {box.second}; echo rc=$?; sudo rm /tmp/switch-lock; wait"
    )
    assert "rc=3" in done.stdout, done.tail()
    assert "another switch is under way (lmswitch another, pid" in done.stderr
    assert box.status()["active"] == before


def test_ctrl_c_in_mid_switch_goes_back(box: Box) -> None:
    box.lmswitch(box.first).check()
    box.write_drop_in(box.second, "[Service]\nExecStart=\nExecStart=/bin/sleep 60\n")
    try:
        done = box.run(
            f"sudo -u llm sh -c 'lmswitch {box.second} & "
            'until pgrep -x -f "/bin/sleep 60" >/dev/null || ! kill -0 $!; do sleep 0.1; done; '
            "kill -TERM $!; wait $!; echo rc=$?'"
        )
    finally:
        box.remove_drop_in(box.second)
    assert "rc=1" in done.stdout and "given up" in done.stderr, done.tail()
    assert box.status()["active"] == box.first and box.status()["state"] == "ready"


def test_status_list_logs_off(box: Box) -> None:
    alias = box.presets[box.first]["aliases"][0]
    box.lmswitch(alias).check()
    status = box.status()
    assert set(status) == {"active", "state", "since", "build", "commit", "in_flight", "queued"}
    assert (status["active"], status["state"]) == (box.first, "ready")
    assert status["build"] == box.presets[box.first]["build"] and len(status["commit"]) == 40
    screen = box.lmswitch("status").check().stdout
    assert len(screen.splitlines()) <= 24 and status["commit"][:12] in screen
    rows = json.loads(box.lmswitch("list", "--json").check().stdout)["presets"]
    assert {row["name"]: row["state"] == "ready" for row in rows} == {
        name: name == box.first for name in box.presets
    }
    assert all(name in box.lmswitch("list").stdout for name in box.presets)
    assert len(box.lmswitch("logs", "-n", "3").check().stdout.splitlines()) == 3
    assert (
        json.loads(box.lmswitch("logs", box.first, "-n", "2", "--json").check().stdout)["preset"] == box.first
    )
    assert box.lmswitch("nonsense").rc == 2
    assert json.loads(box.lmswitch("off", "--json").check().stdout)["serving"] is None
    assert box.status()["active"] is None
    box.lmswitch(box.first).check()


def test_over_ssh_without_a_login_shell(box: Box) -> None:
    """The real thing, with the key that the role put there: ssh llm@HOST lmswitch status."""
    done = subprocess.run(
        [
            "ssh",
            *shlex.split(box.hostvars["ansible_ssh_common_args"]),
            *("-o", "ControlPath=none", "-i", box.hostvars["ansible_ssh_private_key_file"]),
            f"llm@{box.hostvars['ansible_host']}",
            "lmswitch status --json",
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["state"] in {"ready", "stopped"}


@pytest.mark.long
def test_keys_are_a_block_beside_the_user_s_own(box: Box, tmp_path: Path) -> None:
    own = "ssh-ed25519 AAAAOWN own"
    keys = f"{box.wanted.home}/.ssh/authorized_keys"
    kept = box.run(f"sudo cat {keys}").check().stdout

    def play(*words: str, listed: list[str]) -> support.PlaybookRun:
        variables = json.dumps({"llm_user_authorized_keys": listed})
        return support.ansible_playbook(
            play_of(tmp_path, "llm_user"), "--limit", support.LLM, "-e", variables, *words, timeout=120
        )

    ours = box.hostvars["lab_ssh_public_key"]
    try:
        box.run(f"echo {shlex.quote(own)} | sudo -u llm tee -a {keys}").check()
        assert play(listed=[ours, "ssh-rsa AAAAB new"]).check().changed == 1
        assert play("--check", listed=[ours, "ssh-rsa AAAAB new"]).check().changed == 0
        assert play(listed=[ours]).check().changed == 1
        lines = box.run(f"sudo cat {keys}").check().stdout.splitlines()
        assert [line for line in lines if not line.startswith("#")] == [ours, own]
        assert box.run(f"sudo stat -c '%U %a' {keys} {box.wanted.home}/.ssh").stdout.split() == [
            *("llm", "600"),
            *("llm", "700"),
        ]

        box.run(f"sudo chmod 0640 {keys}").check()
        dry = play("--check", "--diff", listed=[]).check()
        assert dry.changed == 1 and f"-{ours}" in dry.stdout
        assert play(listed=[]).check().changed == 1  # the last key too is taken back
        assert box.run(f"sudo cat {keys}").check().stdout == f"{own}\n"
        assert box.run(f"sudo stat -c '%a' {keys}").stdout.split() == ["640"]  # the rest is the user's own
        assert play(listed=[]).check().changed == 0
    finally:
        box.run(f"sudo -u llm tee {keys}; sudo chmod 0600 {keys}", stdin=kept).check()


def test_no_keys_for_a_user_that_is_not_there_yet(box: Box, tmp_path: Path) -> None:
    playbook = play_of(tmp_path, "llm_user")
    variables = {"llm_user_name": "later", "llm_user_uid": 1999, "llm_user_authorized_keys": []}
    words = ("--check", "--diff", "-e", json.dumps(variables))
    dry = support.ansible_playbook(playbook, "--limit", support.LLM, *words, timeout=120).check()
    assert "authorized_keys" not in dry.stdout


def test_another_user_is_told_what_to_type(box: Box) -> None:
    done = box.run("lmswitch status")
    assert done.rc == 2 and "sudo -u llm lmswitch status" in done.stderr


def test_sudo_allows_suspend_and_nothing_wider(box: Box) -> None:
    listed = box.run("sudo -u llm sudo -n -l").check().stdout
    rules = [
        line.strip() for line in listed.partition("may run the following")[2].splitlines()[1:] if line.strip()
    ]
    assert rules == ["(root) NOPASSWD: /usr/bin/systemctl suspend"]
    allowed = "sudo -u llm sudo -n -l /usr/bin/systemctl"
    assert box.run(f"{allowed} suspend").rc == 0
    for words in ("suspend --force", "suspend -i", "poweroff", "", "hibernate", "suspend suspend"):
        assert box.run(f"{allowed} {words}").rc != 0, words


def test_sleep_that_is_refused_brings_the_preset_back(box: Box) -> None:
    """A lab host cannot suspend, so this is the refusal; the machine below must never be asked."""
    can = box.run(
        "busctl call org.freedesktop.login1 /org/freedesktop/login1 org.freedesktop.login1.Manager CanSuspend"
    )
    if '"na"' not in can.stdout:
        pytest.skip(f"this host may really suspend: {can.stdout.strip()}")
    box.lmswitch(box.first).check()
    done = box.lmswitch("sleep")
    assert done.rc == 1 and f"{box.first} serves again" in done.stderr
    assert box.complete()


def test_units_are_not_started_at_boot(box: Box) -> None:
    for name in box.presets:
        assert box.run(f"{USER_SYSTEMCTL} is-enabled llama-{name}.service").stdout.strip() == "static"


def test_the_user_s_journal_shows_the_unit(box: Box) -> None:
    box.lmswitch(box.first).check()
    done = box.run(
        "sudo -u llm XDG_RUNTIME_DIR=/run/user/$(id -u llm) "
        f"journalctl --user --unit=llama-{box.first}.service --lines=5 --output=cat"
    ).check()
    assert len(done.stdout.splitlines()) == 5


def test_the_environment_is_root_s(box: Box) -> None:
    done = box.run("sudo -u llm find -L /opt/llmbox /etc/llmbox -writable ! -path '*/bin/python*' | head -5")
    assert done.stdout == ""


# What each line of the sandbox forbids: an act that works in a bare unit and not with the line.
PROBES = {
    "NoNewPrivileges=yes": "sudo -n -l",
    "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6": (
        "python3 -c 'import socket; socket.socket(socket.AF_NETLINK, 3, 0)'"
    ),
    "RestrictSUIDSGID=yes": "f=$(mktemp) && chmod u+s $f",
    "LockPersonality=yes": "setarch --addr-no-randomize true",
    "UMask=0077": "f=$(mktemp -u) && touch $f && test $(stat -c %a $f) = 644",
    "LimitCORE=0": "test $(prlimit --core --noheadings --output=SOFT) != 0",
    "OOMScoreAdjust=500": "test $(cat /proc/self/oom_score_adj) -lt 500",
}
NOT_SANDBOX = {
    *("Type", "ExecStart", "ExecStartPre", "ExecStartPost", "TimeoutStartSec", "KillSignal", "SendSIGKILL"),
    *("TimeoutStopSec", "Restart", "RestartSec", "OOMPolicy", "RuntimeDirectory"),
}


def test_every_line_of_the_sandbox_has_a_probe(box: Box) -> None:
    text = box.run(f"sudo cat {box.units}/llama-{box.first}.service").check().stdout
    service = text.partition("[Service]\n")[2]
    lines = {line for line in service.splitlines() if "=" in line and not line.startswith("#")}
    assert {line for line in lines if line.partition("=")[0] not in NOT_SANDBOX} == set(PROBES)


@pytest.mark.parametrize("line", PROBES)
def test_a_line_of_the_sandbox_forbids_what_it_says(box: Box, line: str) -> None:
    def act(*properties: str) -> int:
        return box.run(
            "sudo -u llm XDG_RUNTIME_DIR=/run/user/$(id -u llm) systemd-run --user --quiet --wait --collect "
            f"{shlex.join(properties)} sh -c {shlex.quote(PROBES[line].replace('$', '$$'))}"
        ).rc

    extra = () if line.startswith("LimitCORE") else ("--property=UMask=0022",)
    assert act("--property=LimitCORE=infinity", *extra) == 0, (
        "the act fails even without the line: it proves nothing"
    )
    assert act(f"--property={line}") != 0, f"{line} has no effect here"


@pytest.fixture(scope="module")
def converged(lab_hostvars: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> None:
    """The host is as the roles of this very tree leave it."""
    box = Box(support.on_host, lab_hostvars[support.LLM])
    box.play(tmp_path_factory.mktemp("play"), box.presets).check()


def test_roles_change_nothing_twice_and_keep_drop_ins(box: Box, converged: None, tmp_path: Path) -> None:
    path = box.write_drop_in(box.second, "[Service]\nNice=3\n")
    try:
        done = box.play(tmp_path, box.presets).check()
        print(f"four roles, nothing to do: {done.seconds:.1f} s")
        assert done.changed == 0, done.tail()
        assert "Nice=3" in box.run(f"sudo cat {path}").check().stdout
        assert "Nice=3" in box.run(f"{USER_SYSTEMCTL} show --property=Nice llama-{box.second}.service").stdout
    finally:
        box.remove_drop_in(box.second)


def test_one_more_preset_one_changed_one_removed(box: Box, converged: None, tmp_path: Path) -> None:
    """One entry: its unit, the others' Conflicts=, lmswitch list; the active one restarts when it changed."""
    box.lmswitch(box.first).check()
    before = box.status()["since"]
    more = {
        **box.presets,
        "extra": {**box.presets[box.second], "aliases": ["x"], "description": "One 100% more"},
    }
    try:
        # The units, and the gateway, which has to know them.
        assert box.play(tmp_path, more, "llama_presets", "llm_gateway").check().changed == 2
        assert box.status()["since"] == before, (
            "the active preset was restarted though its command is the same"
        )
        shown = box.run(f"{USER_SYSTEMCTL} show --property=Conflicts llama-{box.first}.service").stdout
        assert "llama-extra.service" in shown
        assert "extra" in box.lmswitch("list").stdout
        assert json.loads(box.lmswitch("x", "--json").check().stdout)["serving"] == "extra"
        assert "100% more" in box.lmswitch("status").stdout

        changed = {**more, "extra": {**more["extra"], "threads": 1}}
        assert box.play(tmp_path, changed, "llama_presets", "llm_gateway").check().changed == 3
        assert box.status()["active"] == "extra"
        command = box.run("sudo cat /proc/$(pgrep -x llama-server)/cmdline").stdout.replace("\0", " ")
        assert "--threads 1" in command
    finally:
        done = box.play(tmp_path, box.presets, "llama_presets", "llm_gateway").check()
    assert done.changed == 2
    assert box.status()["active"] is None, "a preset that is no longer in the data still runs"
    assert "extra" not in box.lmswitch("list").stdout
    assert box.run(f"sudo test -e {box.units}/llama-extra.service").rc == 1
    box.lmswitch(box.first).check()


def test_a_damaged_environment_is_replaced(box: Box, converged: None, tmp_path: Path) -> None:
    box.run(
        "echo '# changed' | sudo tee -a /opt/llmbox/lib/python3*/site-packages/llmbox/cli.py >/dev/null"
    ).check()
    damaged = box.run("readlink -f /opt/llmbox").stdout
    assert box.play(tmp_path, box.presets, "llmbox").check().changed == 1
    assert box.run("readlink -f /opt/llmbox").stdout != damaged
    assert box.lmswitch("status").rc == 0
