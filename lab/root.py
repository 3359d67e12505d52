"""The hosts' root file system: made once per suite with mmdebstrap, a thin layer of its own per host."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from lab.config import HTTP_PORT, SUDO_USER, Host, Lab
from lab.shell import LabError, remove_tree, run, say, ticking
from lab.state import shared_cache, write_atomically

# Nothing that a role has to install: a bare host must stay bare. python3-apt is part of every Ubuntu Server
# and Debian cloud image; without it the apt module of Ansible cannot run in check mode.
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
_TARGET = "TARGET"  # stands for the folder in the command, so that the command can be compared
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


def base(lab: Lab, hosts: Sequence[Host]) -> None:
    """Make sure every host has its `base`: the suite's root file system, shared and never written to.

    A host keeps the base it was made with; one that no host of any lab uses any more is deleted.
    """
    folder = lab.cache / "roots"
    with shared_cache(folder, "the root file system"):
        command = build_command(lab)
        key = hashlib.sha256(json.dumps([command, local_cas_text()]).encode()).hexdigest()[:12]
        current = folder / f"{lab.suite}-{key}"
        if not current.exists():
            build(command, current, folder / f"{lab.suite}.tmp")
        for host in hosts:
            place = lab.host_dir(host)
            if not made(lab, host):
                place.mkdir(parents=True, exist_ok=True)
                (place / "base").unlink(missing_ok=True)
                (place / "base").symlink_to(current)
        delete_unused(lab, folder, current)


def delete_unused(lab: Lab, folder: Path, current: Path) -> None:
    """Delete what `folder` holds for this suite, but for `current` and what hosts of any lab still use."""
    used = {link.readlink() for link in lab.cache.glob("lab/*/hosts/*/base")}
    for old in folder.glob(f"{lab.suite}-*"):
        if old != current and old not in used:
            remove_tree(old)


def build(command: list[str], target: Path, work: Path) -> None:
    """Run the command of `build_command` in `work` and move the finished tree to `target`."""
    say(f"making the root file system {target.name} (once)")
    begun = time.monotonic()
    remove_tree(work)
    work.mkdir(parents=True)
    # Namespaces of its own: killed at any moment, it leaves no mount and no process behind.
    isolated = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    with ticking("mmdebstrap"):
        run(
            [word if word != _TARGET else str(work / "root") for word in [*isolated, *command]],
            timeout=1200,
            env={"DEBIAN_FRONTEND": "noninteractive", "TMPDIR": str(work)},
        )
    # Emptied with the rest of the image: apt must not take the folder's date for that of fresh lists.
    os.utime(work / "root/var/lib/apt/lists", (0, 0))
    (work / "root").rename(target)
    remove_tree(work)
    say(f"root file system made, {time.monotonic() - begun:.0f} s")


def build_command(lab: Lab, packages: Sequence[str] = PACKAGES, more: Sequence[str] = ()) -> list[str]:
    """The mmdebstrap command that makes the suite's root file system; hooks in `more` run last."""
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
        'echo \'Acquire::Languages "none";\' > "$1"/etc/apt/apt.conf.d/10lab',
    ]
    if _local_cas():
        hooks.append(f'cp {_LOCAL_CAS}/*.crt "$1"{_LOCAL_CAS}/ && chroot "$1" update-ca-certificates')
    return [
        *("mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(packages)}"),
        # A lab host is thrown away: packages need not survive a power cut.
        *(f"--keyring={_KEYRING}", "--dpkgopt=force-unsafe-io"),
        *(f"--customize-hook={hook}" for hook in (*hooks, *more)),
        *(lab.suite, _TARGET, *mirrors),
    ]


def _local_cas() -> list[Path]:
    return sorted(_LOCAL_CAS.glob("*.crt"))


def local_cas_text() -> list[str]:
    """The machine's local CA certificates, which every root file system has."""
    return [path.read_text() for path in _local_cas()]


def made(lab: Lab, host: Host) -> bool:
    """Whether the host's own files are complete."""
    return any((lab.host_dir(host) / layer).exists() for layer in ("upper", "root", "vm"))


