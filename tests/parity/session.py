"""Sequences on a runner: blocks and slots handed out, plans made by hand, arrays put together."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from router.step import (
    NewSequence,
    SamplingParams,
    ScheduledSequence,
    StateOp,
    StateOpKind,
    StepPlan,
    StepResult,
    Want,
)
from shards.outputs import Outputs
from tests.parity.executors import Runner

LOGITS = Want(logits=True)


class _Live:
    def __init__(self, tokens: Sequence[int], want: Want, slot: int, blocks: list[int]) -> None:
        self.tokens = tuple(tokens)
        self.want = want
        self.slot = slot
        self.blocks = blocks
        self.num_computed = 0
        self.known = False
        self.outputs = Outputs(want, len(tokens))


class Session:
    """Feeds whole prompts in whatever pieces a test asks for; every token is given, none sampled.

    Blocks are scattered over the cache and come back, with what they held, to later sequences.
    A runner has one session: both count its steps and sequences.
    """

    def __init__(self, runner: Runner, seed: int = 0) -> None:
        self._runner = runner
        self._rng = random.Random(seed)
        self._free_blocks = list(range(runner.limits.num_blocks))
        self._rng.shuffle(self._free_blocks)
        self._free_slots = list(range(runner.limits.num_state_slots))
        self._rng.shuffle(self._free_slots)
        self._live: dict[int, _Live] = {}
        self._released: list[int] = []
        self._num_steps = 0
        self._num_sequences = 0

    def start(self, tokens: Sequence[int], want: Want = LOGITS) -> int:
        """A new sequence; returns its id."""
        self._num_sequences += 1
        count = -(-len(tokens) // self._runner.limits.block_size)
        blocks = [self._free_blocks.pop() for _ in range(count)]
        slot = self._free_slots.pop() if self._runner.limits.num_state_slots else -1
        self._live[self._num_sequences] = _Live(tokens, want, slot, blocks)
        return self._num_sequences

    def step(self, chunks: Mapping[int, int]) -> StepResult:
        """Compute the next `chunks[seq_id]` tokens of each sequence in one packed batch."""
        plan = StepPlan(
            epoch=self._runner.epoch,
            step_id=self._num_steps,
            released=tuple(self._released),
            new=tuple(self._introduce(seq_id) for seq_id in chunks if not self._live[seq_id].known),
            state_ops=tuple(
                StateOp(kind=StateOpKind.ZERO, target=self._live[seq_id].slot)
                for seq_id in chunks
                if self._live[seq_id].slot >= 0 and not self._live[seq_id].num_computed
            ),
            scheduled=tuple(self._schedule(seq_id, count) for seq_id, count in chunks.items()),
        )
        self._num_steps += 1
        self._released.clear()
        result = self._runner.run(plan)
        for rows in result.wanted:
            self._live[rows.seq_id].outputs.put(rows)
        return result

    def arrays(self, seq_id: int) -> dict[str, Tensor]:
        """What has come back of a sequence so far."""
        arrays = self._live[seq_id].outputs.arrays
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def finish(self, seq_id: int) -> dict[str, Tensor]:
        """A computed sequence's arrays; its blocks and slot go to later ones, uncleaned."""
        live = self._live[seq_id]
        assert live.num_computed == len(live.tokens), "it is not computed to its end"
        arrays = self.arrays(seq_id)
        self.release(seq_id)
        return arrays

    def release(self, seq_id: int) -> None:
        """Forget a sequence, wherever it is."""
        live = self._live.pop(seq_id)
        self._free_blocks += live.blocks
        if live.slot >= 0:
            self._free_slots.append(live.slot)
        if live.known:
            self._released.append(seq_id)

    def _introduce(self, seq_id: int) -> NewSequence:
        live = self._live[seq_id]
        live.known = True
        return NewSequence(
            seq_id=seq_id,
            prompt=live.tokens,
            emitted=(),
            sampling=SamplingParams(max_tokens=0),
            state_slot=live.slot,
            want=live.want,
        )

    def _schedule(self, seq_id: int, count: int) -> ScheduledSequence:
        live = self._live[seq_id]
        start = live.num_computed
        live.num_computed += count
        assert live.num_computed <= len(live.tokens)
        return ScheduledSequence(
            seq_id=seq_id,
            start=start,
            num_tokens=count,
            token_ids=live.tokens[start : start + count],
            length=len(live.tokens),
            new_blocks=tuple(live.blocks) if start == 0 else (),
        )


def in_one_batch(
    session: Session, sequences: Sequence[Sequence[int]], want: Want = LOGITS
) -> list[dict[str, Tensor]]:
    """All sequences whole, packed into one step."""
    ids = [session.start(tokens, want) for tokens in sequences]
    session.step({seq_id: len(t) for seq_id, t in zip(ids, sequences, strict=True)})
    return [session.finish(seq_id) for seq_id in ids]


def at_every_split(
    session: Session, tokens: Sequence[int], want: Want = LOGITS
) -> dict[int, dict[str, Tensor]]:
    """Copies of one sequence, each prefilled in two chunks cut elsewhere, in shared batches."""
    ids = {cut: session.start(tokens, want) for cut in range(1, len(tokens))}
    if ids:
        session.step({seq_id: cut for cut, seq_id in ids.items()})
        session.step({seq_id: len(tokens) - cut for cut, seq_id in ids.items()})
    return {cut: session.finish(seq_id) for cut, seq_id in ids.items()}


def one_by_one(
    session: Session, tokens: Sequence[int], company: Sequence[int], want: Want = LOGITS
) -> dict[str, Tensor]:
    """One token a step, as in decoding, beside another sequence that comes in pieces of two.

    With empty `company` it is alone in every step.
    """
    mine = session.start(tokens, want)
    other = session.start(company, want) if company else None
    left = len(company)
    for _ in tokens:
        chunks = {mine: 1}
        if other is not None and left > 0:
            chunks = {other: min(2, left), **chunks}
            left -= 2
        session.step(chunks)
    if other is not None:
        session.release(other)
    return session.finish(mine)
