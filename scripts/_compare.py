"""Compare two releases of one build on a box, preset by preset with the same flags, one run after the other.

Each preset is put on trial (scripts/_trial.py) and asked through its gateway, with the server for itself, so
that clients are served in between and the box is as it was before afterwards.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import httpx

from scripts._ask_host import Unreachable, ask, reach
from scripts._inventory import Host
from scripts._llm_box import LlmBox
from scripts._measure import ALONE, Meter, NotLetIn, NotMeasured, Shape, Timed, prompt, refused, shapes
from scripts._refusal import KEY_VARIABLE
from scripts._trial import Trial, TrialFailed, last_words, trial
from scripts._verdict import LEAST_PAIRS, Behaviour, Comparison, judge_preset, open_yet

MOST_PAIRS = 9  # while the verdict is open
PROBE_ATTEMPTS, PROBE_PAUSE_S, PROBE_TIMEOUT_S = 3, 3.0, 300.0
# The share of a prompt's tokens that must come from the cache when it is sent a second time.
CACHED = 0.9
CACHE_WORDS = 800
TOOL = "get_weather"
TOOL_CALL = {
    "messages": [{"role": "user", "content": "What is the weather in Oslo, in celsius? Use the tool."}],
    "tools": [
        {
            "type": "function",
            "function": {
                "name": TOOL,
                "description": "The weather in a city",
                # An enumeration bounds what even the smallest model can write.
                "parameters": {
                    "type": "object",
                    "properties": {
                        "city": {"type": "string", "enum": ["Oslo", "Rome"]},
                        "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
                    },
                    "required": ["city", "unit"],
                },
            },
        }
    ],
    "tool_choice": "required",
    "temperature": 0.0,
    "max_tokens": 512,
}
Tell = Callable[[str], None]


class Refused(Exception):
    """The server answered, and not with what was asked for; the message is one line."""


def compare(host: Host, box: LlmBox, build: str, releases: tuple[str, str], tell: Tell) -> list[Comparison]:
    """Every preset of `build` under both releases, (old, new), until one speaks against the new one.

    Raises Unreachable.
    """
    wanted = [name for name in box.names("user") if box.config.llama_presets[name].build == build]
    if not wanted:
        return []
    seen = ask(host, {"llm": box.request()}, become=True)["llm"]
    key = os.environ.get(KEY_VARIABLE)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    found: list[Comparison] = []
    with (
        reach(host, box.front.host, box.front.port) as url,
        httpx.Client(base_url=url, trust_env=False, headers=headers) as client,
    ):
        for preset in wanted:
            commands = of_releases(preset, seen["presets"], releases)
            if commands is None:
                found.append(Comparison(preset, known=False))
                continue
            try:
                shape = shapes(box.slot_context(preset))[0]
                with trial(host, preset) as held:
                    meter = Meter(client, preset, tell)
                    found.append(Bench(held, client, meter, preset, shape, commands, tell).compare())
            except (TrialFailed, NotMeasured) as error:
                found.append(Comparison(preset, trouble=str(error)))
            if judge_preset(found[-1]).word == "roll back":
                break
    return found


def of_releases(
    preset: str, presets_json: Mapping[str, Any] | None, releases: tuple[str, str]
) -> tuple[list[str], list[str]] | None:
    """The preset's command line with the program of either release; None when the box has no such preset."""
    command = ((presets_json or {}).get("presets", {}).get(preset) or {}).get("command")
    if not command or "/current/" not in command[0]:
        return None
    old, new = ([command[0].replace("/current/", f"/releases/{one}/"), *command[1:]] for one in releases)
    return old, new


