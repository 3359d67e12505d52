"""What holds for the repository as a whole."""

from __future__ import annotations

import yaml
from llama_common.presets import DEFAULT_LISTEN

from tests import support

LIMIT_BYTES = 1_000_000


def test_no_file_is_over_one_megabyte() -> None:
    listed = support.run("git", "ls-files", "-z").check().stdout
    files = [support.ROOT / name for name in listed.split("\0") if name]
    assert files
    large = [str(path) for path in files if path.is_file() and path.stat().st_size > LIMIT_BYTES]
    assert not large, f"over {LIMIT_BYTES} bytes: {large}"


def test_what_the_data_model_assumes_is_what_the_role_does() -> None:
    defaults = yaml.safe_load((support.ROOT / "roles/llama_presets/defaults/main.yml").read_text())
    assert defaults["llama_presets_listen"] == DEFAULT_LISTEN
