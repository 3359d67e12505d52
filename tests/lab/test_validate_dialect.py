"""What llama_common takes for granted about the pinned llama-server is what the real binaries say."""

from __future__ import annotations

import pytest
from llama_common.dialect import CURRENT, Dialect
from llama_common.fields import KV_CACHE_TYPES
from llama_common.flags import FIXED, OWNED, REPEATABLE

from tests.support import LLM, on_host


@pytest.fixture(params=["upstream", "tq3"])
def help_text(request: pytest.FixtureRequest) -> str:
    """The --help text that a release on the lab's LLM box keeps."""
    run = on_host(LLM, f"cat /opt/llama.cpp/{request.param}/current/help.txt")
    if run.rc != 0:
        pytest.skip(f"{LLM} has no release of {request.param} yet: provision the lab first")
    return run.stdout


def test_the_assumed_dialect_is_the_real_one(help_text: str) -> None:
    """Before the first build a command line is composed for this dialect: every flag of it must exist."""
    real = Dialect.from_help(help_text)
    assert {flag: real.values(flag) for flag in CURRENT.hints} == {
        flag: CURRENT.values(flag) for flag in CURRENT.hints
    }
    assert not set(CURRENT.hints) & set(real.removed)
    assert "--draft-max" in real.removed


def test_the_flags_of_keys_exist(help_text: str) -> None:
    """A flag that is refused in extra_args under a name that no binary has would protect nothing."""
    real = Dialect.from_help(help_text)
    spellings = {flag for flags in (*OWNED.values(), *FIXED.values()) for flag in flags} | REPEATABLE
    assert {flag for flag in spellings if not real.knows(flag)} == set()


def test_the_kv_cache_types_are_the_real_ones(help_text: str) -> None:
    """The list of allowed types, as the binary prints it."""
    words = " ".join(help_text.split())
    assert f"allowed values: {', '.join(KV_CACHE_TYPES)} " in words
