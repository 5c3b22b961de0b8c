"""What a replica counts, for Prometheus: one registry, shown on /metrics.

docs/observability.md lists every name. Labels are our own words and numbers, never a client's.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from deploy.generation import Delta
from deploy.instance_metrics import InstanceCollector
from deploy.request_record import QUIET_ROUTES, RequestRecord
from shards.client import ModelClient

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
REPLICA = "replica_id"
# One series less for each counter and histogram: nobody asks when it was made.
disable_created_metrics()  # type: ignore[no-untyped-call]

_LATENCY_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_GAP_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_DURATION_S = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600, 1800)


class Metrics:
    """The metrics of one replica; every series carries its `replica_id`."""

    def __init__(self, client: ModelClient, replica_id: str) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(InstanceCollector(client, replica_id))
        self._replica = replica_id
        self._requests = self._counter(
            "requests", "Requests that ended, by HTTP status; 499: the client left", "route status"
        )
        self._errors = self._counter("errors", "Requests that ended with an error", "code")
        self._refusals = self._counter(
            "admission_refusals", "Requests that were told to come back later", "code"
        )
        self._durations = self._histogram(
            "request_duration_seconds", "Arrival of a request to its end", _DURATION_S, "route"
        )
        self.in_progress = self._gauge("requests_in_progress", "Requests under way")
        self.prompt_tokens = self._counter(
            "prompt_tokens", "Tokens of prompts that were given to the engine"
        ).labels(replica_id)
        self.generation_tokens = self._counter(
            "generation_tokens", "Tokens that were generated"
        ).labels(replica_id)
        self.queue_time = self._histogram(
            "queue_time_seconds", "Arrival of a sequence to its first step", _LATENCY_S
        ).labels(replica_id)
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "Arrival of a request to its first token", _LATENCY_S
        ).labels(replica_id)
        self.dropped_spans = self._counter(
            "trace_spans_dropped", "Spans of traces that no collector took"
        ).labels(replica_id)
        self.token_gap = self._histogram(
            "inter_token_latency_seconds", "One token of a sequence to its next", _GAP_S
        ).labels(replica_id)

    def count(self, record: RequestRecord, duration_s: float) -> None:
        """A request is over."""
        self.in_progress.dec()
        self._requests.labels(self._replica, record.route, str(record.status)).inc()
        if record.error_code is not None:
            self._errors.labels(self._replica, record.error_code).inc()
            if record.refused:
                self._refusals.labels(self._replica, record.error_code).inc()
        if record.route not in QUIET_ROUTES:
            self._durations.labels(self._replica, record.route).observe(duration_s)

    def text(self) -> bytes:
        """Everything in Prometheus' text format; takes milliseconds, on any thread."""
        return generate_latest(self.registry)

    def _counter(self, name: str, meaning: str, labels: str = "") -> Counter:
        return Counter(
            f"conclave_{name}", meaning, (REPLICA, *labels.split()), registry=self.registry
        )

    def _gauge(self, name: str, meaning: str) -> Gauge:
        gauge = Gauge(f"conclave_{name}", meaning, (REPLICA,), registry=self.registry)
        return gauge.labels(self._replica)

    def _histogram(
        self, name: str, meaning: str, buckets: Sequence[float], labels: str = ""
    ) -> Histogram:
        return Histogram(
            f"conclave_{name}",
            meaning,
            (REPLICA, *labels.split()),
            registry=self.registry,
            buckets=buckets,
        )


class AnswerMeter:
    """Times and counts the tokens of one answer."""

    def __init__(self, metrics: Metrics, record: RequestRecord) -> None:
        self._metrics = metrics
        self._record = record
        self._last: dict[int, float] = {}

    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        """The prompts are given to the engine."""
        self._record.prompt_tokens += sum(map(len, prompts))
        self._metrics.prompt_tokens.inc(sum(map(len, prompts)))

    def see(self, delta: Delta) -> None:
        """A token has come."""
        now = time.perf_counter()
        if delta.has_token:
            self._record.completion_tokens += 1
            self._metrics.generation_tokens.inc()
            last = self._last.get(delta.index)
            if last is not None:
                self._metrics.token_gap.observe(now - last)
            self._last[delta.index] = now
        if delta.is_first:
            self._begin(delta, now)
        if delta.finish is not None:
            self._record.finish_reasons.append(delta.finish)

    def waited(self, queue_seconds: float | None) -> None:
        """A sequence has had its first step."""
        if queue_seconds is not None:
            self._metrics.queue_time.observe(queue_seconds)

    def _begin(self, delta: Delta, now: float) -> None:
        self.waited(delta.queue_seconds)
        if self._record.first_token_s is None and delta.has_token:
            self._record.first_token_s = now - self._record.started
            self._metrics.first_token.observe(self._record.first_token_s)