def make(lab: Lab, host: Host) -> None:
    """Make the host's own files: a layer above its base, or a copy of it where overlays cannot be mounted."""
    if made(lab, host):
        return
    place = lab.host_dir(host)
    half = place / "partial"
    remove_tree(half)
    half.mkdir()
    layer = "upper" if _overlays_work(place) else "root"
    if layer == "root":
        run(["cp", "--archive", f"{place}/base/.", half], timeout=600)
    _personalise(half, lab, host)
    half.rename(place / layer)


def unmake(lab: Lab, host: Host) -> None:
    """Delete the host's own files; from the first moment on it is not made, though this be broken off."""
    place = lab.host_dir(host)
    for layer in ("upper", "root", "vm"):
        if (place / layer).exists():
            remove_tree(place / "partial")
            (place / layer).rename(place / "partial")
    remove_tree(place)


def _overlays_work(place: Path) -> bool:
    """Whether this kernel and file system can stack one folder on another (not so inside most containers)."""
    for name in ("try", "work"):
        remove_tree(place / name)
        (place / name).mkdir()
    mount = ["mount", "-t", "overlay", "overlay", "-o", "lowerdir=base,upperdir=try,workdir=work", "try"]
    done = run(["unshare", "--mount", *mount], cwd=place, check=False)
    remove_tree(place / "try")
    remove_tree(place / "work")
    return done.returncode == 0


def _personalise(layer: Path, lab: Lab, host: Host) -> None:
    below = lab.host_dir(host) / "base"
    environment = (below / "etc/environment").read_text() if (below / "etc/environment").exists() else ""
    files = identity(lab, host, "host0", environment) | {"etc/machine-id": uuid.uuid4().hex + "\n"}
    for name, text in files.items():
        put(layer, below, name, text)
    owner = (below / "home" / SUDO_USER).stat()
    for name in (".ssh", ".ssh/authorized_keys"):
        path = layer / "home" / SUDO_USER / name
        os.chown(path, owner.st_uid, owner.st_gid)
        path.chmod(0o700)
    (layer / "etc/ssh/ssh_host_ed25519_key").chmod(0o600)


def identity(lab: Lab, host: Host, interface: str, environment: str = "") -> dict[str, str]:
    """The files (path below the root, text) that make a copy of the root file system this lab's host."""
    keys = lab.state / "ssh" / host.name
    return {
        "etc/hostname": host.name + "\n",
        "etc/hosts": "127.0.0.1 localhost\n::1 localhost\n"
        + "".join(f"{other.address} {other.name}\n" for other in lab.every_host),
        "etc/systemd/network/10-lab.network": f"[Match]\nName={interface}\n\n"
        f"[Network]\nAddress={host.address}/24\nGateway={lab.gateway}\nLinkLocalAddressing=no\nIPv6AcceptRA=no\n",
        "etc/apt/apt.conf.d/10lab-network": apt_network(
            run(["apt-config", "dump"], check=False).stdout, f"http://{lab.gateway}:{HTTP_PORT}"
        ),
        "etc/environment": environment + environment_lines(os.environ, with_cas=bool(_local_cas())),
        "etc/ssh/ssh_host_ed25519_key": (keys / "ssh_host_ed25519_key").read_text(),
        "etc/ssh/ssh_host_ed25519_key.pub": (keys / "ssh_host_ed25519_key.pub").read_text(),
        f"home/{SUDO_USER}/.ssh/authorized_keys": lab.ssh_key.with_suffix(".pub").read_text(),
    }


def put(layer: Path, below: Path, name: str, text: str) -> None:
    """Write a file into a layer; folders made on the way look as they do in the layer below."""
    for parent in reversed(Path(name).parents[:-1]):
        if not (layer / parent).exists():
            (layer / parent).mkdir()
            if (below / parent).exists():
                model = (below / parent).stat()
                os.chown(layer / parent, model.st_uid, model.st_gid)
                (layer / parent).chmod(model.st_mode & 0o7777)
    write_atomically(layer / name, text)


def refresh(lab: Lab, host: Host) -> None:
    """Give a stopped host the machine's resolvers of this moment (a laptop changes its network)."""
    place = lab.host_dir(host)
    layer = place / ("upper" if (place / "upper").exists() else "root")
    put(layer, place / "base", "etc/resolv.conf", resolv_conf(Path("/")))


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
