"""Memory for the rows of exchanges: in decode every step asks for the same few shapes again."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from router.transport.tensors import tensor_buffer

KEPT_BYTES = 128 << 20
"""Of rows that nobody uses: what two micro-batches of a prefill of the largest models take."""
_MOST_KEPT = 4


class Rows(NamedTuple):
    """Rows [N, D] on the CPU and the same memory as bytes."""

    tensor: Tensor
    view: memoryview
    row_bytes: int
    kind: tuple[int, int, torch.dtype]
    """N, D and dtype."""

    def bytes_of(self, start: int, stop: int) -> memoryview:
        """The bytes of rows start..stop-1."""
        return self.view[start * self.row_bytes : stop * self.row_bytes]


class RowPool:
    """Keeps the few rows that were given back last."""

    def __init__(self) -> None:
        self._spare: list[Rows] = []

    def take(self, num_rows: int, width: int, dtype: torch.dtype) -> Rows:
        """Rows with whatever in them."""
        kind = (num_rows, width, dtype)
        for idx, rows in enumerate(self._spare):
            if rows.kind == kind:
                return self._spare.pop(idx)
        tensor = torch.empty((num_rows, width), dtype=dtype)
        return Rows(tensor, tensor_buffer(tensor), width * dtype.itemsize, kind)

    def give_back(self, rows: Rows) -> None:
        """Nobody reads or writes these rows any more; the longest unused ones make room."""
        self._spare.append(rows)
        kept = sum(spare.view.nbytes for spare in self._spare)
        while kept > KEPT_BYTES or len(self._spare) > _MOST_KEPT:
            kept -= self._spare.pop(0).view.nbytes
