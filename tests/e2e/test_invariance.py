"""The numbers contract: the same requests give the same bits whatever happens around them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator
from functools import cache
from random import Random
from typing import Any

import pytest

from deploy.demo import NANO_MODELS
from router.step import SamplingParams
from shards.group import ModelGroup
from tests.e2e.traffic import Request, alone, random_tokens, sampling_of, scarce
from tests.e2e.workers import Workers, incarnations
from tests.groups import Answer, ask, healed, kill_worker, running_group

LONG_FORM = bool(os.environ.get("CONCLAVE_SLOW"))
NUM_REQUESTS = 64 if LONG_FORM else 12
LENGTHS = (3, 10, 40) if LONG_FORM else (3, 8, 24)

DIRECT = {"dispatch": "direct"}
ONE_BY_TWO: dict[str, Any] = {"stages": 1, "expert_shards": 2}  # plans ahead
TWO_BY_TWO: dict[str, Any] = {"stages": 2, "expert_shards": 2}
THREE_BY_FOUR: dict[str, Any] = {"stages": 3, "expert_shards": 4}
# Every expert on both shards: the load of the moment decides which of them computes.
COPIES: dict[str, Any] = {**TWO_BY_TWO, "expert_replicas": 2}
SCARCE = {"scarce": True}

# What is done differently from each request alone, cold, in one process.
CONDITIONS: dict[str, dict[str, Any]] = {
    "in company": {},
    "chunks of 1": {"max_num_batched_tokens": 1},
    "chunks of 5": {"max_num_batched_tokens": 5},
    "chunks of 16": {"max_num_batched_tokens": 16},
    "chunks of 64": {"max_num_batched_tokens": 64},
    "warm": {"turns": 2},
    "preempted": {**SCARCE, "turns": 2},
    "preempted, nothing cached": {**SCARCE, "cached": False},
    "1x2": ONE_BY_TWO,
    "1x2 direct": {**ONE_BY_TWO, **DIRECT},
    "2x2": {**TWO_BY_TWO, "turns": 2},
    "2x2 direct": {**TWO_BY_TWO, **DIRECT},
    "2x2 preempted": {**TWO_BY_TWO, **SCARCE},
    "3x4": {**THREE_BY_FOUR, "max_num_batched_tokens": 64},
    "3x4 direct": {**THREE_BY_FOUR, **DIRECT, "turns": 2},
    "copies": COPIES,
    "copies direct": {**COPIES, **DIRECT},
}
DTYPES = ("float32", "bfloat16")
VICTIMS = (("stage", 0), ("stage", 1), ("expert", 1), ("dispatcher", 0), ("engine", 0))


def every_case() -> Iterator[Any]:
    """Every model, dtype and condition; the short form takes one dispatch home of each pair, the
    other one with the other dtype, and leaves the slowest out."""
    for number, model in enumerate(NANO_MODELS):
        for dtype in DTYPES:
            home = " direct" if number % 2 == DTYPES.index(dtype) else ""
            for condition, options in CONDITIONS.items():
                here = "stages" not in options or condition == condition.split()[0] + home
                short = (here or "preempted" in condition) and condition != "chunks of 1"
                marks = () if short else (pytest.mark.slow,)
                yield pytest.param(model, dtype, condition, marks=marks)


@cache
def requests() -> tuple[Request, ...]:
    """Greedy and seeded, short and long, some of a common beginning, some of one prompt."""
    rng = Random(6)
    shared = random_tokens(rng, 40)
    found: list[Request] = []
    for number in range(NUM_REQUESTS - 2):
        own = random_tokens(rng, rng.choice([1, 4, 17, 60]))
        prompt = (*shared, *own) if number % 3 == 0 else own
        # Short ones grow most: many of them start, and then run out of memory.
        length = LENGTHS[-1] if len(prompt) < 10 else rng.choice(LENGTHS)
        found.append((prompt, sampling_of(number, length)))
    # Two samples of one prompt (`n` 2) that grow past nano-phimoe's original context of 96.
    prompt = random_tokens(rng, 90)
    pair = [SamplingParams(max_tokens=12, seed=3, sample_idx=i, logprobs=2) for i in range(2)]
    return (*found, *((prompt, sampling) for sampling in pair))


@cache
def expected(model: str, dtype: str) -> tuple[Answer, ...]:
    return alone(model, dtype, requests())


async def assert_same(
    group: ModelGroup,
    answers: tuple[Answer, ...],
    seed: int,
    meanwhile: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """All requests at once, in an order of `seed`, have the bits that each has alone."""
    order = list(range(len(answers)))
    Random(seed).shuffle(order)
    asked = [asyncio.create_task(ask(group, *requests()[number])) for number in order]
    if meanwhile is not None:
        await meanwhile()
        assert not all(task.done() for task in asked), "they had ended before anything happened"
    for number, answer in zip(order, await asyncio.gather(*asked), strict=True):
        assert answer == answers[number], f"request {number}: {requests()[number][1]}"


async def some_tokens(group: ModelGroup, count: int = 4) -> None:
    """Return in the middle of other streams: this one, begun after them, has `count` tokens."""
    stream = group.generate((7, 8, 9), SamplingParams(max_tokens=count + 1, temperature=0.0))
    async for token in stream:
        if token.position == count - 1:
            stream.abort()
            return


@pytest.mark.parametrize(("model", "dtype", "condition"), every_case())
async def test_bits_never_move(model: str, dtype: str, condition: str) -> None:
    answers = await asyncio.to_thread(expected, model, dtype)
    options = {"dtype": dtype, **CONDITIONS[condition]}
    turns = options.pop("turns", 1)
    cached, is_scarce = options.pop("cached", True), options.pop("scarce", False)
    if is_scarce:
        # Room for the longest one and little more; blocks so small that every token may want one.
        longest = max(len(prompt) + sampling.max_tokens for prompt, sampling in requests())
        few = {"num_blocks": longest + 2, "block_size": 1, "max_num_seqs": 12}
        options |= {"max_model_len": longest, **scarce(model, dtype, cached=cached, **few)}
    workers = Workers()
    with running_group(model, make=workers.make, **options) as group:
        for turn in range(turns):
            await assert_same(group, answers, seed=turn)
        if is_scarce:
            assert group.load.preemptions >= 3
        if turns > 1:
            assert group.load.prefix_hit_tokens > 100
        if "expert_replicas" in options:
            assert workers.experts_asked(0) & workers.experts_asked(1), "no expert was asked twice"


async def assert_victims_do_not_matter(
    group: ModelGroup,
    answers: tuple[Answer, ...],
    kill: Callable[[str, int], Awaitable[None]],
) -> None:
    """Every role dies in the middle of all requests, one after the other."""
    for turn, victim in enumerate(VICTIMS):

        async def meanwhile(victim: tuple[str, int] = victim) -> None:
            await some_tokens(group)
            await kill(*victim)

        await assert_same(group, answers, turn, meanwhile)


# In float32 the chaos tests do it with processes.
KILLED = [
    pytest.param(model, dtype, dispatch, marks=() if short else pytest.mark.slow)
    for number, model in enumerate(NANO_MODELS)
    for dtype in DTYPES
    for home, dispatch in enumerate(("actor", "direct"))
    for short in [dtype == "bfloat16" and number % 2 == home]
]


@pytest.mark.parametrize(("model", "dtype", "dispatch"), KILLED)
async def test_bits_survive_any_workers_death(model: str, dtype: str, dispatch: str) -> None:
    answers = await asyncio.to_thread(expected, model, dtype)
    workers = Workers()
    options = {"dtype": dtype, "dispatch": dispatch, **TWO_BY_TWO}
    with running_group(model, make=workers.make, **options) as group:

        async def kill(role: str, index: int) -> None:
            await workers.kill(group, role, index)

        await assert_victims_do_not_matter(group, answers, kill)


@pytest.mark.slow
@pytest.mark.parametrize("dispatch", ["actor", "direct"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", NANO_MODELS)
async def test_bits_survive_any_process(model: str, dtype: str, dispatch: str) -> None:
    answers = await asyncio.to_thread(expected, model, dtype)
    options = {"dtype": dtype, "dispatch": dispatch, **TWO_BY_TWO}
    with running_group(model, processes=True, **options) as group:

        async def kill(role: str, index: int) -> None:
            before = incarnations(group)[role, index]
            kill_worker(group, role, index)
            async with asyncio.timeout(60):
                while incarnations(group)[role, index] == before:
                    await asyncio.sleep(0.01)
            await healed(group)

        await assert_victims_do_not_matter(group, answers, kill)
        assert sum(incarnations(group).values()) == len(VICTIMS), "one died that was not killed"
