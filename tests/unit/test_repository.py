"""What holds for the repository as a whole."""

from __future__ import annotations

from tests import support

LIMIT_BYTES = 1_000_000


def test_no_file_is_over_one_megabyte() -> None:
    listed = support.run("git", "ls-files", "-z").check().stdout
    files = [support.ROOT / name for name in listed.split("\0") if name]
    assert files
    large = [str(path) for path in files if path.is_file() and path.stat().st_size > LIMIT_BYTES]
    assert not large, f"over {LIMIT_BYTES} bytes: {large}"
