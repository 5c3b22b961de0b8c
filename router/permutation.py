"""Tokens grouped by expert, and their outputs brought back: one order for every expert backend.

T tokens, k experts per token, D hidden size, N = T·k (token, slot) pairs, E logical experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

_BLOCK_ELEMENTS = 1 << 16  # the float32 sums of a block of tokens stay in the cache


@dataclass(frozen=True, slots=True)
class Permutation:
    """N (token, slot) pairs grouped by expert ascending, in token order within an expert.

    `tokens` [N] is each row's token, `positions` [T, k] each pair's row. Expert e owns the
    `counts[e]` rows from `starts[e]`.
    """

    tokens: Tensor
    positions: Tensor
    counts: tuple[int, ...]
    starts: tuple[int, ...]


class RowMoves(Protocol):
    """The two passes over the rows of one exchange; whoever makes them, the bits are the same.

    Places: where the row of each (token, slot) pair lies, in a form of the implementation's own.
    """

    def spread(
        self, hidden: Tensor, expert_ids: Tensor, order: tuple[int, ...], rows: Tensor
    ) -> tuple[list[int], list[int], Any]:
        """Copy each token of `hidden` [T, D] to a row of `rows` [N, D] per slot, on the CPU.

        Rows lie expert after expert in the `order` of the E experts, in token order within one.
        Gives each expert's count and first row, and the places of the pairs of `expert_ids`
        [T, k]. Raises ValueError for an unknown id.
        """

    def combine(self, rows: Tensor, places: Any, weights: Tensor) -> Tensor:
        """Weighted expert outputs per token: `rows` [N, D], `weights` [T, k] → [T, D]."""


def count_rows(expert_ids: Tensor, num_experts: int) -> list[int]:
    """Rows of each expert in `expert_ids` [T, k]. Raises ValueError for an unknown id."""
    if expert_ids.numel() and int(expert_ids.min()) < 0:
        raise ValueError(f"expert id {int(expert_ids.min())}: allowed 0..{num_experts - 1}")
    counts: list[int] = torch.bincount(expert_ids.reshape(-1), minlength=num_experts).tolist()
    if len(counts) > num_experts:
        raise ValueError(f"expert id {len(counts) - 1}: allowed 0..{num_experts - 1}")
    return counts


def permute(expert_ids: Tensor, num_experts: int) -> Permutation:
    """Group the pairs of `expert_ids` [T, k] by expert. Raises ValueError for an unknown id."""
    counts = count_rows(expert_ids, num_experts)
    starts = tuple(accumulate(counts, initial=0))[:-1]
    tokens, positions = _group(expert_ids, expert_ids.reshape(-1))
    return Permutation(tokens, positions, tuple(counts), starts)


def combine(rows: Tensor, permutation: Permutation, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Weighted expert outputs per token: `rows` [N, D], `weights` [T, k] → [T, D] in `dtype`.

    Sums in float32 over the slots in routing order, whatever order the rows arrived in.
    """
    return _combine(rows, permutation.positions, weights, dtype)


class TorchRows:
    """`RowMoves` by PyTorch, on any device: the tensors of a call but its rows share one."""

    def spread(
        self, hidden: Tensor, expert_ids: Tensor, order: tuple[int, ...], rows: Tensor
    ) -> tuple[list[int], list[int], Tensor]:
        """Copy each token to its rows on the CPU; see `RowMoves`."""
        counts = count_rows(expert_ids, len(order))
        starts = [0] * len(order)
        num_rows = 0
        for expert in order:
            starts[expert] = num_rows
            num_rows += counts[expert]
        first_rows = torch.tensor(starts, dtype=torch.int64, device=expert_ids.device)
        tokens, positions = _group(expert_ids, first_rows[expert_ids.reshape(-1)])
        if hidden.device == rows.device:
            torch.index_select(hidden, 0, tokens, out=rows)
        else:
            rows.copy_(hidden.index_select(0, tokens))
        return counts, starts, positions

    def combine(self, rows: Tensor, places: Tensor, weights: Tensor) -> Tensor:
        """Weighted expert outputs per token, where the weights are; see `RowMoves`."""
        return _combine(rows.to(weights.device), places, weights, rows.dtype)


def _group(expert_ids: Tensor, order_by: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's token [N] and each pair's row [T, k], by ascending `order_by` [N], stable."""
    order = torch.argsort(order_by, stable=True)
    positions = torch.empty_like(order)
    positions[order] = torch.arange(len(order), device=order.device)
    return order.div(expert_ids.shape[1], rounding_mode="floor"), positions.view(expert_ids.shape)


def _combine(rows: Tensor, positions: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    scales = weights.float()
    out = torch.empty(len(scales), rows.shape[1], dtype=dtype, device=rows.device)
    block = max(1, _BLOCK_ELEMENTS // max(1, rows.shape[1]))
    for start in range(0, len(scales), block):
        places, scale = positions[start:][:block], scales[start:][:block]
        total = torch.zeros(len(scale), rows.shape[1], dtype=torch.float32, device=rows.device)
        for slot in range(scale.shape[1]):
            # Multiply, then add, as two operations: a fused one would round differently.
            total += rows.index_select(0, places[:, slot]).float() * scale[:, slot, None]
        out[start : start + block] = total
    return out
