"""Clients that people use, against the gateway on a real host: the openai and anthropic packages."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import anthropic
import httpx
import openai
import pytest

from scripts._compare import prompt_cache_trouble, tool_call_trouble
from tests import support
from tests.lab.test_lmswitch import Box
from tests.lab.tool_template import CHOOSES, ONLY_TOOLS, tool_template

TIMEOUT_S = 240
QUESTION = "What is the capital of France?"
NO_KEY = "none"  # the lab has no keys; the packages insist on a word
CITIES = ["Paris", "London"]
WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": CITIES}},  # else a base model never ends the word
    "required": ["city"],
}
FUNCTION: dict[str, Any] = {"name": "weather", "description": "The weather in a city", "parameters": WEATHER}
ASKED = {"role": "user", "content": "What is the weather in Paris?"}


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


def test_anthropic_counts_tokens(anthropic_client: anthropic.Anthropic, preset: str) -> None:
    counted = anthropic_client.messages.count_tokens(
        model=preset, messages=[{"role": "user", "content": QUESTION}]
    )
    assert counted.input_tokens > 5


@pytest.fixture(scope="module")
def caller(url: str, on_host: Callable[..., support.Run], lab_hostvars: dict[str, Any]) -> Iterator[str]:
    """The preset for agents, which has to call a tool where a request requires one."""
    presets = support.expected().config.llama_presets
    preset = next(name for name, data in presets.items() if data.agent)
    with tool_template(Box(on_host, lab_hostvars[support.LLM]), preset, CHOOSES, *ONLY_TOOLS):
        yield preset


@pytest.mark.long
def test_what_an_update_asks_of_a_release_is_answered_by_one_that_works(url: str, caller: str) -> None:
    """Else both releases would fail there, and that is held against neither."""

    def ask(path: str, body: Mapping[str, Any]) -> Any:
        reply = httpx.post(f"{url}{path}", json={"model": caller, **body}, timeout=TIMEOUT_S)
        return reply.raise_for_status().json()

    assert tool_call_trouble(ask) == prompt_cache_trouble(ask) == ""


@pytest.mark.parametrize("stream", [False, True])
def test_openai_calls_a_tool(openai_client: openai.OpenAI, caller: str, stream: bool) -> None:
    def ask(*messages: Any) -> tuple[str | None, Any, str, int]:
        """How it ended, the call without its arguments, these, and in how many pieces they came."""
        asked: dict[str, Any] = {
            "model": caller,
            "messages": [ASKED, *messages],
            "tools": [{"type": "function", "function": FUNCTION}],
            "tool_choice": "required",
            "parallel_tool_calls": False,
            "max_tokens": 64,
        }
        answer: Any = openai_client.chat.completions.create(**asked, stream=stream)
        if not stream:
            (call,) = answer.choices[0].message.tool_calls
            return answer.choices[0].finish_reason, call, call.function.arguments, 1
        choices = [chunk.choices[0] for chunk in answer if chunk.choices]
        pieces = [call for choice in choices for call in choice.delta.tool_calls or ()]
        arguments = "".join(piece.function.arguments or "" for piece in pieces)
        return choices[-1].finish_reason, pieces[0], arguments, len(pieces)

    ended, call, arguments, pieces = ask()
    assert (ended, call.function.name) == ("tool_calls", "weather") and call.id
    assert json.loads(arguments)["city"] in CITIES
    assert (pieces > 1) == stream
    called = {"id": call.id, "type": "function", "function": {"name": "weather", "arguments": arguments}}
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    ended, *_ = ask({"role": "assistant", "tool_calls": [called]}, result)
    assert ended == "tool_calls"
    print(f"openai, stream={stream}: weather({arguments}) in {pieces} pieces")


def test_openai_responses_call_a_tool(openai_client: openai.OpenAI, caller: str) -> None:
    tool: Any = {"type": "function", "strict": False, **FUNCTION}
    answer = openai_client.responses.create(
        model=caller, input=ASKED["content"], tools=[tool], tool_choice="required", max_output_tokens=64
    )
    (call,) = (item for item in answer.output if item.type == "function_call")
    assert call.name == "weather" and json.loads(call.arguments)["city"] in CITIES


@pytest.mark.parametrize("stream", [False, True])
def test_anthropic_calls_a_tool(anthropic_client: anthropic.Anthropic, caller: str, stream: bool) -> None:
    tool = {"name": "weather", "description": FUNCTION["description"], "input_schema": WEATHER}

    def ask(*messages: Any) -> tuple[anthropic.types.Message, list[str]]:
        """The message, and the pieces that the call's input came in."""
        asked: dict[str, Any] = {
            "model": caller,
            "max_tokens": 64,
            "messages": [ASKED, *messages],
            "tools": [tool],
            "tool_choice": {"type": "any"},
        }
        if not stream:
            return anthropic_client.messages.create(**asked), []
        with anthropic_client.messages.stream(**asked) as events:
            pieces = [event.partial_json for event in events if event.type == "input_json"]
            return events.get_final_message(), pieces

    message, pieces = ask()
    call = next(block for block in message.content if block.type == "tool_use")
    assert (message.stop_reason, call.name) == ("tool_use", "weather") and call.id
    assert isinstance(call.input, dict) and call.input["city"] in CITIES
    assert (len(pieces) > 1) == stream
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    called = call.model_dump(include={"type", "id", "name", "input"})
    message, _ = ask({"role": "assistant", "content": [called]}, {"role": "user", "content": [result]})
    assert message.stop_reason == "tool_use"
    print(f"anthropic, stream={stream}: weather({call.input}) in {len(pieces) or 1} pieces")
