"""What Prometheus is told. Labels are names of routes and states of ours, never a client's words."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counts answers, and writes the page. `counts` and `workers` are the job store's."""

    def __init__(
        self,
        counts: Callable[[], dict[tuple[str, str], int]],
        workers: Callable[[], list[tuple[str, bool, str, str]]],
    ) -> None:
        self._registry = CollectorRegistry()
        self._answers = Counter(
            "ocr_requests", "Answers, by route and HTTP status.", ["route", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "ocr_request_seconds",
            "Time from a request's head to its answer's end.",
            ["route"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self._registry.register(_Live(counts, workers))
        ProcessCollector(registry=self._registry)

    def observe(self, route: str, status: int, seconds: float) -> None:
        """An answer went out."""
        self._answers.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def render(self) -> bytes:
        """The page. It asks the database."""
        return generate_latest(self._registry)


class _Live(Collector):
    def __init__(
        self,
        counts: Callable[[], dict[tuple[str, str], int]],
        workers: Callable[[], list[tuple[str, bool, str, str]]],
    ) -> None:
        self._counts = counts
        self._workers = workers

    def collect(self) -> Iterator[Metric]:
        photos = GaugeMetricFamily(
            "ocr_photos", "Photos in the job tables, by kind of job and state.", labels=["kind", "state"]
        )
        for (kind, state), count in self._counts().items():
            photos.add_metric([kind, state], count)
        yield photos
        seen = self._workers()
        yield GaugeMetricFamily("ocr_workers", "Workers seen lately.", len(seen))
        ready = sum(1 for _, is_ready, _, _ in seen if is_ready)
        yield GaugeMetricFamily("ocr_workers_ready", "Workers whose backends answer.", ready)

    def describe(self) -> list[Metric]:
        """Nothing: else the registry would ask the database when it is made."""
        return []
