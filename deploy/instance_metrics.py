"""What a model instance itself counts, read when somebody asks for the metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from router.layer_totals import LayerTotals
from router.step import EngineLoad
from shards.client import GroupState, ModelClient, WorkerStatus

# Name, meaning, field of EngineLoad.
_GAUGES = (
    ("sequences_running", "Sequences that take part in steps", "running"),
    ("sequences_waiting", "Sequences that wait for a step", "waiting"),
    ("kv_cache_blocks_used", "KV cache blocks that sequences hold", "used_blocks"),
    ("kv_cache_blocks", "KV cache blocks that there are", "total_blocks"),
    ("state_slots_used", "Recurrent-state slots that sequences hold", "used_slots"),
    ("state_slots", "Recurrent-state slots that there are", "total_slots"),
    ("state_snapshots_used", "Recurrent states kept for later prompts", "used_snapshots"),
    ("state_snapshots", "Recurrent states that can be kept", "total_snapshots"),
)
_COUNTERS = (
    ("preemptions", "Sequences that gave their memory to others", "preemptions"),
    ("prefix_tokens", "Tokens of sequences that started", "prefix_tokens"),
    ("prefix_hit_tokens", "Those of them that a cached prefix saved", "prefix_hit_tokens"),
)


class InstanceCollector(Collector):
    """Counters of the engine begin at 0 in every epoch, others with the process that counts."""

    def __init__(self, client: ModelClient, replica_id: str) -> None:
        self._client = client
        self._replica = replica_id

    def describe(self) -> Iterator[Metric]:
        """Nothing is asked of the instance when the registry is made."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Every metric, as the instance is now."""
        yield self._state()
        yield from self._load(self._client.load)
        yield from self._actors(self._client.workers())
        yield from self._dispatch(self._client.layer_totals)

    def _state(self) -> Metric:
        states = _gauge("instance_state", "1 for the state that the model instance is in", "state")
        for state in GroupState:
            states.add_metric((self._replica, str(state)), float(state is self._client.state))
        return states

    def _load(self, load: EngineLoad) -> Iterator[Metric]:
        for name, meaning, field in _GAUGES:
            gauge = _gauge(name, meaning)
            gauge.add_metric((self._replica,), getattr(load, field))
            yield gauge
        for name, meaning, field in _COUNTERS:
            counter = _counter(name, meaning)
            counter.add_metric((self._replica,), getattr(load, field))
            yield counter

    def _actors(self, workers: tuple[WorkerStatus, ...]) -> Iterator[Metric]:
        alive = _gauge("actors_alive", "Actors that have loaded and live", "role")
        deaths = _counter("actor_deaths", "Actors that died", "role index")
        recoveries = _counter("actor_recoveries", "Successors that have loaded", "role index")
        for role in sorted({worker.role for worker in workers}):
            count = sum(w.role == role and w.state == "alive" for w in workers)
            alive.add_metric((self._replica, role), count)
        for worker in workers:
            labels = (self._replica, worker.role, str(worker.index))
            deaths.add_metric(labels, worker.deaths)
            recoveries.add_metric(labels, worker.recoveries)
        yield from (alive, deaths, recoveries, self._missing(workers))

    def _missing(self, workers: tuple[WorkerStatus, ...]) -> Metric:
        gauge = _gauge("experts_without_copy", "Experts that no living expert actor holds")
        held = {expert for worker in workers for expert in worker.experts}
        live = {
            expert for worker in workers if worker.state == "alive" for expert in worker.experts
        }
        gauge.add_metric((self._replica,), len(held - live))
        return gauge

    def _dispatch(self, totals: Mapping[int, LayerTotals]) -> Iterator[Metric]:
        latency = SummaryMetricFamily(
            "conclave_dispatch_latency_seconds",
            "Rows of a layer to their experts and back",
            labels=("replica_id", "layer"),
        )
        sent = _counter("dispatch_bytes", "Bytes of rows", "layer direction")
        calls = _counter("dispatch_calls", "Calls to expert actors", "layer")
        resends = _counter("dispatch_resends", "Calls that were sent again to a copy", "layer")
        tokens = _counter("expert_tokens", "Tokens that an expert was given", "layer expert")
        for layer, seen in totals.items():
            labels = (self._replica, str(layer))
            latency.add_metric(labels, seen.exchanges, seen.seconds)
            calls.add_metric(labels, seen.calls)
            resends.add_metric(labels, seen.resends)
            sent.add_metric((*labels, "sent"), seen.sent_bytes)
            sent.add_metric((*labels, "received"), seen.received_bytes)
            for expert, count in enumerate(seen.tokens):
                tokens.add_metric((*labels, str(expert)), count)
        yield from (latency, sent, calls, resends, tokens)


def _gauge(name: str, meaning: str, labels: str = "") -> GaugeMetricFamily:
    return GaugeMetricFamily(f"conclave_{name}", meaning, labels=("replica_id", *labels.split()))


def _counter(name: str, meaning: str, labels: str = "") -> CounterMetricFamily:
    return CounterMetricFamily(f"conclave_{name}", meaning, labels=("replica_id", *labels.split()))
