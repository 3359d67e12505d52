"""What says that a machine was left alone notices when it was not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lab.config import from_environment
from tests import untouched
from tests.untouched import MachineState


def test_a_file_a_setting_a_module_and_the_clock_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "grub.cfg"
    file.write_text("as it was")
    monkeypatch.setattr(untouched, "PLACES", (str(tmp_path),))
    monkeypatch.setattr(untouched, "_modules", lambda: frozenset({"nvidia", "veth"}))
    before = MachineState.now()
    assert before.changes() == {}
    file.write_text("otherwise")
    (name,) = before.changes()
    assert name == str(file)
    file.write_text("as it was")
    for changed, found in (
        (replace(before, modules=frozenset({"veth"})), "module nvidia"),
        (replace(before, modules=before.modules | {"gone"}), "module gone"),
        (replace(before, clock_offset=before.clock_offset - 3), "clock"),
        (
            replace(before, sysctls=before.sysctls | {"/proc/sys/kernel/panic": "17"}),
            "/proc/sys/kernel/panic",
        ),
    ):
        assert list(changed.changes()) == [found]
    assert replace(before, modules=frozenset({"nvidia"})).changes() == {}, "a lab loads it by using it"


NET = "/proc/sys/net"


def test_of_the_network_only_what_a_lab_borrows_or_makes_may_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untouched, "PLACES", ())
    before = MachineState.now()
    assert f"{NET}/ipv4/conf/all/rp_filter" in before.sysctls

    def changed(*names: str) -> list[str]:
        """What is told when these were otherwise before."""
        otherwise = {f"{NET}/{name}": "otherwise" for name in names}
        return sorted(replace(before, sysctls=before.sysctls | otherwise).changes())

    for name in (
        "ipv4/conf/all/rp_filter", "ipv4/conf/lo/accept_local", "ipv4/conf/lo/forwarding",
        "ipv4/conf/all/accept_redirects", "ipv6/conf/all/forwarding", "ipv4/tcp_syncookies",
        "ipv6/conf/default/accept_ra", "ipv4/conf/vb-other/forwarding", "netfilter/nf_conntrack_max",
    ):  # fmt: skip
        assert changed(name) == [f"{NET}/{name}"]
    lab = from_environment()
    for own in (lab.bridge, *(f"vb-{lab.machine(host)}" for host in lab.every_host)):
        assert changed(f"ipv4/conf/{own}/rp_filter", f"ipv6/neigh/{own}/retrans_time_ms") == []
    forwarding = ("ipv4/ip_forward", "ipv4/conf/lo/forwarding", "ipv4/conf/all/accept_redirects")
    assert changed(*forwarding) == []
    assert changed(*forwarding, "ipv4/conf/lo/rp_filter") == [f"{NET}/ipv4/conf/lo/rp_filter"]
    without = {name: value for name, value in before.sysctls.items() if "/netfilter/" not in name}
    assert replace(before, sysctls=without).changes() == {}, "they come with a module that a lab uses"
