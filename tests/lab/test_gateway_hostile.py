"""Clients that are a burden, on a real host: one that goes away, a thousand beside one that streams."""

from __future__ import annotations

import asyncio
import itertools
import json
import resource
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import support
from tests.lab.test_lmswitch import USER_SYSTEMCTL, Box
from tests.lab.test_lmswitch import box as box  # the fixture

GONE = (Path(__file__).parent / "gone_client.py").read_text()
BAR_S = 1.0
DROPS = 5
CROWD, STREAMED = 1000, 100
CHAT = "/v1/chat/completions"
CLEAR = {200, 429, 503}  # answered, or told to come again
MEMORY_BAR = 90_000_000  # bytes
PATIENCE_S = 900


def quickest(box: Box) -> str:
    """The preset with the smallest model."""
    return min(box.wanted.names("user"), key=lambda preset: box.wanted.model_file(preset).size)


def memory(box: Box) -> int:
    """The most bytes that the gateway had in memory so far."""
    shown = box.run(f"{USER_SYSTEMCTL} show --value --property=MainPID llm-gateway.service").check().stdout
    status = box.run(f"sudo cat /proc/{shown.strip()}/status").check().stdout
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


@pytest.mark.parametrize("how", ["", "pipelined"])
def test_a_client_that_goes_away_ends_its_generation(box: Box, how: str) -> None:
    box.lmswitch(quickest(box)).check()
    listen = box.wanted.config.llama_presets_listen
    command = f"sudo -u {box.wanted.user} python3 - {box.wanted.front.port} {listen} {how}"
    found = [json.loads(box.run(command, stdin=GONE).check().stdout) for _ in range(DROPS)]
    assert all(one["status"] == 200 and one["busy"] and one["seconds"] is not None for one in found), found
    what = f"a {how} client goes away in its stream: until llama-server's slot is idle"
    seconds = [one["seconds"] for one in found]
    print(support.keep_figures(f"gateway-client-gone{how}", what, seconds, BAR_S))
    assert min(seconds) <= BAR_S, "a slow day makes some of them late, not each"


def test_a_thousand_connections_beside_a_stream(box: Box) -> None:
    box.lmswitch(quickest(box)).check()
    host = box.hostvars["ansible_host"]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))

    def body(tokens: int, **asked: Any) -> bytes:
        asked["messages"] = [{"role": "user", "content": "Hello"}]
        return json.dumps({"max_tokens": tokens, **asked}).encode()

    async def one() -> bytes:
        """The head of an answer, by means that leave this machine to the others."""
        asked = body(1)
        reader, writer = await asyncio.open_connection(host, box.wanted.front.port)
        try:
            writer.write(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(asked)}\r\n\r\n".encode())
            writer.write(asked)
            async with asyncio.timeout(PATIENCE_S):
                return (await reader.readuntil(b"\r\n\r\n")).lower()
        finally:
            writer.close()

    async def crowd() -> tuple[list[float], str, list[bytes]]:
        """When the stream's events came, its last line, and what the crowd was told."""
        events, last, answers = [], "", None
        async with httpx.AsyncClient(timeout=PATIENCE_S, trust_env=False) as client:
            asked = body(STREAMED, stream=True, ignore_eos=True)
            async with client.stream("POST", f"{box.wanted.url(host)}{CHAT}", content=asked) as reply:
                assert reply.status_code == 200
                async for line in reply.aiter_lines():
                    events += [time.monotonic()] if line else []
                    last = line or last
                    answers = answers or asyncio.gather(*(one() for _ in range(CROWD)))
        assert answers is not None
        return events, last, await answers

    events, last, answers = asyncio.run(crowd())
    statuses = Counter(int(answer.split()[1]) for answer in answers)
    peak = memory(box)
    gap = max(later - sooner for sooner, later in itertools.pairwise(events))
    print(
        f"{CROWD} connections at once: {dict(statuses)}; the gateway's memory at most {peak / 1e6:.1f} MB; "
        f"the stream beside them: {len(events)} events, the longest gap {gap:.2f} s"
    )
    assert last == "data: [DONE]" and len(events) > STREAMED
    assert set(statuses) <= CLEAR and statuses[200] >= 60, statuses
    assert sum(b"\r\nretry-after: " in answer for answer in answers) == CROWD - statuses[200]
    assert peak <= MEMORY_BAR
