"""The servers that a session starts for itself: llama-server here or over SSH, and apfel."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import secrets
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from local_claude import keeper
from local_claude.backends import LOCAL
from local_claude.errors import EXIT_NOT_STARTED, EXIT_USAGE, LocalClaudeError, one_line, shown
from local_claude.keeping import Kept, Order, answers, free_port
from local_claude.options import Options
from local_claude.wire import Server

START_TIMEOUT_S = 600.0
SURVEY_TIMEOUT_S = 120.0
SILENCE_S = 20.0
_DESTINATION = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.@:%\[\]-]{0,254}$")
# What runs there first: reads one line, a byte at a time because heartbeats follow, and becomes what it says.
_FIRST = """
import json, os
line = b""
while line[-1:] != b"\\n":
    piece = os.read(0, 1)
    if not piece:
        raise SystemExit(2)
    line += piece
orders = json.loads(line)
exec(orders["program"], {"__name__": "far", "orders": orders})
"""
_KEEP = "\nimport sys\nsys.exit(main(orders))\n"
_SURVEY = """
import json, sys, types
for name, source in orders["modules"]:
    module = sys.modules[name] = types.ModuleType(name)
    parent, _, own = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], own, module)
    exec(compile(source, name, "exec"), module.__dict__)
print(json.dumps(sys.modules["local_claude.survey"].survey(orders["server"], orders["folder"])))
"""
_SSH_FIX = {
    "Permission denied": "log in once by hand, or add your key: ssh-copy-id {to}",
    "Host key verification failed": "log in once by hand and accept its key: ssh {to}",
    "Could not resolve": "correct --host, or add it to ~/.ssh/config",
    "Connection refused": "start sshd there, or correct --host",
    "timed out": "look at the network: VPN, tailnet, Wi-Fi",
    "python3": "install python3 there",
}
Tell = Callable[[str], None]


def needs_llama_common() -> None:
    """It is on no index, so pipx leaves it out. Raises LocalClaudeError where it is not installed."""
    if importlib.util.find_spec("llama_common") is None:
        raise LocalClaudeError(
            EXIT_NOT_STARTED,
            "what starts a llama-server, llama_common, is not installed",
            "type where the checkout is: pipx inject local-claude ./apps/llama_common",
        )


def here(wanted: Options, folder: Path, tell: Tell) -> tuple[Kept, Server]:
    """llama-server on a free port of this machine. Raises LocalClaudeError."""
    needs_llama_common()
    from local_claude import llama, survey

    server = os.environ.get("LOCAL_CLAUDE_LLAMA_SERVER", "")
    models = os.environ.get("LOCAL_CLAUDE_MODELS", "")
    plan = llama.plan(survey.survey(server, models), wanted, lambda files: pick(files, wanted))
    port, key = free_port(), secrets.token_hex(16)
    command = plan.command(f"{LOCAL}:{port}")
    show(plan.notes, command, tell)
    order = Order(
        "llama-server",
        tuple(command),
        {"LLAMA_API_KEY": key},
        log_file(folder, "llama-server"),
        what=plan.what,
    )
    return started(order, Server("http", LOCAL, port, key), tell)


def there(wanted: Options, folder: Path, tell: Tell) -> tuple[Kept, Server]:
    """llama-server on the host that ssh knows, on a socket for its user alone. Raises LocalClaudeError."""
    needs_llama_common()
    from local_claude import llama

    to = destination(wanted.host or "")
    plan = llama.plan(far_survey(to), wanted, lambda files: pick(files, wanted))
    port, key = free_port(), secrets.token_hex(16)
    place = f"/tmp/local-claude-{secrets.token_hex(8)}"  # noqa: S108 - made there by its keeper, for its user alone
    command = plan.command(f"{place}/s.sock")
    show(plan.notes, command, tell)
    orders = {
        "program": inspect.getsource(keeper) + _KEEP,
        "argv": command,
        "env": {"LLAMA_API_KEY": key},
        "log": keeper.HERE,
        "silence_s": SILENCE_S,
        "folder": place,
    }
    forward = ("-o", "ExitOnForwardFailure=yes", "-L", f"{LOCAL}:{port}:{place}/s.sock")
    order = Order(
        f"llama-server on {to}",
        (*ssh(), *forward, "--", to, far_command()),
        log=log_file(folder, "ssh"),
        first_line=json.dumps(orders),
        what=f"{to}: {plan.what}",
    )
    return started(order, Server("http", LOCAL, port, key), tell)


def apple(folder: Path, tell: Tell) -> tuple[Kept, Server]:
    """apfel on a free port. Raises LocalClaudeError."""
    port, key = free_port(), secrets.token_hex(16)
    argv = ("apfel", "--serve", "--host", LOCAL, "--port", str(port))
    order = Order("apfel", argv, {"APFEL_TOKEN": key}, log_file(folder, "apfel"))
    return started(order, Server("http", LOCAL, port, key), tell, path="/v1/models")


def started(order: Order, server: Server, tell: Tell, path: str = "/health") -> tuple[Kept, Server]:
    """Start it and wait until it answers; it is stopped again when it does not."""
    kept = Kept(order)
    try:
        tell(f"starting {order.name}")
        kept.wait_ready(answers(server, path), START_TIMEOUT_S, tell, "the lines above say why")
    except BaseException:
        kept.stop()
        raise
    return kept, server


def show(notes: tuple[str, ...], command: list[str], tell: Tell) -> None:
    """What is about to be started, in lines."""
    for note in notes:
        tell(note)
    tell(shlex.join(command))


def planned(wanted: Options) -> Iterator[str]:
    """For --dry-run: the command that would be started, and why."""
    needs_llama_common()
    from local_claude import llama, survey

    if wanted.backend == "remote-llama":
        found = far_survey(destination(wanted.host or ""))
    else:
        given = os.environ.get
        found = survey.survey(given("LOCAL_CLAUDE_LLAMA_SERVER", ""), given("LOCAL_CLAUDE_MODELS", ""))
    plan = llama.plan(found, wanted, lambda files: pick(files, wanted))
    yield from (f"# {note}" for note in plan.notes)
    yield shlex.join(plan.command(f"{LOCAL}:8080"))


def pick(files: list[Any], wanted: Options) -> Any:
    """Let a person choose a file; None where nobody is there."""
    if not wanted.interactive:
        return None
    from local_claude.choose import choose

    rows = [f"{file.name:<60} {file.size / 2**30:6.1f} GiB" for file in files]
    number = choose("GGUF files", rows)
    return None if number is None else files[number]


def log_file(folder: Path, name: str) -> Path:
    """Where a server of this session writes; removed when the session ends well."""
    place = folder / "local-claude"
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    return place / f"{name}-{os.getpid()}.log"


def destination(host: str) -> str:
    """--host as ssh may get it. Raises LocalClaudeError."""
    if not _DESTINATION.match(host):
        raise LocalClaudeError(
            EXIT_USAGE, f"--host {shown(host)} is nothing for ssh", "write it like llm@ancalagon"
        )
    return host


def ssh() -> tuple[str, ...]:
    """A connection of its own: it asks nothing, and ends when the other side is gone."""
    options = {
        "BatchMode": "yes",
        "ConnectTimeout": "10",
        "ControlMaster": "no",
        "ControlPath": "none",
        "ForwardAgent": "no",
        "ServerAliveInterval": "5",
        "ServerAliveCountMax": "3",
        "LogLevel": "ERROR",
    }
    return ("ssh", "-T", *(word for name, value in options.items() for word in ("-o", f"{name}={value}")))


def far_command() -> str:
    """What the shell there is to run: everything else comes over standard input."""
    return f"exec python3 -c {shlex.quote(_FIRST)}"


def far_survey(to: str) -> dict[str, Any]:
    """The survey of the host that ssh knows. Raises LocalClaudeError."""
    from llama_common import gguf

    from local_claude import survey

    orders = {
        "program": _SURVEY,
        "modules": [
            ("llama_common", ""),
            ("llama_common.gguf", inspect.getsource(gguf)),
            ("local_claude", ""),
            ("local_claude.keeper", inspect.getsource(keeper)),
            ("local_claude.survey", inspect.getsource(survey)),
        ],
        "server": os.environ.get("LOCAL_CLAUDE_REMOTE_LLAMA_SERVER", ""),
        "folder": os.environ.get("LOCAL_CLAUDE_REMOTE_MODELS", ""),
    }
    me = os.getpid()
    try:
        done = subprocess.run(
            [*ssh(), "--", to, far_command()],
            input=f"{json.dumps(orders)}\n",
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SURVEY_TIMEOUT_S,
            check=False,
            preexec_fn=lambda: keeper.die_with(me),
        )
        found = json.loads(done.stdout) if done.returncode == 0 else None
    except FileNotFoundError:
        raise LocalClaudeError(EXIT_NOT_STARTED, "ssh is not installed", "install an SSH client") from None
    except subprocess.TimeoutExpired:
        raise LocalClaudeError(
            EXIT_NOT_STARTED, f"{to} gave no answer within {SURVEY_TIMEOUT_S:g} s", f"look: ssh {to} true"
        ) from None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ssh_error(to, done.stderr)
    return found


def ssh_error(to: str, said: str) -> LocalClaudeError:
    """What ssh said, in one line with the fix that goes with it."""
    lines = [line for line in said.splitlines() if line.strip()]
    last = one_line(lines[-1]) if lines else "no reason given"
    fix = next((fix.format(to=to) for part, fix in _SSH_FIX.items() if part in said), f"look: ssh {to} true")
    return LocalClaudeError(EXIT_NOT_STARTED, f"ssh {to}: {last}", fix)
