"""llmbox-drift: each kind of hand-made drift is named with what was expected and found; nothing else is."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from llmbox import trial
from llmbox.drift import cli, compare, host, models

from scripts import _ask_host, verify_health
from tests.support import ROOT, run

PASS, RAISE, NO_TEXT = b"pass\n", b"raise\n", b"\xff"
KEYS = b'{"keys": ["a"]}'
SETTINGS = "[Service]\nRestart=always\nUMask=0077\n"
MODEL = bytes(range(256)) * 16
DAY = 20_000


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write(path: Path, content: str | bytes, mode: int = 0o644) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(mode)
    return path


class Box:
    """A folder that stands for a box on which everything that a role may name was deployed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.state = folder, folder / "state"
        self.unit = write(folder / "units/llama-coder.service", SETTINGS)
        self.secret = write(folder / "etc/keys.json", KEYS, 0o640)
        self.keys = write(folder / "authorized_keys", "ssh-rsa BBBB own\nssh-ed25519 AAAA ann\n")
        self.command = folder / "bin/lmswitch"
        self.command.parent.mkdir()
        self.command.symlink_to("/opt/llmbox/bin/lmswitch")
        self.environment = self.make_environment()
        self.build = folder / "llama.cpp/upstream"
        self.release = self.make_release("one")
        (self.build / "current").symlink_to("releases/one")
        self.model = self.make_model()
        self.states = {
            "": {"llmbox-drift-full.timer": {"UnitFileState": "enabled", "ActiveState": "active"}},
            "llm": {"llm-gateway.socket": {"UnitFileState": "enabled", "ActiveState": "active"}},
        }
        self.groups = {"llm": {"llm", "video"}}
        self.held = {"linux-image-generic", "nvidia-driver-580"}
        self.table = "table inet llmbox {\n\tchain input {\n\t\ttcp dport 22 accept\n\t}\n}\n"
        self.deployed: dict[str, Any] = {
            "files": [str(self.unit), str(self.secret), str(self.command)],
            "environments": [str(self.environment)],
            "builds": [str(self.build)],
            "models": [
                {
                    "directory": str(self.model.parent),
                    "owner": "root",
                    "files": [
                        {
                            "url": "https://me:secret@x/y",
                            "file": self.model.name,
                            "size": len(MODEL),
                            "sha256": sha256(MODEL),
                        }
                    ],
                }
            ],
            "units": [
                {"unit": "llama-coder.service", "user": "llm"},
                {"unit": "llm-gateway.socket", "user": "llm", "enabled": True, "active": True},
                {"unit": "llmbox-drift-full.timer", "enabled": True, "active": True},
                {"unit": "llmbox-drift@.service"},
            ],
            "members": [{"user": "llm", "groups": ["video"]}],
            "lines": [{"path": str(self.keys), "lines": ["ssh-ed25519 AAAA ann"]}],
            "held_packages": ["nvidia-driver-580"],
            "kernel_parameters": Path("/proc/cmdline").read_text().split()[:1],
            "tables": ["inet llmbox"],
        }

    def make_environment(self) -> Path:
        """An environment with its list, as roles/llmbox leaves it."""
        venv = self.folder / "venvs/3.11-abc"
        source = write(venv / "lib/switch.py", "pass\n")
        (venv / "python").symlink_to("/usr/bin/python3")
        listing = {
            ".": f"{venv.lstat().st_mode:o} ",
            "lib": f"{source.parent.lstat().st_mode:o} ",
            "lib/switch.py": f"100644 {sha256(source.read_bytes())}",
            "python": f"{(venv / 'python').lstat().st_mode:o} /usr/bin/python3",
        }
        write(self.folder / "venvs/3.11-abc.json", json.dumps(listing))
        link = self.folder / "llmbox"
        link.symlink_to(venv)
        return link

    def make_release(self, name: str) -> Path:
        """A release with its stamp, as roles/llama_cpp leaves it."""
        release = self.build / "releases" / name
        server = write(release / "bin/llama-server", b"\x7fELF server", 0o755)
        (release / "bin/libllama.so").symlink_to("libllama.so.0")
        for folder in (release, release / "bin"):
            folder.chmod(0o755)
        files = {
            "bin/llama-server": {"size": 11, "sha256": sha256(server.read_bytes())},
            "bin/libllama.so": {"link": "libllama.so.0"},
        }
        write(release / "release.json", json.dumps({"files": files, "targets": ["llama-server"]}))
        return release

    def make_model(self) -> Path:
        """A model with its stamp, as roles/gguf_models leaves it."""
        model = write(self.folder / "models/small.gguf", MODEL)
        self.stamp(model)
        return model

    def stamp(self, model: Path, content: bytes = MODEL) -> None:
        """The content was verified as it is now, so it is told."""
        info = model.stat()
        stamp = {
            "sha256": sha256(content),
            "size": info.st_size,
            "mtime_ns": info.st_mtime_ns,
            "ctime_ns": info.st_ctime_ns,
            "inode": info.st_ino,
        }
        write(model.with_name(f".{model.name}.sha256"), json.dumps(stamp))

    def systemctl(self, user: str, *arguments: str) -> str:
        if any("@." in argument for argument in arguments):
            return ""  # "neither a valid invocation ID nor unit name", and not a word of the others
        blocks = [
            "\n".join(f"{key}={value}" for key, value in {"Id": unit, **state}.items())
            for unit, state in self.states[user].items()
            if unit in arguments
        ]
        return "\n\n".join(blocks)

    def nft(self, argv: list[str], *_: object, **__: object) -> subprocess.CompletedProcess[str]:
        assert argv == ["nft", "--stateless", "list", "table", "inet", "llmbox"]
        return subprocess.CompletedProcess(argv, 0 if self.table else 1, self.table, "")

    def record(self, *, dry_run: bool = False) -> bool:
        """Whether there was something to record."""
        changed: bool = cli.record(self.deployed, self.state, dry_run=dry_run)["changed"]
        return changed

    def check(self, *, full: bool = False) -> dict[str, Any]:
        """The report; what was learned of the models is kept."""
        report, blocks = cli.check(self.state, full=full, day=DAY)
        cli.write_json(self.state / cli.BLOCKS, blocks)
        return report

    def found(self, *, full: bool = False) -> list[tuple[str, str, str]]:
        """Path (below the box's folder), expected, found of each difference."""
        differences = [compare.Difference(**each) for each in self.check(full=full)["drift"]]
        return [
            (each.path.removeprefix(f"{self.folder}/"), each.expected, each.found) for each in differences
        ]


