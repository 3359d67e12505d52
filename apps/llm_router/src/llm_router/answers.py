"""Whether a model's answer to a request with tools can be used: a tool call that failed silently is a 200.

Pure, standard library only: the router's hook and scripts/verify_agent.py both judge by it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

# Marks of chat templates that a server should have taken out. Not <s> or <b>: that is HTML.
# local_claude.checks has the same pattern, as it is installed without the other apps; a test compares them.
LEAK = re.compile(
    r"<unused\d+>|<\|[a-z][a-z0-9_]{1,30}\|?>|<[a-z][a-z0-9_]{1,30}\|>|<\|\\?\"\|>"
    r"|<\uff5c[^\uff5c<>]{1,40}\uff5c>"
    r"|</?(?:start_of_turn|end_of_turn|tool_call|tool_response|function_calls|think|bos|eos)>"
    r"|<function=[\w.-]+>|</function>|<parameter=[\w.-]+>|<invoke name=\\?\"[\w.-]+\\?\">"
    r"|\[/?(?:INST|TOOL_CALLS|AVAILABLE_TOOLS|TOOL_RESULTS)\]"
)
_CALL_MARK = re.compile(
    r"<tool_call>|<\|tool_call>|^call:[\w.-]{1,64}\{|<function=[\w.-]+>|<invoke name=\"[\w.-]+\">"
    r"|\[TOOL_CALLS\]|<\|python_tag\|>|<\uff5ctool\u2581call\w*\u2581begin\uff5c>",
    re.MULTILINE,
)
_NAMES, _ARGUMENTS = ("name", "tool", "function", "tool_name"), ("arguments", "parameters", "input", "args")
_OBJECT = re.compile(r"^[ \t]*(?:\[\s*)?(?=\{\s*\")", re.MULTILINE)
_CALL_HEAD = re.compile(
    rf'\{{\s*"(?:{"|".join(_NAMES)})"\s*:\s*"([\w.-]{{1,64}})"\s*,\s*"(?:{"|".join(_ARGUMENTS)})"\s*:'
)
_JSON = json.JSONDecoder(strict=False)
_EXCERPT = 80
_LOOKED_AT = 200_000  # characters of a text: what leaks, leaks at once
_OBJECTS = 100  # JSON objects of a text that are read: nested ones are read once for each level


@dataclass
class Called:
    """A tool call as the server parsed it; `arguments` is the JSON text of its arguments."""

    name: str = ""
    arguments: str = ""


@dataclass
class Answer:
    """What a model answered, put together from a whole answer or from the events of a stream."""

    text: str = ""
    thought: str = ""
    calls: dict[int, Called] = field(default_factory=dict)
    stop: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    parts: int = 0  # pieces of text, thought or arguments that came

    @property
    def tokens(self) -> int:
        """What it took, as far as its server has told."""
        return self.prompt_tokens + self.output_tokens

    @property
    def said(self) -> bool:
        """Whether a call or a visible character has come."""
        return bool(self.calls) or bool(self.text.strip())

    def take(self, event: Mapping[str, Any]) -> None:
        """Add a whole answer, a chunk or an event of either protocol."""
        before = self._length()
        if "choices" in event:
            self._take_openai(event)
        elif event.get("type") == "message":
            self._take_message(event)
        else:
            self._take_event(event)
        self.parts += self._length() > before

    def estimate(self, body: Mapping[str, Any]) -> bool:
        """Put in for what a server did not tell, as its answer was left too early; whether it had to be.

        A token for each part that came, as servers stream them, and one for each four characters of the
        request's JSON, which is about what tokenizers make of English and of code.
        """
        if self.stop or not self.parts or (self.prompt_tokens and self.output_tokens):
            return False
        self.prompt_tokens = self.prompt_tokens or len(json.dumps(body, default=str)) // 4
        self.output_tokens = self.output_tokens or self.parts
        return True

    def _length(self) -> int:
        called = sum(len(call.name) + len(call.arguments) for call in self.calls.values())
        return len(self.text) + len(self.thought) + called

    def _take_openai(self, event: Mapping[str, Any]) -> None:
        self._take_usage(event.get("usage"), "prompt_tokens", "completion_tokens")
        for choice in (event.get("choices") or [])[:1]:
            part = choice.get("message") or choice.get("delta") or {}
            self.text += _text(part.get("content"))
            self.thought += _text(part.get("reasoning_content"))
            self.stop = str(choice.get("finish_reason") or self.stop)
            for place, call in enumerate(part.get("tool_calls") or []):
                index = call.get("index")
                called = self.calls.setdefault(place if index is None else int(index), Called())
                function = call.get("function") or {}
                called.name += str(function.get("name") or "")
                called.arguments += str(function.get("arguments") or "")

    def _take_message(self, event: Mapping[str, Any]) -> None:
        self._take_usage(event.get("usage"), "input_tokens", "output_tokens")
        self.stop = str(event.get("stop_reason") or self.stop)
        for place, block in enumerate(event.get("content") or []):
            self._begin(place, block)

    def _take_event(self, event: Mapping[str, Any]) -> None:
        kind = event.get("type")
        if kind == "message_start":
            self._take_usage((event.get("message") or {}).get("usage"), "input_tokens", "output_tokens")
        elif kind == "content_block_start":
            self._begin(int(event.get("index") or 0), event.get("content_block") or {})
        elif kind == "content_block_delta":
            delta = event.get("delta") or {}
            self.text += _text(delta.get("text"))
            self.thought += _text(delta.get("thinking"))
            if (called := self.calls.get(int(event.get("index") or 0))) is not None:
                called.arguments += _text(delta.get("partial_json"))
        elif kind == "message_delta":
            self._take_usage(event.get("usage"), "input_tokens", "output_tokens")
            self.stop = str((event.get("delta") or {}).get("stop_reason") or self.stop)

    def _begin(self, place: int, block: Mapping[str, Any]) -> None:
        if block.get("type") == "tool_use":
            given = block.get("input")
            self.calls[place] = Called(str(block.get("name") or ""), json.dumps(given) if given else "")
        elif block.get("type") == "text":
            self.text += _text(block.get("text"))
        elif block.get("type") == "thinking":
            self.thought += _text(block.get("thinking"))

    def _take_usage(self, usage: Any, prompt: str, output: str) -> None:
        if isinstance(usage, Mapping):
            cached = int(usage.get("cache_read_input_tokens") or 0)
            cached += int(usage.get("cache_creation_input_tokens") or 0)
            self.prompt_tokens = max(self.prompt_tokens, int(usage.get(prompt) or 0) + cached)
            self.output_tokens = max(self.output_tokens, int(usage.get(output) or 0))


def fault(answer: Answer, request: Mapping[str, Any]) -> str:
    """Why a whole answer is of no use to the request, in a few words; or nothing.

    Marks that the request itself contains are talked about, not leaked.
    """
    if not answer.said:
        return "empty answer"
    if found := early_fault(answer, request):
        return found
    known = tool_names(request)
    for called in answer.calls.values():
        if known and called.name not in known:
            return f"call of an unknown tool: {_excerpt(called.name)}"
        if not _is_object(called.arguments):
            cut = answer.stop in ("length", "max_tokens")
            return f"{'cut off' if cut else 'malformed'} arguments of {called.name}"
    return ""


def early_fault(answer: Answer, request: Mapping[str, Any]) -> str:
    """The faults that can be told before an answer is whole."""
    text = answer.text[:_LOOKED_AT]
    calls = list(_calls(text, tool_names(request)))
    leaks = leaked_tokens(text) + leaked_tokens(
        " ".join(called.name + called.arguments for called in answer.calls.values())[:_LOOKED_AT]
    )
    if not calls and not leaks:
        return ""
    asked = _asked(request)
    if unparsed := [begins for mark, begins in calls if mark not in asked]:
        return f"a tool call that was not parsed: {unparsed[0]}"
    if fresh := [token for token in leaks if token not in asked]:
        return f"template tokens leaked: {', '.join(fresh[:3])}"
    return ""


def leaked_tokens(text: str) -> list[str]:
    """The marks of chat templates in a text, each once."""
    return list(dict.fromkeys(LEAK.findall(text)))


def unparsed_call(text: str, tools: frozenset[str] = frozenset()) -> str:
    """The beginning of a tool call that stands in a text instead of beside it; or nothing.

    With `tools` a JSON object is a call only when it names one of them.
    """
    return next((begins for _, begins in _calls(text, tools)), "")


def _calls(text: str, tools: frozenset[str]) -> Iterator[tuple[str, str]]:
    """What looks like a call in a text: the mark that gives it away, for JSON the call, and its beginning."""
    for mark in _CALL_MARK.finditer(text):
        yield mark[0], _excerpt(text[mark.start() :])
    for place in islice(_OBJECT.finditer(text), _OBJECTS):
        if _is_call(text, place.end(), tools):
            yield _excerpt(text[place.end() :]), _excerpt(text[place.end() :])


def _is_call(text: str, start: int, tools: frozenset[str]) -> bool:
    """Whether the JSON object that begins there is a call; of one that is not whole its head must tell."""
    try:
        found, _ = _JSON.raw_decode(text, start)
    except (ValueError, RecursionError):
        head = _CALL_HEAD.match(text, start)
        return head is not None and (not tools or head[1] in tools)
    names = [found[name] for name in _NAMES if isinstance(found.get(name), str)]
    return any(name in found for name in _ARGUMENTS) and any(not tools or name in tools for name in names)


def tool_names(request: Mapping[str, Any]) -> frozenset[str]:
    """The tools that a request of either protocol offers; a server's own tools have only a type."""
    names = set()
    for tool in request.get("tools") or []:
        if isinstance(tool, Mapping):
            inner = tool.get("function")
            names.add(str((inner if isinstance(inner, Mapping) else tool).get("name") or ""))
    return frozenset(names - {""})


def _asked(request: Mapping[str, Any]) -> str:
    """All that a request says, for looking a mark up; made only when there is one."""
    return " ".join(" ".join(_strings([request.get("system"), request.get("messages")])).split())


def _strings(value: Any) -> Iterator[str]:
    """The texts in it, but for the model's own: they may be what leaked before and was passed on."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping) and value.get("role") != "assistant":
        for one in value.values():
            yield from _strings(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _strings(one)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _is_object(text: str) -> bool:
    try:
        return not text.strip() or isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _excerpt(text: str) -> str:
    return " ".join(text[: 4 * _EXCERPT].split())[:_EXCERPT]
