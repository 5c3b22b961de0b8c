"""One MoE layer of one micro-batch on its way to the experts and back.

T tokens, k experts per token, D hidden size, N = T·k (token, slot) pairs, E logical experts.
"""

from __future__ import annotations

import time

from torch import Tensor

from router.permutation import RowMoves
from router.row_pool import RowPool
from router.transport.base import Header
from router.transport.tensors import wire_dtype

Key = tuple[int, int, int, int, int]


class Exchange:
    """Tokens permuted once, sent from where they lie; answers take the place of their questions.

    Made by `TokenDispatcher.submit`, which decides who gets which expert's rows.
    """

    def __init__(
        self,
        header: Header,
        hidden: Tensor,
        expert_ids: Tensor,
        weights: Tensor,
        order: tuple[int, ...],
        moves: RowMoves,
        pool: RowPool,
    ) -> None:
        """Rows lie in the `order` of the experts. Raises ValueError for an unknown expert."""
        self.header = header
        self.held: tuple[int, ...] = ()
        """Experts that wait for a shard to come up."""
        self.outstanding: set[int] = set()
        """Sequence numbers of the calls under way."""
        self.key: Key = header.key
        """(epoch, step, layer, micro_batch, source)."""
        self.started = time.perf_counter()
        self.dtype = wire_dtype(hidden.dtype)
        self._weights = weights
        self._moves = moves
        self._pool = pool
        self._rows = pool.take(expert_ids.numel(), hidden.shape[1], hidden.dtype)
        self.counts, self._starts, self._places = moves.spread(
            hidden, expert_ids, order, self._rows.tensor
        )
        """Of each expert: its number of rows, and the first of them."""
        self._combined: Tensor | None = None

    @property
    def done(self) -> bool:
        """Whether every expert has answered."""
        return not self.outstanding and not self.held

    def result(self) -> Tensor:
        """The layer's expert output [T, D] in the dtype of `hidden`; only when `done`."""
        if self._combined is None:
            assert self.done, f"exchange {self.key} still waits for experts"
            self._combined = self._moves.combine(self._rows.tensor, self._places, self._weights)
            self._pool.give_back(self._rows)
        return self._combined

    def questions(self, experts: tuple[int, ...]) -> memoryview:
        """The input rows of `experts`, in their order, as bytes; they were not answered yet."""
        parts = self._parts(experts)
        return parts[0] if len(parts) == 1 else memoryview(bytearray().join(parts))

    def answer(self, experts: tuple[int, ...], buffer: memoryview) -> None:
        """Take the output rows of `experts`. Raises ValueError when their number is wrong."""
        parts = self._parts(experts)
        wanted = sum(map(len, parts))
        if buffer.nbytes != wanted:
            raise ValueError(f"answer of {buffer.nbytes} bytes: the rows asked for have {wanted}")
        taken = 0
        for part in parts:
            part[:] = buffer[taken : taken + len(part)]
            taken += len(part)

    def _parts(self, experts: tuple[int, ...]) -> list[memoryview]:
        """Where the rows of `experts` lie, in their order; neighbours are joined."""
        runs: list[tuple[int, int]] = []
        for expert in experts:
            start = self._starts[expert]
            stop = start + self.counts[expert]
            if runs and runs[-1][1] == start:
                start = runs.pop()[0]
            runs.append((start, stop))
        return [self._rows.bytes_of(start, stop) for start, stop in runs]
