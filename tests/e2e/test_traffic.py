"""Two hundred real requests on far too little memory: nothing lost, changed, leaked or left
to wait."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest

from deploy.demo import NANO_MODELS
from router.engine import EngineCore
from router.sequence import MAX_OVERTAKES
from router.step import EngineLoad, StepPlan, Token
from shards.client import TokenStream
from shards.group import ModelGroup
from tests.e2e.traffic import Request, alone, random_tokens, sampling_of, scarce
from tests.groups import Answer, answer_of, running_group

NUM_REQUESTS = 200
MOST_OPEN = 60
"""Clients that wait or read at once."""
MAX_MODEL_LEN = 132
NUM_SEATS = 12
SCARCE = {"num_blocks": 38, "block_size": 4, "max_num_seqs": NUM_SEATS}
TWO_BY_TWO: dict[str, Any] = {"stages": 2, "expert_shards": 2}


@dataclass
class Watch:
    """Counts, for each sequence, how many later arrivals had started when it first did.

    Sequence ids rise with the order of arrival.
    """

    started: set[int] = field(default_factory=set)
    overtaken: dict[int, int] = field(default_factory=dict)

    def see(self, core: EngineCore, plan: StepPlan) -> None:
        """One plan goes out: nothing may leak, and it says who starts."""
        core.check_invariants()
        for new in plan.new:
            if new.seq_id not in self.started:
                self.overtaken[new.seq_id] = sum(other > new.seq_id for other in self.started)
            self.started.add(new.seq_id)

    def over(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """See every plan of the engines that live in this process."""
        plain = EngineCore.schedule

        def schedule(core: EngineCore) -> StepPlan | None:
            plan = plain(core)
            if plan is not None:
                self.see(core, plan)
            return plan

        monkeypatch.setattr(EngineCore, "schedule", schedule)


@dataclass(frozen=True)
class Visit:
    """One client: what it asks, how urgent it is, and after how many tokens it leaves, if it
    does."""

    request: Request
    priority: int
    leaves_after: int | None


def visits(seed: str) -> list[Visit]:
    """Heavy tails on both ends; half of the prompts share a beginning with many others."""
    rng = Random(seed)
    found = []
    for number in range(NUM_REQUESTS):
        num_prompt = min(90, 1 + int(rng.paretovariate(1.1) * 8))
        shared = num_prompt // 2 if rng.random() < 0.5 else 0
        beginning = random_tokens(Random(rng.randrange(3)), shared)
        prompt = (*beginning, *random_tokens(rng, num_prompt - shared))
        max_tokens = min(MAX_MODEL_LEN - 1 - num_prompt, int(rng.paretovariate(0.9) * 5))
        found.append(
            Visit(
                request=(prompt, sampling_of(number, max_tokens)),
                priority=rng.choice([0] * 9 + [1]),
                leaves_after=rng.choice([0, 1, 5]) if rng.random() < 0.15 else None,
            )
        )
    return found


async def read(stream: TokenStream, leaves_after: int | None) -> Answer:
    """The whole answer, or what came before its client left."""
    tokens: list[Token] = []
    if leaves_after != 0:
        async for token in stream:
            tokens.append(token)
            if len(tokens) == leaves_after:
                break
    stream.abort()  # harmless after the end
    return answer_of(tokens)


async def visit_all(group: ModelGroup, todo: list[Visit], rng: Random) -> list[Answer]:
    """Arrivals in bursts that keep ahead of what can be served."""
    gate = asyncio.Semaphore(MOST_OPEN)

    async def one(visit: Visit) -> Answer:
        prompt, sampling = visit.request
        stream = group.generate(prompt, sampling, priority=visit.priority)
        try:
            return await read(stream, visit.leaves_after)
        finally:
            gate.release()

    asked = []
    for visit in todo:
        await gate.acquire()
        asked.append(asyncio.create_task(one(visit)))
        if rng.random() < 0.3:
            await asyncio.sleep(0.001 * rng.randrange(20))
    return list(await asyncio.gather(*asked))


async def at_rest(group: ModelGroup) -> EngineLoad:
    """The load once the last aborts have arrived."""
    async with asyncio.timeout(10):
        while group.load.running or group.load.waiting:
            await asyncio.sleep(0.01)
    return group.load


def begins(answer: Answer, whole: Answer) -> bool:
    """Whether an answer that was cut short is the beginning of `whole`."""
    count = len(answer.token_ids)
    return (answer.token_ids, answer.logprobs, answer.top_logprobs) == (
        whole.token_ids[:count],
        whole.logprobs[:count],
        whole.top_logprobs[:count],
    )


async def assert_a_day(
    monkeypatch: pytest.MonkeyPatch, model: str, dtype: str, **options: Any
) -> None:
    todo = visits(model)
    whole = await asyncio.to_thread(alone, model, dtype, tuple(v.request for v in todo))
    options |= {"dtype": dtype, "max_model_len": MAX_MODEL_LEN, **scarce(model, dtype, **SCARCE)}
    watch = Watch()
    watch.over(monkeypatch)
    with running_group(model, max_num_batched_tokens=48, **options) as group:
        answers = await visit_all(group, todo, Random(7))
        load = await at_rest(group)
    for number, (visit, answer, own) in enumerate(zip(todo, answers, whole, strict=True)):
        assert begins(answer, own), f"request {number}: {visit}"
        left = visit.leaves_after is not None and visit.leaves_after < len(own.token_ids)
        assert left or answer == own, f"request {number}: {visit}"
    assert (load.running, load.waiting, load.used_blocks, load.used_slots) == (0, 0, 0, 0)
    assert load.used_snapshots <= load.total_snapshots
    assert load.total_blocks == SCARCE["num_blocks"]
    assert load.preemptions > 20, "memory must be short"
    assert load.prefix_hit_tokens > 0
    # The documented bound on waiting: overtakes, and those already chosen when it was reached.
    assert len(watch.overtaken) > NUM_REQUESTS / 2
    assert 0 < max(watch.overtaken.values()) <= MAX_OVERTAKES - 1 + NUM_SEATS


CASES = [
    pytest.param("float32", {}, id="local"),
    pytest.param("bfloat16", {}, id="local-bfloat16", marks=pytest.mark.slow),
    pytest.param("float32", TWO_BY_TWO, id="2x2", marks=pytest.mark.slow),
    pytest.param(
        "bfloat16", {**TWO_BY_TWO, "dispatch": "direct"}, id="2x2-direct", marks=pytest.mark.slow
    ),
]


@pytest.mark.parametrize(("dtype", "options"), CASES)
@pytest.mark.parametrize("model", NANO_MODELS)
async def test_two_hundred_requests(
    model: str, dtype: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    await assert_a_day(monkeypatch, model, dtype, **options)
