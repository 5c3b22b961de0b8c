"""PhiMoE's LongRoPE boundary, crossed while the running engine generates.

Every step of every sequence is compared, in all its log-probabilities, with a full forward of the
corrected reference over what the sequence then holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from router.engine import EngineCore
from router.step import Admit, SamplingParams, StepPlan, Token
from tests.groups import running_group
from tests.models.driver import tokens_of
from tests.parity.cases import case
from tests.parity.executors import LocalRunner, Runner, pipeline
from tests.parity.generation import TOPOLOGIES, Prompt, Reference, answers
from tests.parity.remedies import load
from tests.tiny import VOCAB_SIZE, write_tiny

ORIGINAL = 48
GREEDY = SamplingParams(max_tokens=14, temperature=0.0, logprobs=VOCAB_SIZE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny("phimoe", tmp_path)


@pytest.fixture
def reference(folder: Path, longrope_switches_factors: Callable[[Any], Any]) -> Reference:
    return Reference(longrope_switches_factors(load(folder)))


def prompt_of(seed: int, count: int) -> Prompt:
    return tuple(tokens_of(seed, count))


@case(23, "PhiMoE", "generating across the boundary, every step against a full recompute")
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_every_step(folder: Path, reference: Reference, topology: dict[str, Any]) -> None:
    prompt = prompt_of(1, ORIGINAL - 6)
    with running_group(folder, **topology) as group:
        (answer,) = answers(group, [prompt], GREEDY)
    assert len(prompt) + len(answer) > ORIGINAL + 6
    reference.assert_every_step(prompt, answer)


@case(24, "PhiMoE", "generating on both sides of the boundary in one batch: each its solo run")
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_company(folder: Path, reference: Reference, topology: dict[str, Any]) -> None:
    lengths = (ORIGINAL - 5, 3, ORIGINAL + 1, ORIGINAL)
    prompts = [prompt_of(10 + i, n) for i, n in enumerate(lengths)]
    with running_group(folder, **topology) as group:
        together = answers(group, prompts, GREEDY)
        alone = [answers(group, [prompt], GREEDY)[0] for prompt in prompts]
    for prompt, mine, solo in zip(prompts, together, alone, strict=True):
        reference.assert_every_step(prompt, mine)
        assert [facts(t) for t in mine] == [facts(t) for t in solo], f"prompt of {len(prompt)}"


def facts(token: Token) -> Token:
    """A token without the number of its sequence and what a cached prefix saved."""
    return replace(token, seq_id=0, num_cached=0)


@case(26, "PhiMoE", "crossing while prompts come in chunks, and the second prefill too")
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("budget", [5, 16])
def test_chunked(folder: Path, reference: Reference, topology: dict[str, Any], budget: int) -> None:
    prompts = [prompt_of(20, ORIGINAL - 3), prompt_of(21, 2), prompt_of(22, ORIGINAL + 7)]
    with running_group(folder, max_num_batched_tokens=budget, block_size=4, **topology) as group:
        found = answers(group, prompts, GREEDY)
    for prompt, answer in zip(prompts, found, strict=True):
        reference.assert_every_step(prompt, answer)


@case(26, "PhiMoE", "crossing with a cache too small for all: preempted and resumed")
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_preempted(folder: Path, reference: Reference, topology: dict[str, Any]) -> None:
    prompts = [prompt_of(30 + i, ORIGINAL - 4 - 5 * i) for i in range(4)]
    sampling = replace(GREEDY, max_tokens=26)
    # 16 blocks of 8 tokens: not even two of the sequences fit to their end.
    small = {"block_size": 8, "max_model_len": 96, "kv_cache_memory": 16 * 6144}
    with running_group(folder, **small, **topology) as group:
        assert group.spec.limits.num_blocks == 16
        found = answers(group, prompts, sampling)
        assert group.load.preemptions > 0
        assert [facts(t) for t in answers(group, prompts[:1], sampling)[0]] == [
            facts(t) for t in found[0]
        ]
    for prompt, answer in zip(prompts, found, strict=True):
        reference.assert_every_step(prompt, answer)


@case(26, "PhiMoE", "a cached prefix below the boundary never serves a sequence above it")
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_cached_prefixes(folder: Path, reference: Reference, topology: dict[str, Any]) -> None:
    longer = prompt_of(25, ORIGINAL + 9)
    prompts = [longer[: ORIGINAL - 5], longer[: ORIGINAL - 1], longer, longer[:ORIGINAL]]
    with running_group(folder, block_size=4, **topology) as group:
        for turn in ("cold", "warm"):
            for prompt in prompts:
                (answer,) = answers(group, [prompt], GREEDY)
                reference.assert_every_step(prompt, answer)
            assert group.load.prefix_hit_tokens > 0, turn


@contextmanager
def runner_of(folder: Path, where: str) -> Iterator[Runner]:
    if where == "local":
        yield LocalRunner(folder)
    else:
        with pipeline(folder) as runner:
            yield runner


def drive(
    runner: Runner, prompts: Sequence[Prompt], max_tokens: int, **limits: int
) -> tuple[list[list[Token]], list[StepPlan]]:
    """The engine's core over a runner: every token of each prompt, and every plan it made."""
    core = EngineCore(replace(runner.limits, **limits))
    core.reset(runner.epoch)
    found: list[list[Token]] = [[] for _ in prompts]
    plans: list[StepPlan] = []
    for seq_id, prompt in enumerate(prompts):
        sampling = replace(GREEDY, max_tokens=max_tokens)
        admit = Admit(seq_id=seq_id, epoch=runner.epoch, prompt=prompt, sampling=sampling)
        assert core.admit(admit) is None
    while core.has_work:
        plan = core.schedule()
        assert plan is not None
        plans.append(plan)
        for token in core.apply(runner.run(plan)):
            found[token.seq_id].append(token)
        core.check_invariants()
    return found, plans


