"""From scheduled sequences to the rows of a batch: pure packing and splitting."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from models.interface import BatchMeta
from models.kernels.program import Program
from models.layers.rowwise import padded_rows
from router.step import ScheduledSequence


def split_sequences(counts: Sequence[int], few_tokens: int | None) -> tuple[tuple[int, int], ...]:
    """Half-open ranges of sequences with `counts` tokens each: one, or two of about equal tokens.

    Up to `few_tokens` stay together; None: any number does.
    """
    if not counts:
        return ()
    total = sum(counts)
    if few_tokens is None or len(counts) == 1 or total <= few_tokens:
        return ((0, len(counts)),)
    first_half = tuple(accumulate(counts))
    cut = min(range(1, len(counts)), key=lambda cut: abs(2 * first_half[cut - 1] - total))
    return ((0, cut), (cut, len(counts)))


def pack(
    scheduled: Sequence[ScheduledSequence],
    blocks: Sequence[Sequence[int]],
    state_slots: Sequence[int],
    *,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device | str,
    program: Program | None = None,
) -> BatchMeta:
    """Lay sequences out one after another; `blocks[b]` is sequence b's whole block table.

    Rows are padded to the row tile of `dtype`.
    """
    positions: list[int] = []
    slots: list[int] = []
    for sequence, table in zip(scheduled, blocks, strict=True):
        own = range(sequence.start, sequence.start + sequence.num_tokens)
        assert len(sequence.token_ids) == len(own) > 0, sequence
        assert own.stop <= len(table) * block_size, (sequence, len(table))
        positions += own
        slots += [table[p // block_size] * block_size + p % block_size for p in own]
    num_rows = padded_rows(len(positions), dtype, torch.device(device))
    width = max(map(len, blocks))
    tables = [[*table, *[0] * (width - len(table))] for table in blocks]
    padding = [0] * (num_rows - len(positions))
    return BatchMeta(
        num_tokens=len(positions),
        num_rows=num_rows,
        query_starts=tuple(accumulate((s.num_tokens for s in scheduled), initial=0)),
        starts=tuple(s.start for s in scheduled),
        lengths=tuple(s.length for s in scheduled),
        positions=torch.tensor(positions + padding, dtype=torch.int64, device=device),
        slot_mapping=torch.tensor(slots, dtype=torch.int64, device=device),
        block_tables=torch.tensor(tables, dtype=torch.int64, device=device),
        state_slots=tuple(state_slots),
        program=program,
    )
