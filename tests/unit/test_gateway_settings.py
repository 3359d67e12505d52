"""gateway.json: what is refused, in one line with the remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from llmbox import rendered
from llmbox.errors import UsageError
from llmbox.gateway.settings import load

from tests.unit.gateway_settings import settings


def write(folder: Path, **changed: object) -> Path:
    """A sound file with these changes; None takes a key out."""
    fields = {**settings().model_dump(), **changed}
    path = folder / "gateway.json"
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))
    return path


def test_a_sound_file_is_read(tmp_path: Path) -> None:
    assert load(write(tmp_path, max_body=5000, max_buffered=5000)) == settings(
        max_body=5000, max_buffered=5000
    )


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"max_body": 5001, "max_buffered": 5000},
            "max_body = 5001 is larger than max_buffered = 5000: a body of that size could never be kept; "
            "lower the one or raise the other",
        ),
        ({"networks": ["10.0.0.1/8"]}, "networks = ['10.0.0.1/8']: 10.0.0.1/8 has host bits set"),
        ({"hold_timeout": -1}, "hold_timeout = -1: "),
        ({"switch_policy": False}, "switch_policy = False: "),
        ({"max_body": None}, "max_body: Field required"),
        ({"colour": "red"}, "colour = 'red': "),
    ],
)
def test_what_cannot_be_meant_is_one_line(tmp_path: Path, changed: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError) as refused:
        load(write(tmp_path, **changed))
    line = str(refused.value)
    assert said in line and "\n" not in line and "Value error" not in line
    assert line.endswith("; run the playbook llm_server.yml, which writes it")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read (No such file or directory)"),
        (b"{", "is not JSON (line 1"),
        (b'{"max_body": "\xff"}', "is not usable JSON"),
        (b"[" * 100_000, "is not usable JSON"),
        (b"[1]", "the whole = [1]: "),
    ],
)
def test_what_is_no_settings_file_is_one_line(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "gateway.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError) as refused:
        load(path)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_the_check_of_the_role_says_it_and_exits_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, max_body=-1)
    monkeypatch.setattr("sys.argv", ["settings", str(path)])
    assert rendered.main(load) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "max_body = -1: " in said.err
    write(tmp_path)
    assert rendered.main(load) == 0