def spans(plans: Sequence[StepPlan], seq_id: int) -> list[tuple[int, int, int]]:
    """(start, end, length) of a sequence in each step that computed some of it."""
    rows = [row for plan in plans for row in plan.scheduled if row.seq_id == seq_id]
    return [(row.start, row.start + row.num_tokens, row.length) for row in rows]


@case(24, "PhiMoE", "at the crossing that sequence alone is prefilled again, the others go on")
@pytest.mark.parametrize("where", ["local", "pipeline"])
@pytest.mark.parametrize("budget", [12, 4096])
def test_only_the_crossing_sequence(
    folder: Path, reference: Reference, where: str, budget: int
) -> None:
    crossing, below, above = range(3)
    prompts = [prompt_of(40, ORIGINAL - 3), prompt_of(41, 6), prompt_of(42, ORIGINAL + 2)]
    with runner_of(folder, where) as runner:
        found, plans = drive(runner, prompts, 24, max_num_batched_tokens=budget)
    for prompt, answer in zip(prompts, found, strict=True):
        reference.assert_every_step(prompt, answer)
    for other in (below, above):
        assert_each_position_once(spans(plans, other))
    mine = spans(plans, crossing)
    again = next(i for i, (start, _, _) in enumerate(mine) if i and start == 0)
    assert_each_position_once(mine[:again])
    assert_each_position_once(mine[again:])
    assert mine[again - 1][1] == ORIGINAL
    assert {length for _, _, length in mine[:again]} <= set(range(ORIGINAL + 1))
    assert mine[again][2] == ORIGINAL + 1
    # While it is prefilled again, every step brings both others a token.
    for plan in plans:
        rows = {row.seq_id: row for row in plan.scheduled}
        if crossing in rows and rows[crossing].length == ORIGINAL + 1:
            assert rows[below].samples
            assert rows[above].samples
    assert (sum(end <= ORIGINAL for _, end, length in mine[again:]) > 2) == (budget < ORIGINAL)


def assert_each_position_once(found: Sequence[tuple[int, int, int]]) -> None:
    """Spans that follow each other from 0 on."""
    assert [start for start, _, _ in found] == [0, *(end for _, end, _ in found[:-1])]


@case(26, "PhiMoE", "preempted on either side of the boundary, resumed on the side it is on")
@pytest.mark.parametrize("where", ["local", "pipeline"])
def test_preempted_on_either_side(folder: Path, reference: Reference, where: str) -> None:
    prompts = [prompt_of(50 + i, count) for i, count in enumerate((17, 41, 31, 22, 25))]
    with runner_of(folder, where) as runner:
        found, plans = drive(
            runner, prompts, 30, num_blocks=13, max_model_len=96, max_num_batched_tokens=32
        )
    resumed = [len(n.prompt) + len(n.emitted) for p in plans for n in p.new if n.emitted]
    # At the crossing itself every sequence starts again.
    assert min(resumed) <= ORIGINAL, resumed
    assert max(resumed) > ORIGINAL + 1, resumed
    for prompt, answer in zip(prompts, found, strict=True):
        reference.assert_every_step(prompt, answer)
