"""What the modules of this role share: programs with a timeout, files written in one step."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

TIMEOUT_S = 60
FILE_MODE = 0o644


class Refused(Exception):
    """Something is not as it must be; the text is one line for the person."""


def work(module: Any, apply: Callable[[Mapping[str, Any], bool], dict[str, Any]]) -> None:
    """End the module with what `apply` makes of its parameters, given whether this is a dry run."""
    try:
        result = apply(module.params, module.check_mode)
    except (Refused, OSError) as error:
        module.fail_json(msg=str(error))
    module.exit_json(**result)


def run(
    *argv: str, timeout_s: float = TIMEOUT_S, env: Mapping[str, str] | None = None, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run a program, its messages in English. Raises Refused when it is missing or hangs."""
    try:
        return subprocess.run(
            argv,
            input=stdin,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
            env={**os.environ, "LC_ALL": "C.UTF-8", **(env or {})},
        )
    except FileNotFoundError:
        raise Refused(f"{argv[0]} is not installed on this host") from None
    except subprocess.TimeoutExpired:
        raise Refused(f"{' '.join(argv[:3])} gave no answer in {timeout_s:g} s") from None


def must(
    *argv: str, timeout_s: float = TIMEOUT_S, env: Mapping[str, str] | None = None, stdin: str = ""
) -> str:
    """The output of a program. Raises Refused with its last line when it fails."""
    done = run(*argv, timeout_s=timeout_s, env=env, stdin=stdin)
    if done.returncode != 0:
        said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise Refused(f"{' '.join(argv[:3])} failed: {said[-1] if said else f'exit {done.returncode}'}")
    return done.stdout


def present(path: Path, mode: int = FILE_MODE) -> str | None:
    """The text of a file; None unless it is a regular file of this user's with the right mode."""
    try:
        info = path.lstat()
        right = (info.st_uid, stat.S_IMODE(info.st_mode)) == (os.geteuid(), mode)
        return path.read_text(errors="replace") if right and stat.S_ISREG(info.st_mode) else None
    except OSError:
        return None


def write(path: Path, content: str | bytes, mode: int = FILE_MODE) -> None:
    """Write a file in one step; on the disk before it has its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    with fresh.open("wb") as handle:
        handle.write(content.encode() if isinstance(content, str) else content)
        handle.flush()
        os.fsync(handle.fileno())
    fresh.chmod(mode)
    fresh.replace(path)


def converge(
    wanted: Mapping[Path, str | None], *, check: bool, mode: int = FILE_MODE
) -> list[dict[str, str]]:
    """Write, or remove (None), each file that differs. Returns what Ansible shows as differences."""
    diffs = []
    for path, text in wanted.items():
        found = present(path, mode)
        if found == text and (text is not None or not os.path.lexists(path)):
            continue
        if not check and text is None:
            path.unlink(missing_ok=True)
        elif not check and text is not None:
            write(path, text, mode)
        diffs.append(
            {
                "before_header": str(path),
                "after_header": str(path),
                "before": found or "",
                "after": text or "",
            }
        )
    return diffs
