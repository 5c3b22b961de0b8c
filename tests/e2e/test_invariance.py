"""The numbers contract: the same requests give the same bits whatever happens around them."""

from __future__ import annotations

import asyncio
import os
from functools import cache
from random import Random
from typing import Any

import pytest

from router.step import SamplingParams
from shards.group import ModelGroup
from tests.groups import Answer, ask, healed, kill_worker, running_group

LONG_FORM = bool(os.environ.get("CONCLAVE_SLOW"))
NUM_REQUESTS = 64 if LONG_FORM else 12

Request = tuple[tuple[int, ...], SamplingParams]

# What is done differently from each request alone, cold, in one process.
CONDITIONS: dict[str, dict[str, Any]] = {
    "in company": {"executor": "local"},
    "chunks of 5": {"executor": "local", "max_num_batched_tokens": 5},
    "warm": {"executor": "local", "turns": 2},
    "preempted": {
        "executor": "local",
        "block_size": 4,
        "max_model_len": 160,
        "kv_cache_memory": "preempts",
    },
    "2x2": {"stages": 2, "expert_shards": 2},
    "2x2 direct": {"stages": 2, "expert_shards": 2, "dispatch": "direct"},
    "3x4": {"stages": 3, "expert_shards": 4, "turns": 2},
    "copies": {"stages": 2, "expert_shards": 3, "expert_replicas": 2},
    "killed": {"stages": 2, "expert_shards": 2, "processes": True},
}


@cache
def requests() -> tuple[Request, ...]:
    """Greedy and seeded, short and long, some of a common beginning."""
    rng = Random(6)
    shared = tuple(rng.randrange(5, 100) for _ in range(40))
    found = []
    for number in range(NUM_REQUESTS):
        own = tuple(rng.randrange(5, 100) for _ in range(rng.choice([1, 4, 17, 60])))
        prompt = (*shared, *own) if number % 3 == 0 else own
        sampling = SamplingParams(
            max_tokens=rng.choice([3, 10, 40]),
            temperature=number % 2 * 0.9,
            top_p=0.95,
            seed=number,
            repetition_penalty=1.2 if number % 5 == 0 else 1.0,
            logprobs=2,
        )
        found.append((prompt, sampling))
    return tuple(found)


@cache
def alone(model: str, dtype: str) -> tuple[Answer, ...]:
    """Each request by itself, with nothing to find and nobody beside it."""

    async def one_by_one(group: ModelGroup) -> tuple[Answer, ...]:
        return tuple([await ask(group, *request) for request in requests()])

    options: dict[str, Any] = {"executor": "local", "enable_prefix_caching": False}
    with running_group(model, dtype=dtype, **options) as group:
        # In a thread: the caller's event loop is running.
        return asyncio.run(one_by_one(group))


def budget(model: str, dtype: str) -> int:
    """KV memory for one sequence of 160 tokens."""
    from deploy.demo import nano_checkpoint
    from models.registry import load_config
    from shards.kv_cache import block_bytes, slot_bytes

    config = load_config(nano_checkpoint(model))
    itemsize = 4 if dtype == "float32" else 2
    layers = range(config.num_layers)
    states = 32 * slot_bytes(config, layers, itemsize)
    return states + 40 * block_bytes(config, layers, 4, itemsize)


# Its processes take long to start: the short form leaves it to the chaos tests.
killed = pytest.param("killed", marks=pytest.mark.slow)


@pytest.mark.parametrize("condition", [c if c != "killed" else killed for c in CONDITIONS])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["nano-dbrx", "nano-phimoe", "nano-jamba"])
async def test_bits_never_move(model: str, dtype: str, condition: str) -> None:
    expected = await asyncio.to_thread(alone, model, dtype)
    options = {"dtype": dtype, **CONDITIONS[condition]}
    turns = options.pop("turns", 1)
    if options.get("kv_cache_memory") == "preempts":
        options["kv_cache_memory"] = budget(model, dtype)
    with running_group(model, **options) as group:
        for _ in range(turns):
            asked = asyncio.gather(*(ask(group, *request) for request in requests()))
            if condition == "killed":
                await asyncio.sleep(0.3)
                for victim in (("stage", 1), ("expert", 0)):
                    kill_worker(group, *victim)
                    await healed(group)
            answers = await asked
            for number, (answer, own) in enumerate(zip(answers, expected, strict=True)):
                assert answer == own, f"request {number}"
        if condition == "preempted":
            assert group.load.preemptions > 0
        if turns > 1:
            assert group.load.prefix_hit_tokens > 100
