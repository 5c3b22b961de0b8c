"""Jamba's state slots: reused, kept for later, copied; plans are made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

from router.step import (
    NewSequence,
    SamplingParams,
    ScheduledSequence,
    StateOp,
    StateOpKind,
    StepPlan,
)
from shards.outputs import Outputs
from tests.models.driver import tokens_of
from tests.parity.battery import assert_close, assert_same_bits
from tests.parity.cases import case
from tests.parity.executors import LocalRunner, Runner, pipeline
from tests.parity.jamba import RECURRENT, jamba, reference, schedule
from tests.parity.session import LOGITS

MIXED = schedule((3, 1), (2, 1), 3)
A, B = tokens_of(1, 24), tokens_of(2, 19)
BLOCK = 8
"""The runners' block size."""

everywhere = pytest.mark.parametrize("where", ["local", "pipeline"])


def opened(where: str, folder: Path) -> AbstractContextManager[Runner]:
    return nullcontext(LocalRunner(folder)) if where == "local" else pipeline(folder)


def zero(slot: int) -> StateOp:
    return StateOp(kind=StateOpKind.ZERO, target=slot)


def copy(source: int, target: int) -> StateOp:
    return StateOp(kind=StateOpKind.COPY, source=source, target=target)


def snapshot(source: int, target: int) -> StateOp:
    return StateOp(kind=StateOpKind.SNAPSHOT, source=source, target=target)


class Plans:
    """One sequence at a time, in slots and blocks that the test chooses."""

    def __init__(self, runner: Runner) -> None:
        assert runner.limits.block_size == BLOCK
        self._runner = runner
        self._known: set[int] = set()
        self._released: list[int] = []
        self._num_steps = 0

    def run(
        self,
        seq_id: int,
        tokens: Sequence[int],
        chunk: range,
        *,
        slot: int,
        blocks: Sequence[int],
        ops: Sequence[StateOp] = (),
    ) -> Tensor:
        """Logits [len(chunk), V] of the positions `chunk`; `blocks` are all that `tokens` fill."""
        new = NewSequence(
            seq_id=seq_id,
            prompt=tuple(tokens),
            emitted=(),
            sampling=SamplingParams(max_tokens=0),
            state_slot=slot,
            want=LOGITS,
        )
        first = seq_id not in self._known
        plan = StepPlan(
            epoch=self._runner.epoch,
            step_id=self._num_steps,
            released=tuple(self._released),
            new=(new,) if first else (),
            state_ops=tuple(ops),
            scheduled=(
                ScheduledSequence(
                    seq_id=seq_id,
                    start=chunk.start,
                    num_tokens=len(chunk),
                    token_ids=tuple(tokens[chunk.start : chunk.stop]),
                    length=len(tokens),
                    new_blocks=tuple(blocks) if first else (),
                ),
            ),
        )
        self._num_steps += 1
        self._known.add(seq_id)
        self._released.clear()
        outputs = Outputs(LOGITS, len(tokens))
        for rows in self._runner.run(plan).wanted:
            outputs.put(rows)
        return torch.from_numpy(outputs.arrays["logits"])[chunk.start : chunk.stop]

    def release(self, seq_id: int) -> None:
        """With the next plan."""
        self._known.remove(seq_id)
        self._released.append(seq_id)


def assert_rows(rows: Tensor, folder: Path, tokens: Sequence[int], chunk: range) -> None:
    assert_close(rows, reference(folder, [tokens])[0][chunk.start : chunk.stop])


@case(52, "Jamba", "a slot that is handed on starts from zero")
@everywhere
@pytest.mark.parametrize("keys", [MIXED, RECURRENT], ids=["mixed", "Mamba alone"])
def test_a_reused_slot(tmp_path: Path, where: str, keys: dict[str, int]) -> None:
    folder = jamba(tmp_path, **keys)
    whole = range(len(B))
    with opened(where, folder) as runner:
        plans = Plans(runner)
        fresh = plans.run(1, B, whole, slot=5, blocks=[0, 1, 2], ops=[zero(5)])
        plans.run(2, A, range(len(A)), slot=3, blocks=[3, 4, 5], ops=[zero(3)])
        plans.release(2)
        reused = plans.run(3, B, whole, slot=3, blocks=[5, 4, 3], ops=[zero(3)])
        stale = plans.run(4, B, whole, slot=3, blocks=[6, 7, 8])
    assert_rows(reused, folder, B, whole)
    assert_same_bits({"logits": reused}, {"logits": fresh}, "slot 3 after another sequence")
    assert (stale - fresh).abs().max() > 0.01, "a slot that is not zeroed shows"


@case(52, "Jamba", "a snapshot resumes a preempted sequence where it was")
@everywhere
def test_preempted_and_resumed_from_a_snapshot(tmp_path: Path, where: str) -> None:
    """Mamba alone: the state is all that a sequence is."""
    folder = jamba(tmp_path, **RECURRENT)
    begin, rest = range(13), range(13, len(A))
    with opened(where, folder) as runner:
        plans = Plans(runner)
        whole = plans.run(1, A, range(len(A)), slot=0, blocks=[0, 1, 2], ops=[zero(0)])
        plans.run(2, A, begin, slot=1, blocks=[3, 4, 5], ops=[zero(1)])
        plans.release(2)
        # Another sequence takes the slot, once its content is safe.
        ops = [snapshot(1, 9), zero(1)]
        other = plans.run(3, B, range(len(B)), slot=1, blocks=[3, 4, 5], ops=ops)
        resumed = plans.run(4, A, rest, slot=7, blocks=[6, 7, 8], ops=[copy(9, 7)])
    assert_rows(other, folder, B, range(len(B)))
    assert_rows(resumed, folder, A, rest)
    assert_same_bits({"logits": resumed}, {"logits": whole[13:]}, "resumed at 13")


@case(52, "Jamba", "a fork goes on from a copied state, and its parent from its own")
@everywhere
def test_a_fork(tmp_path: Path, where: str) -> None:
    """Full blocks of keys and values are shared, the state is copied."""
    folder = jamba(tmp_path, **MIXED)
    begin, rest = range(2 * BLOCK), range(2 * BLOCK, len(A))
    child = [*A[: 2 * BLOCK], *B[: len(A) - 2 * BLOCK]]
    with opened(where, folder) as runner:
        plans = Plans(runner)
        plans.run(1, A, begin, slot=0, blocks=[0, 1, 2], ops=[zero(0)])
        forked = plans.run(2, child, rest, slot=4, blocks=[0, 1, 3], ops=[copy(0, 4)])
        parent = plans.run(1, A, rest, slot=0, blocks=[])
    assert_rows(forked, folder, child, rest)
    assert_rows(parent, folder, A, rest)


@case(52, "Jamba", "state operations happen in the order of the plan")
@everywhere
def test_operations_in_order(tmp_path: Path, where: str) -> None:
    folder = jamba(tmp_path, **RECURRENT)
    begin, rest = range(9), range(9, len(A))
    with opened(where, folder) as runner:
        plans = Plans(runner)
        plans.run(1, A, begin, slot=0, blocks=[0, 1, 2], ops=[zero(0)])
        # Through two other slots and back, the ways in between wiped.
        ops = [snapshot(0, 1), zero(0), copy(1, 2), zero(1), copy(2, 0), zero(2)]
        rows = plans.run(1, A, rest, slot=0, blocks=[], ops=ops)
    assert_rows(rows, folder, A, rest)
