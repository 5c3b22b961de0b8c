"""How large the caches of a model instance are: arithmetic over their cost and the free memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from router.limits import EngineLimits
from shards.control import Started
from shards.spec import CacheCost, GroupSpec, Role

USABLE = 0.5
"""Of a node's free memory. The rest is for activations, for other model instances, and for what
starts later: pages of a cache are committed only when they are first written."""
SNAPSHOTS_PER_SLOT = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class CachePlan:
    """What was decided for the life of a group, and from what."""

    limits: EngineLimits
    source: str

    def __str__(self) -> str:
        limits = self.limits
        tokens = limits.num_blocks * limits.block_size
        text = f"the KV cache holds {tokens:,} tokens in blocks of {limits.block_size}"
        if limits.num_state_slots:
            text += f", {limits.num_state_slots} recurrent states"
            text += f" and {limits.num_snapshots} snapshots of them"
        return f"{text} ({self.source})"


@dataclass(frozen=True, slots=True)
class _Node:
    """One node's caches: who holds them, what they cost together, what memory there is."""

    name: str
    peers: tuple[str, ...]
    cost: CacheCost
    free: int

    @property
    def budget(self) -> int:
        return int(self.free * USABLE)


def most_caches(limits: EngineLimits) -> EngineLimits:
    """Caches that nothing could ever fill: sequences times the blocks of the longest one, and
    SNAPSHOTS_PER_SLOT snapshots for each state slot where prefixes are cached."""
    snapshots = SNAPSHOTS_PER_SLOT * limits.num_state_slots if limits.prefix_caching else 0
    blocks = limits.max_num_seqs * _longest(limits)
    return replace(limits, num_blocks=blocks, num_snapshots=snapshots)


def total_cost(costs: Iterable[CacheCost]) -> CacheCost:
    """What several workers' layers cost together."""
    costs = tuple(costs)
    return CacheCost(
        block_bytes=sum(cost.block_bytes for cost in costs),
        state_bytes=sum(cost.state_bytes for cost in costs),
    )


def least_bytes(limits: EngineLimits, cost: CacheCost) -> int:
    """What one sequence of max_model_len takes, beside a state for each that may run."""
    return limits.num_state_slots * cost.state_bytes + _longest(limits) * cost.block_bytes


def fit_caches(most: EngineLimits, budgets: Iterable[tuple[CacheCost, int]]) -> EngineLimits:
    """The largest caches, up to `most`, that stay within every one of `budgets` (cost, bytes).

    Snapshots take a quarter of a budget at most, and only what `least_bytes` leaves of it; every
    budget has to hold that much. Blocks take the rest.
    """
    budgets = tuple(budgets)
    snapshots = [
        min(budget // 4, budget - least_bytes(most, cost)) // cost.state_bytes
        for cost, budget in budgets
        if cost.state_bytes
    ]
    fitted = replace(most, num_snapshots=min([most.num_snapshots, *snapshots]))
    blocks = [
        (budget - fitted.num_state_rows * cost.state_bytes) // cost.block_bytes
        for cost, budget in budgets
        if cost.block_bytes
    ]
    return replace(fitted, num_blocks=min([most.num_blocks, *blocks]))


def plan_caches(spec: GroupSpec, started: Mapping[str, Started]) -> CachePlan:
    """Decide once everyone has loaded: `started` holds every worker of the group by its peer name.

    Without `spec.cache_costs` the sizes are in `spec.limits` already. Raises ValueError when not
    even one sequence of max_model_len fits.
    """
    if not spec.cache_costs:
        return CachePlan(limits=spec.limits, source="as kv_cache_memory says")
    nodes = _nodes(spec, started)
    tightest = min(nodes, key=lambda node: node.budget / least_bytes(spec.limits, node.cost))
    if tightest.budget < least_bytes(spec.limits, tightest.cost):
        raise ValueError(_shortage(spec.limits, tightest))
    limits = fit_caches(spec.limits, ((node.cost, node.budget) for node in nodes))
    source = f"measured: {size_text(tightest.free)} free on {tightest.name}"
    if len(nodes) > 1:
        source += f", which has the least room of {len(nodes)} nodes"
    return CachePlan(limits=limits, source=source)


def contents(limits: EngineLimits) -> str:
    """What `least_bytes` are for, in words."""
    text = f"one sequence of max_model_len={limits.max_model_len}"
    if limits.num_state_slots:
        text += f" and the recurrent states of max_num_seqs={limits.max_num_seqs}"
    return text


def cache_holders(spec: GroupSpec) -> tuple[str, ...]:
    """Peer names of the workers that hold caches, in the order of `stage_layers`."""
    role = Role.ENGINE if spec.executor == "local" else Role.STAGE
    return tuple(f"{role}-{index}" for index in range(len(spec.stage_layers)))


def size_text(num_bytes: int) -> str:
    """Bytes as people read them: `11.2 GiB`."""
    for unit, power in (("GiB", 3), ("MiB", 2), ("KiB", 1)):
        if num_bytes >= 1024**power:
            return f"{num_bytes / 1024**power:.1f} {unit}"
    return f"{num_bytes} bytes"


def _longest(limits: EngineLimits) -> int:
    """Blocks of one sequence of max_model_len."""
    return -(-limits.max_model_len // limits.block_size)


def _nodes(spec: GroupSpec, started: Mapping[str, Started]) -> list[_Node]:
    """Every node with caches. Whoever loaded last on it, an expert worker too, saw what is left."""
    costs = dict(zip(cache_holders(spec), spec.cache_costs, strict=True))
    held: dict[str, list[str]] = {}
    for peer in costs:
        held.setdefault(started[peer].node_id, []).append(peer)
    return [
        _Node(
            name=f"node {node_id[:12]}" if node_id else "this machine",
            peers=tuple(peers),
            cost=total_cost(costs[peer] for peer in peers),
            free=min(_measured(peer, s) for peer, s in started.items() if s.node_id == node_id),
        )
        for node_id, peers in held.items()
    ]


def _measured(peer: str, started: Started) -> int:
    assert started.free_bytes is not None, f"{peer} was to measure its node's memory"
    return started.free_bytes


def _shortage(limits: EngineLimits, node: _Node) -> str:
    return (
        f"kv_cache_memory=auto: {node.name} has {size_text(node.free)} free, of which the caches "
        f"of {', '.join(node.peers)} may use {size_text(node.budget)}, but {contents(limits)} "
        f"need {size_text(least_bytes(limits, node.cost))} there: lower one of them, or say with a "
        "size how much may be used"
    )
