"""Who moves the rows of an exchange in this process: the native kernels where they serve them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.kernels.native import native_kernels
from models.kernels.token_rows import TokenRows
from router.permutation import RowMoves, TorchRows


class FastestRows:
    """Native kernels or PyTorch, by dtype and device; bits are the same. Owned by one thread."""

    def __init__(self) -> None:
        self._elsewhere = TorchRows()
        self._here: dict[torch.dtype, RowMoves] = {}

    def spread(
        self, hidden: Tensor, expert_ids: Tensor, order: tuple[int, ...], rows: Tensor
    ) -> tuple[list[int], list[int], Any]:
        """See `RowMoves`."""
        moves = self._moves_of(hidden)
        return moves.spread(hidden.contiguous(), expert_ids.contiguous(), order, rows)

    def combine(self, rows: Tensor, places: Any, weights: Tensor) -> Tensor:
        """See `RowMoves`."""
        return self._moves_of(weights).combine(rows, places, weights.contiguous())

    def _moves_of(self, tensor: Tensor) -> RowMoves:
        """The same for all tensors of an exchange."""
        if not tensor.is_cpu:
            return self._elsewhere
        moves = self._here.get(tensor.dtype)
        if moves is None:
            kernels = native_kernels("experts", tensor.dtype, tensor.device)
            moves = self._elsewhere if kernels is None else TokenRows(kernels.name)
            self._here[tensor.dtype] = moves
        return moves
