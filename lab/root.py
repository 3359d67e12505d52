"""The hosts' root file system: made once per suite with mmdebstrap, unpacked and personalised per host."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

from lab.config import HTTP_PORT, SUDO_USER, Host, Lab
from lab.shell import LabError, remove_tree, run, say, ticking
from lab.state import shared_cache, write_atomically

# Nothing that a role has to install: a bare host must stay bare. python3-apt is part of every Ubuntu Server and
# Debian cloud image, and Ansible's apt module cannot run in check mode without it.
PACKAGES = (
    *("systemd", "systemd-sysv", "dbus", "dbus-user-session", "libpam-systemd", "openssh-server"),
    *("sudo", "python3", "python3-apt", "iproute2", "ca-certificates", "procps"),
)
_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
_LOCAL_CAS = Path("/usr/local/share/ca-certificates")
# Settings of the machine's apt that decide whether and how it reaches its archive.
_APT_SETTINGS = re.compile(
    r'^(Acquire::(?:Check-Valid-Until|Check-Date|Retries|https?::(?:Proxy|Timeout)(?:::[^ ]+)?)) "(.+)";$',
    re.M,
)
_PROXY_VARIABLES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
_CA_BUNDLE = "/etc/ssl/certs/ca-certificates.crt"


def archive_lines(sources: str, codename: str, suite: str) -> list[str]:
    """Turn the machine's own Debian archive lines into lines for `suite`; none when it has no plain archive.

    `sources` is deb822 text or one-line text. Only the archive's own suites (plain, -updates, -security) that
    the Debian keyring signs count, so that no third party's repository gets into a lab host.
    """
    wanted = {codename, f"{codename}-updates", f"{codename}-security"}
    lines: list[str] = []

    def add(uris: list[str], suites: list[str], components: list[str]) -> None:
        for uri in uris:
            for name in suites:
                if name in wanted and "main" in components:
                    lines.append(f"deb {uri} {suite}{name.removeprefix(codename)} {' '.join(components)}")

    for block in re.split(r"\n\s*\n", sources):
        fields = dict(re.findall(r"^([A-Za-z-]+):[ \t]*(.*)$", block, re.M))
        if {"Types", "URIs", "Suites"} <= fields.keys():
            signer = fields.get("Signed-By", "debian-archive")
            if (
                "deb" in fields["Types"].split()
                and "debian-archive" in signer
                and fields.get("Enabled") != "no"
            ):
                add(fields["URIs"].split(), fields["Suites"].split(), fields.get("Components", "").split())
            continue
        for options, uri, name, components in re.findall(
            r"^deb\s+(?:\[([^\]]*)\]\s+)?(\S+)\s+(\S+)\s+(.+)$", block, re.M
        ):
            if "signed-by" not in options or "debian-archive" in options:
                add([uri], [name], components.split())
    has_all = {line.split()[2] for line in lines} == {name.replace(codename, suite, 1) for name in wanted}
    return list(dict.fromkeys(lines)) if has_all else []


def archive(lab: Lab) -> Path:
    """Return the suite's root as a tar file, made when it is missing or was made differently."""
    folder = lab.cache / "roots"
    tar, note = folder / f"{lab.suite}.tar", folder / f"{lab.suite}.json"
    half = folder / f"{lab.suite}.partial.tar"  # mmdebstrap chooses the format by the name's end
    with shared_cache(folder, "the root file system"):
        command, environment = _build_command(lab, half)
        key = hashlib.sha256(
            json.dumps([command, *(path.read_text() for path in _local_cas())]).encode()
        ).hexdigest()
        if tar.exists() and note.exists() and json.loads(note.read_text())["key"] == key:
            return tar
        say(f"making the {lab.suite} root file system (once)")
        begun = time.monotonic()
        work = folder / f"{lab.suite}.tmp"
        remove_tree(work)
        work.mkdir()
        try:
            # Namespaces of its own: killed at any moment, it leaves no mount and no process behind.
            with ticking("mmdebstrap"):
                run(
                    ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", *command],
                    timeout=1200,
                    env={**environment, "TMPDIR": str(work)},
                )
        finally:
            remove_tree(work)
        note.unlink(missing_ok=True)
        half.replace(tar)
        seconds = round(time.monotonic() - begun)
        write_atomically(note, json.dumps({"key": key, "seconds": seconds}))
        say(f"root file system made in {seconds} s ({tar.stat().st_size / 1e6:.0f} MB)")
    return tar


def _build_command(lab: Lab, target: Path) -> tuple[list[str], dict[str, str]]:
    release = dict(re.findall(r'^(\w+)="?([^"\n]*)"?$', Path("/etc/os-release").read_text(), re.M))
    places = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*.*"))]
    text = "\n\n".join(
        place.read_text() for place in places if place.exists() and place.suffix in (".list", ".sources")
    )
    mirrors = (
        archive_lines(text, release.get("VERSION_CODENAME", "?"), lab.suite)
        if release["ID"] == "debian"
        else []
    )
    hooks = [
        # Every host gets keys and an identity of its own.
        'rm -f "$1"/etc/ssh/ssh_host_* "$1"/var/lib/dbus/machine-id',
        ': > "$1"/etc/machine-id',
        f'chroot "$1" useradd --create-home --shell /bin/bash {SUDO_USER}',
        f"""echo '{SUDO_USER} ALL=(ALL) NOPASSWD: ALL' > "$1"/etc/sudoers.d/{SUDO_USER}""",
        f'chmod 0440 "$1"/etc/sudoers.d/{SUDO_USER}',
        'chroot "$1" systemctl enable systemd-networkd',
        'chroot "$1" systemctl mask console-getty.service systemd-networkd-wait-online.service',
        # A lab host is thrown away: packages need not survive a power cut.
        'echo force-unsafe-io > "$1"/etc/dpkg/dpkg.cfg.d/lab',
        'echo \'Acquire::Languages "none";\' > "$1"/etc/apt/apt.conf.d/10lab',
    ]
    if _local_cas():
        hooks.append(f'cp {_LOCAL_CAS}/*.crt "$1"{_LOCAL_CAS}/ && chroot "$1" update-ca-certificates')
    command = [
        *(
            "mmdebstrap",
            "--quiet",
            "--variant=minbase",
            f"--include={','.join(PACKAGES)}",
            f"--keyring={_KEYRING}",
        ),
        *(f"--customize-hook={hook}" for hook in hooks),
        *(lab.suite, str(target), *mirrors),
    ]
    return command, {"DEBIAN_FRONTEND": "noninteractive"}


