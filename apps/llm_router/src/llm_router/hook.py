"""The router's hook in LiteLLM: authentication, budgets, the check of answers, and the logs.

LiteLLM finds `authenticate` and `router_hook` by their names in config.yaml. Everything that decides is in
the modules beside this one; here LiteLLM's calls are turned into theirs.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import json
import os
import sys
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import HTTPException, Request
from litellm.integrations.custom_logger import CustomLogger  # type: ignore[import-not-found]
from litellm.proxy._types import UserAPIKeyAuth  # type: ignore[import-not-found]

from llm_router.answers import fault
from llm_router.gate import Ask, Bounds, Verdict, guarded
from llm_router.health import Watch
from llm_router.ledger import Key, Ledger, Log, Refused, Settings
from llm_router.serve import COUNT, PATHS, SETTINGS, shown_keys

MESSAGES = "@messages"  # the same presets, asked in Anthropic's protocol
CHAT = ("completion", "acompletion")
LOST = frozenset({"APIConnectionError", "InternalServerError", "Timeout"})
# A box that answers so has read the request and will not have it: the cloud is not asked then.
REFUSED = frozenset({400, 413, 422})
# What LiteLLM itself puts there for a request of either protocol; and what no client may say.
KEPT = frozenset({"metadata", "litellm_metadata"})
INSIDE = frozenset(
    {
        *("api_base", "api_key", "api_version", "base_url", "fallbacks", "context_window_fallbacks"),
        *("content_policy_fallbacks", "mock_response", "model_list", "proxy_server_request", "model_info"),
        *("num_retries", "custom_llm_provider", "extra_headers", "extra_body", "callbacks", "guardrails"),
    }
)
# What a client may say; everything else that LiteLLM would understand (api_base, fallbacks, …) is taken out.
FIELDS = frozenset(
    {
        *("model", "messages", "system", "tools", "tool_choice", "stream", "stream_options", "max_tokens"),
        *("max_completion_tokens", "temperature", "top_p", "top_k", "stop", "stop_sequences", "seed", "n"),
        *("presence_penalty", "frequency_penalty", "response_format", "parallel_tool_calls", "thinking"),
        *("logprobs", "top_logprobs", "logit_bias", "reasoning_effort", "context_management"),
    }
)
CLIENT_LEFT = "the client went away"
OPEN_REQUESTS = 10_000
CONVERSATIONS = 10_000  # of which the box is known that read them last


@dataclass
class Open:
    """A request that is not answered yet."""

    key: Key
    model: str
    messages: bool
    body: dict[str, Any]
    began: float
    left: set[int] = field(default_factory=set)  # the attempts for which it left the network
    conversation: str = ""
    box: str = ""
    tried: list[str] = field(default_factory=list)
    refused: Exception | None = None  # what a box that has read it answered
    verdict: Verdict = field(default_factory=Verdict)

    @property
    def cloud(self) -> bool:
        """Whether it left the network."""
        return bool(self.left)


class RouterHook(CustomLogger):  # type: ignore[misc]
    """One for the whole program."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        state = Path(settings.state_dir)
        self.settings = settings
        self.ledger = Ledger(settings)
        self.watch = Watch(settings.boxes, settings.health_interval)
        self._requests = Log(state / "requests.jsonl", settings.log_max_size, settings.log_keep)
        self._egress = Log(state / "egress.jsonl", settings.log_max_size, settings.log_keep)
        self._open: OrderedDict[str, Open] = OrderedDict()
        self._models = frozenset(model.name for model in settings.models)
        self._last: OrderedDict[str, str] = OrderedDict()
        self._keys: dict[str, Key] = {key.name: key for key in settings.keys}

    # --- before ---

    async def async_pre_call_hook(
        self, user_api_key_dict: Any, cache: Any, data: dict[str, Any], call_type: str
    ) -> dict[str, Any]:
        """Count the request, take out what a client may not say, choose protocol and fallback."""
        self.watch.begin()
        key = self._keys[str(user_api_key_dict.key_alias)]
        model = str(data.get("model") or "")
        sent = (data.get("proxy_server_request") or {}).get("body") or {}
        try:
            self._refuse_inside(key, model, sent)
            self.ledger.admit(key)
        except Refused as error:
            self._write(self._line(key, model[:100], status=error.status, error=str(error)))
            raise answer_of(error) from None
        for name in set(sent) - FIELDS - KEPT:
            data.pop(name, None)
        body = {name: copy.deepcopy(data[name]) for name in FIELDS & data.keys()}
        messages = call_type == "anthropic_messages"
        forget_metadata(data, messages)
        if messages:
            data["model"] = f"{model}{MESSAGES}"
        if self.settings.cloud and self.ledger.may_leave(key):
            data["fallbacks"] = [self._cloud(messages)]
        self._open[call_id(data)] = Open(
            key, model, messages, body, time.monotonic(), conversation=conversation_of(key.name, model, body)
        )
        while len(self._open) > OPEN_REQUESTS:
            self._open.popitem(last=False)
        return data

    def _refuse_inside(self, key: Key, model: str, sent: Mapping[str, Any]) -> None:
        """Raises Refused for what only the router itself may say, and for a request that names no model."""
        if not model:
            raise Refused(400, "the request names no model; /v1/models lists them")
        if model == self.settings.cloud:
            self.ledger.admit_to_cloud(key)
        # LiteLLM takes more for a model: a deployment's own name, several at once.
        if model not in self._models and not (model == self.settings.cloud and self.ledger.may_leave(key)):
            raise Refused(404, f"{model[:100]}: no such model; /v1/models lists them")
        inside = sorted(
            name for name in set(sent) - KEPT if name in INSIDE or str(name).startswith("litellm")
        )
        if inside:
            raise Refused(400, f"{inside[0]}: not for clients of this router")
        if sent.get("tools") and sent.get("n") not in (None, 1):
            raise Refused(400, "n: with tools one answer is judged; fix: leave n out, or ask several times")

    async def count(self, key: Key, request: Request) -> None:
        """A count of tokens, which no other hook sees: only for a preset, so that the prompt stays here.

        Raises Refused.
        """
        model = ""
        try:
            asked = json.loads(await request.body())
            model = str(asked.get("model") or "") if isinstance(asked, dict) else ""
            if model not in self._models:
                raise Refused(404, f"{model[:100]}: no such model to count for; /v1/models lists them")
            self.ledger.admit(key)
        except ValueError:
            raise Refused(400, "the body is no JSON object") from None
        except Refused as error:
            self._write(self._line(key, model[:100], status=error.status, error=str(error)))
            raise
        self._write(self._line(key, model, status=200, error="", protocol="anthropic", counted=True))

    async def async_filter_deployments(
        self,
        model: str,
        healthy_deployments: list[Any],
        messages: Any,
        request_kwargs: Mapping[str, Any] | None = None,
        parent_otel_span: Any = None,
    ) -> list[Any]:
        """Boxes that live, of these those that serve the preset, the least busy, who has the prompt."""
        opened = self._open.get(call_id(request_kwargs or {}))
        tried = opened.tried if opened else []
        fresh = [one for one in healthy_deployments if box_of(one) not in tried]
        chosen = self.watch.choose(fresh or healthy_deployments, model.removesuffix(MESSAGES))
        flying = Counter(one.box for one in self._open.values())
        load = [flying[box_of(one)] for one in chosen]
        idle = [one for one, count in zip(chosen, load, strict=True) if count == min(load)]
        last = self._last.get(opened.conversation) if opened else None
        return [one for one in idle if box_of(one) == last] or idle

    async def async_pre_call_deployment_hook(self, kwargs: dict[str, Any], call_type: Any) -> dict[str, Any]:
        """Write down what leaves the network, before it leaves. Raises OSError: then it does not.

        Raises what a box has answered to a request that it refuses: that one does not leave either.
        """
        places = (kwargs, kwargs.get("litellm_metadata") or {}, kwargs.get("metadata") or {})
        info: Mapping[str, Any] = next(
            (place["model_info"] for place in places if place.get("model_info")), {}
        )
        opened = self._open.get(call_id(kwargs))
        if info.get("cloud"):
            if opened is not None and opened.refused is not None:
                raise opened.refused
            self._left(kwargs, opened)
        elif opened is not None:
            opened.box = str(info.get("box") or opened.box)
            opened.tried.append(opened.box)
            self._last[opened.conversation] = opened.box
            self._last.move_to_end(opened.conversation)
            while len(self._last) > CONVERSATIONS:
                self._last.popitem(last=False)
        return kwargs

    async def async_post_call_failure_deployment_hook(
        self, request_data: Mapping[str, Any], exception: Exception, *_: Any, **__: Any
    ) -> None:
        """A box that lost a request is looked at as gone until the next look says otherwise."""
        opened = self._open.get(call_id(request_data))
        if opened is None or not opened.box:
            return
        if type(exception).__name__ in LOST:
            self.watch.lost(opened.box)
        elif getattr(exception, "status_code", None) in REFUSED:
            opened.refused = exception

    def _left(self, kwargs: Mapping[str, Any], opened: Open | None) -> None:
        sent = {name: kwargs[name] for name in sorted(FIELDS & kwargs.keys())}
        text = json.dumps(sent, ensure_ascii=False, default=str)
        if opened is not None:
            # LiteLLM's own fallback comes before the first answer is begun.
            opened.left.add(max(0, len(opened.verdict.answers) - 1))
        asked = opened is not None and opened.model == self.settings.cloud
        reason = "it was asked for" if asked else "no box answered"
        why = (opened.verdict.faults[-1:] or [reason])[0] if opened else "unknown"
        entry = {
            "time": now(),
            "key": opened.key.name if opened else None,
            "request": call_id(kwargs),
            "asked_for": opened.model if opened else None,
            "to": kwargs.get("model"),
            "why": why,
            "bytes": len(text.encode()),
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            **({"content": sent} if self.settings.egress_content else {}),
        }
        self._egress.write(entry)

    # --- after ---

    async def async_post_call_success_hook(
        self, data: dict[str, Any], user_api_key_dict: Any, response: Any
    ) -> Any:
        """A whole answer: a better one in its place where a tool call failed silently."""
        opened = self._open.get(call_id(data))
        if opened is None:
            return response
        chosen, event = response, as_mapping(response)
        answer = opened.verdict.attempt()
        answer.take(event)
        if opened.body.get("tools"):
            if kept := fault(answer, opened.body):
                chosen = await self._better(data, opened, response, kept)
            opened.verdict.judged = not opened.verdict.passed_on
        self._finish(data, opened)
        return chosen

    async def _better(self, data: Mapping[str, Any], opened: Open, response: Any, kept: str) -> Any:
        opened.verdict.faults.append(kept)
        for ask in self._again(data, opened):
            answer = opened.verdict.attempt()
            try:
                other = await ask()
            except Exception as error:  # whatever LiteLLM raises: the next one is asked
                opened.verdict.faults.append(f"the server was lost: {type(error).__name__}")
                continue
            answer.take(as_mapping(other))
            if found := fault(answer, opened.body):
                opened.verdict.faults.append(found)
                continue
            return other
        opened.verdict.passed_on = kept
        return response

    async def async_post_call_streaming_iterator_hook(
        self, user_api_key_dict: Any, response: AsyncIterator[Any], request_data: dict[str, Any]
    ) -> AsyncGenerator[Any]:
        """A stream: held back until it is known to be of use."""
        opened = self._open.get(call_id(request_data))
        if opened is None:
            async for chunk in response:
                yield chunk
            return
        bounds = Bounds(self.settings.hold_size, self.settings.hold_seconds)
        again = self._again(request_data, opened)
        error, status = "", 0
        try:
            async for chunk in guarded(response, again, opened.body, opened.verdict, bounds):
                yield chunk
        except (GeneratorExit, asyncio.CancelledError):
            error, status = CLIENT_LEFT, 499
            raise
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"
            raise
        finally:
            self._finish(request_data, opened, error, status)

    async def async_post_call_failure_hook(
        self, request_data: dict[str, Any], original_exception: Exception, *_: Any, **__: Any
    ) -> None:
        """A request that got no answer."""
        opened = self._open.get(call_id(request_data))
        if opened is not None:
            status = getattr(original_exception, "status_code", None) or 500
            self._finish(request_data, opened, str(original_exception), int(status))

    def left(self, request: str) -> None:
        """Nobody waits for this request any more; where its answer had begun that is known already."""
        if opened := self._open.get(request):
            self._finish({"litellm_call_id": request}, opened, CLIENT_LEFT, 499)

    def _again(self, data: Mapping[str, Any], opened: Open) -> list[Ask]:
        """How else the request can be answered: by the boxes once more, then by the cloud model."""
        local = f"{opened.model}{MESSAGES}" if opened.messages else opened.model
        models = [local] * self.settings.tool_retries
        if self.settings.cloud and self.ledger.may_leave(opened.key) and not opened.cloud:
            models.append(self._cloud(opened.messages))
        return [partial(self._ask, call_id(data), opened, model) for model in models]

    async def _ask(self, request: str, opened: Open, model: str) -> Any:
        from litellm.proxy.proxy_server import llm_router  # type: ignore[import-not-found]

        call = llm_router.aanthropic_messages if opened.messages else llm_router.acompletion
        body = {**copy.deepcopy(opened.body), "model": model, "litellm_call_id": request}
        return await call(**body, fallbacks=[])

    def _cloud(self, messages: bool) -> str:
        return f"{self.settings.cloud}{MESSAGES}" if messages else self.settings.cloud

    # --- the log ---

    def _finish(self, data: Mapping[str, Any], opened: Open, error: str = "", status: int = 0) -> None:
        if self._open.pop(call_id(data), None) is None:
            return
        answers = opened.verdict.answers
        estimated = [answer.estimate(opened.body) for answer in answers]
        cloud_tokens = sum(answer.tokens for number, answer in enumerate(answers) if number in opened.left)
        entry = self._line(
            opened.key,
            opened.model,
            status=status or (502 if error else 200),
            error=" ".join(error.split())[:500],
            seconds=round(time.monotonic() - opened.began, 3),
            box="" if opened.cloud else opened.box,
            cloud=opened.cloud,
            protocol="anthropic" if opened.messages else "openai",
            stream=bool(opened.body.get("stream")),
            tools=bool(opened.body.get("tools")),
            judged=opened.verdict.judged,
            faults=opened.verdict.faults,
            passed_on=opened.verdict.passed_on,
            prompt_tokens=sum(answer.prompt_tokens for answer in answers),
            output_tokens=sum(answer.output_tokens for answer in answers),
            cloud_tokens=cloud_tokens,
            estimated=any(estimated),
            request=call_id(data),
        )
        self._write(entry)
        try:
            self.ledger.spend(opened.key.name, sum(answer.tokens for answer in answers), cloud_tokens)
        except OSError as problem:
            print(f"llm-router: usage.json cannot be written: {problem}", file=sys.stderr)

    def _line(self, key: Key, model: str, **more: Any) -> dict[str, Any]:
        return {"time": now(), "key": key.name, "model": model, **more}

    def _write(self, entry: Mapping[str, Any]) -> None:
        try:
            self._requests.write(entry)
        except OSError as problem:
            print(f"llm-router: requests.jsonl cannot be written: {problem}", file=sys.stderr)


