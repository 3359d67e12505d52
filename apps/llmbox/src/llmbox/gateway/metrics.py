"""What Prometheus is told: the gateway's own figures, and those of the llama-server behind it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from llmbox.gateway.accounts import Accounts
from llmbox.gateway.audit import Entry
from llmbox.gateway.board import Board
from llmbox.gateway.requests import ROUTES
from llmbox.gateway.upstream import Lost, Upstream

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FETCH_TIMEOUT_S = 1.0
FETCH_LIMIT = 1024 * 1024  # bytes of llama-server's figures; they are about 3 KB
FOREIGN_PREFIX = "llamacpp:"
HOLD_BUCKETS_S = (0.01, 0.1, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 90, 120, 180, 300)
EXACT = 2**53  # the largest count that a float holds

log = logging.getLogger(__name__)


class Metrics:
    """Counts finished requests, and writes the page. Labels: names of routes and presets, no client's."""

    def __init__(self, board: Board, accounts: Accounts, upstream: Upstream, presets: Iterable[str]) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._board = board
        self._upstream = upstream
        self._presets = frozenset(presets)
        self._routes = frozenset(path for _, path in ROUTES)
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "llmbox_requests",
            "Requests that are over, by the HTTP status that they ended with (499: the client left).",
            ["route", "preset", "status"],
            registry=self._registry,
        )
        self._held = Histogram(
            "llmbox_hold_seconds",
            "Time that requests waited in the gateway for a free slot of their preset.",
            buckets=HOLD_BUCKETS_S,
            registry=self._registry,
        )
        self._prompt = self._tokens(
            "llmbox_prompt_tokens", "Tokens of prompts, those from the cache included."
        )
        self._cached = self._tokens("llmbox_prompt_cached_tokens", "Tokens of prompts that the cache held.")
        self._generated = self._tokens("llmbox_generated_tokens", "Tokens generated.")
        self._registry.register(_Live(board, accounts))
        ProcessCollector(registry=self._registry)

    def _tokens(self, name: str, told: str) -> Counter:
        return Counter(name, told, ["preset"], registry=self._registry)

    def observe(self, entry: Entry) -> None:
        """Count a request that is over."""
        served = entry.preset or entry.wanted
        preset = served if served in self._presets else ""
        route = entry.path if entry.path in self._routes else "other"
        status = str(entry.status) if 100 <= entry.status <= 599 else "other"
        self._requests.labels(route, preset, status).inc()
        if entry.preset or entry.waited_s:  # others never joined the queue
            self._held.observe(entry.waited_s)
        for counter, count in (
            (self._prompt, entry.usage.prompt),
            (self._cached, entry.usage.cached),
            (self._generated, entry.usage.generated),
        ):
            counter.labels(preset).inc(min(max(0, count or 0), EXACT))

    async def render(self) -> bytes:
        """The page for a scrape, of the type CONTENT_TYPE. It takes FETCH_TIMEOUT_S at most."""
        foreign = await self._foreign()
        up = GaugeMetricFamily(
            "llmbox_llama_server_up", "Whether llama-server gave its figures.", float(bool(foreign))
        )
        page = generate_latest(_Fixed(self._registry, up))
        if not foreign:
            return page
        return page + b"\n# --- llama-server's own figures, as it tells them ---\n" + foreign

    async def _foreign(self) -> bytes:
        """llama-server's figures; nothing when none is ready, or when it gives no figures of its own."""
        if self._board.serving is None:
            return b""
        try:
            async with asyncio.timeout(FETCH_TIMEOUT_S):
                answer = await self._upstream.send("GET", "/metrics", [], b"")
                try:
                    body = b""
                    async for chunk in answer.chunks():
                        body += chunk
                        if len(body) > FETCH_LIMIT:
                            return b""
                finally:
                    answer.close()
        except (Lost, TimeoutError):
            return b""
        return body.rstrip() + b"\n" if answer.status == 200 and _sound(body) else b""


class _Live(Collector):
    """Figures that the board and the accounts keep themselves."""

    def __init__(self, board: Board, accounts: Accounts) -> None:
        self._board = board
        self._accounts = accounts

    def collect(self) -> Iterator[Metric]:
        board = self._board
        yield GaugeMetricFamily("llmbox_queued_requests", "Requests that wait.", board.queued)
        yield GaugeMetricFamily(
            "llmbox_in_flight_requests", "Requests that are with llama-server.", board.in_flight
        )
        active = GaugeMetricFamily(
            "llmbox_active_preset_info",
            "1 for the preset that serves; absent when none does.",
            labels=["preset"],
        )
        if board.serving and board.serving.preset:
            active.add_metric([board.serving.preset], 1)
        yield active
        switches = CounterMetricFamily(
            "llmbox_switches", "Switches to a preset and how they ended.", labels=["preset", "outcome"]
        )
        for (preset, outcome), count in board.switches.items():
            switches.add_metric([preset, outcome], count)
        yield switches
        parts = SummaryMetricFamily(
            "llmbox_switch_seconds",
            "Time that switches to a preset took, by part; stop and load are within ready.",
            labels=["preset", "part"],
        )
        for (preset, part), (count, total) in board.switch_parts.items():
            parts.add_metric([preset, part], count, total)
        yield parts
        breaches = CounterMetricFamily(
            "llmbox_key_budget_breaches",
            "Requests refused or cut off, by the budget that was used up.",
            labels=["budget"],
        )
        for budget, count in self._accounts.breaches.items():
            breaches.add_metric([budget], count)
        yield breaches


class _Fixed(Collector):
    """A registry and one figure that was taken for this page only."""

    def __init__(self, registry: CollectorRegistry, metric: Metric) -> None:
        self._registry = registry
        self._metric = metric

    def collect(self) -> Iterator[Metric]:
        yield from self._registry.collect()
        yield self._metric


def _sound(text: bytes) -> bool:
    """Whether a page can be appended: Prometheus drops the whole of one that it cannot read."""
    try:
        families = list(text_string_to_metric_families(text.decode()))
    except (ValueError, KeyError, IndexError):
        return False
    return bool(families) and all(family.name.startswith(FOREIGN_PREFIX) for family in families)
