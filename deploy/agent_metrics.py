"""A replica's metrics on Ray's metrics agent, where what scrapes Ray finds them: `ray_conclave_*`.

Every sample of the one registry, the sums and buckets of histograms too, is shown as a gauge with
the value that it has. `rate()` and `histogram_quantile()` go by names and values, so both are as
right as on /metrics; counters and histograms of Ray's own would be counted a second time, token by
token, with sums that are guessed from buckets.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Protocol

from prometheus_client import CollectorRegistry

log = logging.getLogger("conclave.metrics")

PREFIX = "ray_"
"""What Ray puts before every name."""
_AT_ONCE = 32
_PAUSE_S = 0.0005
"""After so many series others may run: the loop that streams tokens is in this process."""


class AgentGauge(Protocol):
    """Ray's gauge, as far as it is used here."""

    def set(self, value: float | None, tags: dict[str, str] | None = None) -> None:
        """The value that the series with `tags` has now."""


MakeGauge = Callable[[str, str, tuple[str, ...]], AgentGauge]
"""Name, meaning and label names → gauge."""


class AgentMetrics:
    """Shows a registry on the agent of the node that it runs on, with `labels` on every series."""

    def __init__(
        self, registry: CollectorRegistry, labels: Mapping[str, str], make: MakeGauge
    ) -> None:
        self._registry = registry
        self._labels = dict(labels)
        self._make = make
        self._gauges: dict[str, AgentGauge] = {}

    def push(self) -> None:
        """Set every series once; takes milliseconds, on a thread of its own."""
        samples = (
            (family.documentation, sample)
            for family in self._registry.collect()
            for sample in family.samples
        )
        while batch := list(islice(samples, _AT_ONCE)):
            for meaning, sample in batch:
                tags = {**sample.labels, **self._labels}
                gauge = self._gauges.get(sample.name)
                if gauge is None:
                    gauge = self._make(sample.name, meaning, tuple(tags))
                    self._gauges[sample.name] = gauge
                gauge.set(float(sample.value), tags)
            time.sleep(_PAUSE_S)


class AgentReporter:
    """Pushes for as long as the replica lives."""

    def __init__(self, metrics: AgentMetrics, period_s: float) -> None:
        self._metrics = metrics
        self._period_s = period_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="agent-metrics", daemon=True)

    def start(self) -> None:
        """From now on."""
        self._thread.start()

    def stop(self) -> None:
        """Waits until nothing is pushed any more."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(self._period_s):
            try:
                self._metrics.push()
            except Exception:  # numbers that are missing must not end what serves
                log.exception("metrics have not reached Ray's agent")


def report_to_agent(registry: CollectorRegistry, labels: Mapping[str, str]) -> AgentReporter:
    """Start to show a registry on the agent of this actor's node."""
    import ray
    from ray.util.metrics import Gauge

    # A gauge is dropped with the first of Ray's reports that it was not set for.
    period_s = max(1.0, ray._config.metrics_report_interval_ms() / 1000) / 2
    reporter = AgentReporter(AgentMetrics(registry, labels, Gauge), period_s)
    reporter.start()
    return reporter
