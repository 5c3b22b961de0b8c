"""What Ray's agent is told of the replica's registry: every sample, as it is."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.parser import text_string_to_metric_families

from deploy.agent_metrics import AgentMetrics, AgentReporter
from router.layer_totals import LayerTotals
from tests.deploy.http_client import post

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


@dataclass
class Agent:
    """Keeps what it is told, and refuses what Ray refuses."""

    series: Series = field(default_factory=dict)
    sets: int = 0
    told: threading.Event = field(default_factory=threading.Event)

    def make(self, name: str, meaning: str, keys: tuple[str, ...]) -> AgentSeries:
        assert re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]*", name)
        assert meaning
        assert name not in {known.name for known in self.gauges}
        self.gauges.append(AgentSeries(self, name, keys))
        return self.gauges[-1]

    gauges: list[AgentSeries] = field(default_factory=list)


@dataclass
class AgentSeries:
    agent: Agent
    name: str
    keys: tuple[str, ...]

    def set(self, value: float | None, tags: dict[str, str] | None = None) -> None:
        assert isinstance(value, float)
        assert tags is not None
        assert set(tags) == set(self.keys)
        assert all(isinstance(each, str) for each in tags.values())
        self.agent.series[self.name, frozenset(tags.items())] = value
        self.agent.sets += 1
        self.agent.told.set()


def scraped(text: str) -> Series:
    """What /metrics shows, with the label that the agent's series have beside."""
    return {
        (sample.name, frozenset({**sample.labels, "application": "app"}.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_the_agent_is_told_what_metrics_shows(make_api: Callable[..., Any]) -> None:
    api, agent = make_api(), Agent()
    exported = AgentMetrics(api.service.metrics.registry, {"application": "app"}, agent.make)
    for tokens in ([5, 6], [7, 9]):
        totals = LayerTotals(exchanges=1, calls=2, seconds=0.5, tokens=tokens)
        api.client.layer_totals = {1: totals, 2: totals}
        await post(api, "/v1/completions", {"prompt": [5], "max_tokens": 3})
        await post(api, "/v1/completions", {"prompt": []})
        exported.push()
        assert agent.series == scraped(api.service.metrics.text().decode())
    names = {name for name, _ in agent.series}
    assert {
        "conclave_requests_total",
        "conclave_expert_tokens_total",
        "conclave_sequences_running",
        "conclave_inter_token_latency_seconds_bucket",
        "conclave_dispatch_latency_seconds_sum",
    } <= names


def test_buckets_are_cumulative_and_have_their_bounds() -> None:
    registry, agent = CollectorRegistry(), Agent()
    histogram = Histogram("h", "Times", registry=registry, buckets=(1, 2))
    for value in (0.5, 1.5, 1.5, 9):
        histogram.observe(value)
    AgentMetrics(registry, {}, agent.make).push()
    found = {dict(labels)["le"]: value for (name, labels), value in agent.series.items() if labels}
    assert found == {"1.0": 1, "2.0": 3, "+Inf": 4}
    assert agent.series["h_sum", frozenset()] == 12.5
    assert agent.series["h_count", frozenset()] == 4


def test_what_falls_falls_and_what_stays_is_said_again() -> None:
    """An engine's counters begin at 0 again with it; a series that is not set is forgotten."""
    registry, agent = CollectorRegistry(), Agent()
    gauge = Gauge("g", "Any", registry=registry)
    counter = Counter("c", "Any", registry=registry)
    exported = AgentMetrics(registry, {}, agent.make)
    gauge.set(7)
    counter.inc(3)
    exported.push()
    gauge.set(2)
    before = agent.sets
    exported.push()
    assert agent.series == {("g", frozenset()): 2, ("c_total", frozenset()): 3}
    assert agent.sets == 2 * before


def test_a_reporter_goes_on_after_an_error_and_ends_when_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    registry, agent = CollectorRegistry(), Agent()
    Counter("c", "Any", registry=registry)
    failed = threading.Event()

    def make(name: str, meaning: str, keys: tuple[str, ...]) -> AgentSeries:
        if not failed.is_set():
            failed.set()
            raise RuntimeError("Ray is not there")
        return agent.make(name, meaning, keys)

    reporter = AgentReporter(AgentMetrics(registry, {}, make), period_s=0.001)
    reporter.start()
    assert agent.told.wait(10)
    reporter.stop()
    ended = agent.sets
    assert not any(each.name == "agent-metrics" for each in threading.enumerate())
    assert ended == agent.sets
    assert "Ray is not there" in caplog.text
