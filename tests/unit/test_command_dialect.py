"""What --help says about a binary's flags."""

from __future__ import annotations

import pytest
from llama_common.dialect import CURRENT, Dialect

from tests.unit.test_command import CURRENT_HELP, OLD_HELP

HELP = Dialect.from_help(CURRENT_HELP)


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("-h", 0), ("--usage", 0), ("-t", 1), ("--threads", 1), ("-ctk", 1), ("--mlock", 0),
        ("--override-tensor", 1), ("-ncmoe", 1), ("--n-cpu-moe", 1), ("-fit", 1), ("--fit", 1),
        ("--control-vector-layer-range", 2), ("--temperature", 1), ("--spec-draft-model", 1), ("-md", 1),
        ("--spec-type", 1), ("--no-webui", 0), ("--slots", 0), ("--no-slots", 0), ("--flash-attn", 1),
    ],
)  # fmt: skip
def test_every_spelling_is_known_with_its_values(flag: str, values: int) -> None:
    """Short, long and negative spellings, with the hint on the same line whatever its width."""
    assert HELP.knows(flag)
    assert HELP.values(flag) == values


@pytest.mark.parametrize("flag", ["--draft-max", "--draft", "--draft-n"])
def test_removed_flags_are_not_known(flag: str) -> None:
    """The help still lists them; the binary ends with an error when they are used."""
    assert not HELP.knows(flag)
    assert "--spec-ngram-mod-n-max" in HELP.removed[flag]
    assert Dialect.from_help(OLD_HELP).knows(flag)


def test_prose_is_not_a_flag() -> None:
    """Lists and headings in the help are not options."""
    assert not any(flag.strip("-") in ("", "common", "on:") for flag in HELP.hints)
    assert "-" not in HELP.hints


@pytest.mark.parametrize("text", [None, "", "bash: llama-server: cannot execute binary file"])
def test_no_help_is_the_current_dialect(text: str | None) -> None:
    """A binary that says nothing is taken for the pinned one."""
    assert Dialect.from_help(text) is CURRENT
    assert CURRENT.knows("--fit")


def test_spellings() -> None:
    """The first known one of several; the nearest one to a misspelt one."""
    assert HELP.first_known("--no-such", "--no-webui", "--no-ui") == "--no-webui"
    assert HELP.first_known("--no-such") is None
    assert HELP.closest("--treads") == "--threads"
