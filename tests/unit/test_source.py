"""The text of a variable file: what Ansible would tell without file, key or fix is one line with these."""

from __future__ import annotations

import pytest
from llama_common.source import Document


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("- a\n- b\n", '1: (file) = "a list": holds no variables'),
        ("# words\njust text\n", '2: (file) = "a single value": holds no variables'),
        ("b: 1\na: &x [*x]\n", '2: a.0 = "*alias": contains itself'),
        ("a: &x {b: {c: *x}}\n", '1: a.b.c = "*alias": contains itself'),
        ("a: {b: !foo 1}\n", '1: a.b = "!foo": is a YAML tag that Ansible does not know'),
        (
            "b: 1\na: {{ ctx }}\n",
            '2: a = "{{ … }}": has a list or a mapping where the name of a key must stand',
        ),
        ("? [a, b]\n: 1\n", "where the name of a key must stand"),
        ("a:\n  b: 2026-02-30\n", '2: a.b = "2026-02-30": is no timestamp that exists'),
        ("a: !!int abc\n", '1: a = "abc": is no int that exists'),
        ("x:\n  <<: 1\n", '2: x.<< = "…": merges what is no mapping'),
        ("a: " + "[" * 3000 + "]" * 3000 + "\n", "is nested too deeply to be read"),
        ("a: !!python/object:os.system {}\n", "is a YAML tag that Ansible does not know"),
    ],
)
def test_odd_yaml_is_one_line(text: str, line: str) -> None:
    (found,) = Document.read(text).problems
    said = found.problem.line(f"file:{found.line}")
    assert line in said and "; fix: " in said and "\n" not in said


@pytest.mark.parametrize(
    "text",
    [
        "",
        "---\n",
        "a: !vault |\n  x\nb: !unsafe '{{'\n",
        "a: &x {b: 1}\nc:\n  <<: *x\n  d: *x\n",
        "a: [x, 2020-01-01, 1.5, null, true, !!str 1]\n",
    ],
)
def test_what_ansible_reads_is_left_to_it(text: str) -> None:
    assert Document.read(text).problems == ()


def test_a_variable_beside_the_name_of_a_host_is_found() -> None:
    text = """\
all:
  children:
    box: {hosts: {other: {}}}
    llm_servers:
      hosts:
        other: {llm_gateway_listen: [bar]}
        box:
          llm_gateway_listen:
            - foo
"""
    document = Document.read(text)
    assert document.line_of_host("box", ["llm_gateway_listen", "0"]) == 9
    assert document.line_of_host("box", ["llama_presets"]) is None
    assert document.line_of_host("nobody", ["llm_gateway_listen"]) is None
    assert Document.read("").line_of_host("box", ["x"]) is None
