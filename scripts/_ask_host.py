"""Run the probe on a host over ssh, with nothing installed there."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from scripts._inventory import ROOT, Host

PROBE = Path(__file__).resolve().parent / "_probe.py"
CHECKER = ROOT / "apps/llmbox/src/llmbox/drift"
PROBE_TIMEOUT_S = 60
# A model that was touched since it was verified is read whole.
COMPARISON_TIMEOUT_S = 600
TUNNEL_TIMEOUT_S = 10


class Unreachable(Exception):
    """The host could not be asked; the message is one line."""


def probe_source(request: Mapping[str, Any]) -> str:
    """The program that the host's Python reads on standard input."""
    return f"{PROBE.read_text()}\nprint(json.dumps(probe(json.loads({json.dumps(dict(request))!r}))))\n"


def ask(host: Host, request: Mapping[str, Any], *, become: bool) -> dict[str, Any]:
    """The probe's answer. `become`: as root through sudo, as the roles do. Raises Unreachable."""
    return run_program(host, probe_source(request), become=become)


def checker_source() -> str:
    """The box's own checker for drift: the one that is installed there may be what drifted."""
    texts = {f"llmbox.drift.{file.stem}": file.read_text() for file in sorted(CHECKER.glob("[a-z]*.py"))}
    return f"""import importlib.abc, importlib.util, json, sys
TEXTS = {texts!r}
class Sent(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    def find_spec(self, name, path, target=None):
        known = name in TEXTS or name in ("llmbox", "llmbox.drift")
        return importlib.util.spec_from_loader(name, self, is_package=name not in TEXTS) if known else None
    def get_source(self, name):
        return TEXTS.get(name, "")
    def is_package(self, name):
        return name not in TEXTS
sys.meta_path.insert(0, Sent())
from llmbox.drift.cli import STATE, answer
print(json.dumps(answer(STATE)))
"""


def compare(host: Host) -> dict[str, Any]:
    """What differs on a host from what was deployed (llmbox.drift.cli.answer). Raises Unreachable."""
    return run_program(host, checker_source(), become=True, timeout_s=COMPARISON_TIMEOUT_S)


def run_program(
    host: Host, source: str, *, become: bool, timeout_s: float = PROBE_TIMEOUT_S
) -> dict[str, Any]:
    """The JSON object that a Python program prints last on the host. Raises Unreachable."""
    python = str(host.variables.get("ansible_python_interpreter") or "/usr/bin/python3")
    command = f"{'sudo -n ' if become else ''}{python} -"
    try:
        done = subprocess.run(
            host.ssh(command),
            input=source,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Unreachable(f"no answer over ssh in {timeout_s:g} s") from None
    except FileNotFoundError:
        raise Unreachable("this machine has no ssh client; install openssh-client") from None
    if done.returncode != 0:
        raise Unreachable(explain(host, done.returncode, done.stderr))
    try:
        answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        raise Unreachable(
            f"its answer is no JSON: {done.stdout.strip()[:80]!r}; a login shell that prints?"
        ) from None
    return answer


def explain(host: Host, code: int, stderr: str) -> str:
    """One line about a failed ssh, with what to do."""
    said = next((line.strip() for line in reversed(stderr.splitlines()) if line.strip()), f"exit code {code}")
    if "sudo" in said and "password" in said:
        user = host.variables.get("ansible_user", "its user")
        return f"{said}; looking at the host needs passwordless sudo for {user}"
    if code == 255:
        return f"{said}; try: ssh {host.address}"
    return said


@contextlib.contextmanager
def reach(host: Host, address: str, port: int | None) -> Iterator[str]:
    """A base URL under which this machine reaches a server on the host.

    An address that only the host itself can reach (loopback, a UNIX socket: `port` None) is forwarded over
    ssh. Raises Unreachable.
    """
    if port is not None and address in ("0.0.0.0", "::"):  # noqa: S104 - compared with, not bound to
        yield f"http://{bracketed(host.address)}:{port}"
    elif port is not None and not address.startswith("127.") and address != "::1":
        yield f"http://{bracketed(address)}:{port}"
    else:
        target = address if port is None else f"{bracketed(address)}:{port}"
        with forwarded(host, target) as local:
            yield f"http://127.0.0.1:{local}"


def bracketed(address: str) -> str:
    """An address as it stands in a URL."""
    return f"[{address}]" if ":" in address else address


@contextlib.contextmanager
def forwarded(host: Host, target: str) -> Iterator[int]:
    """A port of this machine that ssh forwards to `target` on the host. Raises Unreachable."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    options = ["-N", "-o", "ExitOnForwardFailure=yes", "-L", f"127.0.0.1:{port}:{target}"]
    with subprocess.Popen(
        [*host.ssh_options(), *options, host.address],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as tunnel:
        try:
            deadline = time.monotonic() + TUNNEL_TIMEOUT_S
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
                if tunnel.poll() is not None or time.monotonic() > deadline:
                    raise Unreachable(f"ssh could not forward {target}")
                time.sleep(0.05)
            yield port
        finally:
            tunnel.terminate()
