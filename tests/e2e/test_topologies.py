"""One sequence, one answer: the same bits on every topology, dispatch home and batch."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest

from deploy.demo import NANO_MODELS
from router.step import SamplingParams
from tests.groups import Answer, ask, ask_all, running_group

TOPOLOGIES: dict[str, dict[str, Any]] = {
    "2x2": {"stages": 2, "expert_shards": 2},
    "1x4-direct": {"stages": 1, "expert_shards": 4, "dispatch": "direct"},
    "3x3-uneven-copies": {"stages": 3, "expert_shards": 3, "expert_replicas": 2},
}
SAMPLINGS = [
    SamplingParams(max_tokens=24, temperature=0.0, logprobs=2),
    SamplingParams(max_tokens=16, temperature=1.0, top_p=0.95, top_k=20, seed=7, logprobs=0),
]


def prompts() -> list[tuple[int, ...]]:
    rng = random.Random(5)
    # The long ones cross pages, chunks and nano-phimoe's LongRoPE boundary.
    return [tuple(rng.randrange(5, 90) for _ in range(n)) for n in (1, 5, 17, 60, 130)]


@cache
def solo(model: str) -> list[list[Answer]]:
    """The oracle: each sequence alone, the whole model in one process."""
    import asyncio

    async def run() -> list[list[Answer]]:
        return [[await ask(group, p, s) for p in prompts()] for s in SAMPLINGS]

    with running_group(model, executor="local") as group:
        return asyncio.run(run())


@pytest.mark.parametrize("model", NANO_MODELS)
async def test_batched_in_one_process(model: str) -> None:
    expected = await _solo(model)
    options = {"executor": "local", "max_num_batched_tokens": 24, "max_num_seqs": 3}
    with running_group(model, **options) as group:
        for sampling, answers in zip(SAMPLINGS, expected, strict=True):
            assert await ask_all(group, prompts(), sampling) == answers


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("model", NANO_MODELS)
async def test_batched_over_stages_and_shards(model: str, topology: str) -> None:
    expected = await _solo(model)
    with running_group(model, **TOPOLOGIES[topology]) as group:
        for sampling, answers in zip(SAMPLINGS, expected, strict=True):
            assert await ask_all(group, prompts(), sampling) == answers


async def _solo(model: str) -> list[list[Answer]]:
    import asyncio

    return await asyncio.to_thread(solo, model)
