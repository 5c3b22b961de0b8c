"""When will whom be served: the queue played forward in predicted seconds. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import NamedTuple


class Demand(NamedTuple):
    """What a sequence still needs, in seconds from when it gets it.

    Prompts are computed one after the other; decoding goes on in all seats at once.
    """

    prefill_s: float
    decode_s: float
    blocks: int
    """KV blocks that it holds until it ends."""


class Turn(NamedTuple):
    """Seconds from now until a sequence's prompt is begun, and until it has ended."""

    begins: float
    ends: float


class Queue:
    """Sequences in the order in which they are served, with seats and blocks for so many at once.

    A sequence that needs more blocks than there are has all of them to itself.
    """

    def __init__(self, num_seats: int, num_blocks: int) -> None:
        self._num_seats = num_seats
        self._num_blocks = self._free_blocks = num_blocks
        self._seated: list[tuple[float, int]] = []  # a heap: when it ends, its blocks
        self._now = self._prefill_free = 0.0

    def add(self, demand: Demand) -> Turn:
        """Its turn; it stands behind all others, and the next one behind it."""
        need = min(demand.blocks, self._num_blocks)
        while len(self._seated) >= self._num_seats or self._free_blocks < need:
            ended, blocks = heapq.heappop(self._seated)
            self._now = max(self._now, ended)
            self._free_blocks += blocks
        begins = max(self._now, self._prefill_free) if demand.prefill_s else self._now
        ends = begins + demand.prefill_s + demand.decode_s
        if demand.prefill_s:
            self._prefill_free = begins + demand.prefill_s
        self._free_blocks -= need
        heapq.heappush(self._seated, (ends, need))
        return Turn(begins, ends)

    def turn_of(self, demand: Demand) -> Turn:
        """The turn that it would have; the queue stays as it is."""
        copy = Queue(self._num_seats, self._num_blocks)
        copy._seated = self._seated.copy()
        copy._free_blocks = self._free_blocks
        copy._now, copy._prefill_free = self._now, self._prefill_free
        return copy.add(demand)


def forecast(demands: Iterable[Demand], num_seats: int, num_blocks: int) -> list[Turn]:
    """The turn of each, first come first served."""
    queue = Queue(num_seats, num_blocks)
    return [queue.add(demand) for demand in demands]