def _local_cas() -> list[Path]:
    return sorted(_LOCAL_CAS.glob("*.crt"))


def unpack(tar: Path, lab: Lab, host: Host) -> None:
    """Unpack and personalise a host's root; it appears under its name only when complete."""
    target = lab.host_dir(host) / "root"
    if target.exists():
        return
    half = lab.host_dir(host) / "root.partial"
    remove_tree(half)
    half.mkdir(parents=True)
    run(
        [
            "tar",
            "--extract",
            "--numeric-owner",
            "--xattrs",
            "--xattrs-include=*",
            f"--file={tar}",
            "-C",
            half,
        ],
        timeout=300,
    )
    (lab.host_dir(host) / "log").mkdir(exist_ok=True)
    _personalise(half, lab, host)
    half.rename(target)


def _personalise(root: Path, lab: Lab, host: Host) -> None:
    files = {
        "etc/machine-id": uuid.uuid4().hex + "\n",
        "etc/hostname": host.name + "\n",
        "etc/hosts": "127.0.0.1 localhost\n::1 localhost\n"
        + "".join(f"{other.address} {other.name}\n" for other in lab.hosts),
        "etc/systemd/network/10-lab.network": "[Match]\nName=host0\n\n"
        f"[Network]\nAddress={host.address}/24\nGateway={lab.gateway}\nLinkLocalAddressing=no\nIPv6AcceptRA=no\n",
        "etc/apt/apt.conf.d/10lab-network": apt_network(
            run(["apt-config", "dump"], check=False).stdout, f"http://{lab.gateway}:{HTTP_PORT}"
        ),
    }
    for name, text in files.items():
        write_atomically(root / name, text)
    for key, mode in (("ssh_host_ed25519_key", 0o600), ("ssh_host_ed25519_key.pub", 0o644)):
        write_atomically(root / "etc/ssh" / key, (lab.state / "ssh" / host.name / key).read_text(), mode)
    home = root / "home" / SUDO_USER
    write_atomically(home / ".ssh/authorized_keys", lab.ssh_key.with_suffix(".pub").read_text(), 0o600)
    (home / ".ssh").chmod(0o700)
    owner = home.stat()
    for path in (home / ".ssh", home / ".ssh/authorized_keys"):
        os.chown(path, owner.st_uid, owner.st_gid)
    with (root / "etc/environment").open("a") as stream:
        stream.write(environment_lines(os.environ, with_cas=bool(_local_cas())))
    # Emptied with the rest of the image: apt must not take the folder's date for that of fresh lists.
    os.utime(root / "var/lib/apt/lists", (0, 0))
    refresh_resolver(root)


def refresh_resolver(root: Path) -> None:
    """Give a host the machine's resolvers of this moment (they change when a laptop changes its network)."""
    write_atomically(root / "etc/resolv.conf", resolv_conf(Path("/")))


def resolv_conf(machine: Path) -> str:
    """Return the resolvers a lab host can reach: the machine's own, or what its local stub asks.

    Raises LabError when the machine knows only resolvers of its own loopback.
    """
    for name in (
        "etc/resolv.conf",
        "run/systemd/resolve/resolv.conf",
        "run/NetworkManager/no-stub-resolv.conf",
    ):
        place = machine / name
        if not place.exists():
            continue
        servers = re.findall(r"^nameserver\s+(\S+)", place.read_text(), re.M)
        reachable = [server for server in servers if not server.startswith("127.") and ":" not in server]
        if reachable:
            search = re.findall(r"^search\s+.*$", place.read_text(), re.M)
            return "".join(f"nameserver {server}\n" for server in reachable) + "".join(
                f"{line}\n" for line in search
            )
    raise LabError(
        "/etc/resolv.conf names only loopback resolvers, out of a host's reach; fix: add an upstream one",
        2,
    )


def apt_network(dump: str, package_cache: str) -> str:
    """Return apt settings of a host: the machine's that concern its archive, and the lab's package cache.

    A proxy of the machine is used by the package cache, not by the hosts.
    """
    lines = [
        f'{name} "{value}";' for name, value in _APT_SETTINGS.findall(dump) if name != "Acquire::http::Proxy"
    ]
    return "\n".join([*lines, f'Acquire::http::Proxy "{package_cache}";', ""])


def environment_lines(environ: Mapping[str, str], *, with_cas: bool) -> str:
    """Return /etc/environment lines: the machine's proxies, its CAs for programs that bring their own."""
    found = {name: environ[name] for name in _PROXY_VARIABLES if environ.get(name)}
    if with_cas:
        found |= dict.fromkeys(
            ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "PIP_CERT", "CURL_CA_BUNDLE"), _CA_BUNDLE
        )
    return "".join(f'{name}="{value}"\n' for name, value in found.items())