def answer_of(error: Refused) -> HTTPException:
    """A refusal as LiteLLM answers it."""
    headers = {"Retry-After": str(error.retry_after)} if error.retry_after else None
    return HTTPException(error.status, str(error), headers)


def box_of(deployment: Mapping[str, Any]) -> str:
    """The box that an entry of LiteLLM's list stands for."""
    return str((deployment.get("model_info") or {}).get("box"))


def conversation_of(key: str, model: str, body: Mapping[str, Any]) -> str:
    """What the turns of a conversation have in common: the words up to the first that the user said.

    Words only, as marks beside them (cache_control) move on from turn to turn.
    """
    said: list[str] = []
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else []:
        if not isinstance(message, Mapping):
            break
        said += _words(message.get("content"))
        if message.get("role") == "user":
            break
    return hashlib.sha256(json.dumps([key, model, said]).encode()).hexdigest()


def _words(content: Any) -> list[str]:
    if isinstance(content, str):
        return [content]
    blocks = content if isinstance(content, list) else []
    return [str(block["text"]) for block in blocks if isinstance(block, Mapping) and block.get("text")]


def call_id(data: Mapping[str, Any]) -> str:
    """LiteLLM's name for a request."""
    return str(data.get("litellm_call_id") or "")


def forget_metadata(data: dict[str, Any], messages: bool) -> None:
    """Take out what a client says of itself: no model needs it, and LiteLLM would send it to the cloud.

    LiteLLM's own stands in one of the two fields, for OpenAI's protocol among what the client said.
    """
    data.pop("metadata" if messages else "litellm_metadata", None)
    own = data.get("litellm_metadata" if messages else "metadata") or {}
    told = own.pop("requester_metadata", None) or {}
    for name in () if messages else told:
        own.pop(name, None)


def as_mapping(response: Any) -> Mapping[str, Any]:
    """A whole answer as data."""
    if isinstance(response, Mapping):
        return response
    dump = getattr(response, "model_dump", None)
    found = dump() if callable(dump) else None
    return found if isinstance(found, Mapping) else {}


def now() -> str:
    """The time of a line."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


async def authenticate(request: Request, api_key: str) -> Any:
    """LiteLLM's custom_auth: a known key, and one of the few paths that are for clients."""
    try:
        if request.url.path not in PATHS:
            raise Refused(404, f"{request.url.path}: not for clients of this router")
        key = router_hook.ledger.key(*shown_keys(request.headers))
        if request.url.path == COUNT:
            await router_hook.count(key, request)
    except Refused as error:
        raise answer_of(error) from None
    return UserAPIKeyAuth(api_key=f"sha256-{key.sha256}", key_alias=key.name, models=[])


router_hook = RouterHook(Settings.read(Path(os.environ[SETTINGS])))
