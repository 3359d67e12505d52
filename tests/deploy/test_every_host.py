"""What every managed Debian or Ubuntu host has."""

from __future__ import annotations

from typing import Any

import pytest

from scripts._inventory import Host

testinfra_hosts = ["ansible://all"]


def test_base_packages_are_installed(host: Any, wanted: Host) -> None:
    if not host.file("/etc/debian_version").exists:
        pytest.skip("not a Debian or Ubuntu host: the role base does not run there")
    if "llama_hosts" not in wanted.groups:
        pytest.skip("a client: the role base does not run there")
    packages = " ".join(wanted.variables["base_packages"])
    states = host.check_output(
        f"dpkg-query --show --showformat='${{db:Status-Status}}\\n' {packages}"
    ).split()
    assert states == ["installed"] * len(wanted.variables["base_packages"])


def test_no_unit_has_failed(host: Any) -> None:
    if not host.exists("systemctl"):
        pytest.skip("no systemd on this host")
    failed = host.check_output("systemctl list-units --failed --plain --no-legend").splitlines()
    assert [line.split()[0] for line in failed if line] == []
