"""How large caches are, against a search through all sizes."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from router.engine import EngineLimits
from shards.cache_budget import (
    CachePlan,
    fit_caches,
    least_bytes,
    most_caches,
    plan_caches,
    size_text,
)
from shards.control import Started
from shards.spec import CacheCost, GroupSpec

LIMITS = EngineLimits(
    block_size=4,
    num_blocks=1,
    num_state_slots=3,
    max_num_seqs=3,
    max_num_batched_tokens=64,
    max_model_len=37,
    prefix_caching=True,
)
LONGEST = 10  # blocks of 4 tokens that hold 37
DENSE = replace(LIMITS, num_state_slots=0)
Budgets = list[tuple[CacheCost, int]]


def cost(block: int, state: int = 0) -> CacheCost:
    return CacheCost(block_bytes=block, state_bytes=state)


def test_nothing_is_larger_than_could_be_filled() -> None:
    assert most_caches(LIMITS) == replace(LIMITS, num_blocks=30, num_snapshots=12)
    assert most_caches(DENSE) == replace(DENSE, num_blocks=30, num_snapshots=0)
    uncached = replace(LIMITS, prefix_caching=False)
    assert most_caches(uncached) == replace(uncached, num_blocks=30, num_snapshots=0)


def searched(most: EngineLimits, budgets: Budgets) -> EngineLimits:
    """The rule in words: as many snapshots as may be, then as many blocks as there is room for."""

    def snapshots_fit(count: int) -> bool:
        return all(
            count * each.state_bytes <= budget // 4
            and (most.num_state_slots + count) * each.state_bytes + LONGEST * each.block_bytes
            <= budget
            for each, budget in budgets
        )

    def blocks_fit(count: int) -> bool:
        rows = most.num_state_slots + snapshots
        return all(
            rows * each.state_bytes + count * each.block_bytes <= budget for each, budget in budgets
        )

    snapshots = max(n for n in range(most.num_snapshots + 1) if snapshots_fit(n))
    blocks = max(n for n in range(most.num_blocks + 1) if blocks_fit(n))
    return replace(most, num_snapshots=snapshots, num_blocks=blocks)


@pytest.mark.parametrize("seed", range(400))
def test_the_largest_that_fit_every_budget(seed: int) -> None:
    rng = random.Random(seed)
    limits = rng.choice([LIMITS, DENSE, replace(LIMITS, prefix_caching=False)])
    most = most_caches(limits)
    budgets: Budgets = []
    for _ in range(rng.randrange(1, 4)):
        # Some stages have attention alone, some recurrent layers alone.
        block, state = rng.choice([(0, 5), (7, 0), (3, 11), (rng.randrange(1, 9), 40)])
        each = cost(block or (not limits.num_state_slots), state * bool(limits.num_state_slots))
        least = 3 * each.state_bytes + LONGEST * each.block_bytes
        budgets.append((each, least + rng.choice([0, 1, rng.randrange(50), rng.randrange(900)])))
    assert fit_caches(most, budgets) == searched(most, budgets)


def group(costs: list[CacheCost], limits: EngineLimits = LIMITS) -> GroupSpec:
    return GroupSpec(
        model_path="/nowhere",
        dtype="float32",
        executor="pipeline" if len(costs) > 1 else "local",
        dispatch="actor",
        stage_layers=tuple((i, i + 1) for i in range(len(costs))),
        placement=None,
        limits=most_caches(limits),
        threads=1,
        secret="s",
        cache_costs=tuple(costs),
    )


def started(**free: tuple[str, int]) -> dict[str, Started]:
    """Workers by name, with the node they are on and what they found free there."""
    return {
        peer.replace("_", "-"): Started(address=peer, pid=1, node_id=node, free_bytes=num_bytes)
        for peer, (node, num_bytes) in free.items()
    }


@pytest.mark.parametrize("seed", range(200))
def test_a_node_gives_half_of_what_its_last_worker_found(seed: int) -> None:
    rng = random.Random(seed)
    costs = [cost(rng.randrange(1, 9), rng.randrange(1, 20)) for _ in range(4)]
    peers = [*(f"stage_{i}" for i in range(4)), "engine_0", "expert_0", "expert_1", "dispatcher_0"]
    found = {peer: (rng.choice("ab"), rng.randrange(1200, 3000)) for peer in peers}
    budgets: Budgets = []
    for node in {found[f"stage_{i}"][0] for i in range(4)}:
        here = [costs[i] for i in range(4) if found[f"stage_{i}"][0] == node]
        together = cost(sum(c.block_bytes for c in here), sum(c.state_bytes for c in here))
        budgets.append((together, min(num for n, num in found.values() if n == node) // 2))
    most = most_caches(LIMITS)
    plan = plan_caches(group(costs), started(**found))
    assert plan.limits == searched(most, budgets)
    assert plan_caches(group(costs), dict(reversed(started(**found).items()))) == plan


def test_one_sequence_must_fit_on_every_node() -> None:
    spec = group([cost(100), cost(300)], DENSE)
    enough = {"engine_0": ("a", 1), "stage_0": ("a", 9000), "stage_1": ("b", 6000)}
    with pytest.raises(ValueError, match=r"^kv_cache_memory=auto: node a has 1 bytes free"):
        plan_caches(spec, started(**enough))
    enough["engine_0"] = ("c", 1)
    assert plan_caches(spec, started(**enough)).limits.num_blocks == LONGEST
    with pytest.raises(ValueError, match="node b") as error:
        plan_caches(spec, started(**{**enough, "stage_1": ("b", 5998)}))
    said = str(error.value)
    for word in ("stage-1", "5.9 KiB", "max_model_len=37", "2.9 KiB"):
        assert word in said
    assert "stage-0" not in said
    assert "recurrent" not in said
    with pytest.raises(ValueError, match="recurrent states of max_num_seqs=3"):
        plan_caches(group([cost(1, 1)]), started(engine_0=("", 25)))
    assert plan_caches(group([cost(1, 1)]), started(engine_0=("", 26))).limits.num_blocks == LONGEST


def test_what_is_said_about_it() -> None:
    plan = plan_caches(group([cost(1 << 20, 1 << 20)]), started(engine_0=("", 12 << 30)))
    assert str(plan) == (
        "the KV cache holds 120 tokens in blocks of 4, 3 recurrent states and 12 snapshots of "
        "them (measured: 12.0 GiB free on this machine)"
    )
    two = started(stage_0=("a", 90), stage_1=("b", 70))
    plan = plan_caches(group([cost(1), cost(1)], DENSE), two)
    assert str(plan) == (
        "the KV cache holds 120 tokens in blocks of 4 (measured: 70 bytes free on node b, which "
        "has the least room of 2 nodes)"
    )


def test_given_sizes_are_not_measured() -> None:
    limits = replace(LIMITS, num_blocks=17, num_snapshots=2)
    spec = replace(group([cost(1)]), cache_costs=(), limits=limits)
    assert plan_caches(spec, {}) == CachePlan(limits=limits, source="as kv_cache_memory says")


def test_least_bytes_and_words() -> None:
    assert least_bytes(LIMITS, cost(7, 5)) == 3 * 5 + LONGEST * 7
    sizes = {0: "0 bytes", 1023: "1023 bytes", 1536: "1.5 KiB", 3 << 30: "3.0 GiB"}
    assert {num: size_text(num) for num in sizes} == sizes
