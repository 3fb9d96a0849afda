"""What the server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

__all__ = ["Metrics"]

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """Counters of one app; each app has a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter("tokenflow_requests", "Answered requests.", ("route", "status"), registry=self._registry)
        self.seconds = Histogram(
            "tokenflow_request_seconds", "From a request's head to the end of its answer.", ("route",),
            registry=self._registry, buckets=_SECONDS,
        )  # fmt: skip
        self._stages = Histogram(
            "tokenflow_stage_seconds", "Seconds in each stage: body, picture, queue, engine, scale, token.", ("stage",),
            registry=self._registry, buckets=_SECONDS,
        )  # fmt: skip
        self.batches = Histogram(
            "tokenflow_batch_size", "Pictures in a call of the engine.", ("operation",),
            registry=self._registry, buckets=(1, 2, 4, 8, 16, 32, 64),
        )  # fmt: skip
        self.refused = Counter("tokenflow_refused", "Requests refused for lack of room.", registry=self._registry)
        self._stage = cache(self._stages.labels)
        self._gauges: dict[str, Gauge] = {}

    def gauge(self, name: str, text: str, value: Callable[[], float], **labels: str) -> None:
        """A value that is asked for when the metrics are read."""
        if name not in self._gauges:
            self._gauges[name] = Gauge(name, text, tuple(labels), registry=self._registry)
        gauge = self._gauges[name]
        (gauge.labels(**labels) if labels else gauge).set_function(value)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure a stage."""
        began = perf_counter()
        try:
            yield
        finally:
            self.observe(name, perf_counter() - began)

    def observe(self, stage: str, seconds: float) -> None:
        """Note how long a stage took."""
        self._stage(stage).observe(seconds)

    def observe_steps(self, stage: str, times: Iterable[float]) -> None:
        """Note how long each step took, from the seconds from the start to each one's end."""
        for began, ended in pairwise((0.0, *times)):
            self.observe(stage, ended - began)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)
