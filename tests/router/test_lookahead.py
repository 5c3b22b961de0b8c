"""The next step is planned while one runs: when it may be, and what becomes of a row too many."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from router.engine import EngineCore
from router.limits import EngineLimits
from router.step import (
    LAST_SAMPLED,
    NO_TOKEN,
    Admit,
    FinishReason,
    Sampled,
    SamplingParams,
    StepPlan,
    StepResult,
    Token,
)

LIMITS = EngineLimits(
    block_size=4,
    num_blocks=16,
    num_state_slots=0,
    max_num_seqs=4,
    max_num_batched_tokens=16,
    max_model_len=32,
    lookahead=True,
)


def core_of(*prompts: int, max_tokens: int = 8, **limits: Any) -> EngineCore:
    """A core with one sequence per prompt length; ids count from 0."""
    core = EngineCore(replace(LIMITS, **limits))
    for seq_id, length in enumerate(prompts):
        admit(core, seq_id, length, max_tokens)
    return core


def admit(core: EngineCore, seq_id: int, length: int, max_tokens: int, priority: int = 0) -> None:
    sampling = SamplingParams(max_tokens=max_tokens, stop_token_ids=(9,))
    prompt = tuple(range(10 + seq_id, 10 + seq_id + length))
    message = Admit(seq_id=seq_id, epoch=0, prompt=prompt, sampling=sampling, priority=priority)
    assert core.admit(message) is None


def planned(core: EngineCore) -> StepPlan:
    plan = core.schedule()
    core.check_invariants()
    assert plan is not None
    return plan


def answer(core: EngineCore, plan: StepPlan, token_id: int = 7) -> tuple[Token, ...]:
    sampled = tuple(
        Sampled(seq_id=r.seq_id, token_id=token_id) for r in plan.scheduled if r.samples
    )
    tokens = core.apply(StepResult(epoch=0, step_id=plan.step_id, sampled=sampled))
    core.check_invariants()
    return tokens


def test_the_next_step_is_planned_while_one_runs() -> None:
    core = core_of(3, 6)
    first, second = planned(core), planned(core)
    assert core.schedule() is None, "two steps are enough"
    assert [(r.start, r.token_ids, r.length) for r in second.scheduled] == [
        (3, (LAST_SAMPLED,), 4),
        (6, (LAST_SAMPLED,), 7),
    ]
    assert all(r.samples for r in second.scheduled)
    assert [t.position for t in answer(core, first)] == [0, 0]
    third = planned(core)
    assert [t.position for t in answer(core, second)] == [1, 1]
    assert [(r.start, r.token_ids) for r in third.scheduled] == [
        (4, (LAST_SAMPLED,)),
        (7, (LAST_SAMPLED,)),
    ]


def test_chunks_of_a_prompt_follow_each_other() -> None:
    core = core_of(24, max_num_batched_tokens=10)
    plans = [planned(core), planned(core)]
    rows = [plan.scheduled[0] for plan in plans]
    assert [(r.start, r.num_tokens, r.samples) for r in rows] == [(0, 10, False), (10, 10, False)]
    assert answer(core, plans[0]) == ()
    (last,) = planned(core).scheduled
    assert (last.start, last.num_tokens, last.samples) == (20, 4, True)


@pytest.mark.parametrize("token_id", [9, NO_TOKEN])
def test_what_follows_an_unforeseen_end_is_dropped(token_id: int) -> None:
    core = core_of(4)
    first, second = planned(core), planned(core)
    (token,) = answer(core, first, token_id)
    assert token.finish in (FinishReason.STOP, FinishReason.ERROR)
    assert core.load().used_blocks == 2, "the step in flight still writes them"
    assert core.schedule() is None
    assert answer(core, second) == ()
    assert (core.has_work, core.load().used_blocks) == (False, 0)


def test_an_abort_waits_for_both_steps() -> None:
    core = core_of(4)
    first, second = planned(core), planned(core)
    core.abort(0)
    core.check_invariants()
    assert answer(core, first) == ()
    assert core.load().used_blocks == 2
    assert answer(core, second) == ()
    assert (core.has_work, core.load().used_blocks) == (False, 0)


def test_nothing_is_planned_behind_the_last_token() -> None:
    core = core_of(4, max_tokens=2)
    first, second = planned(core), planned(core)
    (token,) = answer(core, first)
    assert token.finish is None
    assert core.schedule() is None
    (token,) = answer(core, second)
    assert token.finish is FinishReason.LENGTH


def test_a_prompt_that_is_not_continued_ends_with_its_last_chunk() -> None:
    core = core_of(15, max_tokens=0, max_num_batched_tokens=10)
    first, second = planned(core), planned(core)
    assert answer(core, first) == ()
    (token,) = answer(core, second)
    assert (token.token_id, token.finish) == (NO_TOKEN, FinishReason.LENGTH)


def test_nothing_is_planned_behind_the_crossing() -> None:
    core = core_of(4, reprefill_length=5)
    first, second = planned(core), planned(core)
    answer(core, first)
    assert core.schedule() is None, "the sixth token is computed in the other regime"
    answer(core, second)
    (row,) = planned(core).scheduled
    assert (row.start, row.num_tokens, row.length) == (0, 6, 6)


def test_nothing_is_planned_where_a_sequence_must_give_way() -> None:
    core = core_of(8, 8, num_blocks=5, max_tokens=8)
    first = planned(core)
    assert len(first.scheduled) == 2
    assert core.schedule() is None, "both need a block and one is left"
    answer(core, first)
    second = planned(core)
    assert [row.seq_id for row in second.scheduled] == [0]
    assert core.load().preemptions == 0, "the other waits with what it holds"


def test_a_better_priority_is_not_kept_waiting() -> None:
    core = core_of(6, 6, num_blocks=5, max_tokens=8)
    first = planned(core)
    admit(core, 7, 8, 4, priority=-1)
    assert core.schedule() is None, "one of those in flight must give way"
    answer(core, first)
    second = planned(core)
    assert [new.seq_id for new in second.new] == [7]
    assert core.load().preemptions == 1


def test_results_come_in_order() -> None:
    core = core_of(4)
    plans = [planned(core), planned(core)]
    with pytest.raises(ValueError, match="step 1 came before step 0"):
        answer(core, plans[1])
    assert answer(core, plans[0])


def test_only_one_stage_looks_ahead() -> None:
    with pytest.raises(ValueError, match="lookahead with max_in_flight=2: allowed 1"):
        replace(LIMITS, max_in_flight=2)
