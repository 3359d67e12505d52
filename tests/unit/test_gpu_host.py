"""Role gpu_host: what its modules make of a host, of apt, of GRUB and of netplan."""

from __future__ import annotations

import base64
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from roles.gpu_host.module_utils import gpu_host_tools as tools
from scripts import _probe, verify_health
from tests.support import ROOT, PlaybookRun, ansible_playbook

ROLE = ROOT / "roles/gpu_host"
# An Ed25519 key that nobody holds.
KEY = b"""-----BEGIN PGP PUBLIC KEY BLOCK-----

mDMEawqL/RYJKwYBBAHaRw8BAQdA0ilrK7lf0b2W95WLk8qYVFmElht0wKmb+BlJ
1G2/AFq0I3N0YW5kLWluIDxzdGFuZC1pbkBleGFtcGxlLmludmFsaWQ+iJAEExYI
ADgWIQSaIPG/6aRh0jNXcKVDXlsvihacMQUCawqL/QIbAwULCQgHAgYVCgkICwIE
FgIDAQIeAQIXgAAKCRBDXlsvihacMbNFAPsENGfRCNv4MDYNFKC5/dqDo1txdLvP
3NVvw1kssKExsQD+PPfS4MFq+DYsP1kIEJpqY9041NjJ6Y0xj2Gjc0KM8AA=
=blWB
-----END PGP PUBLIC KEY BLOCK-----
"""
FINGERPRINT = "9A20F1BFE9A461D2335770A5435E5B2F8A169C31"


