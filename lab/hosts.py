"""Booting, reaching and removing the lab hosts and the lab's servers."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from lab import root, source_server, vm
from lab.config import GIT_PORT, HTTP_PORT, REPO_ROOT, SUDO_USER, Host, Lab, typed
from lab.shell import LabError, last_line, run, say
from lab.state import Claims, write_atomically
from lab.supervisor import Supervisor

_NSPAWN_DIR = Path("/run/systemd/nspawn")
# No lock files: the lab has a lock of its own. The new cgroup layout even where the machine has the old one.
_NSPAWN_ENV = {"SYSTEMD_NSPAWN_LOCK": "0", "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"}
# Mounts a host's layers where nobody else sees them, then becomes systemd-nspawn.
_BOOT = """cd "$0" || exit
if [ -d upper ]; then
  mkdir -p work mnt && mount -t overlay overlay -o lowerdir=base,upperdir=upper,workdir=work mnt || exit
  exec systemd-nspawn --directory=mnt "$@"
fi
exec systemd-nspawn --directory=root "$@"
"""


def unit_of(lab: Lab, part: str) -> str:
    """Name of the control group or transient unit of a host or server."""
    return f"llmbox-{lab.name}-{part}"


def make_keys(lab: Lab) -> None:
    """Make the lab's ssh key and every host's key, and pin the host keys; what exists is kept."""
    folder = lab.state / "ssh"
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    lab.control_dir.mkdir(exist_ok=True)
    places = [lab.ssh_key, *(folder / host.name / "ssh_host_ed25519_key" for host in lab.every_host)]
    for place in places:
        if place.with_name(place.name + ".pub").exists():
            continue
        place.parent.mkdir(exist_ok=True)
        half = place.with_name("new_key")
        for leftover in (half, half.with_name("new_key.pub")):
            leftover.unlink(missing_ok=True)
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"lab-{lab.name}", "-f", half])
        half.replace(place)
        half.with_name("new_key.pub").replace(place.with_name(place.name + ".pub"))
    pins = "".join(
        f"{host.address} " + " ".join(place.with_name(place.name + ".pub").read_text().split()[:2]) + "\n"
        for host, place in zip(lab.every_host, places[1:], strict=True)
    )
    write_atomically(lab.known_hosts, pins, 0o600)


def start_servers(lab: Lab, claims: Claims, supervisor: Supervisor) -> None:
    """Start the git and HTTP servers of the lab, or leave those that answer."""
    sources = lab.cache / "sources"
    commands: dict[str, list[str | Path]] = {
        "git": [
            *(
                "git",
                "daemon",
                "--export-all",
                "--reuseaddr",
                "--informative-errors",
                f"--listen={lab.gateway}",
            ),
            *(f"--base-path={sources}", sources / "upstream.git", sources / "tq3.git"),
        ],
        "http": [
            *(sys.executable, "-m", "lab.source_server", "--listen", f"{lab.gateway}:{HTTP_PORT}"),
            *("--models", sources / "models", "--packages", lab.cache / "apt" / lab.suite),
        ],
    }
    env = {"PYTHONPATH": str(REPO_ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    env |= {name: os.environ[name] for name in ("HOME", "http_proxy", "no_proxy") if name in os.environ}
    for part, command in commands.items():
        unit = unit_of(lab, part)
        if supervisor.alive(unit) and (part != "http" or _http_version(lab) == source_server.version()):
            continue
        claims.claim("unit", unit, exists=supervisor.exists(unit))
        supervisor.stop(unit)
        supervisor.start(unit, command, env, lab.state / f"{part}.log")
    deadline = time.monotonic() + 20
    while not (_answers(lab.gateway, GIT_PORT) and _http_version(lab) == source_server.version()):
        if time.monotonic() > deadline:
            said = _tail(lab.state / "git.log", lab.state / "http.log")
            raise LabError(f"the lab's source server does not answer: {said}")
        time.sleep(0.1)


def boot(lab: Lab, host: Host, supervisor: Supervisor) -> None:
    """Make sure the host runs and answers over ssh."""
    unit = unit_of(lab, host.short)
    log = lab.host_dir(host) / "console.log"
    if not supervisor.alive(unit):
        supervisor.stop(unit)
        log.unlink(missing_ok=True)
        if host == lab.vm:
            vm.make(lab)
            supervisor.start(unit, vm.command(lab), {}, log)
        else:
            root.make(lab, host)
            root.refresh(lab, host)
            supervisor.start(unit, nspawn_command(lab, host), _NSPAWN_ENV, log)
    begun = time.monotonic()
    wait_for_ssh(lab, host, lambda: supervisor.alive(unit))
    _check_source_server(lab, host)
    say(f"{host.name}: answers at {host.address}, {time.monotonic() - begun:.1f} s")


def _check_source_server(lab: Lab, host: Host) -> None:
    """Raise LabError when a host cannot reach the source server, which only a firewall can cause."""
    probe = f"timeout 5 bash -c '</dev/tcp/{lab.gateway}/{HTTP_PORT}'"
    if ssh(lab, host, [probe]).returncode != 0:
        raise LabError(
            f"cannot reach {lab.source_http}: a firewall of this machine drops what enters at {lab.bridge}; "
            f"fix: let it through, for example `iptables -I INPUT -i {lab.bridge} -j ACCEPT`",
            2,
        )


def wait_for_ssh(lab: Lab, host: Host, alive: Callable[[], bool] = lambda: True, unlike: str = "") -> str:
    """Wait until a host lets the sudo user in with a boot id other than `unlike`, and return its boot id.

    Raises LabError when it does not within its time, or is not `alive` any more.
    """
    deadline = time.monotonic() + host.boot_seconds
    console = lab.host_dir(host) / "console.log"
    while True:
        reason = "port 22 does not answer"
        if _answers(host.address, 22):
            try:
                done = ssh(lab, host, ["cat", "/proc/sys/kernel/random/boot_id"])
            except LabError as error:  # an emulated host on a loaded machine: another try may be quicker
                reason = str(error)
            else:
                if done.returncode == 0 and done.stdout.strip() != unlike:
                    return done.stdout.strip()
                reason = last_line(done.stderr) if done.returncode else "it has not rebooted"
        if not alive():
            raise LabError(f"{host.name} does not boot: {_tail(console)}")
        if time.monotonic() > deadline:
            raise LabError(
                f"{host.name} is not reachable after {host.boot_seconds} s ({reason}); console: {console}"
            )
        time.sleep(0.2)


def reboot(lab: Lab, host: Host, supervisor: Supervisor) -> None:
    """Reboot a host in order, from inside, and wait until it answers again."""
    if not supervisor.alive(unit_of(lab, host.short)):
        raise LabError(f"{host.name} does not run; fix: `{typed('python3 -m lab up')}`", 2)
    before = wait_for_ssh(lab, host)
    begun = time.monotonic()
    ssh(lab, host, ["sudo", "systemctl", "reboot"])
    wait_for_ssh(lab, host, unlike=before)
    say(f"{host.name}: rebooted, {time.monotonic() - begun:.1f} s")


def poweroff(lab: Lab, host: Host, supervisor: Supervisor) -> None:
    """Power a host off in order and wait for its end."""
    unit = unit_of(lab, host.short)
    if host == lab.vm:
        vm.control(lab, "system_powerdown")  # the power button; a signal would be the plug
    else:
        supervisor.poweroff(unit)
    deadline = time.monotonic() + host.boot_seconds
    while supervisor.alive(unit):
        if time.monotonic() > deadline:
            raise LabError(f"{host.name} does not power off within {host.boot_seconds} s")
        time.sleep(0.1)
    say(f"{host.name}: powered off")


def nspawn_command(lab: Lab, host: Host) -> list[str | Path]:
    """The command that boots a host; the shared caches are mounted where the roles expect them."""
    binds = []
    if host.builds:
        ccache = lab.cache / "ccache" / lab.suite
        ccache.mkdir(parents=True, exist_ok=True)
        binds.append(f"--bind={ccache}:/var/cache/llama.cpp")
    return [
        *("unshare", "--mount", "sh", "-c", _BOOT, lab.host_dir(host)),
        *("--quiet", "--boot", "--register=no", "--keep-unit", "--settings=no"),
        *(
            f"--machine={lab.machine(host)}",
            f"--hostname={host.name}",
        ),
        *(f"--network-bridge={lab.bridge}", "--resolv-conf=off", "--timezone=off", "--link-journal=no"),
        *("--console=pipe", *binds),
    ]


def ssh(lab: Lab, host: Host, command: list[str], timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run a command on a host as the sudo user, without a shared connection."""
    argv = ["ssh", "-oControlPath=none", "-oBatchMode=yes", *lab.ssh_options(), "-i", str(lab.ssh_key)]
    return run([*argv, f"{SUDO_USER}@{host.address}", *command], check=False, timeout=timeout)


def close_connections(lab: Lab) -> None:
    """End the ssh masters that wait on this lab's control sockets."""
    for place in lab.control_dir.glob("*"):
        run(["ssh", "-F", "/dev/null", f"-oControlPath={place}", "-O", "exit", "lab"], check=False)
        place.unlink(missing_ok=True)


def remove_host(lab: Lab, host: Host, supervisor: Supervisor) -> None:
    """End a host at once and delete its files and what systemd-nspawn keeps about it."""
    supervisor.stop(unit_of(lab, host.short))
    for leftover in _NSPAWN_DIR.glob(f"*/{lab.machine(host)}"):
        run(["umount", "--lazy", leftover], check=False)
        with contextlib.suppress(OSError):
            leftover.rmdir()
    root.unmake(lab, host)


def _answers(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), timeout=1):
            return True
    except OSError:
        return False


def _http_version(lab: Lab) -> str | None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(lab.source_http + source_server.HEALTH_PATH, timeout=2) as answer:
            return str(json.load(answer)["version"])
    except (OSError, ValueError, KeyError):
        return None


def _tail(*logs: Path) -> str:
    text = "".join(log.read_text(errors="replace") for log in logs if log.exists())
    return last_line(text)
