"""EngineCore's edges: what it admits, when a sequence ends, what a result may say."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace

import pytest

from router.engine import EngineCore, EngineLimits
from router.step import (
    NO_TOKEN,
    Admit,
    FinishReason,
    Sampled,
    SamplingParams,
    StepResult,
    Token,
    Want,
)

LIMITS = EngineLimits(
    block_size=4,
    num_blocks=8,
    num_state_slots=2,
    max_num_seqs=2,
    max_num_batched_tokens=8,
    max_model_len=32,
)


def admit_of(prompt: Seq[int] = (1, 2), *, max_tokens: int = 3, **fields: object) -> Admit:
    plain = {"seq_id": 1, "epoch": 0, "sampling": SamplingParams(max_tokens=max_tokens)}
    return Admit(prompt=tuple(prompt), **{**plain, **fields})  # type: ignore[arg-type]


def step(core: EngineCore, token_id: int = 7) -> tuple[Token, ...]:
    """Plan a step and answer it with `token_id` for every sequence that samples."""
    plan = core.schedule()
    assert plan is not None
    sampled = tuple(
        Sampled(seq_id=row.seq_id, token_id=token_id) for row in plan.scheduled if row.samples
    )
    tokens = core.apply(StepResult(epoch=plan.epoch, step_id=plan.step_id, sampled=sampled))
    core.check_invariants()
    return tokens


@pytest.mark.parametrize(
    ("admit", "named"),
    [
        (admit_of(()), "prompt has 0 tokens: allowed 1..31"),
        (admit_of([1] * 32), "prompt has 32 tokens: allowed 1..31"),
        (admit_of(max_tokens=-1), "max_tokens=-1"),
        (admit_of([1] * 33, max_tokens=0), "prompt has 33 tokens: allowed 1..32"),
        (admit_of(want=Want(logits=True)), "want.logits=True with max_tokens=3: allowed"),
        (admit_of(want=Want(score_position=0)), "want.score_position=0 with max_tokens=3"),
        (admit_of(max_tokens=0, want=Want(score_position=2)), "outside the prompt: allowed 0..1"),
        (admit_of(max_tokens=0, want=Want(logits=True, logits_positions=(1, 1))), "rising"),
    ],
)
def test_what_can_never_be_served_is_refused_by_name(admit: Admit, named: str) -> None:
    core = EngineCore(LIMITS)
    refusal = core.admit(admit)
    assert refusal is not None
    assert refusal.seq_id == 1
    assert named in refusal.reason
    assert not core.has_work


def test_a_sequence_that_is_not_continued_ends_when_its_prompt_is_computed() -> None:
    core = EngineCore(replace(LIMITS, max_num_batched_tokens=20))
    want = Want(logits=True, prompt_logprobs=1)
    assert core.admit(admit_of([5] * 32, max_tokens=0, want=want)) is None
    plan = core.schedule()
    assert plan is not None
    assert plan.new[0].want == want
    assert not any(row.samples for row in plan.scheduled)
    assert core.apply(StepResult(epoch=0, step_id=plan.step_id)) == ()
    assert step(core) == (
        Token(seq_id=1, position=0, token_id=NO_TOKEN, finish=FinishReason.LENGTH),
    )
    assert not core.has_work


def test_a_sequence_larger_than_the_cache_is_refused_and_the_largest_is_served() -> None:
    limits = EngineLimits(
        block_size=4,
        num_blocks=2,
        num_state_slots=0,
        max_num_seqs=2,
        max_num_batched_tokens=8,
        max_model_len=32,
    )
    refusal = EngineCore(limits).admit(admit_of([1] * 5, max_tokens=5))
    assert refusal is not None
    assert "need room for 9 tokens in the KV cache, which holds 8" in refusal.reason
    core = EngineCore(limits)
    assert core.admit(admit_of([1] * 5, max_tokens=4)) is None
    tokens = [token for _ in range(4) for token in step(core)]
    assert [token.position for token in tokens] == [0, 1, 2, 3]
    assert tokens[-1].finish is FinishReason.LENGTH


@pytest.mark.parametrize(
    "admit",
    [
        admit_of(emitted=(7, 7, 7)),
        admit_of(emitted=(7, 9), sampling=SamplingParams(max_tokens=5, stop_token_ids=(9,))),
        admit_of(epoch=1),
    ],
)
def test_programming_errors_raise(admit: Admit) -> None:
    core = EngineCore(LIMITS)
    with pytest.raises(ValueError, match=r"finished|announced"):
        core.admit(admit)
    assert not core.has_work


def test_a_known_sequence_cannot_be_admitted_again() -> None:
    core = EngineCore(LIMITS)
    core.admit(admit_of())
    with pytest.raises(ValueError, match="already admitted"):
        core.admit(admit_of())


def test_results_that_do_not_answer_the_plan_change_nothing() -> None:
    core = EngineCore(LIMITS)
    core.admit(admit_of())
    plan = core.schedule()
    assert plan is not None
    good = Sampled(seq_id=1, token_id=7)
    for result in (
        StepResult(epoch=0, step_id=plan.step_id + 1, sampled=(good,)),
        StepResult(epoch=1, step_id=plan.step_id, sampled=(good,)),
        StepResult(epoch=0, step_id=plan.step_id),
        StepResult(epoch=0, step_id=plan.step_id, sampled=(Sampled(seq_id=2, token_id=7),)),
    ):
        with pytest.raises(ValueError, match="step"):
            core.apply(result)
        core.check_invariants()
    done = StepResult(epoch=0, step_id=plan.step_id, sampled=(good,))
    assert core.apply(done) == (Token(seq_id=1, position=0, token_id=7),)
    with pytest.raises(ValueError, match="not in flight"):
        core.apply(done)


def test_an_aborted_sequence_keeps_its_blocks_until_its_step_returns() -> None:
    core = EngineCore(LIMITS)
    core.admit(admit_of([1] * 6))
    plan = core.schedule()
    assert plan is not None
    core.abort(1)
    assert (core.load().used_blocks, core.load().used_slots) == (2, 1)
    result = StepResult(epoch=0, step_id=plan.step_id, sampled=(Sampled(seq_id=1, token_id=7),))
    assert core.apply(result) == ()
    assert (core.load().used_blocks, core.load().used_slots) == (0, 0)
    assert not core.has_work
    core.abort(1)
    assert core.schedule() is None
    core.admit(admit_of(seq_id=2))
    following = core.schedule()
    assert following is not None
    assert following.released == (1,)


def test_reset_refuses_older_epochs() -> None:
    core = EngineCore(LIMITS)
    core.reset(0)
    core.admit(admit_of())
    with pytest.raises(ValueError, match="epoch"):
        core.reset(0)
    core.reset(3)
    assert not core.has_work
    with pytest.raises(ValueError, match="epoch 2"):
        core.reset(2)
    assert core.admit(admit_of(epoch=2)) is None
    assert not core.has_work


def answered(core: EngineCore, **fields: object) -> tuple[Token, ...]:
    """Plan a step for one sequence and answer it with a `Sampled` of these fields."""
    plan = core.schedule()
    assert plan is not None
    sampled = Sampled(seq_id=1, **fields)  # type: ignore[arg-type]
    tokens = core.apply(StepResult(epoch=0, step_id=plan.step_id, sampled=(sampled,)))
    core.check_invariants()
    return tokens


@pytest.mark.parametrize("max_tokens", [1, 3])
def test_a_complete_grammar_ends_its_sequence(max_tokens: int) -> None:
    core = EngineCore(LIMITS)
    core.admit(admit_of(max_tokens=max_tokens, grammar="g"))
    assert answered(core, token_id=7, ends=True) == (
        Token(seq_id=1, position=0, token_id=7, finish=FinishReason.STOP),
    )
    assert not core.has_work


def test_a_grammar_may_end_without_a_token_or_fail() -> None:
    core = EngineCore(LIMITS)
    core.admit(admit_of(grammar="g"))
    answered(core, token_id=7)
    assert answered(core, token_id=NO_TOKEN, ends=True) == (
        Token(seq_id=1, position=1, token_id=NO_TOKEN, finish=FinishReason.STOP),
    )
    core.admit(admit_of(grammar="g"))
    assert answered(core, token_id=NO_TOKEN, error="why") == (
        Token(seq_id=1, position=0, token_id=NO_TOKEN, finish=FinishReason.ERROR, error="why"),
    )
    assert not core.has_work


def test_stages_hear_of_the_grammar_again_after_a_resume() -> None:
    core = EngineCore(LIMITS)
    core.admit(admit_of(grammar="g", emitted=(5, 6)))
    plan = core.schedule()
    assert plan is not None
    assert [(new.grammar, new.emitted) for new in plan.new] == [("g", (5, 6))]
