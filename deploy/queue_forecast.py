"""When will whom be served: the queue played forward in predicted seconds. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a sequence still needs, in seconds from when it gets it.

    Prompts are computed one after the other; decoding goes on in all seats at once.
    """

    prefill_s: float
    decode_s: float
    blocks: int
    """KV blocks that it holds until it ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """Seconds from now until a sequence's prompt is begun, and until it has ended."""

    begins: float
    ends: float


def forecast(demands: Iterable[Demand], num_seats: int, num_blocks: int) -> list[Turn]:
    """The turn of each, first come first served, with seats and blocks for so many at once.

    A sequence that needs more blocks than there are has all of them to itself.
    """
    turns: list[Turn] = []
    seated: list[tuple[float, int]] = []  # a heap: when it ends, its blocks
    free_blocks = num_blocks
    now = prefill_free = 0.0
    for demand in demands:
        need = min(demand.blocks, num_blocks)
        while len(seated) >= num_seats or free_blocks < need:
            ended, blocks = heapq.heappop(seated)
            now = max(now, ended)
            free_blocks += blocks
        begins = max(now, prefill_free) if demand.prefill_s else now
        ends = begins + demand.prefill_s + demand.decode_s
        if demand.prefill_s:
            prefill_free = begins + demand.prefill_s
        free_blocks -= need
        heapq.heappush(seated, (ends, need))
        turns.append(Turn(begins=begins, ends=ends))
    return turns
