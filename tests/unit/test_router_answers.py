"""What makes an answer to a request with tools useless: both protocols, whole and streamed."""

from __future__ import annotations

from typing import Any

import pytest
from llm_router.answers import (
    Answer,
    early_fault,
    fault,
    leaked_tokens,
    unparsed_call,
)

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


def test_html_and_code_are_not_leaks() -> None:
    text = "<s>old</s> <b>x</b> a <| b |> c [INSTALL] List<Tool> {'name': 'Write'} <p>"
    assert leaked_tokens(text) == [] and unparsed_call(text) == ""