@pytest.fixture
def module(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The module that the test names, with its tools where Ansible puts them."""
    sys.modules["ansible.module_utils.gpu_host_tools"] = tools
    yield importlib.import_module(f"roles.gpu_host.library.gpu_host_{request.param}")
    del sys.modules["ansible.module_utils.gpu_host_tools"]


def of(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("module", [name], indirect=True, ids=[""])


def done(out: str = "", rc: int = 0, err: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess([], rc, out, err)


def test_the_specification_repeats_the_defaults() -> None:
    options = yaml.safe_load((ROLE / "meta/argument_specs.yml").read_text())["argument_specs"]["main"][
        "options"
    ]
    defaults = yaml.safe_load((ROLE / "defaults/main.yml").read_text())
    assert {name: option["default"] for name, option in options.items()} == defaults


# --- what applies ---


def asked(**changes: Any) -> dict[str, Any]:
    declared = ["packages", "device", "kernel_parameters", "wake_on_lan", "hardware_clock"]
    return {"declared": declared, "card": "auto", "local_clock": True, "left_behind": {}, **changes}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with GRUB, without a card, whose hardware clock runs in UTC."""
    library = importlib.import_module("roles.gpu_host.library.gpu_host_look")
    for name in ("grub", "adjtime"):
        (tmp_path / name).write_text("0.0 0 0.0\n0\nUTC\n")
    monkeypatch.setattr(library, "run", lambda *argv, **_: done("none\n", 1))
    monkeypatch.setattr(library, "GRUB", tmp_path / "grub")
    monkeypatch.setattr(library, "cards", list)
    monkeypatch.setattr(library, "clock_is_local", lambda: False)
    monkeypatch.setattr(library, "secure_boot", lambda: False)
    return tmp_path


@of("look")
def test_nothing_is_looked_at_when_nothing_is_asked_for(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "run", lambda *_argv, **_more: pytest.fail("it ran a program"))
    assert module.look(asked(declared=[]))["apply"] == []


@of("look")
@pytest.mark.parametrize("kind", ["systemd-nspawn", "docker", ""])
def test_a_container_is_not_the_machine(
    module: Any, machine: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Not even when systemd cannot tell: nothing of the machine's is done, and each part is named."""
    answer = done(f"{kind}\n", 0) if kind else done("", 1)
    monkeypatch.setattr(module, "run", lambda *argv, **_: answer)
    found = module.look(asked(card="present"))
    assert found["apply"] == ["packages"]
    assert len([note for note in found["notes"] if note.startswith("skipped: ")]) == 4


@of("look")
def test_without_a_card_the_rest_applies_and_the_skipped_is_said(module: Any, machine: Path) -> None:
    found = module.look(asked())
    assert found["apply"] == ["kernel_parameters", "wake_on_lan", "hardware_clock"] and not found["key_waits"]
    assert [note.partition(": no NVIDIA card")[0] for note in found["notes"]] == [
        "skipped: the NVIDIA driver and the CUDA toolkit",
        "skipped: the driver's settings, services and limits",
    ]
    assert found["clock_differs"]
    (machine / "grub").unlink()
    assert "does not boot with GRUB" in " ".join(module.look(asked())["notes"])


@of("look")
def test_what_was_set_up_before_is_kept_up_or_taken_away(module: Any, machine: Path) -> None:
    """A card that fell off the bus keeps its driver; data that went is cleaned up after."""
    left = {"packages": [str(machine / "grub")]}
    assert "packages" in module.look(asked(left_behind=left))["apply"]
    assert module.look(asked(declared=[], left_behind=left))["apply"] == ["packages"]


@of("look")
def test_cards_are_told_from_other_devices(module: Any, tmp_path: Path) -> None:
    for name, vendor, kind in (
        ("01:00.0", "0x10de", "0x030000"),
        ("01:00.1", "0x10de", "0x040300"),
        ("00:02.0", "0x1234", "0x030000"),
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(vendor + "\n")
        (tmp_path / name / "class").write_text(kind + "\n")
    (tmp_path / "broken").mkdir()
    assert module.cards(tmp_path) == ["01:00.0"]


@of("look")
def test_secure_boot_is_read_and_the_person_is_told(
    module: Any, machine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    variable = tmp_path / module.SECURE_BOOT
    monkeypatch.undo()
    assert not module.secure_boot(tmp_path)
    variable.write_bytes(b"\x06\x00\x00\x00\x00")
    assert not module.secure_boot(tmp_path)
    variable.write_bytes(b"\x06\x00\x00\x00\x01")
    assert module.secure_boot(tmp_path)
    key = tmp_path / "MOK.der"
    (note,) = module.secure_boot_notes([key])
    assert "has no key yet" in note
    key.touch()
    for said, told in (("is not enrolled", f"mokutil --import {key}"), (f"{key} is already enrolled", "")):
        monkeypatch.setattr(module, "run", lambda *argv, said=said, **_: done(said))
        assert told in "".join(module.secure_boot_notes([key]))
        monkeypatch.setattr(module, "secure_boot", lambda: True)
        monkeypatch.setattr(module, "SIGNING_KEYS", [key])
        monkeypatch.setattr(module, "container", str)
        monkeypatch.setattr(module.secure_boot_notes, "__defaults__", ([key],))
        assert module.look(asked(declared=["packages"], card="present"))["key_waits"] is bool(told)
        assert bool(told) == bool(list(module.secure_boot_notes([key])))


@of("look")
@pytest.mark.parametrize(
    ("text", "local"), [("0 0 0\n0\nLOCAL\n", True), ("0 0 0\n0\nUTC\n", False), ("", False)]
)
def test_the_hardware_clock(module: Any, tmp_path: Path, text: str, local: bool) -> None:
    (tmp_path / "adjtime").write_text(text)
    assert module.clock_is_local(tmp_path / "adjtime") is local
    assert module.clock_is_local(tmp_path / "missing") is False


# --- packages ---


@of("packages")
def test_a_key_is_known_by_its_fingerprint(module: Any) -> None:
    raw = module.binary(KEY)
    assert module.fingerprints(KEY) == module.fingerprints(raw) == [FINGERPRINT]
    assert module.is_pinned(KEY, FINGERPRINT)
    assert not module.is_pinned(KEY, "0" * 40)
    assert not module.is_pinned(raw + raw, FINGERPRINT), "a second key could sign too"
    for wrong in (b"", b"<html>404</html>", KEY[:200], raw[:-1], base64.b64encode(raw)):
        assert not module.is_pinned(wrong, FINGERPRINT)


@of("packages")
def test_another_key_is_refused_before_anything_is_written(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "fetch", lambda _url: KEY)
    with pytest.raises(tools.Refused, match=f"has the fingerprint {FINGERPRINT}, not {'0' * 40}"):
        module.the_key("http://x/k", "0" * 40)
    assert module.the_key("http://x/k", FINGERPRINT) == module.binary(KEY)
    two = module.binary(KEY) + module.binary(KEY)
    monkeypatch.setattr(module, "fetch", lambda _url: two)
    with pytest.raises(tools.Refused, match=f"{FINGERPRINT}, {FINGERPRINT}, not {FINGERPRINT}"):
        module.the_key("http://x/k", FINGERPRINT)


FAMILIES: list[dict[str, Any]] = [
    {"names": ["*nvidia*", "libcuda1*"], "version": "580.1-1"},
    {"names": ["cuda-*-13-0", "lib*-13-0"]},
]


@of("packages")
def test_families_are_pinned_and_the_rest_of_the_repository_waits(module: Any) -> None:
    stanzas = module.preferences("https://repo.example/x/", FAMILIES).split("\n", 1)[1].split("\n\n")
    assert [dict(line.split(": ", 1) for line in stanza.strip().splitlines()) for stanza in stanzas] == [
        {"Package": "*nvidia* libcuda1*", "Pin": "version 580.1-1", "Pin-Priority": "1001"},
        {"Package": "cuda-*-13-0 lib*-13-0", "Pin": 'origin "repo.example"', "Pin-Priority": "500"},
        {"Package": "*", "Pin": 'origin "repo.example"', "Pin-Priority": "90"},
    ]


@of("packages")
def test_what_is_held_and_what_has_strayed(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    there = {
        "nvidia-open": ("580.1-1", "install"), "libcuda1": ("580.1-1", "hold"),
        "libcublas-13-0": ("13.1.0-1", "install"),
        "nvidia-container-toolkit": ("1.19-1", "install"), "nvidia-driver-open": ("595.9-1", "install"),
        "linux-generic": ("6.8", "install"), "bash": ("5", "install"),
    }  # fmt: skip
    assert module.to_hold(FAMILIES, ["linux-gen*"], there) == [
        "libcublas-13-0", "libcuda1", "linux-generic", "nvidia-open",
    ]  # fmt: skip
    policy = (
        "nvidia-container-toolkit:\n  Candidate: 1.19-1\n"
        "nvidia-driver-open:\n  Installed: 595.9-1\n  Candidate: 580.1-1\n"
    )
    monkeypatch.setattr(module, "must", lambda *argv, **_: policy)
    assert module.strays(FAMILIES, there) == {"nvidia-driver-open": "580.1-1"}
    assert module.unlike({"nvidia-open": "580.1-1", "libcuda1": "", "new": "1"}, there) == ["new"]


@of("packages")
def test_what_leaves_the_list_of_held_packages_is_let_go(
    module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """But for what somebody else held before: without its updates a kernel grows old unnoticed."""
    selections = {"linux-image-generic": "install", "linux-generic": "install", "bash": "hold"}

    def must(*argv: str, stdin: str = "", **_more: Any) -> str:
        assert argv == ("dpkg", "--set-selections")
        selections.update(dict(line.split() for line in stdin.splitlines()))
        return ""

    monkeypatch.setattr(module, "must", must)
    for name in ("HELD", "SOURCE", "PREFERENCES", "KEY"):
        monkeypatch.setattr(module, name, tmp_path / name.lower())
    monkeypatch.setattr(module, "installed", lambda: {name: ("1", wish) for name, wish in selections.items()})

    def apply(*held: str, check: bool = False) -> tuple[bool, str]:
        wanted = {
            "packages": {},
            "families": [],
            "held": held,
            "url": "",
            "fingerprint": "",
            "headers": False,
        }
        found = module.apply(wanted, check)
        return found["changed"], "".join(diff["after"] for diff in found["diff"])

    assert apply("linux-*", "bash")[0] and set(selections.values()) == {"hold"}
    assert apply("linux-*", "bash") == (False, "")
    assert apply("linux-generic", check=True) == (True, "linux-image-generic: no longer on hold\n")
    assert apply("linux-generic")[0] and not apply("linux-generic")[0]
    assert selections == {"linux-image-generic": "install", "linux-generic": "hold", "bash": "hold"}
    assert module.HELD.exists()
    assert apply()[0] and selections["linux-generic"] == "install" and not module.HELD.exists()
    assert selections["bash"] == "hold", "it was on hold before"


@of("packages")
def test_the_driver_s_module_gets_what_it_is_built_with(
    module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without headers DKMS skips the build and does not fail: Debian's servers have none."""
    monkeypatch.setattr(module, "KERNEL", "6.1.0-25-amd64")
    monkeypatch.setattr(module, "BUILD", tmp_path / "build")
    families = [{**FAMILIES[0], "loaded": str(tmp_path / "version")}, FAMILIES[1]]
    there = dict.fromkeys(
        ("linux-image-amd64", "linux-image-6.1.0-25-amd64", "linux-image-amd64-dbg"), ("6.1", "install")
    )
    policy = " linux-headers-amd64 |  6.1.192-2 | http://deb.example bookworm/main amd64 Packages\n"
    monkeypatch.setattr(module, "must", lambda *_argv, **_: policy)
    (tmp_path / "build").symlink_to("nowhere")
    both = ["linux-headers-6.1.0-25-amd64", "linux-headers-amd64"]
    assert module.missing_headers(families, there) == both
    (tmp_path / "version").write_text("580.1\n")
    assert module.missing_headers(families, there) == both[1:], "its module is there, however it was built"
    (tmp_path / "version").unlink()
    (tmp_path / "build").unlink()
    (tmp_path / "build").mkdir()
    assert module.missing_headers(families, there) == both[1:]
    assert module.missing_headers(families, there | {both[1]: ("6.1", "install")}) == []
    monkeypatch.setattr(module, "must", lambda *_argv, **_: "")
    with pytest.raises(
        tools.Refused, match=r"no repository has linux-headers-6\.1\.0-25-amd64, .*; fix: upgr"
    ):
        module.must_exist({both[0]: ""}, "http://x/")


@of("packages")
def test_headers_are_installed_with_the_driver_where_they_are_asked_for(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "missing_headers", lambda *_: ["linux-headers-x"])
    monkeypatch.setattr(module, "installed", lambda: {"nvidia-open": ("580.1-1", "hold")})
    monkeypatch.setattr(module, "converge", lambda *_, **__: [])
    monkeypatch.setattr(module, "key_in_place", lambda _: True)
    wanted = {
        "packages": {"nvidia-open": "580.1-1"},
        "families": [],
        "held": [],
        "url": "",
        "fingerprint": "",
    }
    for headers in (True, False):
        found = module.apply({**wanted, "headers": headers}, True)
        assert ("linux-headers-x (none) -> any" in str(found["diff"])) is headers is found["changed"]
    found = module.apply({**wanted, "packages": {}, "headers": True}, True)
    assert "linux-headers" not in str(found["diff"]), "no card, no driver"


# --- kernel parameters ---

CONFIGURATION = """
menuentry 'Debian' {
	linux	/vmlinuz root=UUID=1 ro quiet pcie_aspm=off
}
submenu 'Advanced' {
	menuentry 'Old' {
		linux	/vmlinuz-old root=UUID=1 ro single
	}
}
menuentry 'Windows Boot Manager' {
	chainloader /EFI/Microsoft/Boot/bootmgfw.efi
}
"""


@pytest.fixture
def grub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A host's GRUB in a folder; grub-script-check finds a fault where the text has BROKEN."""
    library = importlib.import_module("roles.gpu_host.library.gpu_host_kernel_parameters")
    for name in ("SETTINGS", "FOLDER", "OWN", "BOOTS", "FRESH", "COMMAND_LINE", "REMOVED", "ENVIRONMENT"):
        path = tmp_path / str(getattr(library, name)).lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        monkeypatch.setattr(library, name, path)
    library.SETTINGS.write_text('GRUB_CMDLINE_LINUX_DEFAULT="quiet"  # by hand\n')
    library.BOOTS.write_text(CONFIGURATION)
    library.COMMAND_LINE.write_text("BOOT_IMAGE=/vmlinuz root=UUID=1 ro quiet\n")

    def run(*argv: str, **_more: Any) -> subprocess.CompletedProcess[str]:
        if argv[0] == "grub-script-check":
            broken = "BROKEN" in Path(argv[1]).read_text()
            return done(rc=int(broken), err="error: syntax error.\nerror: line 3\n" if broken else "")
        return subprocess.run(argv, capture_output=True, text=True, check=False)

    monkeypatch.setattr(library, "run", run)
    return tmp_path


def making(module: Any, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """grub-mkconfig makes this."""

    def must(*argv: str, **_more: Any) -> str:
        if argv[0] == "grub-mkconfig":
            Path(argv[2]).write_text(text)
        return ""

    monkeypatch.setattr(module, "must", must)


@of("kernel_parameters")
def test_the_drop_in_adds_and_owns_only_itself(module: Any, grub: Path) -> None:
    before = module.SETTINGS.read_bytes()
    first = module.put(["pcie_aspm=off", "consoleblank=60"], check=False)
    assert first["changed"]
    script = f'GRUB_CMDLINE_LINUX="mine"; . {module.OWN}; printf %s "$GRUB_CMDLINE_LINUX"'
    said = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout
    assert said == "mine pcie_aspm=off consoleblank=60"
    module.put(["consoleblank=60"], check=False)
    assert "pcie_aspm" not in module.OWN.read_text(), "replaced, not piled up"
    module.put([], check=False)
    assert not module.OWN.exists()
    assert module.SETTINGS.read_bytes() == before


@of("kernel_parameters")
def test_it_is_changed_until_what_boots_follows(
    module: Any, grub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a run that was broken off between the file and GRUB's configuration."""
    module.put(["pcie_aspm=off"], check=False)
    assert module.put(["pcie_aspm=off"], check=False)["changed"], "the configuration is older than the file"
    making(module, monkeypatch, CONFIGURATION)
    assert module.generate(["pcie_aspm=off"])["pending"] == ["+pcie_aspm=off"]
    assert not module.put(["pcie_aspm=off"], check=False)["changed"]
    module.COMMAND_LINE.write_text("BOOT_IMAGE=/vmlinuz root=UUID=1 ro quiet pcie_aspm=off")
    assert module.put(["pcie_aspm=off"], check=True)["pending"] == []
    module.BOOTS.write_text(CONFIGURATION + "BROKEN")
    assert module.put(["pcie_aspm=off"], check=True)["changed"], "what boots does not parse"


@of("kernel_parameters")
@pytest.mark.parametrize(
    ("made", "says"),
    [
        (CONFIGURATION + "BROKEN", "syntax error"),
        ("menuentry 'Windows' {\nchainloader x\n}\n", "no entry that boots Linux"),
        (CONFIGURATION.replace("pcie_aspm=off", ""), "does not give pcie_aspm=off"),
        (
            CONFIGURATION.replace("pcie_aspm=off", "pcie_aspm=off pcie_aspm=force"),
            "pcie_aspm=force takes the place of pcie_aspm=off: it comes after it",
        ),
    ],
)
def test_a_configuration_that_proves_nothing_does_not_replace_what_boots(
    module: Any, grub: Path, monkeypatch: pytest.MonkeyPatch, made: str, says: str
) -> None:
    making(module, monkeypatch, made)
    with pytest.raises(tools.Refused, match=says) as refused:
        module.generate(["pcie_aspm=off"])
    assert "boots as before" in str(refused.value)
    assert module.BOOTS.read_text() == CONFIGURATION
    assert [file.name for file in module.BOOTS.parent.iterdir()] == ["grub.cfg"]


@of("kernel_parameters")
def test_a_later_word_of_the_same_name_takes_the_place_of_ours(module: Any, grub: Path) -> None:
    """By hand in GRUB_CMDLINE_LINUX_DEFAULT: GRUB puts that behind, and the kernel takes the last one."""
    given = "menuentry 'x' {\n\tlinux /vmlinuz console=tty0 a=1 console=ttyS0 a=2 b quiet\n}\n"
    assert module.overruled(["a=1", "b", "console=tty0", "c"], given) == [("a=1", "a=2")]
    assert module.REPEATED == verify_health.REPEATED, "a module that runs on the host can import none of ours"
    module.put(["pcie_aspm=off"], check=False)
    module.BOOTS.write_text(CONFIGURATION)
    assert not module.put(["pcie_aspm=off"], check=False)["changed"]
    module.BOOTS.write_text(CONFIGURATION.replace("=off", "=off pcie_aspm=force"))
    assert module.put(["pcie_aspm=off"], check=False)["changed"], "the handler refuses it, with the fix"


@of("kernel_parameters")
def test_a_setting_that_sh_cannot_read_is_refused_by_name(
    module: Any, grub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    making(module, monkeypatch, CONFIGURATION)
    module.FOLDER.mkdir(exist_ok=True)
    (module.FOLDER / "50-hand.cfg").write_text('GRUB_TIMEOUT="5\n')
    for attempt in (module.generate, module.before_reboot):
        with pytest.raises(tools.Refused, match=r"50-hand\.cfg"):
            attempt(["pcie_aspm=off"])
    assert module.BOOTS.read_text() == CONFIGURATION


@of("kernel_parameters")
def test_no_reboot_into_what_does_not_parse(module: Any, grub: Path) -> None:
    assert module.before_reboot(["pcie_aspm=off"])["pending"] == ["+pcie_aspm=off"]
    for broken in (CONFIGURATION + "BROKEN", ""):
        module.BOOTS.write_text(broken)
        with pytest.raises(tools.Refused, match="no reboot: "):
            module.before_reboot(["pcie_aspm=off"])
    module.SETTINGS.unlink()
    assert module.before_reboot([]) == {"changed": False, "diff": [], "pending": []}, "another boot loader"


MENU = """
if [ -s $prefix/grubenv ]; then
  load_env
fi
if [ "${next_entry}" ] ; then
   set default="${next_entry}"
   set next_entry=
   save_env next_entry
   set boot_once=true
else
   set default="%s"
fi
function load_video {
  if [ x$feature_all_video_module = xy ]; then
    insmod all_video
  fi
}
menuentry 'Ubuntu' --class ubuntu --class os $menuentry_id_option 'gnulinux-simple-1' {
	linux	/vmlinuz root=UUID=1 ro quiet
}
submenu 'Advanced options for Ubuntu' $menuentry_id_option 'gnulinux-advanced-1' {
	menuentry 'Ubuntu, with Linux 6.8' --class ubuntu $menuentry_id_option 'gnulinux-6.8-1' {
		linux	/vmlinuz-6.8 root=UUID=1 ro quiet
	}
}
menuentry 'Windows Boot Manager (on /dev/nvme0n1p1)' --class windows $menuentry_id_option 'osprober-efi-1' {
	chainloader /efi/Microsoft/Boot/bootmgfw.efi
}
if [ "$grub_platform" = "efi" ]; then
	menuentry 'UEFI Firmware Settings' $menuentry_id_option 'uefi-firmware' {
		fwsetup
	}
fi
"""
WINDOWS = "Windows Boot Manager (on /dev/nvme0n1p1)"


@of("kernel_parameters")
@pytest.mark.parametrize(
    ("default", "saved", "fix"),
    [
        ("0", "", None),
        ("1>2", "", None),
        ("3", "", None),
        ("Ubuntu", "", None),
        ("gnulinux-advanced-1>gnulinux-6.8-1", "", None),
        ("9", "", None),  # GRUB takes the first one
        ("${saved_entry}", "", None),
        ("${saved_entry}", "saved_entry=0", None),
        ("2", "saved_entry=0", "GRUB_DEFAULT in "),
        (WINDOWS, "", "GRUB_DEFAULT in "),
        ("osprober-efi-1", "", "GRUB_DEFAULT in "),
        ("${saved_entry}", f"saved_entry={WINDOWS}", "grub-set-default 0"),
        ("0", f"saved_entry={WINDOWS}", None),
        ("0", "next_entry=2", "unset next_entry"),
        ("2", "next_entry=0", None),
        ("0", "next_entry=", None),
    ],
)
def test_it_is_told_where_grub_s_menu_starts_windows(
    module: Any, grub: Path, default: str, saved: str, fix: str | None
) -> None:
    """The menu as grub-mkconfig writes it."""
    module.BOOTS.write_text(MENU % default)
    module.ENVIRONMENT.write_text(f"# GRUB Environment Block\n{saved}\n" + "#" * 99)
    told = module.before_reboot([])["windows"]
    assert (
        re.search(f"^GRUB's menu .*Windows, by itself; fix: .*{re.escape(fix)}", told) if fix else told == ""
    )


@of("kernel_parameters")
def test_windows_as_the_first_entry_starts_where_nothing_else_is_named(module: Any) -> None:
    for windows in (
        "menuentry 'W' {\n\tchainloader /EFI/Microsoft/Boot/bootmgfw.efi\n}\n",
        "menuentry 'W' --class windows {\n\tchainloader +1\n}\n",
    ):
        for default, starts in {"": True, 'set default="9"\n': True, 'set default="1>0"\n': False}.items():
            found = module.windows_by_itself(default + windows + CONFIGURATION, "")
            assert ("'W', Windows" in found) if starts else found == ""
        assert module.windows_by_itself(CONFIGURATION + windows, "") == ""
    assert module.windows_by_itself("", "") == ""


@of("kernel_parameters")
def test_asked_is_told_from_in_effect(module: Any) -> None:
    running = "BOOT_IMAGE=/vmlinuz root=UUID=1 ro quiet old=1"
    assert module.pending(["pcie_aspm=off"], CONFIGURATION, running) == ["+pcie_aspm=off", "-old=1"]
    unresolved = CONFIGURATION.replace("quiet pcie_aspm=off", "quiet $vt_handoff")
    gone = module.pending([], unresolved, running + " vt.handoff=7 pcie_aspm=off")
    assert gone == ["-old=1", "-pcie_aspm=off"]
    quoted = CONFIGURATION.replace("quiet", 'quiet acpi_osi="Windows 2009"')
    as_asked = running.replace("old=1", 'acpi_osi="Windows 2009" pcie_aspm=off')
    assert module.pending([], quoted, as_asked) == []
    unknown = CONFIGURATION.replace("quiet pcie_aspm=off", "quiet $mine")
    assert module.pending([], unknown, running) == []  # `old=1` may be what that is


@of("kernel_parameters")
def test_what_was_taken_out_of_the_data_stays_due_until_a_reboot(
    module: Any, grub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when nothing is asked for any more: the next run, which may reboot, has to look again."""
    module.put(["pcie_aspm=off", "quiet"], check=False)
    module.COMMAND_LINE.write_text("BOOT_IMAGE=/vmlinuz root=UUID=1 ro quiet pcie_aspm=off\n")
    module.put([], check=True)
    assert not module.REMOVED.exists(), "a dry run"
    module.put([], check=False)
    assert module.REMOVED.read_text().split() == ["pcie_aspm=off", "quiet"]
    making(module, monkeypatch, CONFIGURATION.replace(" pcie_aspm=off", ""))
    module.generate([])
    for _ in range(2):
        assert module.put([], check=False) == {"changed": False, "diff": [], "pending": ["-pcie_aspm=off"]}
        found = module.before_reboot([])["pending"]
        assert found == ["-pcie_aspm=off"]
        module.settle(found)
        assert module.REMOVED.read_text().split() == ["pcie_aspm=off"], "`quiet` is somebody else's, too"
    module.settle([])
    assert not module.REMOVED.exists()


@of("kernel_parameters")
def test_what_two_runs_have_taken_out_is_due_together(module: Any, grub: Path) -> None:
    for asked in (["a=1", "b=2", "c=3"], ["b=2", "c=3"], ["c=3"]):
        module.put(asked, check=False)
    assert module.REMOVED.read_text().split() == ["a=1", "b=2"]
    module.put(["a=1", "c=3"], check=False)
    module.settle(["-b=2"])
    assert module.REMOVED.read_text().split() == ["b=2"], "the other one is asked for again"


@of("kernel_parameters")
def test_a_parameter_that_is_no_shell_text_is_refused_before_it_is_written(module: Any, grub: Path) -> None:
    """Else update-grub would fail for everybody, and the next kernel's package with it."""
    for check in (True, False):
        with pytest.raises(
            tools.Refused, match=r"99-llmbox\.cfg would not be shell text: .*; fix: gpu_host_k"
        ):
            module.put(['acpi_osi="Windows'], check=check)
    assert not module.OWN.exists() and not module.REMOVED.exists()


@of("kernel_parameters")
def test_a_new_configuration_may_be_read_by_whom_the_former_one_could(
    module: Any, grub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may hold a password's hash."""
    making(module, monkeypatch, CONFIGURATION)
    for mode in (0o600, 0o444):
        module.BOOTS.chmod(mode)
        module.generate(["pcie_aspm=off"])
        assert module.BOOTS.stat().st_mode & 0o7777 == mode
    module.BOOTS.unlink()
    module.generate(["pcie_aspm=off"])
    assert module.BOOTS.stat().st_mode & 0o7777 == module.FILE_MODE


@of("kernel_parameters")
def test_the_role_and_the_verification_know_of_what_a_reboot_still_has_to_take_away(module: Any) -> None:
    left = yaml.safe_load((ROLE / "vars/main.yml").read_text())["_gpu_host_left_behind"]
    assert str(module.REMOVED) in left["kernel_parameters"]
    assert module.REMOVED == _probe.REMOVED_PARAMETERS
    assert module.REMOVED.is_relative_to("/run"), "a boot forgets it"


@of("device")
def test_an_initramfs_whose_update_failed_is_brought_up_to_date_later(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, made = tmp_path / "nvidia.conf", tmp_path / "initrd.img"
    monkeypatch.setattr(module, "MODPROBE", tmp_path)
    monkeypatch.setattr(module, "INITRAMFS", made)
    options.touch()
    assert not module.initramfs_stale({options: ""}), "a machine without one"
    made.touch()
    os.utime(options, (100, 100))
    assert not module.initramfs_stale({options: ""})
    os.utime(made, (50, 50))
    assert module.initramfs_stale({options: ""})
    assert not module.initramfs_stale({tmp_path / "units" / "other": ""})
    monkeypatch.setattr(module, "states", lambda _: {})
    monkeypatch.setattr(module, "converge", lambda *_, **__: [])
    found = module.apply({"files": {str(options): "x"}, "enabled": [], "started": [], "version": ""}, True)
    assert found["modprobe"] and found["changed"]


@of("device")
@pytest.mark.parametrize(
    ("text", "loaded", "pending"),
    [
        ("options nvidia NVreg_PreserveVideoMemoryAllocations=1 NVreg_TemporaryFilePath=/x\n", "1", ""),
        (
            "options nvidia NVreg_PreserveVideoMemoryAllocations=1 NVreg_TemporaryFilePath=/x\n",
            "0",
            "PreserveVideoMemoryAllocations=1 is asked for, the loaded driver has 0",
        ),
        ("options nvidia NVreg_PreserveVideoMemoryAllocations=1\n", None, ""),
        ("# options nvidia NVreg_PreserveVideoMemoryAllocations=1\n", "0", ""),
        ("", "0", ""),
    ],
    ids=["in effect", "loaded before it was written", "no driver is loaded", "a comment", "not asked for"],
)
def test_an_option_that_the_loaded_driver_does_not_have_waits_for_a_reboot(
    module: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    loaded: str | None,
    pending: str,
) -> None:
    for name, file in {"MODPROBE": "modprobe", "LOADED": "version", "PARAMETERS": "params"}.items():
        monkeypatch.setattr(module, name, tmp_path / file)
    monkeypatch.setattr(module, "DEVICES", tmp_path)
    monkeypatch.setattr(module, "states", lambda _: {})
    (tmp_path / "version").write_text("580.1\n")
    (tmp_path / "nvidia-uvm").touch()
    if loaded is not None:
        (tmp_path / "params").write_text(
            f'EnableMSI: 1\nPreserveVideoMemoryAllocations: {loaded}\nTemporaryFilePath: "/x"\n'
        )
    wanted = {"files": {str(tmp_path / "modprobe/llmbox-nvidia.conf"): text}, "enabled": [], "started": []}
    assert module.apply({**wanted, "version": "580.1-1ubuntu1"}, True)["pending"] == pending
    assert module.apply({**wanted, "version": ""}, True)["pending"] == "", "the driver is not ours"


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A host whose driver 580.1 is loaded: its units by name with their state, and what systemctl refuses."""
    library = importlib.import_module("roles.gpu_host.library.gpu_host_device")
    host: dict[str, Any] = {"states": {}, "fails": set(), "asked": []}
    for name in ("UNITS", "LOADED", "PARAMETERS", "DEVICES", "MODPROBE"):
        monkeypatch.setattr(library, name, tmp_path / name.lower())
    library.LOADED.write_text("580.1\n")
    library.DEVICES.mkdir()
    (library.DEVICES / "nvidia-uvm").touch()
    mkdtemp = tempfile.mkdtemp
    monkeypatch.setattr("tempfile.mkdtemp", lambda **_: mkdtemp(dir=tmp_path))  # /run is root's

    def run(*argv: str, **_more: Any) -> subprocess.CompletedProcess[str]:
        host["asked"].append(argv[1:])
        if argv[1] == "show":
            shown = "Id={}\nLoadState=loaded\nUnitFileState={}\nActiveState={}\n"
            return done("\n".join(shown.format(unit, *state) for unit, state in host["states"].items()))
        if argv[1] == "restart":
            fails = argv[2] in host["fails"]
            host["states"][argv[2]] = ("enabled", "failed" if fails else "inactive")
            return done(rc=int(fails))
        return done()

    monkeypatch.setattr(library, "run", run)
    monkeypatch.setattr(library, "must", lambda *argv, **_: host["asked"].append(argv[1:]))
    return host


@of("device")
def test_a_unit_that_no_reboot_would_mend_is_told_at_each_run(module: Any, card: dict[str, Any]) -> None:
    """As a power limit that the card does not take; while the driver waits for a reboot it is no fault."""
    unit = "llmbox-gpu-limits.service"
    card["states"][unit] = ("enabled", "inactive")
    files = {str(module.UNITS / unit): "[Service]\n"}
    wanted = {"files": files, "enabled": [unit], "started": [unit], "version": "580.1-1"}
    card["fails"].add(unit)
    for changed in (True, False):
        found = module.apply(wanted, False)
        assert (found["changed"], found["pending"]) == (changed, "")
        assert found["broken"] == f"{unit} could not do its work; look with: journalctl -u {unit}"
    assert module.apply(wanted, True)["broken"], "a look says so, too"
    (module.DEVICES / "nvidia-uvm").unlink()
    found = module.apply(wanted, False)
    assert (found["pending"].partition(" could")[0], found["broken"]) == (unit, "")
    (module.DEVICES / "nvidia-uvm").touch()
    assert module.apply({**wanted, "version": "590.1-1"}, False)["broken"] == ""
    card["fails"].clear()
    assert module.apply(wanted, False)["broken"] == "" and card["states"][unit][1] == "inactive"
    count = len(card["asked"])
    module.apply(wanted, False)
    assert ("restart", unit) not in card["asked"][count:], "one that has done its work is left alone"


@of("device")
def test_without_its_device_node_a_driver_is_not_in_effect(module: Any, card: dict[str, Any]) -> None:
    (module.DEVICES / "nvidia-uvm").unlink()
    wanted = {"files": {}, "enabled": [], "started": [], "version": "580.1-1"}
    for check in (True, False):
        found = module.apply(wanted, check)
        assert found["pending"] == "the driver is loaded, /dev/nvidia-uvm is missing"


@of("device")
def test_a_service_that_the_packages_do_not_bring_is_named(module: Any, card: dict[str, Any]) -> None:
    wanted = {"files": {}, "enabled": ["nvidia-suspend.service"], "started": [], "version": ""}
    assert module.apply(wanted, True)["changed"], "a dry run on a new host has none of them yet"
    with pytest.raises(tools.Refused, match=r"bring no nvidia-suspend\.service; fix: gpu_host_driver_pack"):
        module.apply(wanted, False)
    assert not any("enable" in argv for argv in card["asked"])


@of("device")
def test_a_unit_that_systemd_refuses_is_not_written(
    module: Any, card: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it says of other units at the same time is nobody's business here."""
    show = module.run

    def run(*argv: str, **more: Any) -> subprocess.CompletedProcess[str]:
        if argv[0] != "systemd-analyze":
            found: subprocess.CompletedProcess[str] = show(*argv, **more)
            return found
        (trial,) = (Path(word) for word in argv if word.startswith("/"))
        wrong = f"{trial}:1: Missing '='\n" if "BROKEN" in trial.read_text() else ""
        return done(err=f"/usr/lib/systemd/system/another.service:2: old\n{wrong}")

    monkeypatch.setattr(module, "run", run)
    unit = module.UNITS / "llmbox-gpu-limits.service"
    card["states"][unit.name] = ("enabled", "inactive")
    wanted = {"files": {str(unit): "BROKEN"}, "enabled": [unit.name], "started": [], "version": ""}
    with pytest.raises(tools.Refused, match=r"refuses a unit: llmbox-gpu-limits\.service:1: Missing"):
        module.apply(wanted, False)
    assert not unit.exists()
    module.apply({**wanted, "files": {str(unit): "[Service]\n"}}, False)
    assert unit.exists()


@of("device")
def test_a_unit_that_goes_is_stopped_first(module: Any, card: dict[str, Any]) -> None:
    unit = module.UNITS / "llmbox-gpu-limits.service"
    unit.parent.mkdir(parents=True)
    unit.write_text("[Service]\n")
    wanted = {"files": {str(unit): ""}, "enabled": [], "started": [], "version": ""}
    assert module.apply(wanted, True)["changed"] and unit.exists()
    assert not any("disable" in argv for argv in card["asked"])
    assert module.apply(wanted, False)["changed"] and not unit.exists()
    assert ("disable", "--now", unit.name) in card["asked"]
    assert not module.apply(wanted, False)["changed"]


def test_the_play_fails_for_a_unit_that_cannot_do_its_work() -> None:
    """Before a reboot, which would not mend it, and after one; a dry run starts nothing that could fail."""
    tasks = {file: yaml.safe_load((ROLE / f"tasks/{file}.yml").read_text()) for file in ("apply", "reboot")}
    (before,) = (task for task in tasks["apply"] if "broken" in str(task))
    assert tasks["apply"].index(before) < [
        task.get("ansible.builtin.include_tasks") for task in tasks["apply"]
    ].index("reboot.yml")
    assert before["when"] == "not ansible_check_mode" and "__gpu_host_device.broken" in str(before)
    (after,) = (task for task in tasks["reboot"] if "broken" in str(task))
    assert after["ansible.builtin.assert"]["that"] == "not __gpu_host_device_after.broken | default('')"


@of("device")
def test_the_role_asks_for_what_is_compared_with_the_loaded_driver(module: Any) -> None:
    """The name is found in the role's own template, and the verification reads the same file."""
    text = (ROLE / "templates/nvidia.conf.j2").read_text()
    assert re.findall(rf"^options nvidia NVreg_{module.SUSPEND}=(\d) ", text, re.M) == ["1"]
    assert module.PARAMETERS == _probe.DRIVER_PARAMETERS


# --- Wake-on-LAN ---

MAC = "52:54:00:12:34:56"


@of("wake_on_lan")
@pytest.mark.parametrize(
    ("ethernets", "found"),
    [
        ({"eno1": {"dhcp4": True}}, "eno1"),
        ({"lan": {"match": {"macaddress": MAC.upper()}, "set-name": "eno1"}}, "lan"),
        ({"lan": {"match": {"name": "eno1"}}}, "lan"),
        ({"eno2": {"dhcp4": True}}, None),
        ({"eno1": {"match": {"macaddress": "00:00:00:00:00:01"}}}, None),
        ({}, None),
    ],
)
def test_netplan_s_definition_of_the_card_is_found(
    module: Any, ethernets: dict[str, Any], found: str | None
) -> None:
    assert module.owner(ethernets, "eno1", MAC) == found


@of("wake_on_lan")
@pytest.mark.parametrize(
    ("ethernets", "says"),
    [
        ({"all": {"match": {"name": "en*"}, "dhcp4": True}}, "more cards than eno1"),
        ({"all": {"match": {"driver": "igc"}}}, "more cards than eno1"),
        ({"eno1": {}, "lan": {"match": {"macaddress": MAC}}}, "eno1 and in lan"),
    ],
)
def test_a_definition_that_others_live_by_is_left_alone(
    module: Any, ethernets: dict[str, Any], says: str
) -> None:
    with pytest.raises(tools.Refused, match=says):
        module.owner(ethernets, "eno1", MAC)


@of("wake_on_lan")
def test_our_file_adds_to_the_definition_and_never_counts_as_one(module: Any, tmp_path: Path) -> None:
    """Alone it would be a card without an address."""
    (tmp_path / "etc/netplan").mkdir(parents=True)
    own = module.netplan_text("eno1", "eno1", MAC)
    (tmp_path / "etc/netplan" / module.NETPLAN.name).write_text(own)
    assert module.merged(module.netplan_definitions(tmp_path)) == {}
    (tmp_path / "etc/netplan/50-installer.yaml").write_text("network: {ethernets: {eno1: {dhcp4: true}}}")
    (tmp_path / "etc/netplan/60-more.yaml").write_text("network: {ethernets: {eno1: {mtu: 9000}, eno2:}}")
    assert module.merged(module.netplan_definitions(tmp_path)) == {
        "eno1": {"dhcp4": True, "mtu": 9000},
        "eno2": {},
    }
    (tmp_path / "etc/netplan/70-broken.yaml").write_text("network: {")
    with pytest.raises(tools.Refused, match="cannot be read"):
        module.netplan_definitions(tmp_path)
    assert yaml.safe_load(own)["network"]["ethernets"]["eno1"] == {
        "match": {"macaddress": MAC}, "set-name": "eno1", "wakeonlan": True,
    }  # fmt: skip


@of("wake_on_lan")
def test_a_link_keeps_the_system_s_naming(module: Any) -> None:
    default = (
        "#x\n[Match]\nOriginalName=*\n\n[Link]\nNamePolicy=keep kernel\n# y\nMACAddressPolicy=persistent\n"
    )
    assert module.link_text(default, MAC).split("\n", 1)[1] == (
        f"[Match]\nPermanentMACAddress={MAC}\n\n[Link]\nNamePolicy=keep kernel\n"
        "MACAddressPolicy=persistent\nWakeOnLan=magic\n"
    )


@of("wake_on_lan")
@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("\tSupports Wake-on: pumbg\n\tWake-on: d\n", ("pumbg", "d")),
        ("\tSupports Wake-on: d\n\tWake-on: d\n", ("d", "d")),
        ("Settings for eno1:\n\tLink detected: yes\n", ("", "")),
    ],
)
def test_ethtool_is_the_judge(module: Any, said: str, found: tuple[str, str]) -> None:
    assert module.wake_on(said) == found


@pytest.fixture
def wired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A host with the card eno1, which netplan does not have: what ethtool says, and what was run."""
    library = importlib.import_module("roles.gpu_host.library.gpu_host_wake_on_lan")
    host: dict[str, Any] = {"supports": "pumbg", "now": "d", "takes": True, "ran": [], "decides": ""}
    (tmp_path / "net/eno1").mkdir(parents=True)
    monkeypatch.setattr(library, "INTERFACES", tmp_path / "net")
    monkeypatch.setattr(library, "NETPLAN", tmp_path / "90-llmbox-wake-on-lan.yaml")
    monkeypatch.setattr(library, "LINK", tmp_path / "50-llmbox-wake-on-lan.link")
    monkeypatch.setattr(library, "DEFAULT_LINKS", ())
    monkeypatch.setattr("shutil.which", lambda name: None if name == "netplan" else f"/usr/sbin/{name}")

    def run(*argv: str, **_more: Any) -> subprocess.CompletedProcess[str]:
        host["ran"].append(argv)
        if argv[:2] == ("ethtool", "--show-permaddr"):
            return done(f"Permanent address: {MAC}\n")
        if argv[:2] == ("ethtool", "--change"):
            host["now"] = "g" if host["takes"] else host["now"]
        if argv[0] == "ethtool":
            return done(f"\tSupports Wake-on: {host['supports']}\n\tWake-on: {host['now']}\n")
        if argv[:2] == ("udevadm", "test-builtin"):
            return done(f"ID_NET_LINK_FILE={host['decides'] or library.LINK}\n")
        return done()

    monkeypatch.setattr(library, "run", run)
    monkeypatch.setattr(library, "must", lambda *argv, **more: run(*argv, **more).stdout)
    return host


@of("wake_on_lan")
def test_a_card_is_set_once_and_stays_so(module: Any, wired: dict[str, Any]) -> None:
    assert module.apply({"interface": "eno1"}, True)["changed"] and not module.LINK.exists()
    first = module.apply({"interface": "eno1"}, False)
    assert first["changed"] and first["by"] == str(module.LINK) and wired["now"] == "g"
    assert "WakeOnLan=magic" in module.LINK.read_text()
    wired["ran"].clear()
    assert not module.apply({"interface": "eno1"}, False)["changed"]
    assert not any("--change" in argv for argv in wired["ran"])
    wired["now"] = "d"  # as something else has set it
    assert module.apply({"interface": "eno1"}, False)["changed"] and wired["now"] == "g"


@of("wake_on_lan")
@pytest.mark.parametrize("supports", ["pumb", "d", ""])
def test_a_card_that_no_magic_packet_wakes_is_refused(
    module: Any, wired: dict[str, Any], supports: str
) -> None:
    wired["supports"] = supports
    for check in (True, False):
        with pytest.raises(
            tools.Refused, match=r"eno1 cannot be woken by magic packet .*; fix: switch it on"
        ):
            module.apply({"interface": "eno1"}, check)
    assert not module.LINK.exists() and not any("--change" in argv for argv in wired["ran"])


@of("wake_on_lan")
def test_a_card_that_takes_the_setting_and_does_not_keep_it_is_told(
    module: Any, wired: dict[str, Any]
) -> None:
    wired["takes"] = False
    with pytest.raises(tools.Refused, match="ethtool says Wake-on: d after it was set"):
        module.apply({"interface": "eno1"}, False)


@of("wake_on_lan")
def test_another_file_that_decides_at_boot_is_told(
    module: Any, wired: dict[str, Any], tmp_path: Path
) -> None:
    other = tmp_path / "10-first.link"
    other.write_text("[Link]\nMTUBytes=9000\n")
    wired["decides"] = str(other)
    with pytest.raises(
        tools.Refused, match=r"at boot .*10-first\.link decides over eno1, not our file; fix: "
    ):
        module.apply({"interface": "eno1"}, False)
    other.write_text("[Link]\nWakeOnLan=magic\n")
    module.apply({"interface": "eno1"}, False)


@of("wake_on_lan")
def test_netplan_judges_our_file_before_it_is_written(
    module: Any, wired: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that it refuses would keep every network from coming up at boot."""
    judged: list[str] = []

    def refuse(text: str) -> None:
        judged.append(text)
        raise tools.Refused("netplan generate: no")

    monkeypatch.setattr(module, "kept_by", lambda *_: (module.NETPLAN, "network: {}\n"))
    monkeypatch.setattr(module, "try_netplan", refuse)
    for check in (True, False):
        with pytest.raises(tools.Refused, match="netplan generate"):
            module.apply({"interface": "eno1"}, check)
    assert judged == 2 * ["network: {}\n"] and not module.NETPLAN.exists() and wired["now"] == "d"


# --- files ---


def test_a_file_is_whole_again_whatever_became_of_it(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b.conf"
    assert tools.converge({file: "x\n"}, check=True)
    assert not file.exists()
    assert tools.converge({file: "x\n"}, check=False)
    assert not tools.converge({file: "x\n"}, check=False)
    for damage in ("chmod 666 $0", "echo y > $0", "ln -sfn /dev/null $0"):
        subprocess.run(["sh", "-c", damage, file], check=True)
        assert tools.converge({file: "x\n"}, check=False)
        assert tools.present(file) == "x\n"
    file.unlink()
    file.symlink_to(tmp_path / "nowhere")
    assert tools.converge({file: None}, check=False)
    assert not os.path.lexists(file)
    assert not tools.converge({file: None}, check=False)


def test_a_program_that_hangs_or_is_missing_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(tools.Refused, match=re.escape("sleep 30 gave no answer in 0.1 s")):
        tools.run("sleep", "30", timeout_s=0.1)
    with pytest.raises(tools.Refused, match="no-such-program is not installed"):
        tools.run("no-such-program")
    with pytest.raises(tools.Refused, match="failed: worse"):
        tools.must("sh", "-c", "echo bad; echo worse >&2; exit 3")


@pytest.mark.parametrize(("unit", "bar_s"), [("devices", 40), ("limits", 70)])
def test_a_card_that_hangs_delays_the_boot_by_a_moment_only(unit: str, bar_s: int) -> None:
    """A child that no signal ends: systemd waits TimeoutStopSec, 90 s by default, after each of its four."""
    file = ROLE / f"templates/llmbox-gpu-{unit}.service.j2"
    seconds = {
        name: int(value)
        for name, value in re.findall(r"^Timeout(Start|Stop)Sec=(\d+)$", file.read_text(), re.M)
    }
    assert seconds["Start"] + 4 * seconds.get("Stop", 90) <= bar_s


def reboot(
    folder: Path, variables: dict[str, str] | None, *words: str, **more: Any
) -> tuple[PlaybookRun, list[str]]:
    """The role, as far as it comes here: Ansible refuses to reboot the machine that it runs on."""
    serves = more.pop("serves", True)
    log = folder / "log"
    log.unlink(missing_ok=True)
    (folder / "lmswitch").write_text(
        f'#!/bin/sh\necho "$*" >> {log}\n'
        f'[ $1 != resume ] || [ -e {log}.up ] || {{ touch {log}.up; echo "{{}}"; exit 3; }}\n'
        f'echo \'{{"ok": true, "changed": {json.dumps(serves)}}}\'\n'
    )
    (folder / "lmswitch").chmod(0o755)
    task = {"name": "The role", "ansible.builtin.include_role": {"name": "gpu_host"}}
    play = {"hosts": "all", "gather_facts": False, "connection": "local", "tasks": [task]}
    (folder / "play.yml").write_text(yaml.safe_dump([play]))
    (folder / "inventory.yml").write_text(yaml.safe_dump({"all": {"hosts": {"box": {}}}}))
    given = {
        "ansible_become": False,
        "ansible_connection": "local",
        "gpu_host_allow_reboot": True,
        "__gpu_host": LOOKED,
        "_gpu_host_lmswitch": str(folder / "lmswitch"),
        **more,
    }
    if variables is not None:
        given["__gpu_host_device"] = {"pending": "the driver"}
        given["__gpu_host_others"] = {"state": {"variables": variables}}
    done = ansible_playbook(
        folder / "play.yml", "-e", json.dumps(given), *words, inventory=folder / "inventory.yml", timeout=120
    )
    return done, log.read_text().splitlines() if log.exists() else []


# In a container there is nothing to look at beside what a test gives.
LOOKED: dict[str, Any] = {
    "apply": ["a reboot"],
    "notes": [],
    "container": "a test's",
    "key_waits": False,
    "clock_differs": False,
}


def test_what_serves_is_drained_before_a_reboot_and_serves_again(tmp_path: Path) -> None:
    done, calls = reboot(tmp_path, {"BootOrder": "0700000000000100"})
    assert "would reboot the control node" in done.stdout
    assert calls == ["off --keep --json", "resume --json", "resume --json"]


def test_what_a_run_stopped_that_was_cut_off_serves_again_after_the_next_one(tmp_path: Path) -> None:
    """That one finds nothing that serves; what lmswitch remembers is from the first."""
    _, calls = reboot(tmp_path, {"BootOrder": "0700000000000100"}, serves=False)
    assert calls == ["off --keep --json", "resume --json", "resume --json"]


def with_a_reboot_that_does_nothing(folder: Path) -> None:
    """A copy of the role beside the play, which comes before the role itself."""
    copy = folder / "roles/gpu_host"
    shutil.copytree(ROLE, copy)
    tasks = copy / "tasks/reboot.yml"
    text = tasks.read_text()
    # Ansible's own says in a dry run, too, that it has rebooted.
    lines = (f"ansible.builtin.shell: echo reboot >> {folder}/log", "changed_when: true", "check_mode: false")
    stand_in = "".join(f"      {line}\n" for line in lines)
    task = re.compile(r"      ansible\.builtin\.reboot:\n        reboot_timeout: .*\n")
    assert len(task.findall(text)) == 1
    tasks.write_text(task.sub(stand_in, text))


def with_a_broken_grub(folder: Path) -> None:
    """A copy of the role beside the play, for a machine whose GRUB has settings and no configuration."""
    copy = folder / "roles/gpu_host"
    shutil.copytree(ROLE, copy)
    library = copy / "library/gpu_host_kernel_parameters.py"
    text = library.read_text()
    for path in ('"/etc/default/grub"', '"/boot/grub/grub.cfg"'):
        assert text.count(path) == 1
        text = text.replace(path, f'"{folder}{path[1:]}')
    library.write_text(text)
    (folder / "etc/default").mkdir(parents=True)
    (folder / "etc/default/grub").touch()


def test_no_reboot_for_the_driver_alone_into_what_does_not_boot(tmp_path: Path) -> None:
    with_a_broken_grub(tmp_path)
    done, calls = reboot(tmp_path, {})
    assert done.rc != 0 and not calls
    assert f"no reboot: {tmp_path}/boot/grub/grub.cfg is missing" in " ".join(done.stdout.split())
    done, _ = reboot(tmp_path, {}, gpu_host_allow_reboot=False)
    assert done.rc == 0, "nothing boots: nothing is to be judged"


DRIVER: dict[str, Any] = {"_gpu_host_files": {}, "_gpu_host_enabled": [], "_gpu_host_driver_retries": 1}


def test_a_reboot_that_has_not_brought_the_driver_is_a_failure_with_its_fix(tmp_path: Path) -> None:
    """Else every later run that may reboot would drain and reboot again, and call it well."""
    with_a_reboot_that_does_nothing(tmp_path)
    done, calls = reboot(tmp_path, {}, **DRIVER, gpu_host_driver_version="580.1-1")
    assert done.rc != 0 and calls[0] == "off --keep --json"
    assert (
        "rebooted, and still not in effect: driver 580.1 is installed, none is loaded; fix: " in done.stdout
    )


def test_a_reboot_that_has_brought_it_is_well(tmp_path: Path) -> None:
    with_a_reboot_that_does_nothing(tmp_path)
    done, _ = reboot(
        tmp_path, {}, **DRIVER, gpu_host_driver_version=""
    )  # nothing is asked for that is missing
    assert done.rc == 0, done.tail()


def test_no_reboot_for_a_driver_whose_key_waits_for_a_person(tmp_path: Path) -> None:
    done, calls = reboot(tmp_path, {}, __gpu_host={**LOOKED, "key_waits": True})
    assert done.rc == 0 and not calls, done.tail()


def test_no_reboot_into_what_somebody_else_has_named_next(tmp_path: Path) -> None:
    done, calls = reboot(tmp_path, {"BootNext": "070000000100"})
    assert done.rc != 0 and "something else is to start next" in done.stdout and not calls


# In the place of a module of the role's: says what it was asked for, and answers what the test has for it.
STAND_IN = """#!/usr/bin/python3
# WANT_JSON
import json, sys
given = json.load(open(sys.argv[1]))
how = ["compare"] if given.get("before") else [given["phase"]] if "phase" in given else []
asked = " ".join(["NAME", *how])
called = asked + " (dry)" * given["_ansible_check_mode"]
with open("FOLDER/log", "a") as log:
    print(called, file=log)
json.dump(given, open("FOLDER/NAME.given", "w"))
answers = json.load(open("FOLDER/answers"))
print(json.dumps({"changed": False, **answers.get(called, answers.get(asked, {}))}))
"""
STATE = {"variables": {"BootOrder": "0700"}, "files": {}}


def with_stand_ins(folder: Path, answers: dict[str, dict[str, Any]]) -> None:
    """A copy of the role whose modules are stand-ins."""
    with_a_reboot_that_does_nothing(folder)
    names = ("boot_state", *(f"gpu_host_{name}" for name in ("packages", "device", "kernel_parameters")))
    for name in names:
        text = STAND_IN.replace("NAME", name.removeprefix("gpu_host_")).replace("FOLDER", str(folder))
        (folder / f"roles/gpu_host/library/{name}.py").write_text(text)
    (folder / "answers").write_text(json.dumps({"boot_state": {"state": STATE}, **answers}))


def another_driver(
    folder: Path, *words: str, answers: dict[str, dict[str, Any]] | None = None, **more: Any
) -> tuple[PlaybookRun, list[str]]:
    """The role on a machine that serves with driver 580.1, where 580.2 is asked for."""
    due = {"pending": "driver 580.2 is installed, 580.1 is loaded"}
    with_stand_ins(folder, {"packages": {"displaced": "580.1"}, "device": due, **(answers or {})})
    looked = {**LOOKED, "apply": ["packages", "device"], "container": ""}
    given = {
        "__gpu_host": looked,
        "gpu_host_driver_version": "580.2-1",
        "_gpu_host_driver_retries": 0,
        **more,
    }
    return reboot(folder, None, *words, **given)


LOOK, STOP, START = ["boot_state", "packages (dry)"], "off --keep --json", "resume --json"


def test_what_serves_is_stopped_before_its_driver_changes(tmp_path: Path) -> None:
    """The packages take away the libraries that the loaded driver works with."""
    done, calls = another_driver(tmp_path)
    installed = ["packages", "device", "boot_state compare"]
    before = ["kernel_parameters check (dry)", STOP]
    assert calls[:11] == [*LOOK, *before, *installed, *before, "reboot", "device (dry)"], done.tail()
    assert calls[-2:] == [START, START], "also when the reboot has not brought it"
    assert done.rc != 0 and "rebooted, and still not in effect" in done.stdout


@pytest.mark.parametrize(("key_waits", "fix"), [(False, "-e allow_reboot=true"), (True, "Secure Boot first")])
def test_a_driver_that_serves_is_not_changed_without_the_reboot_that_it_needs(
    tmp_path: Path, key_waits: bool, fix: str
) -> None:
    looked = {**LOOKED, "apply": ["packages", "device"], "container": "", "key_waits": key_waits}
    done, calls = another_driver(tmp_path, __gpu_host=looked, gpu_host_allow_reboot=key_waits)
    assert done.rc != 0 and calls == LOOK, done.tail()
    said = " ".join(done.stdout.split())
    assert "driver 580.1 is loaded, 580.2-1 is asked for" in said and fix in said
    # No more than that: one that was cut off may have begun.
    assert "so this run installed nothing; fix: " in said


def test_a_driver_that_is_not_loaded_is_installed_without_a_reboot(tmp_path: Path) -> None:
    """The first one, and one whose packages are there already."""
    done, calls = another_driver(
        tmp_path, answers={"packages": {"displaced": ""}}, gpu_host_allow_reboot=False
    )
    assert done.rc == 0 and calls == [*LOOK, "packages", "device", "boot_state compare"], done.tail()
    assert "asked for, in effect after a reboot: driver 580.2 is installed" in done.stdout


@pytest.mark.parametrize(("container", "version"), [("", "580.2-1"), ("docker", "580.2-1"), ("", "")])
def test_headers_come_with_a_driver_and_not_in_a_container(
    tmp_path: Path, container: str, version: str
) -> None:
    looked = {**LOOKED, "apply": ["packages"], "container": container}
    done, _ = another_driver(
        tmp_path, answers={"packages": {}}, __gpu_host=looked, gpu_host_driver_version=version
    )
    assert done.rc == 0, done.tail()
    given = json.loads((tmp_path / "packages.given").read_text())
    assert given["headers"] is (not container and bool(version))


def test_what_serves_is_left_alone_where_the_machine_would_not_come_back(tmp_path: Path) -> None:
    refused: dict[str, dict[str, Any]] = {
        "kernel_parameters check": {"failed": True, "msg": "no reboot: grub.cfg"}
    }
    done, calls = another_driver(tmp_path, answers=refused)
    assert done.rc != 0 and calls == [*LOOK, "kernel_parameters check (dry)"], done.tail()


def test_what_serves_is_started_again_when_its_driver_cannot_be_had(tmp_path: Path) -> None:
    answers: dict[str, dict[str, Any]] = {
        "packages (dry)": {"displaced": "580.1"},
        "packages": {"failed": True, "msg": "has no 580.2"},
    }
    done, calls = another_driver(tmp_path, answers=answers)
    assert done.rc != 0 and "has no 580.2" in done.stdout
    assert calls == [*LOOK, "kernel_parameters check (dry)", STOP, "packages", START, START], done.tail()


def test_a_change_to_what_is_not_ours_fails_the_run_before_a_reboot(tmp_path: Path) -> None:
    """The second look comes when the boot loader's files are written, and compares with the first."""
    answers: dict[str, dict[str, Any]] = {
        "kernel_parameters file": {"changed": True},
        "kernel_parameters check": {"pending": ["+quiet"]},
        "boot_state compare": {"failed": True, "msg": "BootOrder has changed"},
    }
    looked = {**LOOKED, "apply": ["kernel_parameters"], "container": ""}
    done, calls = another_driver(tmp_path, answers=answers, __gpu_host=looked)
    assert done.rc != 0 and "BootOrder has changed" in done.stdout
    written = ["kernel_parameters file", "kernel_parameters generate"]
    assert calls == ["boot_state", *written, "boot_state compare"], done.tail()


def test_no_reboot_where_the_firmware_starts_windows_first(tmp_path: Path) -> None:
    answers: dict[str, dict[str, Any]] = {"boot_state": {"state": STATE, "windows_first": "Boot0001"}}
    done, calls = another_driver(tmp_path, answers=answers)
    assert done.rc != 0 and calls == LOOK, done.tail()
    said = " ".join(done.stdout.split())
    assert "the firmware starts Boot0001, Windows, before this system; fix: sudo efibootmgr --boot" in said
    assert "where it is already, restart into it first" in said


def test_no_reboot_where_grub_s_menu_starts_windows(tmp_path: Path) -> None:
    told = {"windows": "GRUB's menu starts 'W', Windows, by itself; fix: sudo grub-set-default 0"}
    done, calls = another_driver(tmp_path, answers={"kernel_parameters check": told})
    assert done.rc != 0 and calls == [*LOOK, "kernel_parameters check (dry)"], done.tail()
    assert f"not rebooted: {told['windows']}" in " ".join(done.stdout.split())


def parameters_due(folder: Path, *words: str) -> tuple[PlaybookRun, list[str]]:
    """The role where a parameter is not in effect, and no reboot brings it."""
    looked = {**LOOKED, "apply": ["kernel_parameters"], "container": ""}
    due: dict[str, dict[str, Any]] = {"kernel_parameters check": {"pending": ["+quiet"]}}
    return another_driver(folder, *words, answers=due, __gpu_host=looked)


def test_a_reboot_that_has_not_brought_a_parameter_is_a_failure_with_its_fix(tmp_path: Path) -> None:
    done, calls = parameters_due(tmp_path)
    assert done.rc != 0 and calls[-4:] == ["reboot", "kernel_parameters check", START, START]
    assert "rebooted, and still not in effect: +quiet; fix: " in " ".join(done.stdout.split())


def test_a_dry_run_does_not_look_for_what_its_reboot_has_brought(tmp_path: Path) -> None:
    done, calls = parameters_due(tmp_path, "--check")
    assert done.rc == 0 and calls[-1] == "reboot" and STOP not in calls, done.tail()


@of("packages")
def test_a_driver_is_displaced_while_another_one_is_loaded(module: Any, tmp_path: Path) -> None:
    """Not the toolkit, nor packages that follow what is loaded already, as after a reboot."""
    loaded = tmp_path / "version"
    families = [{**FAMILIES[0], "loaded": str(loaded)}, FAMILIES[1]]
    assert module.displaced(families, ["nvidia-open"]) == "", "none is loaded"
    loaded.write_text("580.0\n")
    assert module.displaced(families, ["nvidia-open", "cuda-nvcc-13-0"]) == "580.0"
    assert module.displaced(families, ["cuda-nvcc-13-0"]) == module.displaced(families, []) == ""
    loaded.write_text("580.1\n")
    assert module.displaced(families, ["nvidia-open"]) == ""


@of("packages")
def test_the_module_tells_which_loaded_driver_its_packages_displace(
    module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In the dry run, by which the role stops what serves first."""
    for name in ("HELD", "SOURCE", "PREFERENCES"):
        monkeypatch.setattr(module, name, tmp_path / name.lower())
    monkeypatch.setattr(module, "key_in_place", lambda _: True)
    monkeypatch.setattr(module, "installed", lambda: {"nvidia-open": ("580.0-1", "hold")})
    monkeypatch.setattr(module, "strays", lambda *_: {})
    (tmp_path / "version").write_text("580.0\n")
    families = [{**FAMILIES[0], "loaded": str(tmp_path / "version")}]
    wanted = {"families": families, "held": [], "url": "", "fingerprint": "", "headers": False}
    for version, lost in (("580.1-1", "580.0"), ("580.0-1", "")):
        found = module.apply({**wanted, "packages": {"nvidia-open": version}}, True)
        assert found["displaced"] == lost


@of("device")
def test_the_loaded_driver_is_the_same_one_for_packages_and_device(module: Any) -> None:
    assert f"'loaded': '{module.LOADED}'" in (ROLE / "vars/main.yml").read_text()
