"""What a program that has failed says, in one line. Standard library only: bootwin runs it as root."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence


def complaint(argv: Sequence[str], timeout_s: float) -> str:
    """Run a program; what it complains of, empty when it succeeds."""
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except FileNotFoundError:
        return f"{argv[0]} is not installed"
    except OSError as error:
        return f"{argv[0]} cannot be run: {error.strerror}"
    except subprocess.TimeoutExpired:
        return f"{argv[0]} did not end within {timeout_s:g} s"
    if done.returncode == 0:
        return ""
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return lines[-1] if lines else f"{argv[0]}: exit code {done.returncode}"
