"""What makes an answer to a request with tools useless: both protocols, whole and streamed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from llm_router import answers
from llm_router.answers import (
    Answer,
    early_fault,
    fault,
    leaked_tokens,
    unparsed_call,
)
from local_claude import checks

REQUEST: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Write a file. What does <|im_start|> mean?"}],
    "tools": [{"name": "Write", "input_schema": {}}, {"type": "function", "function": {"name": "Read"}}],
}


def answer(*events: dict[str, Any]) -> Answer:
    made = Answer()
    for event in events:
        made.take(event)
    return made


def openai(content: str | None, *calls: tuple[str, str], stop: str = "stop") -> dict[str, Any]:
    tools = [{"id": "1", "function": {"name": name, "arguments": given}} for name, given in calls]
    message = {"content": content, **({"tool_calls": tools} if tools else {})}
    return {"choices": [{"message": message, "finish_reason": stop}], "usage": {"completion_tokens": 7}}


def anthropic(*blocks: dict[str, Any], stop: str = "end_turn") -> dict[str, Any]:
    return {"type": "message", "content": list(blocks), "stop_reason": stop, "usage": {"output_tokens": 7}}


def stream(*arguments: str) -> list[dict[str, Any]]:
    block = {"type": "tool_use", "name": "Write", "input": {}}
    return [
        {"type": "message_start", "message": {"usage": {"input_tokens": 5, "cache_read_input_tokens": 90}}},
        {"type": "content_block_start", "index": 1, "content_block": block},
        *(
            {"type": "content_block_delta", "index": 1, "delta": {"partial_json": piece}}
            for piece in arguments
        ),
        {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 7}},
    ]


GOOD = [
    [openai("Here it is.")],
    [openai(None, ("Write", '{"file_path": "a"}'), stop="tool_calls")],
    [openai("", ("Read", ""), stop="tool_calls")],
    [anthropic({"type": "text", "text": "Done."})],
    [anthropic({"type": "tool_use", "name": "Write", "input": {"a": 1}}, stop="tool_use")],
    stream('{"file_', 'path": "a"}'),
    [openai("<|im_start|> begins a turn.")],  # the user asked about it
    [openai('An example: {"name": "other", "arguments": {}}')],
]
BAD = [
    ([openai("")], "empty answer"),
    ([openai(" \n")], "empty answer"),
    ([anthropic()], "empty answer"),
    ([anthropic({"type": "thinking", "thinking": "hm"})], "empty answer"),
    ([openai('<tool_call>\n{"name": "Write", "arguments": {}}</tool_call>')], "was not parsed: <tool_call>"),
    ([openai('{"name": "Write", "arguments": {"file_path": "a"}}')], "was not parsed: {"),
    ([openai('I do:\n```json\n{"name": "Read", "arguments": {}}\n```')], "was not parsed: {"),
    ([openai("<function=Write>\n<parameter=file_path>")], "was not parsed: <function=Write>"),
    ([openai("Done.<|im_end|>")], "template tokens leaked: <|im_end|>"),
    ([openai("Hello <unused49>")], "template tokens leaked: <unused49>"),
    ([openai(None, ("Write", '{"content": "x<end_of_turn>"}'))], "leaked: <end_of_turn>"),
    ([openai(None, ("Write", '{"file_path": '), stop="length")], "cut off arguments of Write"),
    ([openai(None, ("Write", "a"))], "malformed arguments of Write"),
    ([openai(None, ("Write", "[1]"))], "malformed arguments of Write"),
    ([openai(None, ("Invent", "{}"))], "unknown tool: Invent"),
    (stream('{"file_', "path"), "malformed arguments of Write"),
]


# What each family of the shipped agent presets writes where its server does not parse it.
FAMILIES = {
    "gemma4": [
        ('<|tool_call>call:Write{file_path:<|"|>a<|"|>}<tool_call|>', "not parsed: <|tool_call>call:Write"),
        ("I write it.\ncall:Write{file_path:a}", "not parsed: call:Write{"),
        ("<|channel>thought\nhm<channel|>Done.", "leaked: <|channel>, <channel|>"),
        ("Done.<turn|>", "leaked: <turn|>"),
        ('Done <|"|>', 'leaked: <|"|>'),
    ],
    "qwen3-coder": [
        (
            "<tool_call>\n<function=Write>\n<parameter=file_path>\na",
            "not parsed: <tool_call> <function=Write>",
        ),
        ("Done.</tool_call>", "leaked: </tool_call>"),
        ("Done.<|im_end|>", "leaked: <|im_end|>"),
    ],
    "qwen36": [
        ("hm\n</think>\nDone.", "leaked: </think>"),
        ('<tool_call>\n{"name": "Write", "arguments": {}}', "not parsed: <tool_call>"),
    ],
    "": [  # any model's own idea of a call
        ('<invoke name="Write">', "not parsed: <invoke"),
        ('Sure:\n{"name": "Write", "arguments": {"file_path": "a"}}', 'not parsed: {"name"'),
        ('Sure:\n{"name": "Write", "arguments": {"file_path": "a', 'not parsed: {"name"'),
        ('```json\n{"arguments": {"file_path": "a"}, "name": "Write"}\n```', 'not parsed: {"arguments"'),
        ('[{"id": 1, "name": "Write", "arguments": "{}"}]', 'not parsed: {"id"'),
    ],
}


@pytest.mark.parametrize(("text", "said"), [case for cases in FAMILIES.values() for case in cases])
def test_what_a_family_of_models_leaks(text: str, said: str) -> None:
    assert said in fault(answer(openai(text)), REQUEST)


def test_every_shipped_agent_preset_has_a_family() -> None:
    file = Path(__file__).parents[2] / "inventory/production/group_vars/llm_servers/presets.yml"
    presets = yaml.safe_load(file.read_text())["llama_presets"].values()
    models = [preset["model"] for preset in presets if preset.get("agent")]
    assert models and [one for one in models if not one.startswith(tuple(filter(None, FAMILIES)))] == []


def test_the_wrapper_knows_the_same_marks() -> None:
    """It is installed without the router, so it has the pattern a second time."""
    assert checks.LEAKED.pattern == answers.LEAK.pattern


@pytest.mark.parametrize(
    ("asked", "said", "found"),
    [
        ("explain `<tool_call>`", "A `<tool_call>` is a tag around a call", ""),
        ("explain `<tool_call>`", 'It is a tag:\n{"name": "Write", "arguments": {}}', "not parsed: {"),
        ('what is\n  {"name": "Write", "arguments": {}}', 'This:\n{"name": "Write", "arguments": {}}', ""),
        ('what is <|"|> in Gemma', 'A quote is <|"|> there', ""),
        ('explain <invoke name="Write">', '`<invoke name="Write">` is a call', ""),
        ("explain `<tool_call>`", "[TOOL_CALLS]Write{}", "not parsed: [TOOL_CALLS]"),
    ],
)
def test_what_the_request_talks_about_is_no_fault(asked: str, said: str, found: str) -> None:
    for content in (asked, [{"type": "text", "text": asked}]):
        request = {**REQUEST, "messages": [{"role": "user", "content": content}]}
        told = fault(answer(openai(said)), request)
        assert found in told and bool(told) == bool(found)


def test_what_the_model_itself_said_before_excuses_nothing() -> None:
    leak = "Done <unused7> <tool_call>"
    before = [{"role": "user", "content": "go"}, {"role": "assistant", "content": leak}]
    assert "not parsed" in fault(answer(openai(leak)), {**REQUEST, "messages": before})


@pytest.mark.parametrize("events", GOOD)
def test_a_good_answer(events: list[dict[str, Any]]) -> None:
    assert fault(answer(*events), REQUEST) == ""


@pytest.mark.parametrize(("events", "said"), BAD)
def test_a_bad_answer(events: list[dict[str, Any]], said: str) -> None:
    found = fault(answer(*events), REQUEST)
    assert said in found and "\n" not in found


def test_some_faults_show_before_the_end() -> None:
    events = [{"choices": [{"delta": {"content": part}}]} for part in ("Well, <tool_", "call>", "{")]
    assert early_fault(answer(*events[:1]), REQUEST) == ""
    assert "not parsed" in early_fault(answer(*events[:2]), REQUEST)


def test_usage_counts_what_the_cache_had() -> None:
    made = answer(*stream("{}"))
    assert (made.prompt_tokens, made.output_tokens, made.stop) == (95, 7, "tool_use")


def test_usage_counts_what_went_into_the_cache() -> None:
    usage = {"input_tokens": 5, "cache_creation_input_tokens": 80, "cache_read_input_tokens": 10}
    assert answer({**anthropic(), "usage": usage}).tokens == 95


def test_html_and_code_are_not_leaks() -> None:
    text = "<s>old</s> <b>x</b> a <| b |> c [INSTALL] List<Tool> {'name': 'Write'} <p>"
    assert leaked_tokens(text) == [] and unparsed_call(text) == ""
