"""Clients that people use, against the gateway on a real host: the openai and anthropic packages."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import anthropic
import openai
import pytest

from tests import support

TIMEOUT_S = 240
QUESTION = "What is the capital of France?"
NO_KEY = "none"  # the lab has no keys; the packages insist on a word
WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
}


CALLED = '{"city": "Paris"}'


@pytest.fixture(scope="module")
def url(on_host: Callable[..., support.Run], lab_hostvars: dict[str, dict[str, Any]]) -> str:
    """The gateway; the first preset serves."""
    box = support.expected()
    on_host(support.LLM, f"sudo -u {box.user} lmswitch {box.names('user')[0]}", timeout=120).check()
    return box.url(lab_hostvars[support.LLM]["ansible_host"])


@pytest.fixture
def openai_client(url: str) -> openai.OpenAI:
    """The package as a user has it, but without its own retries."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key=NO_KEY, max_retries=0, timeout=TIMEOUT_S)


@pytest.fixture
def anthropic_client(url: str) -> anthropic.Anthropic:
    """The package as a user has it, but without its own retries."""
    return anthropic.Anthropic(base_url=url, api_key=NO_KEY, max_retries=0, timeout=TIMEOUT_S)


@pytest.fixture
def preset() -> str:
    """The preset that serves."""
    return support.expected().names("user")[0]


def test_openai_lists_the_presets(openai_client: openai.OpenAI) -> None:
    assert {model.id for model in openai_client.models.list()} == set(support.expected().names("user"))


def test_openai_chat(openai_client: openai.OpenAI, preset: str) -> None:
    answer = openai_client.chat.completions.create(
        model=preset, messages=[{"role": "user", "content": QUESTION}], max_tokens=16
    )
    assert answer.choices[0].message.content and answer.usage and answer.usage.completion_tokens <= 16


def test_openai_stream(openai_client: openai.OpenAI, preset: str) -> None:
    chunks = list(
        openai_client.chat.completions.create(
            model=preset, messages=[{"role": "user", "content": QUESTION}], max_tokens=16, stream=True
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert chunks[-1].choices[0].finish_reason


# The templates of the lab's small models know no tools: what shows here is that such requests and their
# answers pass whole, not that a model calls one.
@pytest.mark.parametrize("stream", [False, True])
def test_openai_tools(openai_client: openai.OpenAI, preset: str, stream: bool) -> None:
    tool: Any = {"type": "function", "function": {"name": "weather", "parameters": WEATHER}}
    answer: Any = openai_client.chat.completions.create(
        model=preset,
        messages=[
            {"role": "user", "content": "What is the weather in Paris?"},
            {
                "role": "assistant",
                "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "weather", "arguments": CALLED}}
                ],
            },
            {"role": "tool", "tool_call_id": "1", "content": "sunny"},
        ],
        tools=[tool],
        max_tokens=16,
        stream=stream,
    )
    last = list(answer)[-1] if stream else answer
    assert last.choices[0].finish_reason in ("stop", "length", "tool_calls")


def test_openai_responses(openai_client: openai.OpenAI, preset: str) -> None:
    answer = openai_client.responses.create(model=preset, input=QUESTION, max_output_tokens=16)
    assert answer.output_text


def test_openai_is_told_in_its_own_words(openai_client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="messages"):
        openai_client.chat.completions.create(model="x", messages="no list")  # type: ignore[arg-type]


def test_anthropic_message(anthropic_client: anthropic.Anthropic, preset: str) -> None:
    answer = anthropic_client.messages.create(
        model=preset, max_tokens=16, messages=[{"role": "user", "content": QUESTION}]
    )
    assert answer.content[0].type == "text" and answer.content[0].text
    assert 0 < answer.usage.output_tokens <= 16


def test_anthropic_stream(anthropic_client: anthropic.Anthropic, preset: str) -> None:
    with anthropic_client.messages.stream(
        model=preset, max_tokens=16, messages=[{"role": "user", "content": QUESTION}]
    ) as stream:
        assert "".join(stream.text_stream)
        assert stream.get_final_message().stop_reason


def test_anthropic_tools(anthropic_client: anthropic.Anthropic, preset: str) -> None:
    with anthropic_client.messages.stream(
        model=preset,
        max_tokens=16,
        messages=[
            {"role": "user", "content": "What is the weather in Paris?"},
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "id": "1", "name": "weather", "input": json.loads(CALLED)}],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "sunny"}]},
        ],
        tools=[{"name": "weather", "description": "The weather", "input_schema": WEATHER}],
    ) as stream:
        assert stream.get_final_message().stop_reason in ("end_turn", "max_tokens", "tool_use")


def test_anthropic_counts_tokens(anthropic_client: anthropic.Anthropic, preset: str) -> None:
    counted = anthropic_client.messages.count_tokens(
        model=preset, messages=[{"role": "user", "content": QUESTION}]
    )
    assert counted.input_tokens > 5
