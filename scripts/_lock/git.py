"""The commit behind a tag or a branch, from `git ls-remote`: nothing is cloned."""

from __future__ import annotations

import json
from typing import Any

from . import COMMIT, CannotRunError, RefusedError, last_line, refuse, run, without_token
from .inventory import BuildRequest

TIMEOUT_S = 60.0

# No question is ever asked, and no URL can make git run another program.
SETTINGS = {
    "LC_ALL": "C",
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_ASKPASS": "true",
    "SSH_ASKPASS": "true",
    "GIT_SSH_COMMAND": "ssh -o BatchMode=yes -o ConnectTimeout=10",
    "GIT_ALLOW_PROTOCOL": "https:http:ssh:git:file",
}


def full_names(ref: str) -> list[str]:
    """The full names that a ref as a person writes it can stand for."""
    return [ref] if ref.startswith("refs/") else [f"refs/heads/{ref}", f"refs/tags/{ref}"]


def commit_of(ref: str, listing: str) -> str:
    """The commit of `ref` in the output of `git ls-remote`; an annotated tag is followed to its commit.

    Raises RefusedError when there is no such ref, and when a branch and a tag share the name.
    """
    found: dict[str, str] = {}
    for line in listing.splitlines():
        commit, _, name = line.partition("\t")
        if COMMIT.fullmatch(commit):
            found[name] = commit
    candidates = [name for name in full_names(ref) if name in found]
    if not candidates:
        raise RefusedError("no such tag or branch")
    if len(candidates) > 1:
        raise RefusedError(f"both a branch and a tag have this name; fix: write {' or '.join(candidates)}")
    return found.get(candidates[0] + "^{}", found[candidates[0]])


def resolve(request: BuildRequest, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
    """The lock's entry for a build. Raises RefusedError or CannotRunError."""
    entry = {"repo": request.repo, "ref": request.ref}
    if COMMIT.fullmatch(request.ref):
        return {**entry, "commit": request.ref}
    key = f"llama_cpp_builds.{request.name}"
    # Patterns in full: a short one would also match refs/heads/anything/<ref>.
    patterns = [pattern for name in full_names(request.ref) for pattern in (name, name + "^{}")]
    command = ["git", "-c", "http.lowSpeedLimit=1", "-c", "http.lowSpeedTime=20", "ls-remote", "--"]
    where = f"{key}.repo = {json.dumps(request.repo)}"
    try:
        code, output, errors = run(
            [*command, request.repo, *patterns], timeout_s, {**without_token(), **SETTINGS}
        )
    except FileNotFoundError:
        raise CannotRunError("git is not installed; fix: install git on this machine") from None
    except CannotRunError as error:
        raise CannotRunError(f"{where}: {error}") from None
    if code != 0:
        fatal = [line for line in errors.splitlines() if line.startswith("fatal:")]
        reason = last_line(fatal[0].removeprefix("fatal:") if fatal else errors)
        raise CannotRunError(
            f"{where}: {reason}; fix: check the URL and the network: git ls-remote {request.repo}"
        )
    try:
        return {**entry, "commit": commit_of(request.ref, output)}
    except RefusedError as error:
        problem, _, fix = str(error).partition("; fix: ")
        fix = fix or f"git ls-remote {request.repo} lists them"
        refuse(f"{key}.ref", request.ref, f"{problem} in {request.repo}", fix)
