"""Rotary position embedding (Su et al. 2021), half-split, with LongRoPE (Ding et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from models.interface import BatchMeta
from models.kernels import rowops
from models.kernels.native import native_kernels
from models.layers.batch_memo import BatchMemo
from models.long_rope import LongRope

# Tables grow by whole chunks at absolute positions, so that an entry never depends on when it was
# first needed.
_CHUNK = 1024


class _RotaryTable:
    """cos and sin of every position reached so far: two [positions, h/2] tensors in `dtype`."""

    def __init__(self, inverse_frequencies: Tensor, mscale: float, dtype: torch.dtype) -> None:
        self._inverse_frequencies = inverse_frequencies
        self._mscale = mscale
        self.cos = torch.empty(0, inverse_frequencies.shape[0], dtype=dtype)
        self.sin = torch.empty(0, inverse_frequencies.shape[0], dtype=dtype)

    def rows(self, positions: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        """cos and sin at `positions` [R], all below `limit`: two [R, h/2]."""
        if self.cos.device != positions.device:
            self.cos, self.sin = self.cos.to(positions.device), self.sin.to(positions.device)
        while self.cos.shape[0] < limit:
            self._grow()
        return self.cos.index_select(0, positions), self.sin.index_select(0, positions)

    def _grow(self) -> None:
        first = self.cos.shape[0]
        positions = torch.arange(first, first + _CHUNK, dtype=torch.float32)
        angles = positions[:, None] * self._inverse_frequencies
        cos, sin = (torch.cos(angles) * self._mscale, torch.sin(angles) * self._mscale)
        self.cos = torch.cat([self.cos, cos.to(self.cos)])
        self.sin = torch.cat([self.sin, sin.to(self.sin)])


class RotaryEmbedding:
    """Rotates [R, heads, h] queries and keys; the LongRoPE regime is each sequence's own."""

    def __init__(
        self, head_dim: int, theta: float, dtype: torch.dtype, long_rope: LongRope | None = None
    ) -> None:
        # Never on the meta device, where stages are built for their names alone: the first
        # division there imports PyTorch's compiler, which takes more than a second.
        here = torch.device("cpu")
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=here).float() / head_dim
        base = torch.pow(theta, exponents)
        self._long_rope = long_rope
        if long_rope is None:
            self._short = self._long = _RotaryTable(1.0 / base, 1.0, dtype)
        else:
            factors = (long_rope.short_factor, long_rope.long_factor)
            short, long = (torch.tensor(each, device=here) for each in factors)
            self._short = _RotaryTable(1.0 / (short * base), long_rope.short_mscale, dtype)
            self._long = _RotaryTable(1.0 / (long * base), long_rope.long_mscale, dtype)
        self._memo = BatchMemo(self._cos_sin)

    def rotate(
        self, x: Tensor, meta: BatchMeta, num_rotated: int, limit: float | None = None
    ) -> Tensor:
        """[R, heads, h] clamped to ±limit, the first heads rotated by each row's position."""
        cos, sin = self.angles(meta)
        kernels = native_kernels("rope", x.dtype, x.device)
        if kernels is not None:
            return rowops.rotate(kernels.name, x, cos, sin, num_rotated, limit)
        if limit is not None:
            x = x.clamp(-limit, limit)
        first, second = x[:, :num_rotated].chunk(2, dim=-1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        return torch.cat([turned, x[:, num_rotated:]], dim=1)

    def angles(self, meta: BatchMeta) -> tuple[Tensor, Tensor]:
        """cos and sin of the batch's rows, [R, 1, h/2] each."""
        return self._memo(meta)

    def _cos_sin(self, meta: BatchMeta, _: int) -> tuple[Tensor, Tensor]:
        """cos and sin of the batch's rows, [R, 1, h/2] each."""
        counts = [b - a for a, b in zip(meta.query_starts, meta.query_starts[1:], strict=False)]
        limit = max((s + n for s, n in zip(meta.starts, counts, strict=True)), default=1)
        limit = max(limit, 1)
        cos, sin = self._short.rows(meta.positions, limit)
        boundary = self._long_rope and self._long_rope.original_max_position_embeddings
        if boundary and any(length > boundary for length in meta.lengths):
            is_long = torch.zeros(meta.num_rows, 1, dtype=torch.bool, device=cos.device)
            for seq, length in enumerate(meta.lengths):
                is_long[meta.query_starts[seq] : meta.query_starts[seq + 1]] = length > boundary
            long_cos, long_sin = self._long.rows(meta.positions, limit)
            cos, sin = torch.where(is_long, long_cos, cos), torch.where(is_long, long_sin, sin)
        return cos[:, None], sin[:, None]
