"""Debian packages the lab needs on this machine: named before, their units put to rest afterwards."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from lab.config import Lab
from lab.shell import LabError, run, say
from lab.state import write_atomically

# program or file that shows the package is there -> the package's name on Debian and Ubuntu
NEEDED = {
    "mmdebstrap": "mmdebstrap",
    "systemd-nspawn": "systemd-container",
    "nft": "nftables",
    "ip": "iproute2",
    "git": "git",
    "ssh": "openssh-client",
    "setpriv": "util-linux",
    "/usr/share/keyrings/debian-archive-keyring.gpg": "debian-archive-keyring",
    "/etc/ssl/certs/ca-certificates.crt": "ca-certificates",
}


def missing(needed: Mapping[str, str]) -> list[str]:
    """Return the packages whose program or file is not on this machine."""
    return [
        package
        for sign, package in needed.items()
        if not (Path(sign).exists() if sign.startswith("/") else shutil.which(sign, path=_path()))
    ]


def install_command(packages: list[str]) -> str:
    """Return the command a person would type."""
    return "apt-get install --no-install-recommends " + " ".join(packages)


def check(needed: Mapping[str, str] = NEEDED, environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return what is missing of `needed` and may be installed.

    Raises LabError (exit status 2) with the command to type when it may not be installed here.
    """
    packages = missing(needed)
    if not packages:
        return []
    if environ.get("LAB_INSTALL") == "0" or os.geteuid() != 0:
        why = "LAB_INSTALL=0" if environ.get("LAB_INSTALL") == "0" else "this is not root"
        raise LabError(f"Debian packages are missing and {why}; type: {install_command(packages)}", 2)
    if not shutil.which("apt-get"):
        raise LabError(
            f"Debian packages are missing and this machine has no apt-get: {' '.join(packages)}", 2
        )
    return packages


def ensure(lab: Lab, needed: Mapping[str, str] = NEEDED, environ: Mapping[str, str] = os.environ) -> None:
    """Install what is missing of `needed` ({program or file: package}).

    Raises LabError (exit status 2) with the command to type when LAB_INSTALL=0 or who runs it is not root.
    """
    put_units_to_rest(lab)  # of an installation that was interrupted
    packages = check(needed, environ)
    if not packages:
        return
    say(f"installing Debian packages: {' '.join(packages)}")
    apt_env = {"DEBIAN_FRONTEND": "noninteractive", "NEEDRESTART_MODE": "l"}
    run(["apt-get", "update", "-qq"], timeout=600, env=apt_env)
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=300"]
    planned = new_packages(run([*install, "--simulate", *packages], timeout=600, env=apt_env).stdout)
    write_atomically(_journal(lab), json.dumps({"packages": planned}))
    run([*install, *packages], timeout=1200, env=apt_env)
    put_units_to_rest(lab)


def new_packages(simulated: str) -> list[str]:
    """Packages that `apt-get --simulate` would install, without those that it would only replace."""
    lines = (line.split() for line in simulated.splitlines() if line.startswith("Inst "))
    return sorted(words[1] for words in lines if not words[2].startswith("["))


def _journal(lab: Lab) -> Path:
    return lab.cache / "lab" / ".installing.json"


def _path() -> str:
    return os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"


def _installed() -> set[str]:
    done = run(["dpkg-query", "--show", "--showformat=${db:Status-Abbrev} ${Package}\n"])
    return {line.split()[1] for line in done.stdout.splitlines() if line.startswith("ii")}


def put_units_to_rest(lab: Lab) -> None:
    """Stop and disable the units that packages installed by us have started or enabled."""
    journal = _journal(lab)
    if not journal.exists():
        return
    added = _installed() & set(json.loads(journal.read_text()).get("packages", []))
    if shutil.which("systemctl"):
        units = sorted(
            Path(line).name
            for package in added
            for line in run(["dpkg-query", "--listfiles", package]).stdout.splitlines()
            if "/systemd/system/" in line
            and line.endswith((".service", ".socket", ".timer", ".target", ".path"))
        )
        running = Path("/run/systemd/system").is_dir()
        for unit in units:
            state = run(["systemctl", "is-enabled", unit], check=False).stdout.strip()
            active = running and run(["systemctl", "is-active", "--quiet", unit], check=False).returncode == 0
            if state == "enabled" or active:
                say(f"{unit} came with an installed package: stopped and disabled")
                now = ["--now"] if running else []
                run(["systemctl", "disable", "--quiet", *now, unit], check=False)
                if active:
                    run(["systemctl", "stop", unit], check=False)
    journal.unlink()
