"""A prefix that is found again changes what is computed, never what comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from router.step import SamplingParams
from tests.groups import ask, ask_all, running_group
from tests.tiny import FAMILIES, write_tiny

GREEDY = SamplingParams(max_tokens=24, temperature=0.0, logprobs=2)
SEEDED = SamplingParams(max_tokens=24, temperature=1.0, seed=5, logprobs=2)

SHARED = tuple(3 + i * 7 % 90 for i in range(37))
PROMPTS = [
    SHARED,
    (*SHARED, 5, 6, 7),
    (*SHARED[:20], 8, 9, *SHARED[20:]),
    SHARED,
    SHARED[:17],
    (*SHARED, *SHARED),  # PhiMoE: above the original context of 48 tokens
    (1,),
]
TOPOLOGIES: dict[str, dict[str, Any]] = {
    "local": {"executor": "local"},
    "2x3": {"stages": 2, "expert_shards": 3, "dispatch": "direct"},
}


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
async def test_cold_warm_and_preempted_are_the_same(
    family: str, dtype: str, topology: str, tmp_path: Path
) -> None:
    folder = write_tiny(family, tmp_path)
    options = {"dtype": dtype, "block_size": 4, **TOPOLOGIES[topology]}
    with running_group(folder, **options, enable_prefix_caching=False) as group:
        expected = [[await ask(group, p, s) for p in PROMPTS] for s in (GREEDY, SEEDED)]
        assert group.load.prefix_hit_tokens == 0
    with running_group(folder, **options, max_num_batched_tokens=24) as group:
        for _ in ("cold", "warm"):
            for sampling, answers in zip((GREEDY, SEEDED), expected, strict=True):
                assert await ask_all(group, PROMPTS, sampling) == answers
        assert group.load.prefix_hit_tokens > 500
        assert group.load.used_blocks == 0


@pytest.mark.parametrize("family", FAMILIES)
async def test_preempted_sequences_go_on_where_a_prefix_is_left(
    family: str, tmp_path: Path
) -> None:
    folder = write_tiny(family, tmp_path)
    with running_group(folder, executor="local", enable_prefix_caching=False) as group:
        expected = await ask_all(group, PROMPTS, GREEDY)
    # Room for the longest sequence and little more.
    few = {"max_model_len": 112, "block_size": 4, "max_num_seqs": 7}
    budget = {"dbrx": 100_000, "phimoe": 100_000, "jamba": 310_000}[family]
    with running_group(
        folder, executor="local", **few, kv_cache_memory=budget, max_num_batched_tokens=40
    ) as group:
        assert await ask_all(group, PROMPTS, GREEDY) == expected
        assert group.load.preemptions > 0, group.load


@pytest.mark.parametrize("topology", TOPOLOGIES)
async def test_blocks_behind_a_window_are_not_missed(topology: str, tmp_path: Path) -> None:
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    folder = write_tiny("phimoe", tmp_path, sliding_window=13, rope_parameters=plain)
    options: dict[str, Any] = {"block_size": 4, **TOPOLOGIES[topology]}
    with running_group(folder, **options, enable_prefix_caching=False) as group:
        expected = [await ask(group, p, GREEDY) for p in PROMPTS]
    # So few blocks that what is given up behind the windows is soon another sequence's.
    few = {"kv_cache_memory": 100_000, "max_model_len": 112, "max_num_batched_tokens": 24}
    with running_group(folder, **options, **few) as group:
        for _ in ("cold", "warm"):
            assert await ask_all(group, PROMPTS, GREEDY) == expected
        assert group.load.prefix_hit_tokens > 0
        assert group.load.used_blocks == 0
        assert group.load.total_blocks < 40
