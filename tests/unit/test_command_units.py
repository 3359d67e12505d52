"""Quoting for ExecStart=, read back by the rules of systemd.service(5); tests/lab asks a real systemd."""

from __future__ import annotations

import re

import pytest
from llama_common.units import quote_argument, systemd_quote

from tests.lab.test_validate_quoting import ARGUMENTS

_WORD = re.compile(r'"((?:[^"\\]|\\.)*)"|(\S+)')


def read_back(line: str) -> list[str]:
    """The words systemd makes of a line: quotes, then backslashes inside them, then %% and $$."""
    words = []
    for quoted, bare in _WORD.findall(line):
        word = bare or re.sub(r"\\(.)", r"\1", quoted)
        words.append(word.replace("%%", "%").replace("$$", "$"))
    return words


def test_round_trip() -> None:
    """Every argument comes back."""
    assert read_back(systemd_quote(["/bin/true", *ARGUMENTS])) == ["/bin/true", *ARGUMENTS]


@pytest.mark.parametrize(
    ("argument", "quoted"),
    [
        ("--ctx-size", "--ctx-size"),
        ("", '""'),
        ("a b", '"a b"'),
        ("100%", "100%%"),
        ("$HOME", '"$$HOME"'),
        ('say "hi"', '"say \\"hi\\""'),
        ("back\\slash", '"back\\\\slash"'),
        (";", '";"'),
    ],
)
def test_one_argument(argument: str, quoted: str) -> None:
    """Plain words stay readable; the rest is quoted."""
    assert quote_argument(argument) == quoted


@pytest.mark.parametrize("argument", ["a\nb", "a\x00b", "\t", "\x1b"])
def test_control_characters_are_refused(argument: str) -> None:
    """A newline would begin another setting of the unit."""
    with pytest.raises(ValueError, match="control character"):
        quote_argument(argument)


@pytest.mark.parametrize(
    "program", ["llama-server", "-/bin/true", "@/bin/true", "/bin/tr ue", "/bin/%h", "/bin/$x", ""]
)
def test_the_program_is_an_absolute_plain_path(program: str) -> None:
    """Prefixes and specifiers would change what is run, and how."""
    with pytest.raises(ValueError, match="absolute path"):
        systemd_quote([program])
