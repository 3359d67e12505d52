"""What the tuner changes in an inventory: the values that it names, and not a byte beside them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from scripts._preset_edit import CannotEdit, diff, edit, find, with_ubatch
from tests.support import ROOT

PRODUCTION = ROOT / "inventory/production/group_vars/llm_servers/presets.yml"


def changed(before: str, after: str) -> list[str]:
    """The lines that went and came."""
    lines = diff(Path("f"), before, after).splitlines()[2:]
    return [line for line in lines if line[0] in "+-"]


def test_a_value_is_changed_and_its_comment_stays() -> None:
    text = PRODUCTION.read_text()
    after = edit(text, "coder", {"n_cpu_moe": 18, "threads": 6})
    assert changed(text, after) == [
        "-    n_cpu_moe: 16                    # 12 is the bench peak, but leaves no room for this context",
        "-    threads: 12",
        "+    n_cpu_moe: 18                    # 12 is the bench peak, but leaves no room for this context",
        "+    threads: 6",
    ]


def test_keys_that_are_not_there_come_after_the_one_before_them_in_the_schema() -> None:
    text = PRODUCTION.read_text()
    after = edit(text, "gemma4", {"threads": 6, "ubatch": 1024})
    assert changed(text, after) == ["+    threads: 6", '+    extra_args: [--ubatch-size, "1024"]']
    lines = after.splitlines()
    assert lines[lines.index("    threads: 6", lines.index("  gemma4:")) - 1] == "    n_cpu_moe: 8"
    entry = yaml.safe_load(after)["llama_presets"]["gemma4"]
    assert (entry["threads"], entry["extra_args"]) == (6, ["--ubatch-size", "1024"])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("extra_args: []", 'extra_args: [--ubatch-size, "64"]'),
        ("extra_args: [--mlock]  # why", 'extra_args: [--mlock, --ubatch-size, "64"]  # why'),
        (
            'extra_args: [\n      --temp, "0.7",  # its own\n      # keep\n    ]',
            'extra_args: [\n      --temp, "0.7", --ubatch-size, "64",  # its own\n      # keep\n    ]',
        ),
        (
            "extra_args: [  # none yet\n    ]  # why",
            'extra_args: [  # none yet\n    --ubatch-size, "64"]  # why',
        ),
        ("extra_args: [-ub, '512', --mlock]", 'extra_args: [-ub, "64", --mlock]'),
        (
            'extra_args:\n      - -ub  # a\n      - "512"  # b\n      - --mlock',
            'extra_args:\n      - -ub  # a\n      - "64"  # b\n      - --mlock',
        ),
        (
            "extra_args:\n    - --mlock  # why",
            'extra_args:\n    - --mlock  # why\n    - --ubatch-size\n    - "64"',
        ),
        ("description: Größe µ", 'description: Größe µ\n    extra_args: [--ubatch-size, "64"]'),
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_the_flag_in_every_way_of_writing_a_list(before: str, after: str, newline: str) -> None:
    text = "---\nllama_presets:\n  a:\n    {}\n  b: {{x: 1}}\n"
    one, other = (text.format(part).replace("\n", newline) for part in (before, after))
    assert edit(one, "a", {"ubatch": 64}) == other
    assert edit(other, "a", {"ubatch": 64}) == other


def test_a_preset_on_one_line() -> None:
    text = "llama_presets: {a: {context: 4096, n_gpu_layers: 99, expect: {}}, b: {threads: 3}}"
    after = edit(text, "a", {"threads": 2, "n_cpu_moe": 4})
    assert yaml.safe_load(after)["llama_presets"] == {
        "a": {"context": 4096, "n_gpu_layers": 99, "n_cpu_moe": 4, "threads": 2, "expect": {}},
        "b": {"threads": 3},
    }


def test_a_file_without_a_last_newline_and_one_with_a_block_text() -> None:
    assert edit("llama_presets:\n  a:\n    context: 4096", "a", {"threads": 2}).endswith(
        "    context: 4096\n    threads: 2"
    )
    text = "llama_presets:\n  a:\n    description: >\n      long\n    scope: user\n"
    after = edit(text, "a", {"n_cpu_moe": 2})
    assert (
        after == "llama_presets:\n  a:\n    description: >\n      long\n    n_cpu_moe: 2\n    scope: user\n"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("  a: &x {threads: 1}\n  b: *x\n", "shares an anchor"),
        ("  b: &x {threads: 1}\n  a: *x\n", "shares an anchor"),
        ("  b: {threads: &n 1}\n  a: {threads: *n}\n", "shares an anchor"),
        ('  a: {threads: "{{ cores }}"}\n', "no plain number; fix: write threads: 2"),
        ("  a: {threads: 0x10}\n", "no plain number"),
        ('  a: "{{ other }}"\n', "no mapping"),
        ("  b: {threads: 1}\n", "no mapping"),
    ],
)
def test_what_is_written_otherwise_is_left_alone_with_the_fix(text: str, said: str) -> None:
    with pytest.raises(CannotEdit, match=said):
        edit(f"llama_presets:\n{text}", "a", {"threads": 2})


def test_a_key_that_is_merged_in_is_overridden_not_changed_at_its_origin() -> None:
    text = "x: &x {threads: 1}\nllama_presets:\n  a:\n    <<: *x\n    context: 4096\n"
    with pytest.raises(CannotEdit, match="shares an anchor"):
        edit(text, "a", {"threads": 2})


def test_the_file_of_a_preset_is_found_by_ansibles_own_rules(tmp_path: Path) -> None:
    text = "llama_presets:\n  a: {threads: 1}\n"
    file = tmp_path / "group_vars/llm_servers/presets.yml"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    (tmp_path / "group_vars/other.yml").write_text(text)
    (tmp_path / "group_vars/all.yml").write_text("x: 1\n# llama_presets: none\n")
    assert find(tmp_path, "box", ["llm_servers"], "a") == file
    with pytest.raises(CannotEdit, match="no file of group_vars or host_vars below"):
        find(tmp_path, "box", ["llm_servers"], "b")
    host = tmp_path / "host_vars/box.yml"
    host.parent.mkdir()
    host.write_text(text)
    with pytest.raises(CannotEdit, match=r"presets.yml, .*box.yml; fix"):
        find(tmp_path, "box", ["llm_servers"], "a")


def test_the_flag_as_arguments() -> None:
    assert with_ubatch(["--mlock"], 64) == ["--mlock", "--ubatch-size", "64"]
    assert with_ubatch(["-ub", "512", "-x"], 64) == ["-ub", "64", "-x"]
