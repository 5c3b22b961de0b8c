"""Stages, micro-batches and the order of a plan's deltas; packing against a restatement."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.layers.rowwise import padded_rows
from models.registry import load_config
from router.step import (
    LAST_SAMPLED,
    NewSequence,
    SamplingParams,
    ScheduledSequence,
    StateOp,
    StateOpKind,
    StepPlan,
    StepResult,
)
from shards.micro_batches import pack, split_sequences
from tests.shards.generation import Chain, generate, greedy, limits_for, local
from tests.tiny import FAMILIES, load_reference, reference_greedy, write_tiny

GREEDY = SamplingParams(max_tokens=9, temperature=0.0, logprobs=0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: write_tiny(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_stages_and_micro_batches_keep_the_bits(
    family: str, dtype: torch.dtype, folders: dict[str, Path]
) -> None:
    folder = folders[family]
    limits = limits_for(folder, max_num_batched_tokens=40)
    prompts = ((5,), tuple(range(20)), (3, 4, 5), tuple(range(60, 95)), (9, 9))
    admits = [greedy(i, prompt, 18) for i, prompt in enumerate(prompts)]
    whole, _ = generate(local(folder, limits, dtype), limits, admits)
    num_layers = load_config(folder).num_layers
    for cuts, few_tokens in (
        ([(0, num_layers)], 16),
        ([(0, 1), (1, num_layers)], None),
        ([(0, 2), (2, num_layers)], 0),
        ([(i, i + 1) for i in range(num_layers)], 16),
    ):
        chain = Chain(folder, limits, cuts, few_tokens=few_tokens, dtype=dtype)
        tokens, _ = generate(chain, limits, admits)
        assert tokens == whole, cuts


@pytest.mark.parametrize("family", ["phimoe", "jamba"])
def test_a_tied_head_is_read_by_the_last_stage(family: str, tmp_path: Path) -> None:
    folder = write_tiny(family, tmp_path, tie_word_embeddings=True)
    limits = limits_for(folder)
    prompt = (3, 1, 4, 1, 5)
    tokens, _ = generate(
        Chain(folder, limits, [(0, 1), (1, 3 + (family == "jamba"))]),
        limits,
        [greedy(0, prompt, 8)],
    )
    rows = reference_greedy(load_reference(folder), prompt, 8)
    assert [token.token_id for token in tokens[0]] == [int(row.argmax()) for row in rows]
    assert min(float(row.topk(2).values.diff().abs()) for row in rows) > 1e-4


def new(seq_id: int, slot: int = -1, emitted: tuple[int, ...] = ()) -> NewSequence:
    return NewSequence(
        seq_id=seq_id, prompt=(1, 2), emitted=emitted, sampling=GREEDY, state_slot=slot
    )


def row(
    seq_id: int, token_ids: tuple[int, ...], start: int = 0, blocks: tuple[int, ...] = ()
) -> ScheduledSequence:
    return ScheduledSequence(
        seq_id=seq_id,
        start=start,
        num_tokens=len(token_ids),
        token_ids=token_ids,
        length=start + len(token_ids),
        new_blocks=blocks,
        samples=True,
    )


def test_last_sampled_is_the_token_just_sampled(folders: dict[str, Path]) -> None:
    limits = limits_for(folders["dbrx"])
    runner = Chain(folders["dbrx"], limits, [(0, 3)]).runners[0]
    first = StepPlan(epoch=0, step_id=0, new=(new(1),), scheduled=(row(1, (1, 2), 0, (3,)),))
    result = runner.execute(first).output
    assert isinstance(result, StepResult)
    implied = runner.execute(
        StepPlan(epoch=0, step_id=1, scheduled=(row(1, (LAST_SAMPLED,), start=2),))
    )
    named = StepPlan(
        epoch=0,
        step_id=1,
        released=(1,),
        new=(new(1, emitted=(result.sampled[0].token_id,)),),
        scheduled=(row(1, (1, 2, result.sampled[0].token_id), 0, (5,)),),
    )
    assert runner.execute(named) == implied


def test_last_sampled_needs_the_last_stage(folders: dict[str, Path]) -> None:
    first, _ = Chain(folders["dbrx"], limits_for(folders["dbrx"]), [(0, 1), (1, 3)]).runners
    plan = StepPlan(
        epoch=0, step_id=0, new=(new(4),), scheduled=(row(4, (LAST_SAMPLED,), 0, (0,)),)
    )
    with pytest.raises(ValueError, match="sequence 4: token id LAST_SAMPLED"):
        first.execute(plan)


def test_state_ops_come_after_new_and_before_the_run(folders: dict[str, Path]) -> None:
    limits = limits_for(folders["jamba"])
    runner = Chain(folders["jamba"], limits, [(0, 4)]).runners[0]
    zero = StateOp(kind=StateOpKind.ZERO, target=2)
    scheduled = (row(1, (1, 2), 0, (0,)),)
    fresh = runner.execute(
        StepPlan(epoch=0, step_id=0, new=(new(1, 2),), state_ops=(zero,), scheduled=scheduled)
    )
    plan = StepPlan(epoch=0, step_id=0, new=(new(1, 2),), scheduled=scheduled)
    runner.reset()
    stale = runner.execute(plan)
    runner.reset()
    again = runner.execute(replace(plan, state_ops=(zero,)))
    assert fresh == again != stale


def test_what_is_unknown_or_unserved_is_named(folders: dict[str, Path]) -> None:
    runner = Chain(folders["dbrx"], limits_for(folders["dbrx"]), [(0, 3)]).runners[0]
    empty = StepPlan(epoch=0, step_id=0)
    with pytest.raises(AssertionError, match="sequence 8 is unknown"):
        runner.execute(replace(empty, scheduled=(row(8, (1,), 0, (0,)),)))
    with pytest.raises(AssertionError, match="released sequence 8 is unknown"):
        runner.execute(replace(empty, released=(8,)))
    runner.execute(replace(empty, new=(new(8),)))
    with pytest.raises(AssertionError, match="new sequence 8 is known"):
        runner.execute(replace(empty, new=(new(8),)))
    runner.reset()
    with pytest.raises(ValueError, match="grammar is not served"):
        runner.execute(replace(empty, new=(replace(new(8), grammar="x"),)))
    with pytest.raises(AssertionError, match="every stage but the first"):
        runner.execute(empty, torch.zeros(0, 64))


def test_a_plan_without_tokens_runs(folders: dict[str, Path]) -> None:
    first, last = Chain(folders["dbrx"], limits_for(folders["dbrx"]), [(0, 1), (1, 3)]).runners
    plan = StepPlan(epoch=2, step_id=7, new=(new(1),))
    hidden = first.execute(plan).output
    assert isinstance(hidden, torch.Tensor)
    assert hidden.shape == (0, 64)
    assert last.execute(plan, hidden).output == StepResult(epoch=2, step_id=7)


def test_splits_are_whole_sequences_of_about_equal_tokens() -> None:
    assert split_sequences([], 8) == ()
    assert split_sequences([5, 5], None) == ((0, 2),)
    assert split_sequences([500], 8) == ((0, 1),)
    assert split_sequences([4, 4], 8) == ((0, 2),)
    assert split_sequences([4, 4, 1], 8) == ((0, 1), (1, 3))
    assert split_sequences([4, 4, 1], 16) == ((0, 3),)
    assert split_sequences([100, 1, 1], 8) == ((0, 1), (1, 3))
    assert split_sequences([1, 1, 100], 8) == ((0, 2), (2, 3))
    assert split_sequences([1] * 20, 8) == ((0, 10), (10, 20))


def test_packing_by_hand() -> None:
    scheduled = (row(1, (7, 8, 9), start=3), row(2, (5,), start=0))
    meta = pack(scheduled, [[4, 9], [2]], [1, 0], block_size=4, dtype=torch.float32, device="cpu")
    assert (meta.num_tokens, meta.num_rows) == (4, padded_rows(4, torch.float32))
    assert meta.query_starts == (0, 3, 4)
    assert meta.starts == (3, 0)
    assert meta.lengths == (6, 1)
    assert meta.positions.tolist() == [3, 4, 5, 0] + [0] * (meta.num_rows - 4)
    assert meta.slot_mapping.tolist() == [4 * 4 + 3, 9 * 4, 9 * 4 + 1, 2 * 4]
    assert meta.block_tables.tolist() == [[4, 9], [2, 0]]
    assert meta.state_slots == (1, 0)
    with pytest.raises(AssertionError):
        pack(scheduled, [[4], [2]], [1, 0], block_size=4, dtype=torch.float32, device="cpu")