@pytest.fixture
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Box:
    made = Box(tmp_path)
    monkeypatch.setattr(host, "user_name", lambda uid: "root" if uid == os.geteuid() else str(uid))
    monkeypatch.setattr(host, "unit_folders", lambda user: [str(made.unit.parent)] if user else [])
    monkeypatch.setattr(host, "systemctl", made.systemctl)
    monkeypatch.setattr(host, "ask", made.nft)
    monkeypatch.setattr(host, "groups_of", lambda _users: made.groups)
    monkeypatch.setattr(host, "held_packages", lambda: made.held)
    monkeypatch.setattr(models, "BLOCK_BYTES", 512)
    monkeypatch.setattr(models, "CHUNK_BYTES", 128)
    assert made.record()
    return made


def test_a_box_as_deployed_has_no_difference(box: Box) -> None:
    for full in (False, True, False):
        report = box.check(full=full)
        assert (report["ok"], report["drift"], report["overrides"]) == (True, [], [])
    assert not box.record()


def flip(path: Path, at: int = 700) -> None:
    """Change one byte."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def relink(path: Path, target: str) -> None:
    """Let a link lead elsewhere."""
    path.unlink()
    path.symlink_to(target)


def drop_in(box: Box, text: str = "[Service]\nNice=3\n") -> Path:
    return write(box.unit.parent / "llama-coder.service.d/50-own.conf", text)


SERVER = b"\x7fELF server"
DRIFTS: dict[str, tuple[Callable[[Box], object], tuple[str, str, str]]] = {
    "a unit is edited": (
        lambda box: box.unit.write_text(SETTINGS.replace("always", "no")),
        ("units/llama-coder.service", "line 2 'Restart=always'", "line 2 'Restart=no'"),
    ),
    "a line is added to a unit": (
        lambda box: box.unit.write_text(SETTINGS + "LimitCORE=1\n"),
        ("units/llama-coder.service", "the end of the file", "line 4 'LimitCORE=1'"),
    ),
    "the last line break of a unit": (
        lambda box: box.unit.write_text(SETTINGS.rstrip("\n")),
        ("units/llama-coder.service", "36 characters", "the same lines in 35 characters"),
    ),
    "a unit that is no text any more": (
        lambda box: box.unit.write_bytes(NO_TEXT),
        ("units/llama-coder.service", f"sha256 {sha256(SETTINGS.encode())}", f"sha256 {sha256(NO_TEXT)}"),
    ),
    "a unit is removed": (
        lambda box: box.unit.unlink(),
        ("units/llama-coder.service", "a file", "nothing"),
    ),
    "a unit is masked": (
        lambda box: relink(box.unit, "/dev/null"),
        ("units/llama-coder.service", "a file", "a link to /dev/null"),
    ),
    "the mode of a file": (
        lambda box: box.unit.chmod(0o666),
        ("units/llama-coder.service", "mode 0644", "mode 0666"),
    ),
    "a drop-in is added": (
        drop_in,
        ("units/llama-coder.service.d/50-own.conf", "nothing", "a file"),
    ),
    "a whole unit is put before another folder's": (
        lambda box: write(box.unit.with_name("llm-gateway.socket"), "[Socket]\nListenStream=9\n"),
        ("units/llm-gateway.socket", "nothing", "a file"),
    ),
    "a file that not everybody may read": (
        lambda box: box.secret.write_text("{}"),
        ("etc/keys.json", f"sha256 {sha256(KEYS)}", f"sha256 {sha256(b'{}')}"),
    ),
    "a command's link": (
        lambda box: relink(box.command, "/tmp/mine"),
        ("bin/lmswitch", "target /opt/llmbox/bin/lmswitch", "target /tmp/mine"),
    ),
    "a file of the environment": (
        lambda box: (box.folder / "venvs/3.11-abc/lib/switch.py").write_text("raise\n"),
        ("venvs/3.11-abc/lib/switch.py", f"sha256 {sha256(PASS)}", f"sha256 {sha256(RAISE)}"),
    ),
    "a file in the environment that nobody installed": (
        lambda box: write(box.folder / "venvs/3.11-abc/lib/sitecustomize.py", ""),
        ("venvs/3.11-abc/lib/sitecustomize.py", "nothing", "a file"),
    ),
    "the environment is gone": (
        lambda box: (box.folder / "venvs/3.11-abc").rename(box.folder / "venvs/away"),
        ("venvs/3.11-abc", "a folder", "nothing"),
    ),
    "a byte of a release": (
        lambda box: flip(box.release / "bin/llama-server", 3),
        (
            "llama.cpp/upstream/releases/one/bin/llama-server",
            f"sha256 {sha256(SERVER)}",
            f"sha256 {sha256(SERVER[:3] + bytes([SERVER[3] ^ 1]) + SERVER[4:])}",
        ),
    ),
    "a program that others may write": (
        lambda box: (box.release / "bin/llama-server").chmod(0o777),
        (
            "llama.cpp/upstream/releases/one/bin/llama-server",
            "writable by its owner",
            "writable by others too",
        ),
    ),
    "a program that its group may write": (
        lambda box: (box.release / "bin/llama-server").chmod(0o775),
        (
            "llama.cpp/upstream/releases/one/bin/llama-server",
            "writable by its owner",
            "writable by others too",
        ),
    ),
    "a program that may not be run": (
        lambda box: (box.release / "bin/llama-server").chmod(0o644),
        (
            "llama.cpp/upstream/releases/one/bin/llama-server",
            "executable by everybody",
            "executable by some only",
        ),
    ),
    "a program that only its owner may read": (
        lambda box: (box.release / "bin/llama-server").chmod(0o711),
        (
            "llama.cpp/upstream/releases/one/bin/llama-server",
            "readable by everybody",
            "readable by some only",
        ),
    ),
    "a folder of a release that is shut": (
        lambda box: (box.release / "bin").chmod(0o744),
        ("llama.cpp/upstream/releases/one/bin", "executable by everybody", "executable by some only"),
    ),
    "a backend beside a release's programs that nobody built": (
        lambda box: write(box.release / "bin/libggml-mine.so", b"\x7fELF"),
        ("llama.cpp/upstream/releases/one/bin/libggml-mine.so", "nothing", "a file"),
    ),
    "the stamp of a release": (
        lambda box: (box.release / "release.json").write_text("{}"),
        ("llama.cpp/upstream/releases/one/release.json", "sha256 ", f"sha256 {sha256(b'{}')}"),
    ),
    "the list of an environment": (
        lambda box: (box.folder / "venvs/3.11-abc.json").write_text("{}"),
        ("venvs/3.11-abc.json", "sha256 ", f"sha256 {sha256(b'{}')}"),
    ),
    "a model is a link": (
        lambda box: relink(box.model, "/dev/zero"),
        ("models/small.gguf", "a file", "a link to /dev/zero"),
    ),
    "current leads elsewhere": (
        lambda box: relink(box.build / "current", "releases/two"),
        ("llama.cpp/upstream/current", "target releases/one", "target releases/two"),
    ),
    "a previous that nobody deployed": (
        lambda box: (box.build / "previous").symlink_to("releases/zero"),
        ("llama.cpp/upstream/previous", "nothing", "a link to releases/zero"),
    ),
    "a byte of a model": (
        lambda box: flip(box.model),
        ("models/small.gguf", f"sha256 {sha256(MODEL)}", "sha256 "),
    ),
    "a model is cut": (
        lambda box: os.truncate(box.model, 100),
        ("models/small.gguf", "4096 bytes", "100 bytes"),
    ),
    "a model is gone": (lambda box: box.model.unlink(), ("models/small.gguf", "a file", "nothing")),
    "a unit is disabled": (
        lambda box: box.states["llm"]["llm-gateway.socket"].update(UnitFileState="disabled"),
        ("llm-gateway.socket of llm", "enabled", "disabled"),
    ),
    "a timer is stopped": (
        lambda box: box.states[""]["llmbox-drift-full.timer"].update(ActiveState="inactive"),
        ("llmbox-drift-full.timer of the system", "active", "inactive"),
    ),
    "a user left a group": (
        lambda box: box.groups["llm"].remove("video"),
        ("/etc/group", "llm in video", "llm not in it"),
    ),
    "a key is taken out": (
        lambda box: box.keys.write_text("ssh-rsa BBBB own\n"),
        ("authorized_keys", "ssh-ed25519 AAAA ann in it", "ssh-ed25519 AAAA ann not in it"),
    ),
    "a port is opened in the table that is loaded": (
        lambda box: setattr(box, "table", box.table.replace("22", "{ 22, 80 }")),
        (
            "nftables table inet llmbox",
            "line 3 '\\t\\ttcp dport 22 accept'",
            "line 3 '\\t\\ttcp dport { 22, 80 } accept'",
        ),
    ),
    "the table is loaded no longer": (
        lambda box: setattr(box, "table", ""),
        ("nftables table inet llmbox", "a table", "nothing"),
    ),
    "a package is held no longer": (
        lambda box: box.held.remove("nvidia-driver-580"),
        ("packages", "nvidia-driver-580 held", "nvidia-driver-580 not held"),
    ),
}


@pytest.mark.parametrize("what", DRIFTS)
def test_hand_made_drift_is_named_with_expected_and_found_and_nothing_else(box: Box, what: str) -> None:
    do, (path, expected, found) = DRIFTS[what]
    do(box)
    ((where, wanted, there),) = box.found()
    assert (where, wanted[: len(expected)], there[: len(found)]) == (path, expected, found)


@pytest.mark.parametrize("key", ["mode", "owner", "group"])
def test_whose_a_file_is_and_for_whom_is_drift(box: Box, key: str) -> None:
    expected = host.look(str(box.unit), 0)
    assert expected is not None
    (difference,) = compare.compare("x", expected, {**expected, key: "other"})
    assert str(difference) == f"x: expected {key} {expected[key]}, found {key} other"


def test_a_kernel_parameter_that_is_gone(box: Box) -> None:
    box.deployed["kernel_parameters"] = ["pcie_aspm=off"]
    box.record()
    assert box.found() == [("/proc/cmdline", "pcie_aspm=off given", "pcie_aspm=off not given")]


def test_a_line_of_somebody_else_is_no_drift(box: Box) -> None:
    moved = box.keys.rename(box.keys.with_name("elsewhere"))
    box.keys.symlink_to(moved)
    moved.write_text("ssh-ed25519 AAAA ann\nssh-rsa CCCC new\n")
    assert box.found() == []
    moved.unlink()
    assert len(box.found()) == 1


def test_a_service_manager_that_does_not_answer_is_drift(box: Box) -> None:
    box.states["llm"].clear()
    assert box.found() == [
        ("llm-gateway.socket of llm", "enabled", "no answer"),
        ("llm-gateway.socket of llm", "active", "no answer"),
    ]


def test_a_unit_that_should_rest_is_asked_too(box: Box) -> None:
    """Without an answer nobody knows that it rests."""
    for unit in box.deployed["units"]:
        if unit["unit"] == "llm-gateway.socket":
            unit["active"] = False
    box.record()
    assert box.found() == [("llm-gateway.socket of llm", "not active", "active")]
    box.states["llm"]["llm-gateway.socket"]["ActiveState"] = "inactive"
    assert box.found() == []
    box.states["llm"].clear()
    assert box.found()[1] == ("llm-gateway.socket of llm", "not active", "no answer")


@pytest.mark.parametrize("only", ["enabled", "active"])
def test_a_unit_of_which_one_thing_is_wanted_is_asked_for_it(box: Box, only: str) -> None:
    box.deployed["units"] = [{"unit": "llm-gateway.socket", "user": "llm", only: True}]
    box.record()
    assert box.found() == []
    box.states["llm"]["llm-gateway.socket"] = {"UnitFileState": "masked", "ActiveState": "failed"}
    ((_, wanted, _),) = box.found()
    assert wanted == only


def test_a_unit_that_is_restarting_is_no_drift(box: Box) -> None:
    box.states["llm"]["llm-gateway.socket"]["ActiveState"] = "deactivating"
    assert box.found() == []


def test_a_drop_in_that_was_recorded_is_an_override_until_it_changes(box: Box) -> None:
    path = drop_in(box)
    assert "+Nice=3" in box.check()["drift"][0]["diff"]
    assert box.record()
    report = box.check()
    assert (report["drift"], report["overrides"]) == ([], [str(path)])
    assert f"{path}: a local override" in cli.screen(report)
    drop_in(box, "[Service]\nNice=5\n")
    assert box.check()["overrides"] == []
    assert box.found() == [("units/llama-coder.service.d/50-own.conf", "line 2 'Nice=3'", "line 2 'Nice=5'")]
    path.unlink()
    assert box.found() == [("units/llama-coder.service.d/50-own.conf", "a file", "nothing")]


def test_an_update_renews_the_record_of_its_build_and_of_nothing_else(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "STATE", box.state)
    box.make_release("two")
    relink(box.build / "current", "releases/two")
    (box.build / "previous").symlink_to("releases/one")
    box.unit.write_text("other\n")
    paths = {path for path, _, _ in box.found()}
    assert {"llama.cpp/upstream/current", "llama.cpp/upstream/previous"} < paths
    assert not cli.renew(f"{box.folder}/llama.cpp", box.state), "no build was deployed there"
    assert cli.main(["renew", str(box.build)]) == 0
    assert [path for path, _, _ in box.found()] == ["units/llama-coder.service"]
    assert not cli.renew(str(box.build), box.state)
    write(box.build / "releases/two/bin/llama-server", b"rotten")
    assert "llama.cpp/upstream/releases/two/bin/llama-server" in {path for path, _, _ in box.found()}


def test_a_build_whose_name_begins_another_s_is_renewed_alone(box: Box) -> None:
    shorter = box.build.with_name("up")
    (shorter / "releases").mkdir(parents=True)
    (shorter / "current").symlink_to("releases/one")
    box.deployed["builds"].append(str(shorter))
    assert box.record()
    relink(shorter / "current", "releases/two")
    relink(box.build / "current", "releases/three")
    assert cli.renew(str(shorter), box.state)
    assert ("llama.cpp/upstream/current", "target releases/one", "target releases/three") in box.found()


def test_a_box_without_a_record_has_nothing_to_renew(tmp_path: Path) -> None:
    assert not cli.renew("/opt/llama.cpp/upstream", tmp_path)
    assert not (tmp_path / cli.MANIFEST).exists()


def test_a_trial_is_no_drift_while_it_is_held(box: Box) -> None:
    assert (host.TRIAL_UNIT, host.TRIAL_DROP_IN) == (trial.UNIT, trial.DROP_IN)
    write(box.unit.parent / f"llama-coder.service.d/{trial.DROP_IN}", trial.drop_in(["/x"]))
    box.states["llm"][trial.UNIT] = {"ActiveState": "active"}
    assert box.found() == []
    own = drop_in(box)
    assert box.found() == [("units/llama-coder.service.d/50-own.conf", "nothing", "a file")]
    own.unlink()
    box.states["llm"][trial.UNIT] = {"ActiveState": "inactive"}
    assert box.found() == [(f"units/llama-coder.service.d/{trial.DROP_IN}", "nothing", "a file")]


@pytest.mark.parametrize(
    ("unit", "folders"),
    [
        ("llama-a-b.service", ["llama-a-b.service.d", "llama-a-.service.d", "llama-.service.d", "service.d"]),
        ("user@1500.service", ["user@1500.service.d", "user@.service.d", "service.d"]),
        ("x@.timer", ["x@.timer.d", "timer.d"]),
    ],
)
def test_every_folder_whose_drop_ins_systemd_reads(unit: str, folders: list[str]) -> None:
    assert compare.drop_in_folders(unit) == folders


def test_a_model_as_it_was_verified_is_not_read_whole(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "block_digests", lambda _descriptor: pytest.fail("the model was read"))
    assert box.found() == []


def test_a_model_that_was_only_touched_is_read_and_found_whole(box: Box) -> None:
    os.utime(box.model)
    assert box.found() == []


def test_rot_that_no_stamp_shows_is_found_by_a_full_read_and_by_a_sample(box: Box) -> None:
    """A failing disk changes no time; a stamp made after the change stands for that here."""
    box.check(full=True)
    number = models.sample_of(len(MODEL) // 512, DAY)[0]
    flip(box.model, number * 512 + 5)
    box.stamp(box.model)
    ((path, expected, _),) = box.found()
    assert (path, expected) == (
        "models/small.gguf",
        f"bytes from {number * 512} on with sha256 {sha256(MODEL[number * 512 :][:512])}",
    )
    ((_, expected, _),) = box.found(full=True)
    assert expected == f"sha256 {sha256(MODEL)}"


UNREAD = "nothing that can be read: Input/output error"


def rot(monkeypatch: pytest.MonkeyPatch, *files: Path) -> None:
    """The disk gives an error for whatever is read of these files, as it does for a bad sector."""
    bad = {file.stat().st_ino for file in files}
    read, pread = os.read, os.pread

    def sound(descriptor: int) -> int:
        if os.fstat(descriptor).st_ino in bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))  # without a name, as from a descriptor
        return descriptor

    monkeypatch.setattr(os, "read", lambda descriptor, size: read(sound(descriptor), size))
    monkeypatch.setattr(os, "pread", lambda descriptor, size, at: pread(sound(descriptor), size, at))


def test_a_bad_sector_under_a_model_is_named_by_day_and_by_week_beside_all_the_rest(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write(box.model.with_name("other.gguf"), MODEL)
    box.stamp(other)
    (file,) = box.deployed["models"][0]["files"]
    box.deployed["models"][0]["files"].append({**file, "file": other.name})
    box.record()
    box.check(full=True)
    rot(monkeypatch, box.model)
    bad = ("models/small.gguf", f"sha256 {sha256(MODEL)}", UNREAD)
    assert box.found() == [bad] == box.found(full=True)
    assert set(cli.read_json(box.state / cli.BLOCKS)) == {str(box.model), str(other)}
    os.truncate(other, 100)
    flip(box.release / "bin/llama-server", 3)
    for full in (False, True):
        found = box.found(full=full)
        assert found[:2] == [bad, ("models/other.gguf", "4096 bytes", "100 bytes")]
        assert [path for path, _, _ in found[2:]] == ["llama.cpp/upstream/releases/one/bin/llama-server"]


def test_a_file_that_cannot_be_read_is_named_and_hides_nothing(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = box.release / "bin/llama-server"
    rot(monkeypatch, box.unit, server, drop_in(box))
    box.secret.write_text("{}")
    box.keys.unlink()
    os.mkfifo(box.keys)
    assert box.found() == [
        ("etc/keys.json", f"sha256 {sha256(KEYS)}", f"sha256 {sha256(b'{}')}"),
        ("units/llama-coder.service", "a file", UNREAD),
        ("units/llama-coder.service.d/50-own.conf", "nothing", UNREAD),
        ("authorized_keys", "a file", f"nothing that can be read: {box.keys} is no regular file"),
        ("llama.cpp/upstream/releases/one/bin/llama-server", "a file", UNREAD),
    ]
    assert {each["diff"] for each in box.check()["drift"]} == {""}


def test_what_cannot_be_read_is_not_recorded_as_deployed(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    rot(monkeypatch, box.unit)
    with pytest.raises(OSError, match=f"{box.unit}: {UNREAD}"):
        box.record()


def test_what_differs_is_told_where_the_report_cannot_be_kept(
    box: Box, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A disk with bad sectors is soon mounted for reading only."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "drift.json")

    monkeypatch.setattr(cli, "STATE", box.state)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    box.command.unlink()
    monkeypatch.setattr(cli, "write_json", refuse)
    assert cli.main(["check", "--keep"]) == 2
    said = capsys.readouterr()
    assert f"{box.command}: expected a link to /opt/llmbox/bin/lmswitch, found nothing\n" in said.out
    assert said.err == "llmbox-drift: [Errno 30] Read-only file system: 'drift.json'\n"


def test_blocks_of_the_model_that_was_at_the_path_before_are_not_held_against_this_one(box: Box) -> None:
    box.check(full=True)
    other = MODEL[::-1]
    box.model.write_bytes(other)
    box.stamp(box.model, other)
    box.deployed["models"][0]["files"][0]["sha256"] = sha256(other)
    box.record()
    assert box.found() == []


@pytest.mark.parametrize("count", [1, 3, 8, 1061])
def test_samples_come_to_every_block(count: int) -> None:
    days = -(-count // models.BLOCKS_A_DAY) + 1
    assert {block for day in range(days) for block in models.sample_of(count, DAY + day)} == set(range(count))
    assert models.sample_of(0, DAY) == []


def test_the_digests_of_blocks_are_of_the_file_s_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "BLOCK_BYTES", 512)
    monkeypatch.setattr(models, "CHUNK_BYTES", 200)
    for size in (0, 511, 512, 513, 1024):
        content = MODEL[:size]
        with write(tmp_path / "file", content).open("rb", buffering=0) as file:
            whole, blocks = models.block_digests(file.fileno())
        assert whole == sha256(content)
        assert blocks == [sha256(content[at : at + 512]) for at in range(0, size, 512)]


def test_a_list_that_was_not_there_is_not_believed_when_it_comes(box: Box) -> None:
    listing = box.folder / "venvs/3.11-abc.json"
    listing.unlink()
    box.record()
    listing.write_text("{}")
    assert box.found() == [("venvs/3.11-abc.json", "nothing", "a file")]


def test_a_folder_where_a_release_s_link_should_be_has_no_list(box: Box) -> None:
    (box.build / "current").unlink()
    (box.build / "current").mkdir()
    box.record()
    assert box.found() == []


def test_blocks_of_models_that_are_deployed_no_more_are_forgotten(box: Box) -> None:
    box.check(full=True)
    assert list(cli.read_json(box.state / cli.BLOCKS)) == [str(box.model)]
    box.deployed["models"] = []
    box.record()
    box.check(full=True)
    assert cli.read_json(box.state / cli.BLOCKS) == {}


def test_each_day_has_its_own_sample(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    days: list[int] = []

    def no_differences(*_: object, day: int, **_more: object) -> list[compare.Difference]:
        days.append(day)
        return []

    monkeypatch.setattr(cli, "model_differences", no_differences)
    for seconds in (86400 * DAY, 86400 * DAY + 86399, 86400 * (DAY + 1)):
        monkeypatch.setattr(time, "time", lambda now=seconds: now)
        cli.check(box.state, full=False)
    assert days == [DAY, DAY, DAY + 1]


def test_lists_of_others_are_kept_by_their_checksum_and_texts_whole(box: Box) -> None:
    presets = write(box.folder / "etc/presets.json", '{\n "a": 1\n}\n')
    box.deployed["files"].append(str(presets))
    box.record()
    entries = cli.read_json(box.state / cli.MANIFEST)["entries"]
    assert {path for path, entry in entries.items() if entry and "text" in entry} == {
        str(presets),
        str(box.unit),
    }
    presets.write_text('{\n "a": 2\n}\n')
    assert box.found() == [("etc/presets.json", "line 2 ' \"a\": 1'", "line 2 ' \"a\": 2'")]
    shown = cli.record(box.deployed, box.state, dry_run=True)["diff"]
    assert f"{box.unit}: " in shown["before"] and "Restart=" not in shown["before"]


def test_what_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = str(write(tmp_path / "file", "x" * 11))
    assert host.look(file, 10)["sha256"] == "not computed: 11 bytes"  # type: ignore[index]
    for size, shown in ((11, True), (10, False)):
        monkeypatch.setattr(host, "TEXT_LIMIT_BYTES", size)
        found = host.look(file, 11)
        assert found and found["sha256"] == sha256(b"x" * 11) and ("text" in found) == shown


def test_folders_of_units_are_those_of_the_manager() -> None:
    """Of systemd.unit(5): a person's, `edit --runtime`, `set-property` with and without --runtime."""
    etc_and_run = {"/etc/systemd/system", "/run/systemd/system"}
    control = {"/etc/systemd/system.control", "/run/systemd/system.control"}
    assert etc_and_run | control | {"/usr/local/lib/systemd/system"} == set(host.unit_folders(""))
    shared = {"/etc/systemd/user", "/run/systemd/user", "/usr/local/lib/systemd/user"}
    assert set(host.unit_folders("nobody-here")) == shared
    own = {f"/root/.config/systemd/user{end}" for end in ("", ".control")}
    own |= {f"/run/user/0/systemd/user{end}" for end in ("", ".control")}
    assert set(host.unit_folders("root")) == own | shared


