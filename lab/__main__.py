"""`python3 -m lab`: boot, use and remove the lab hosts."""

from __future__ import annotations

from lab import interrupt

if __name__ == "__main__":
    interrupt.exit_quietly()

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from types import FrameType

from lab import hosts, network, packages, root, sources, supervisor, vm
from lab.config import REPO_ROOT, SUDO_USER, SUITES, Lab, from_environment, typed
from lab.inventory import inventory
from lab.shell import LabError, in_parallel, remove_tree, say
from lab.state import Claims, only_command


def up(lab: Lab, only: Sequence[str] = (), fresh: Sequence[str] = ()) -> None:
    """Bring the lab up, or what of it is not up yet; hosts named in `fresh` are made anew."""
    wanted = [lab.host(name) for name in only] or list(lab.hosts)
    anew = [lab.host(name) for name in fresh]
    emulated = lab.vm in wanted
    packages.ensure(lab, packages.NEEDED | vm.NEEDED if emulated else packages.NEEDED)
    keeper = supervisor.choose()
    claims = Claims(lab.claims)
    if claims.suite not in (None, lab.suite):
        raise LabError(
            f"lab {lab.name!r} runs {claims.suite}; "
            f"fix: `{typed('python3 -m lab down')}`, or another LAB_NAME",
            2,
        )
    claims.suite = lab.suite
    claims.save()
    network.up(lab, claims)
    if anew:
        hosts.close_connections(lab)
        in_parallel({host.name: partial(hosts.remove_host, lab, host, keeper) for host in anew})
    containers = [host for host in wanted if host != lab.vm]
    preparations: dict[str, Callable[[], None]] = {
        "sources": lambda: sources.prepare(lab.cache / "sources", REPO_ROOT)
    }
    if containers:
        preparations["root file system"] = lambda: root.base(lab, containers)
    if emulated:
        preparations["image"] = lambda: vm.image(lab)
    in_parallel(preparations)
    hosts.make_keys(lab)
    hosts.start_servers(lab, claims, keeper)
    for host in wanted:
        unit = hosts.unit_of(lab, host.short)
        claims.claim("unit", unit, exists=keeper.exists(unit))
    in_parallel({host.name: partial(hosts.boot, lab, host, keeper) for host in wanted})
    say(f"lab {lab.name!r} is up ({lab.suite}): {', '.join(host.name for host in wanted)}")


def check() -> None:
    """Find out before anything is made whether the lab can run here. Raises LabError (exit status 2)."""
    if os.geteuid() != 0:
        raise LabError("the lab boots real hosts and needs root; fix: sudo make lab", 2)
    packages.check()


def down(lab: Lab) -> None:
    """Remove everything this lab made; what is gone already is fine."""
    packages.put_units_to_rest(lab)
    claims = Claims(lab.claims)
    existed = lab.state.exists()
    if existed:
        keeper = supervisor.choose()
        hosts.close_connections(lab)
        in_parallel({host.name: partial(hosts.remove_host, lab, host, keeper) for host in lab.every_host})
        for unit in claims.of("unit"):
            keeper.stop(unit)
            claims.release("unit", unit)
    network.down(lab, claims)
    remove_tree(lab.state)
    say(f"lab {lab.name!r} is removed" if existed else f"lab {lab.name!r} was not there")


def status(lab: Lab) -> int:
    """Print one line per host and server; return 0 when the whole lab runs, else 1."""
    keeper = supervisor.choose()
    claims = Claims(lab.claims)
    print(f"lab {lab.name} ({claims.suite or 'not up'})  {lab.subnet}  {lab.source_git}  {lab.source_http}")
    shown = [*lab.hosts, *([lab.vm] if root.made(lab, lab.vm) else [])]
    parts = {host.short: f"{host.name:<11} {host.address:<15}" for host in shown}
    parts |= {part: f"{part + ' server':<11} {lab.gateway:<15}" for part in ("git", "http")}
    running = {part: keeper.alive(hosts.unit_of(lab, part)) for part in parts}
    for part, text in parts.items():
        print(f"  {text} {'running' if running[part] else 'stopped'}")
    return 0 if all(running.values()) else 1


