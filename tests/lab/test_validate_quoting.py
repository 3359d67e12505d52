"""What systemd_quote writes reaches the program unchanged: asked of the systemd of the lab's LLM box."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator

import pytest
from llama_common.units import systemd_quote

from tests.support import LLM, on_host

UNIT = "quote-probe.service"
ANSWER = "/run/quote-probe.json"
PROGRAM = f"import sys, json; json.dump(sys.argv[1:], open('{ANSWER}', 'w'))"
ARGUMENTS = [
    "plain",
    "",
    " ",
    "two words",
    "100%",
    "%h",
    "%%",
    "$HOME",
    "${HOME}",
    "$$",
    "a$b",
    ";",
    "\\",
    "back\\slash",
    "\\n",
    "\\x41",
    '"',
    'say "hi"',
    "it's",
    "#no comment",
    "@at",
    "-",
    "--flag=value",
    "!",
    "|",
    "a;b",
    "*",
    "~",
    '{"json": [1, 2]}',
    "é漢",
    "trailing\\",
    "'",
    "`id`",
    "=",
    "a=b c",
    "<tensor name pattern>=<buffer type>",
]


@pytest.fixture
def unit() -> Iterator[str]:
    """The place of a unit that is gone afterwards."""
    path = f"/run/systemd/system/{UNIT}"
    yield path
    on_host(LLM, f"sudo rm -f {path} {ANSWER} && sudo systemctl daemon-reload")


def test_arguments_arrive_as_they_are(unit: str) -> None:
    """Blanks, quotes, backslashes, specifiers, variables, separators, letters beyond ASCII."""
    command = systemd_quote(["/usr/bin/python3", "-c", PROGRAM, *ARGUMENTS])
    text = f"[Service]\nType=oneshot\nExecStart={command}\n"
    on_host(LLM, f"sudo tee {unit} >/dev/null", stdin=text).check()
    on_host(LLM, f"sudo systemctl daemon-reload && sudo systemctl start {shlex.quote(UNIT)}").check()
    answer = on_host(LLM, f"cat {ANSWER}").check()
    assert json.loads(answer.stdout) == ARGUMENTS
