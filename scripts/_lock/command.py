"""The command itself: arguments, the order of the steps, what is printed, the exit code."""

from __future__ import annotations

import argparse
import functools
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import CannotRunError, Lock, RefusedError, git, headers, inventory, lockfile
from .hub import DEFAULT_ENDPOINT, Hubs
from .inventory import Requests

ENDPOINT = re.compile(r"https?://[^\s/@?#]+(?:/[^\s@?#]*)?")


def progress(line: str) -> None:
    """Say on stderr what is going on."""
    print(f"lock_models: {line}", file=sys.stderr, flush=True)


def selected(requests: Requests, only: Sequence[str]) -> Requests:
    """The requests that `--only` names, or all. Raises CannotRunError for a name that needs no lock."""
    known = sorted([*requests.builds, *requests.models, *requests.headers])
    for name in only:
        if name not in known:
            names = ", ".join(known) or "nothing in this inventory"
            raise CannotRunError(f"--only {name}: no build with ref, no model to lock; fix: one of {names}")
    if not only:
        return requests
    return Requests(
        {name: one for name, one in requests.builds.items() if name in only},
        {name: one for name, one in requests.models.items() if name in only},
        {name: one for name, one in requests.headers.items() if name in only},
    )


def resolve_all(requests: Requests, hubs: Hubs, old: Lock) -> Lock:
    """Ask for everything, so that one run reports everything that fails.

    Raises CannotRunError or RefusedError with a line for each failure.
    """
    questions: list[tuple[str, str, str, Callable[[], dict[str, Any]]]] = [
        *(
            ("builds", one.name, f"{one.ref} of {one.repo}", functools.partial(git.resolve, one))
            for one in requests.builds.values()
        ),
        *(
            (
                "models",
                one.name,
                f"{one.revision} of {one.repo}",
                functools.partial(hubs.resolve, one, old["models"].get(one.name)),
            )
            for one in requests.models.values()
        ),
    ]
    lock: Lock = {kind: {} for kind in lockfile.KINDS}
    refused: list[str] = []
    unknown: list[str] = []
    for kind, name, what, ask in questions:
        progress(f"asking for {what}")
        try:
            lock[kind][name] = ask()
        except RefusedError as error:
            refused.append(str(error))
        except CannotRunError as error:
            unknown.append(str(error))
    lines = "\n".join(dict.fromkeys(refused + unknown))
    if unknown:
        raise CannotRunError(lines)
    if refused:
        raise RefusedError(lines)
    return lock


def update(arguments: argparse.Namespace) -> int:
    """Do what the command line asks. Returns the exit code. Raises CannotRunError or RefusedError."""
    where: Path = arguments.inventory
    path = lockfile.path_of(where)
    old = lockfile.read(path)
    requests = inventory.read(where)
    with Hubs(arguments.hub_endpoint, os.environ) as hubs:
        wanted = selected(requests, arguments.only)
        answers = resolve_all(wanted, hubs, old)
        answers["headers"] = headers.resolve_all(wanted, answers["models"], hubs, old["headers"], progress)
        for note in hubs.notes:
            progress(f"note: {note}")
    # What nothing asks for any more goes, except in a partial run, which touches nothing else.
    new: Lock = {kind: {**old[kind], **answers[kind]} for kind in old} if arguments.only else answers

    command = f"scripts/lock_models.py --inventory {lockfile.shown(where)}"
    content = lockfile.render(new, path, command)
    for line in lockfile.differences(old, new):
        print(line)
    locked = f"{len(new['builds'])} builds and {len(new['models'])} models locked"
    if not path.exists() and not any(new.values()):
        print(f"{lockfile.shown(where)}: nothing to lock: no build with ref, no model with hf")
        return 0
    if new == old and path.exists():
        print(f"{lockfile.shown(path)}: current, {locked}")
        return 0
    if arguments.check:
        print(f"{lockfile.shown(path)}: {'out of date' if path.exists() else 'missing'}; fix: {command}")
        return 1
    try:
        lockfile.write(path, content)
    except OSError as error:
        raise CannotRunError(
            f"{lockfile.shown(path)}: {error.strerror}; fix: make its folder writable"
        ) from None
    print(f"{lockfile.shown(path)}: written, {locked}")
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; argparse ends the program with exit code 2 on bad usage."""
    parser = argparse.ArgumentParser(
        prog="lock_models.py",
        description="Lock the commits of an inventory's builds and the checksums of its models.",
        epilog="Exit codes: 0 written or current; 1 out of date (--check), or refused; 2 could not run. "
        "HF_TOKEN in the environment is for gated repositories.",
    )
    parser.add_argument(
        "--inventory", type=Path, required=True, metavar="DIR", help="e.g. inventory/production"
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 when the lock is out of date"
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="lock this build or model alone; may be repeated",
    )
    parser.add_argument(
        "--hub-endpoint",
        default=os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT,
        metavar="URL",
        help=f"another hub (default: HF_ENDPOINT, or {DEFAULT_ENDPOINT})",
    )
    arguments = parser.parse_args(argv)
    if not ENDPOINT.fullmatch(arguments.hub_endpoint):
        parser.error(
            f"--hub-endpoint {arguments.hub_endpoint!r}: not a URL of a hub, such as {DEFAULT_ENDPOINT}"
        )
    return arguments


def main(argv: Sequence[str]) -> int:
    """Run the command. Returns its exit code."""
    arguments = parse(argv)
    try:
        return update(arguments)
    except (RefusedError, CannotRunError) as error:
        for line in str(error).splitlines():
            print(f"refused: {line}", file=sys.stderr)
        progress("nothing was written")
        return 1 if isinstance(error, RefusedError) else 2
    except KeyboardInterrupt:
        progress("interrupted, nothing was written")
        return 130