def ssh(lab: Lab, name: str, command: list[str]) -> None:
    """Become an ssh session on a host."""
    host = lab.host(name)
    if not lab.ssh_key.exists():
        raise LabError(f"lab {lab.name!r} is not up; fix: `{typed('python3 -m lab up')}`", 2)
    argv = ["ssh", *lab.ssh_options(), "-i", str(lab.ssh_key), f"{SUDO_USER}@{host.address}", *command]
    os.execvp("ssh", argv)  # noqa: S606 - a list, no shell


def start(lab: Lab, name: str) -> None:
    """Start a host that was powered off."""
    host = lab.host(name)
    if not root.made(lab, host):
        raise LabError(f"{host.name} was never made; fix: `{typed('python3 -m lab up')}`", 2)
    up(lab, [name])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one lab command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python3 -m lab", description="Boot, use and remove the lab hosts.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    up_parser = verbs.add_parser(
        "up", help="boot the hosts and the source server; a repeat does only what is missing"
    )
    up_parser.add_argument(
        "--suite", choices=SUITES, help="Debian release of the hosts (default: LAB_SUITE, bookworm)"
    )
    up_parser.add_argument(
        "--only", action="append", default=[], metavar="HOST", help="only this host (repeatable)"
    )
    up_parser.add_argument(
        "--fresh", action="append", default=[], metavar="HOST", help="make this host anew (repeatable)"
    )
    verbs.add_parser("check", help="say whether this machine can run the lab; changes nothing")
    verbs.add_parser("down", help="remove everything the lab made on this machine")
    verbs.add_parser("status", help="show what runs")
    verbs.add_parser("inventory", help="print the Ansible inventory (JSON)")
    ssh_parser = verbs.add_parser("ssh", help="log in to a host or run a command there")
    ssh_parser.add_argument("host")
    ssh_parser.add_argument("command", nargs=argparse.REMAINDER)
    for verb, text in (
        ("reboot", "reboot a host"),
        ("poweroff", "power a host off"),
        ("start", "start it again"),
    ):
        verbs.add_parser(verb, help=f"{text} and wait for it").add_argument("host")
    options = parser.parse_args(arguments)

    try:
        if sys.version_info < (3, 11):  # noqa: UP036 - the machine's own Python may be older
            raise LabError(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}", 2)
        lab = from_environment(suite=getattr(options, "suite", None))
        if not (getattr(options, "suite", None) or os.environ.get("LAB_SUITE")):
            lab = replace(lab, suite=Claims(lab.claims).suite or lab.suite)  # a repeat keeps what is there
        if options.verb == "inventory":
            print(json.dumps(inventory(lab), indent=1), flush=True)
            return 0
        if options.verb == "check":
            check()
            return 0
        if os.geteuid() != 0:
            raise LabError(
                f"`lab {options.verb}` needs root; fix: sudo {sys.executable} -m lab {options.verb}", 2
            )
        os.environ["PATH"] = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
        if options.verb == "status":
            code = status(lab)
            sys.stdout.flush()
            return code
        if options.verb == "ssh":
            ssh(lab, options.host, options.command)
        actions: dict[str, Callable[[], None]] = {
            "up": lambda: up(lab, options.only, options.fresh),
            "down": lambda: down(lab),
            "reboot": lambda: hosts.reboot(lab, lab.host(options.host), supervisor.choose()),
            "poweroff": lambda: hosts.poweroff(lab, lab.host(options.host), supervisor.choose()),
            "start": lambda: start(lab, options.host),
        }
        signal.signal(signal.SIGTERM, _interrupt)
        with only_command(lab, options.verb):
            actions[options.verb]()
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return error.code
    except BrokenPipeError:  # who reads has enough, as in `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit stays silent
        return 1
    except KeyboardInterrupt:
        print(
            f"lab: interrupted; `{typed('python3 -m lab up')}` goes on, "
            f"`{typed('python3 -m lab down')}` removes everything",
            file=sys.stderr,
        )
        return 130
    return 0


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    interrupt.raise_again()
    sys.exit(main())
