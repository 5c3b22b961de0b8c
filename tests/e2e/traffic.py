"""Requests of every kind of sampling, what each answers alone, and memory too small for them."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from random import Random
from typing import Any

from deploy.demo import nano_checkpoint
from models.registry import load_config
from router.step import SamplingParams
from shards.cache_bytes import block_bytes, slot_bytes
from shards.group import ModelGroup
from tests.groups import Answer, ask, running_group

Request = tuple[tuple[int, ...], SamplingParams]

# Every option that chooses tokens, greedy and seeded; requests go round them.
SAMPLINGS = tuple(
    SamplingParams(max_tokens=1, logprobs=2, **options)
    for options in (
        {"temperature": 0.0},
        {"temperature": 0.9, "top_p": 0.95},
        {"temperature": 0.0, "repetition_penalty": 1.2},
        {"temperature": 1.0, "top_k": 20, "top_p": 0.9},
        {"temperature": 0.8, "min_p": 0.02, "presence_penalty": 0.7, "frequency_penalty": 0.4},
        {"temperature": 0.0, "frequency_penalty": 0.6, "logit_bias": ((9, 2.0), (30, -3.0))},
        {"temperature": 1.2, "bad_words": ((11,), (20, 21)), "repetition_penalty": 0.9},
        {"temperature": 1.0, "allowed_token_ids": tuple(range(5, 120, 3)), "sample_idx": 1},
        {"temperature": 1.0, "stop_token_ids": tuple(range(5, 100, 9)), "min_tokens": 4},
    )
)


def sampling_of(number: int, max_tokens: int) -> SamplingParams:
    """The options of request `number`; its seed is its own."""
    options = SAMPLINGS[number % len(SAMPLINGS)]
    min_tokens = min(options.min_tokens, max_tokens)
    return replace(options, max_tokens=max_tokens, min_tokens=min_tokens, seed=number)


def random_tokens(rng: Random, count: int) -> tuple[int, ...]:
    """Ids that every nano model has a token for."""
    return tuple(rng.randrange(5, 100) for _ in range(count))


def alone(model: str, dtype: str, requests: tuple[Request, ...]) -> tuple[Answer, ...]:
    """Each request by itself in one process, with nothing to find and nobody beside it.

    Call it in a thread where an event loop runs.
    """

    async def one_by_one(group: ModelGroup) -> tuple[Answer, ...]:
        return tuple([await ask(group, *request) for request in requests])

    options: dict[str, Any] = {"executor": "local", "enable_prefix_caching": False}
    with running_group(model, dtype=dtype, **options) as group:
        return asyncio.run(one_by_one(group))


def scarce(
    model: str,
    dtype: str,
    *,
    num_blocks: int,
    block_size: int,
    max_num_seqs: int,
    cached: bool = True,
) -> dict[str, Any]:
    """Options for that many KV blocks and, where prefixes are `cached`, a third as many snapshots
    as state slots."""
    config = load_config(nano_checkpoint(model))
    itemsize = 4 if dtype == "float32" else 2
    layers = range(config.num_layers)
    states = max_num_seqs + (max_num_seqs // 3 if cached else 0)
    memory = states * slot_bytes(config, layers, itemsize)
    memory += num_blocks * block_bytes(config, layers, block_size, itemsize)
    return {
        "block_size": block_size,
        "max_num_seqs": max_num_seqs,
        "kv_cache_memory": memory,
        "enable_prefix_caching": cached,
    }
