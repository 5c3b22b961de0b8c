"""Bytes that a token moves, and how fast nothing can be faster: roofline bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deploy.plan_actors import numeric
from deploy.plan_options import Hardware
from deploy.plan_sizes import (
    expert_bytes,
    expert_parameters,
    moe_layers,
    stage_bytes,
    stage_parameters,
)
from deploy.plan_topology import Topology
from deploy.resolve import itemsize
from shards.cache_bytes import block_bytes, slot_bytes
from shards.layer_costs import num_touched
from shards.spec import GroupSpec, Role

if TYPE_CHECKING:
    from models.interface import ModelConfig

_ID_BYTES = 8
"""Of the int64 id of an expert that a token has chosen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes of one decoded token between actors, and messages one after the other."""

    stage_bytes: int
    dispatch_bytes: int
    stage_hops: int
    dispatch_hops: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeBound:
    """Decoding `sequences` at once, all of them `context` tokens long, as memory bounds it."""

    sequences: int
    weight_bytes_per_token: int
    cache_bytes_per_token: int
    step_seconds: float
    tokens_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillBound:
    """Prompts as computing bounds them: products with weights alone, without attention's own."""

    flops_per_token: int
    tokens_per_second: float


def traffic(config: ModelConfig, spec: GroupSpec) -> Traffic:
    """Rows on the wire, without headers; nothing moves in one process."""
    if spec.executor == "local":
        return Traffic(stage_bytes=0, dispatch_bytes=0, stage_hops=0, dispatch_hops=0)
    row = config.hidden_size * itemsize(spec.dtype)
    hops = len(spec.stage_layers) - 1
    exchange, exchange_hops = 2 * config.top_k * row, 2
    if spec.dispatch == "actor":
        choices = config.top_k * (_ID_BYTES + itemsize(spec.dtype))
        exchange, exchange_hops = exchange + 2 * row + choices, 4
    exchanges = len(moe_layers(config)) if spec.placement is not None else 0
    return Traffic(
        stage_bytes=hops * row,
        dispatch_bytes=exchanges * exchange,
        stage_hops=hops,
        dispatch_hops=exchanges * exchange_hops,
    )


def decode_bound(
    config: ModelConfig, topology: Topology, machines: Hardware, sequences: int
) -> DecodeBound:
    """The best number of steps under way, of equally many sequences each, from 1 to all stages.

    A round gives each sequence a token. It takes as long as one step does alone, or as long as the
    busiest device needs for the round's steps.
    """
    work = _step_work(config, topology)
    most = min(len(topology.spec.stage_layers), sequences)
    rounds = ((work.round_bytes(steps, sequences / steps), steps) for steps in range(1, most + 1))
    num_bytes, steps = min(rounds)
    batch = sequences / steps
    weights = work.weight_bytes(batch)
    seconds = num_bytes / machines.memory_bandwidth
    return DecodeBound(
        sequences=sequences,
        weight_bytes_per_token=round(weights / batch),
        cache_bytes_per_token=sum(work.caches),
        step_seconds=seconds,
        tokens_per_second=sequences / seconds,
    )


def prefill_bound(config: ModelConfig, topology: Topology, machines: Hardware) -> PrefillBound:
    """With enough prompts under way that no device waits."""
    spec = topology.spec
    parameters = [stage_parameters(config, layers) for layers in spec.stage_layers]
    table = config.vocab_size * config.hidden_size
    parameters[0] -= table  # rows are looked up, not multiplied
    routed = len(moe_layers(config)) * config.top_k * expert_parameters(config)
    busiest = _busiest(topology, [2 * count for count in parameters], 2 * routed)
    return PrefillBound(
        flops_per_token=2 * (sum(parameters) + routed),
        tokens_per_second=machines.flops / busiest,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _StepWork:
    """What decode steps read: of each stage's weights, of each stage's caches per sequence."""

    topology: Topology
    weights: tuple[int, ...]
    caches: tuple[int, ...]
    row: int
    """Of the embedding table, per sequence."""
    expert: int
    """One expert in one layer."""
    moe_layers: int
    num_experts: int
    top_k: int

    def weight_bytes(self, batch: float) -> float:
        """Weights that one step of `batch` sequences touches."""
        return sum(self.weights) + batch * self.row + self._routed(batch)

    def round_bytes(self, steps: int, batch: float) -> float:
        """What is read one after the other in a round of `steps` steps of `batch` sequences."""
        own = [
            weights + batch * caches
            for weights, caches in zip(self.weights, self.caches, strict=True)
        ]
        own[0] += batch * self.row
        routed = self._routed(batch)
        shards = max(1, self.topology.spec.num_expert_shards)
        # The shard with most to read in a layer reads one expert at least.
        alone = sum(own) + max(routed / shards, self.moe_layers * self.expert)
        return max(alone, steps * _busiest(self.topology, own, routed))

    def _routed(self, batch: float) -> float:
        """Experts that are expected to be chosen, in all layers."""
        if not self.moe_layers:
            return 0.0
        touched = num_touched(self.num_experts, self.top_k, batch)
        return self.moe_layers * touched * self.expert


def _step_work(config: ModelConfig, topology: Topology) -> _StepWork:
    spec = topology.spec
    size, limits = itemsize(spec.dtype), spec.limits
    seen = min(limits.max_model_len, limits.window or limits.max_model_len)
    row = config.hidden_size * size
    weights = [sum(stage_bytes(config, layers, numeric(spec))) for layers in spec.stage_layers]
    weights[0] -= config.vocab_size * row  # of the table only the rows of its tokens
    return _StepWork(
        topology=topology,
        weights=tuple(weights),
        caches=tuple(
            block_bytes(config, range(*layers), seen, size)
            + 2 * slot_bytes(config, range(*layers), size)
            for layers in spec.stage_layers
        ),
        row=row,
        expert=sum(expert_bytes(config, numeric(spec))),
        moe_layers=len(moe_layers(config)),
        num_experts=config.num_experts,
        top_k=config.top_k,
    )


def _busiest(topology: Topology, of_stages: Sequence[float], of_experts: float) -> float:
    """The largest load of a process: its stages' own, and its share of what experts do."""
    if topology.spec.executor == "local":
        return sum(of_stages) + of_experts
    copies = sum(len(actor.needs.experts) for actor in topology.actors)
    loads: dict[str, float] = {}
    for actor in topology.actors:
        load = of_experts * len(actor.needs.experts) / copies if actor.needs.experts else 0.0
        if actor.needs.role == Role.STAGE:
            load += of_stages[actor.needs.index]
        loads[actor.process] = loads.get(actor.process, 0.0) + load
    return max(loads.values())
