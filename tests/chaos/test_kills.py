"""SIGKILL of any worker behind the ingress: every stream ends with the bits it would have had."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from router.step import SamplingParams, Want
from shards.group import ModelGroup
from tests.groups import Answer, ask_all, healed, kill_worker, running_group

GREEDY = SamplingParams(max_tokens=80, temperature=0.0, logprobs=1)
SEEDED = SamplingParams(
    max_tokens=80,
    temperature=1.0,
    top_p=0.95,
    seed=11,
    logprobs=1,
    repetition_penalty=1.1,
    frequency_penalty=0.1,
)
PROMPTS = [tuple(range(5, 5 + n)) for n in (4, 11, 30)]


async def _first_tokens(group: ModelGroup, count: int) -> None:
    """Wait until a stream of this group has moved `count` tokens."""
    seen = 0
    stream = group.generate((7, 8, 9), GREEDY)
    async for _ in stream:
        seen += 1
        if seen == count:
            stream.abort()
            return


async def _killed(
    group: ModelGroup, victim: tuple[str, int], sampling: SamplingParams
) -> list[Answer]:
    """Answers of all prompts while `victim` dies in their middle."""
    asked = asyncio.create_task(ask_all(group, PROMPTS, sampling))
    await _first_tokens(group, 5)
    assert not asked.done(), "the streams must still be open when the worker dies"
    kill_worker(group, *victim)
    answers = await asyncio.wait_for(asked, 60)
    await healed(group)
    return answers


@pytest.mark.parametrize(
    ("model", "dispatch"),
    [("nano-jamba", "actor"), ("nano-dbrx", "direct"), ("nano-phimoe", "actor")],
)
async def test_every_role_may_die(model: str, dispatch: str) -> None:
    options: dict[str, Any] = {"stages": 2, "expert_shards": 2, "expert_replicas": 2}
    roles = [("expert", 0), ("stage", 0), ("stage", 1), ("dispatcher", 0), ("engine", 0)]
    with running_group(model, processes=True, dispatch=dispatch, **options) as group:
        expected = {s: await ask_all(group, PROMPTS, s) for s in (GREEDY, SEEDED)}
        for turn, victim in enumerate(roles):
            before = {(w.role, w.index): w.incarnation for w in group.workers()}
            sampling = (GREEDY, SEEDED)[turn % 2]
            assert await _killed(group, victim, sampling) == expected[sampling], victim
            after = {(w.role, w.index): w.incarnation for w in group.workers()}
            assert after[victim] == before[victim] + 1


@pytest.mark.parametrize("dispatch", ["actor", "direct"])
async def test_an_expert_without_a_copy_only_delays(dispatch: str) -> None:
    options: dict[str, Any] = {"stages": 1, "expert_shards": 2, "dispatch": dispatch}
    with running_group("nano-dbrx", processes=True, **options) as group:
        expected = await ask_all(group, PROMPTS, GREEDY)
        assert await _killed(group, ("expert", 1), GREEDY) == expected


async def test_two_at_once() -> None:
    with running_group("nano-jamba", processes=True, stages=2, expert_shards=2) as group:
        expected = await ask_all(group, PROMPTS, GREEDY)
        asked = asyncio.create_task(ask_all(group, PROMPTS, GREEDY))
        await _first_tokens(group, 5)
        kill_worker(group, "engine", 0)
        kill_worker(group, "expert", 1)
        assert await asyncio.wait_for(asked, 60) == expected
        await healed(group)


async def test_the_engine_dies_while_a_stage_waits_for_an_expert() -> None:
    with running_group("nano-jamba", processes=True, stages=2, expert_shards=2) as group:
        expected = await ask_all(group, PROMPTS, GREEDY)
        for _ in range(2):
            asked = asyncio.create_task(ask_all(group, PROMPTS, GREEDY))
            await _first_tokens(group, 5)
            kill_worker(group, "expert", 1)
            # Long enough for a stage to be stopped at the missing expert.
            await asyncio.sleep(0.1)
            kill_worker(group, "engine", 0)
            assert await asyncio.wait_for(asked, 60) == expected
            await healed(group)


async def test_arrays_survive_too() -> None:
    prompt = tuple(5 + i % 60 for i in range(400))
    compute, want = SamplingParams(max_tokens=0), Want(logits=True, hidden_states=True)
    options: dict[str, Any] = {"stages": 2, "expert_shards": 2, "max_num_batched_tokens": 8}
    with running_group("nano-jamba", processes=True, **options) as group:
        expected = group.generate(prompt, compute, want=want)
        assert len([token async for token in expected]) == 1
        for victim in (("stage", 1), ("engine", 0)):
            stream = group.generate(prompt, compute, want=want)
            async with asyncio.timeout(60):
                while "logits" not in stream.outputs:
                    await asyncio.sleep(0.001)
            assert not stream.outputs["logits"][-1].any(), "it must still be under way"
            kill_worker(group, *victim)
            assert len([token async for token in stream]) == 1
            assert stream.outputs.keys() == expected.outputs.keys()
            for name, array in expected.outputs.items():
                assert stream.outputs[name].tobytes() == array.tobytes(), (victim, name)
            await healed(group)


@pytest.mark.parametrize("model", ["nano-dbrx", "nano-jamba"])
async def test_what_the_stages_remember_outlives_a_dispatcher(model: str) -> None:
    """Streams go on from what is cached; what a dead stage remembered is computed again."""
    long_prompts = PROMPTS[2:]
    with running_group(model, processes=True, stages=2, expert_shards=2) as group:
        expected = await ask_all(group, long_prompts, GREEDY)
        for role, hits in (("dispatcher", True), ("stage", False)):
            kill_worker(group, role, 0)
            answers = await asyncio.wait_for(ask_all(group, long_prompts, GREEDY), 60)
            assert answers == expected
            assert (group.load.prefix_hit_tokens > 0) is hits, (role, group.load)
            await healed(group)
