"""What a lab host takes over from the machine it runs on."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab import packages, root, shell
from lab.config import from_environment
from lab.shell import LabError

DEB822 = """\
Types: deb
# a comment
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: https://third.example/linux
Suites: bookworm
Components: main
Signed-By: /etc/apt/keyrings/third.gpg
"""
ONE_LINE = """\
# deb http://old.example/debian bookworm main
deb http://mirror.example/debian bookworm main
deb http://mirror.example/debian bookworm-updates main
deb-src http://mirror.example/debian bookworm main
deb [arch=amd64] http://mirror.example/debian-security bookworm-security main
deb [signed-by=/etc/apt/keyrings/third.gpg] https://third.example/linux bookworm main
"""


def test_archive_lines_of_deb822_sources() -> None:
    assert root.archive_lines(DEB822, "bookworm", "bookworm") == [
        "deb http://mirror.example/debian bookworm main contrib",
        "deb http://mirror.example/debian bookworm-updates main contrib",
        "deb http://mirror.example/debian-security bookworm-security main",
    ]


def test_archive_lines_of_another_suite() -> None:
    assert root.archive_lines(ONE_LINE, "bookworm", "trixie") == [
        "deb http://mirror.example/debian trixie main",
        "deb http://mirror.example/debian trixie-updates main",
        "deb http://mirror.example/debian-security trixie-security main",
    ]


def test_without_security_updates_the_default_mirrors_are_better() -> None:
    assert (
        root.archive_lines("deb http://mirror.example/debian bookworm main\n", "bookworm", "bookworm") == []
    )
    assert root.archive_lines("", "bookworm", "bookworm") == []


def test_apt_takes_over_how_the_machine_reaches_its_archive() -> None:
    dump = """APT::Architecture "amd64";
Acquire::Check-Valid-Until "false";
Acquire::http::Proxy "http://proxy.example:3128";
Acquire::https::Proxy "http://proxy.example:3128";
Acquire::Languages "none";
"""
    assert root.apt_network(dump, "http://10.213.77.1:8088") == (
        'Acquire::Check-Valid-Until "false";\n'
        'Acquire::https::Proxy "http://proxy.example:3128";\n'
        'Acquire::http::Proxy "http://10.213.77.1:8088";\n'
    )


def test_environment_of_a_machine_behind_a_proxy() -> None:
    lines = root.environment_lines(
        {"https_proxy": "http://p:1", "PATH": "/bin", "NO_PROXY": ""}, with_cas=True
    )
    assert 'https_proxy="http://p:1"\n' in lines
    assert 'PIP_CERT="/etc/ssl/certs/ca-certificates.crt"\n' in lines
    assert "PATH" not in lines
    assert "NO_PROXY" not in lines
    assert root.environment_lines({}, with_cas=False) == ""


def place(machine: Path, name: str, text: str) -> None:
    (machine / name).parent.mkdir(parents=True, exist_ok=True)
    (machine / name).write_text(text)


def test_a_local_stub_is_replaced_by_what_it_asks(tmp_path: Path) -> None:
    place(tmp_path, "etc/resolv.conf", "nameserver 127.0.0.53\noptions edns0\n")
    place(
        tmp_path,
        "run/systemd/resolve/resolv.conf",
        "nameserver 192.0.2.1\nnameserver fe80::1%eth0\nsearch a.b\n",
    )
    assert root.resolv_conf(tmp_path) == "nameserver 192.0.2.1\nsearch a.b\n"


def test_plain_resolvers_are_taken_as_they_are(tmp_path: Path) -> None:
    place(tmp_path, "etc/resolv.conf", "nameserver 192.0.2.1\nnameserver 192.0.2.2\n")
    assert root.resolv_conf(tmp_path) == "nameserver 192.0.2.1\nnameserver 192.0.2.2\n"


def test_resolvers_out_of_reach_are_named(tmp_path: Path) -> None:
    place(tmp_path, "etc/resolv.conf", "nameserver ::1\n")
    with pytest.raises(LabError, match="loopback"):
        root.resolv_conf(tmp_path)


def test_a_bare_host_stays_bare() -> None:
    assert not {"acl", "git", "gcc", "cmake", "python3-venv", "curl", "rsync"} & set(root.PACKAGES)


def test_missing_packages_are_named_with_the_command(tmp_path: Path) -> None:
    lab = from_environment({"HOME": str(tmp_path)})
    command = "apt-get install --no-install-recommends p1 p2"
    needed = {"sh": "dash", "no-such-program": "p1", str(tmp_path / "f"): "p2"}
    with pytest.raises(LabError, match=f"LAB_INSTALL=0; type: {command}$") as refused:
        packages.ensure(lab, needed, environ={"LAB_INSTALL": "0"})
    assert refused.value.code == 2


def test_nothing_missing_asks_for_nothing(tmp_path: Path) -> None:
    packages.ensure(from_environment({"HOME": str(tmp_path)}), {"sh": "dash"}, environ={"LAB_INSTALL": "0"})


@pytest.mark.parametrize("layer", ["upper", "root"])
def test_a_removal_that_is_broken_off_leaves_no_host_that_counts_as_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layer: str
) -> None:
    lab = from_environment({"XDG_CACHE_HOME": str(tmp_path)})
    host = lab.hosts[0]
    place = lab.host_dir(host)
    (place / layer / "etc").mkdir(parents=True)
    (place / "partial").mkdir()
    assert root.made(lab, host)
    removed = shell.remove_tree

    def broken_off(folder: Path) -> None:
        if folder == place:
            raise KeyboardInterrupt
        removed(folder)

    monkeypatch.setattr(root, "remove_tree", broken_off)
    with pytest.raises(KeyboardInterrupt):
        root.unmake(lab, host)
    assert not root.made(lab, host)
    monkeypatch.undo()
    root.unmake(lab, host)
    assert not place.exists()