class Bench:
    """One preset, two command lines: who serves now, and what was found so far.

    `is_open` says whether more pairs could still decide it.
    """

    def __init__(
        self,
        held: Trial,
        client: httpx.Client,
        meter: Meter,
        preset: str,
        shape: Shape,
        commands: tuple[list[str], list[str]],
        tell: Tell,
        sleep: Callable[[float], None] = time.sleep,
        is_open: Callable[[Comparison], bool] = open_yet,
    ) -> None:
        self.held = held
        self.client = client
        self.meter = meter
        self.preset = preset
        self.shape = shape
        self.commands = commands
        self.tell = tell
        self.sleep = sleep
        self.is_open = is_open
        self._serving: int | None = None
        self._behaviour: dict[int, Behaviour] = {}
        self._health = ["", ""]

    def compare(self) -> Comparison:
        """Probe both releases, then time them in pairs, the second half of a pair first in the next one.

        Where the old one cannot serve the new one is probed without it. That it ended once may be chance (a
        person, memory that was short): it has another start before it counts for that, and so has then the
        new one, which the same may have hit.
        """
        pairs: list[tuple[Timed, Timed]] = []
        trouble = ""
        excusable = [0, 1]  # whose end is excused, in this order: the new one's only after the old one's
        for number in range(MOST_PAIRS):
            timed: dict[int, Timed] = {}
            for side in (0, 1) if number % 2 == 0 else (1, 0):
                try:
                    timed[side] = self._run(side)
                except TrialFailed as error:
                    if side == 0 and pairs:  # it can serve: this says nothing about it
                        return self._found(pairs, f"it started before and then did not: {error}")
                    self._behaviour[side] = Behaviour(start=last_words(error))
                    return self._found(pairs, "" if side else self._alone())
                except NotMeasured as error:
                    trouble = str(error)
                    break
            ended = [side for side in (0, 1) if self._health[side]]
            if ended and ended == excusable[:1]:
                side = excusable.pop(0)
                self.tell(f"{self.preset}: {self._health[side]}; once more")
                self._behaviour.pop(side, None)
                self._health[side], self._serving, trouble = "", None, ""
                continue
            if self._health[0]:
                trouble = self._alone()
            if trouble or any(self._health):
                break
            pairs.append((timed[0], timed[1]))
            self._progress(number, pairs[-1])
            if number + 1 >= LEAST_PAIRS and not self.is_open(self._found(pairs)):
                break
        return self._found(pairs, trouble)

    def _alone(self) -> str:
        """Probe the new release where there is nothing to compare it with. Returns why it could not be."""
        try:
            if 1 not in self._behaviour:
                self._run(1)
        except TrialFailed as error:
            self._behaviour[1] = Behaviour(start=last_words(error))
        except NotMeasured as error:
            return str(error)
        return ""

    def _run(self, side: int) -> Timed:
        """One timed run of one release. Raises TrialFailed, NotMeasured.

        Raises Unreachable where the gateway does not let this program in, which is no fault of a release.
        """
        if self._serving != side:
            self._serving = None
            self.held.run(self.commands[side])
            self._serving = side
        try:
            if side not in self._behaviour:
                tool_call, cache = tool_call_trouble(self._ask), prompt_cache_trouble(self._ask)
                self._behaviour[side] = Behaviour(tool_call=tool_call, prompt_cache=cache)
            (timed,) = self.meter.series(self.shape, 1)
        except NotLetIn as error:
            raise Unreachable(str(error)) from None
        finally:
            self._look(side)
        return timed

    def _look(self, side: int) -> None:
        """Make sure that it was this release that answered, and that it lived. Raises NotMeasured."""
        serving = self.held.serving()
        if serving.restarts:
            self._health[side] = f"its server ended {serving.restarts} times while it answered"
        elif serving.executable != self.commands[side][0]:
            raise NotMeasured(f"{serving.executable or 'nothing'} served instead of {self.commands[side][0]}")

    def _found(self, pairs: Sequence[tuple[Timed, Timed]], trouble: str = "") -> Comparison:
        old, new = (
            replace(self._behaviour.get(side, Behaviour()), health=self._health[side]) for side in (0, 1)
        )
        return Comparison(
            self.preset,
            old,
            new,
            tuple((one.generation_tok_s, other.generation_tok_s) for one, other in pairs),
            tuple((one.prefill_tok_s, other.prefill_tok_s) for one, other in pairs),
            trouble,
        )

    def _progress(self, number: int, pair: tuple[Timed, Timed]) -> None:
        old, new = pair
        self.tell(
            f"{self.preset} {number + 1}: generation {old.generation_tok_s:.1f} -> {new.generation_tok_s:.1f}"
            f" tok/s, prefill {old.prefill_tok_s:.1f} -> {new.prefill_tok_s:.1f} tok/s"
        )

    def _ask(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON that the preset answers; tried again while it cannot. Raises Refused, NotMeasured."""
        failed = NotMeasured("")
        for attempt in range(PROBE_ATTEMPTS):
            if attempt:
                self.sleep(PROBE_PAUSE_S)
            try:
                named = {"model": self.preset, **body}
                reply = self.client.post(path, json=named, headers={ALONE: "1"}, timeout=PROBE_TIMEOUT_S)
                if reply.status_code == 200:
                    return reply.json()
                failed = refused(reply)
                if reply.status_code in (401, 403):
                    break
                if reply.status_code not in (429, 502, 503):
                    raise Refused(str(failed))
            except (httpx.HTTPError, ValueError) as error:
                failed = NotMeasured(f"{type(error).__name__}: {error}".splitlines()[0])
        raise failed


Ask = Callable[[str, Mapping[str, Any]], Any]


def tool_call_trouble(ask: Ask) -> str:
    """What is wrong with a call that the model is made to make; "" when it comes back parsed.

    Raises NotMeasured.
    """
    try:
        message = ask("/v1/chat/completions", TOOL_CALL)["choices"][0]["message"]
        calls = message.get("tool_calls")
        if not calls:
            return f"no tool_calls in its answer: {str(message.get('content'))[:60]!r}"
        function = calls[0]["function"]
        arguments = json.loads(function["arguments"])
        if function["name"] != TOOL or set(arguments) != {"city", "unit"}:
            return f"it called {function['name']}({', '.join(map(str, arguments))})"
    except Refused as error:
        return str(error)
    except (ValueError, LookupError, TypeError, AttributeError):
        return "its answer is no tool call"
    return ""


def prompt_cache_trouble(ask: Ask) -> str:
    """What is wrong when a long prompt is sent again; "" when it is not read anew. Raises NotMeasured.

    A client in between may take the cache: so it is tried more than once. As clients do, it does not ask for
    the cache: a release that keeps one only when asked has lost it for them.
    """
    text = prompt(CACHE_WORDS, "cache")
    said = ""
    try:
        for _ in range(PROBE_ATTEMPTS):
            body = {"prompt": text, "n_predict": 1, "temperature": 0.0}
            timings = ask("/completion", body)["timings"]
            cached, read = int(timings["cache_n"]), int(timings["prompt_n"])
            if cached >= CACHED * (cached + read):
                return ""
            said = f"of {cached + read} tokens of the same prompt {cached} came from it"
    except Refused as error:
        return str(error)
    except (ValueError, LookupError, TypeError):
        return "its answer has no timings: cache_n, prompt_n"
    return said
