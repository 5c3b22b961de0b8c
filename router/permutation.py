"""Tokens grouped by expert, and their outputs brought back: one order for every expert backend.

T tokens, k experts per token, D hidden size, N = T·k (token, slot) pairs, E logical experts.
"""

from __future__ import annotations

from dataclasses import dataclass

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


def permute(expert_ids: Tensor, num_experts: int) -> Permutation:
    """Group the pairs of `expert_ids` [T, k] by expert. Raises ValueError for an unknown id."""
    num_tokens, top_k = expert_ids.shape
    flat = expert_ids.reshape(-1)
    counts = torch.bincount(flat, minlength=num_experts).tolist()
    if len(counts) > num_experts:
        raise ValueError(f"expert id {len(counts) - 1}: allowed 0..{num_experts - 1}")
    order = torch.argsort(flat, stable=True)
    positions = torch.empty_like(order)
    positions[order] = torch.arange(len(order), device=order.device)
    starts, total = [], 0
    for count in counts:
        starts.append(total)
        total += count
    return Permutation(
        order.div(top_k, rounding_mode="floor"),
        positions.view(num_tokens, top_k),
        tuple(counts),
        tuple(starts),
    )


def combine(rows: Tensor, permutation: Permutation, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Weighted expert outputs per token: `rows` [N, D], `weights` [T, k] → [T, D] in `dtype`.

    Sums in float32 over the slots in routing order, whatever order the rows arrived in.
    """
    scales = weights.float()
    out = torch.empty(len(scales), rows.shape[1], dtype=dtype, device=rows.device)
    block = max(1, _BLOCK_ELEMENTS // max(1, rows.shape[1]))
    for start in range(0, len(scales), block):
        positions, scale = permutation.positions[start:][:block], scales[start:][:block]
        total = torch.zeros(len(scale), rows.shape[1], dtype=torch.float32, device=rows.device)
        for slot in range(scale.shape[1]):
            # Multiply, then add, as two operations: a fused one would round differently.
            total += rows.index_select(0, positions[:, slot]).float() * scale[:, slot, None]
        out[start : start + block] = total
    return out
