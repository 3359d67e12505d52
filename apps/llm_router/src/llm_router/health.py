"""Which boxes answer, and what each serves right now, asked of their gateways again and again."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from llm_router.ledger import Box

TIMEOUT_S = 3.0


@dataclass(frozen=True)
class State:
    """What a gateway said last: whether it lives, and the preset that is ready."""

    alive: bool = True  # until it is known to be gone
    preset: str = ""


class Watch:
    """The last state of each box."""

    def __init__(self, boxes: Sequence[Box], interval: float) -> None:
        self._boxes, self._interval = list(boxes), interval
        self.states: dict[str, State] = {}
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Look from now on; called from a running loop, as often as one likes."""
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        async with httpx.AsyncClient(timeout=TIMEOUT_S, trust_env=False) as client:
            while True:
                await self.look(client)
                await asyncio.sleep(self._interval)

    async def look(self, client: httpx.AsyncClient) -> None:
        """Ask every box once."""
        found = await asyncio.gather(*(look_at(client, box) for box in self._boxes))
        self.states = {box.name: state for box, state in zip(self._boxes, found, strict=True)}

    def lost(self, box: str) -> None:
        """A box that did not answer a request is gone until it is looked at again."""
        self.states = {**self.states, box: State(alive=False)}

    def choose(self, deployments: Sequence[Mapping[str, Any]], model: str) -> list[Mapping[str, Any]]:
        """Those of boxes that live; of these, where there are any, those that serve the model already.

        When no box is known to live all are left: a watch that is wrong must not stop everything.
        """
        living = [one for one in deployments if self._state(one).alive]
        serving = [one for one in living if self._state(one).preset == model]
        return serving or living or list(deployments)

    async def builds(self) -> list[str]:
        """The builds of llama.cpp that serve right now, each once. Asking starts nothing."""
        states = [(box, self.states.get(box.name, State())) for box in self._boxes]
        serving = [box for box, state in states if state.alive and state.preset]
        async with httpx.AsyncClient(timeout=TIMEOUT_S, trust_env=False) as client:
            found = await asyncio.gather(*(_build(client, box) for box in serving))
        return sorted({build for build in found if build})

    def serves(self, model: str) -> bool:
        """Whether a box that lives serves it right now."""
        return any(state.alive and state.preset == model for state in self.states.values())

    def _state(self, deployment: Mapping[str, Any]) -> State:
        info = deployment.get("model_info") or {}
        return self.states.get(str(info.get("box")), State())


async def _build(client: httpx.AsyncClient, box: Box) -> str:
    with contextlib.suppress(httpx.HTTPError, ValueError, AttributeError):
        reply = await client.get(f"{box.url}/props", headers=_key(box))
        if reply.status_code == 200:
            return str(reply.json().get("build_info") or "")
    return ""


def _key(box: Box) -> dict[str, str]:
    return {"Authorization": f"Bearer {box.key}"} if box.key else {}


async def look_at(client: httpx.AsyncClient, box: Box) -> State:
    """What one gateway says."""
    try:
        if (await client.get(f"{box.url}/health")).status_code != 200:
            return State(alive=False)
        reply = await client.get(f"{box.url}/ready", headers=_key(box))
    except httpx.HTTPError:
        return State(alive=False)
    with contextlib.suppress(ValueError, AttributeError):
        if reply.status_code == 200:
            return State(preset=str(reply.json().get("preset") or ""))
    return State()