@pytest.mark.parametrize(("user", "scope"), [("", "--system"), ("root", "--user"), ("nobody-here", None)])
def test_each_manager_is_asked_by_its_user(
    user: str, scope: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def ask(argv: Any, environment: Any, **identity: Any) -> subprocess.CompletedProcess[str] | None:
        asked.append((argv[1], environment.get("XDG_RUNTIME_DIR"), identity.get("user")))
        return said

    monkeypatch.setattr(host, "ask", ask)
    for uid, becomes, said in ((0, None, None), (1000, 0, subprocess.CompletedProcess([], 0, "Id=x", ""))):
        monkeypatch.setattr(os, "geteuid", lambda own=uid: own)
        assert host.systemctl(user, "show") == ("Id=x" if said and scope else "")
        runtime = "/run/user/0" if user else None
        wanted = [(scope, runtime, becomes if user else None)] if scope else []
        assert asked == wanted
        asked.clear()


def test_packages_on_hold_are_those_that_dpkg_names(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = subprocess.CompletedProcess([], 0, "install bash\nhold nvidia-driver-580\ndeinstall hold\n", "")
    monkeypatch.setattr(host, "ask", lambda _argv: listed)
    assert host.held_packages() == {"nvidia-driver-580"}
    monkeypatch.setattr(host, "ask", lambda _argv: None)
    assert host.held_packages() == set()
    assert host.table("inet llmbox") is None, "nft is missing"


def test_a_record_is_written_for_root_only_and_once(box: Box) -> None:
    manifest = box.state / cli.MANIFEST
    assert manifest.stat().st_mode & 0o777 == 0o600 and box.state.stat().st_mode & 0o777 == 0o700
    assert "secret" not in manifest.read_text()
    before = manifest.stat().st_mtime_ns
    assert not box.record()
    box.unit.write_text("other\n")
    assert box.record(dry_run=True)
    assert manifest.stat().st_mtime_ns == before
    assert box.found()
    assert box.record()
    assert box.found() == []


def test_a_fact_that_nobody_would_look_at_is_refused(box: Box) -> None:
    box.deployed["file"] = ["/etc/passwd"]
    with pytest.raises(cli.CouldNotLook, match=r"nothing looks at 'file'; fix: use one of builds, "):
        box.record()


@pytest.mark.parametrize("content", [None, "[]", '{"version": 2}', "{"])
def test_a_box_without_a_record_cannot_be_compared(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / cli.MANIFEST).write_text(content)
    answer = cli.answer(tmp_path)
    assert answer == {"error": f"{tmp_path}/deployed.json does not say what was deployed; fix: run site.yml"}
    (check,) = verify_health.drift_checks(answer)
    assert (check.ok, check.detail) == (False, answer["error"])


def test_exit_codes(box: Box, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "STATE", box.state)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(host, "user_name", lambda _uid: "root")
    assert cli.main(["check", "--keep"]) == 0
    box.unit.write_text(SETTINGS.replace("0077", "0022"))
    assert cli.main(["check", "--keep", "--models=full"]) == 1
    said = capsys.readouterr().out
    assert (
        f"{box.unit}: expected line 3 'UMask=0077', found line 3 'UMask=0022'\n1 differences; fix: " in said
    )
    assert json.loads((box.state / cli.REPORT).read_text())["models"] == "full"
    (box.state / cli.MANIFEST).unlink()
    assert cli.main(["check"]) == 2
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert cli.main(["check"]) == 2
    assert "type: sudo llmbox-drift check" in capsys.readouterr().err


def test_the_program_records_and_tells_as_it_is_asked(
    box: Box, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "STATE", box.state)
    box.unit.write_text("other\n")
    for words, changed in (["record", "--dry-run"], True), (["record"], True), (["record"], False):
        monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(box.deployed)))
        assert cli.main(words) == 0
        assert json.loads(capsys.readouterr().out)["changed"] is changed
    assert cli.main(["check", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models"] == "sampled"
    assert not (box.state / cli.REPORT).exists()
    assert cli.answer(box.state)["models"] == "sampled"


def test_a_screen_ends_with_what_was_compared_and_is_no_flood(box: Box) -> None:
    one = {"path": "/x", "expected": "a file", "found": "nothing", "diff": ""}
    report = {"deployed": "then", "models": "full", "overrides": []}
    assert cli.screen(report | {"drift": []}) == "as deployed (of then, models full)"
    shown = cli.screen(report | {"drift": [one] * 100}).splitlines()
    assert len(shown) == 101 and shown[-1].startswith("100 differences; fix: ")
    shown = cli.screen(report | {"drift": [one] * 103}).splitlines()
    assert shown[-2] == "… and 3 more; all: llmbox-drift check --json" and len(shown) == 102


def test_only_root_looks_at_the_box_itself(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert cli.check(box.state, full=False)[0]["drift"], "another folder is anybody's to look at"


def test_a_long_line_is_cut_and_a_diff_has_what_differs_alone() -> None:
    long = "x" * 200
    found = compare.text_difference("/etc/a", f"one\ntwo\n{long}\n", f"one\ntwo\n{long}y\n")
    assert found.expected == f"line 3 '{'x' * 120}…'" == found.found
    assert found.diff.splitlines() == ["--- deployed", "+++ found", "@@ -3 +3 @@", f"-{long}", f"+{long}y"]
    assert compare.shown("x" * 120) == "x" * 120


def test_what_somebody_named_is_safe_on_a_terminal() -> None:
    assert str(compare.Difference("/x\x1b[2J", "nothing", "a file")).startswith("'/x\\x1b[2J': expected")
    assert "\x1b" not in compare.text_difference("/x", "a", "\x1b[2J").found


def test_a_link_or_a_pipe_in_the_place_of_a_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/etc/shadow")
    assert host.look(str(tmp_path / "pipe"))["type"] == "other thing"  # type: ignore[index]
    assert host.look(str(tmp_path / "link")) == {"type": "link", "target": "/etc/shadow"}
    for name in ("pipe", "link"):
        with pytest.raises(OSError, match=r"no regular file|symbolic links"):
            host.open_regular(str(tmp_path / name))


def test_verify_health_names_each_difference_by_its_file(box: Box) -> None:
    box.unit.write_text(SETTINGS.replace("always", "no"))
    checks = verify_health.drift_checks(box.check())
    assert [check.ok for check in checks] == [False, False]
    line = verify_health.line(checks[1])
    assert line == f"{box.unit} = line 2 'Restart=no', wanted line 2 'Restart=always': drift"
    assert checks[0].value == 1 and "fix: run site.yml" in checks[0].detail
    box.record()
    path = drop_in(box)
    box.record()
    (none, override) = verify_health.drift_checks(box.check())
    assert (none.ok, none.value, override.ok, override.name) == (True, 0, True, str(path))


def test_the_checker_that_is_sent_to_a_box_needs_nothing_of_it() -> None:
    """-S and -I: without the environment in which llmbox is installed."""
    done = run(sys.executable, "-I", "-S", "-", stdin=_ask_host.checker_source()).check()
    assert json.loads(done.stdout).keys() & {"error", "drift"}


def test_roles_say_only_what_is_looked_at() -> None:
    said: dict[str, Any] = {}
    for file in ROOT.glob("roles/*/vars/main.yml"):
        for name, value in yaml.safe_load(file.read_text()).items():
            if name.endswith("_deployed"):
                said[name] = value
    assert {"_llm_user_deployed", "_llm_gateway_deployed", "_drift_deployed"} <= said.keys()
    for name, value in said.items():
        assert isinstance(value, str) or value.keys() <= cli.FACTS, name
