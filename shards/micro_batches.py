"""From scheduled sequences to the rows of a batch: pure packing, padding and splitting."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from models.interface import BatchMeta
from router.step import ScheduledSequence


def split_sequences(
    counts: Sequence[int], num_micro_batches: int, tile: int
) -> tuple[tuple[int, int], ...]:
    """Half-open ranges of sequences with `counts` tokens each: one, or two of about equal tokens.

    What fits into one row tile stays together: two tiles of padding would cost more than the
    overlap of attention and experts gains.
    """
    if not counts:
        return ()
    assert num_micro_batches in (1, 2), num_micro_batches
    before = list(accumulate(counts))
    if num_micro_batches == 1 or len(counts) == 1 or before[-1] <= tile:
        return ((0, len(counts)),)
    cut = min(1 + bisect_left(before, before[-1] / 2), len(counts) - 1)
    return ((0, cut), (cut, len(counts)))


def pack(
    scheduled: Sequence[ScheduledSequence],
    blocks: Sequence[Sequence[int]],
    state_slots: Sequence[int],
    *,
    block_size: int,
    tile: int,
    device: torch.device | str,
) -> BatchMeta:
    """Lay sequences out one after another; `blocks[b]` is sequence b's whole block table."""
    positions: list[int] = []
    slots: list[int] = []
    for sequence, table in zip(scheduled, blocks, strict=True):
        own = range(sequence.start, sequence.start + sequence.num_tokens)
        assert len(sequence.token_ids) == len(own) > 0, sequence
        assert own.stop <= len(table) * block_size, (sequence, len(table))
        positions += own
        slots += [table[p // block_size] * block_size + p % block_size for p in own]
    num_rows = round_up(len(positions), tile)
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
    )


def pad_rows(rows: Tensor, num_rows: int) -> Tensor:
    """Rows [n, D] followed by zeros up to [num_rows, D], in memory of their own."""
    padded = rows.new_zeros((num_rows, *rows.shape[1:]))
    padded[: len(rows)] = rows
    return padded


def round_up(count: int, tile: int) -> int:
    """The least multiple of `tile` that is not below `count`."""
    return -(-count // tile) * tile
