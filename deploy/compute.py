"""Sequences that are computed and not continued: what the model makes of given tokens."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router.step import SamplingParams, Want
from shards.client import TokenSource

Arrays = dict[str, NDArray[np.generic]]

MAX_STEP_BYTES = 2**29
"""One step's arrays share a frame, which holds at most twice as much."""
_COMPUTE_ONLY = SamplingParams(max_tokens=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Computation:
    """One sequence's tokens and the arrays that are wanted of them."""

    tokens: tuple[int, ...]
    want: Want
    priority: int = 0
    step_bytes: int = 0
    """Bytes of arrays that one step may return of it, at most."""


class StepBudget:
    """Bounds the arrays of sequences that may share a step; first come, first served."""

    def __init__(self, total: int = MAX_STEP_BYTES) -> None:
        self._free = total
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def hold(self, num_bytes: int) -> AsyncIterator[None]:
        """Wait until `num_bytes`, no more than the total, are free, and keep them for a while."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((num_bytes, turn))
        self._serve()
        try:
            await turn
            yield
        finally:
            if turn.cancelled():
                self._waiting = deque(w for w in self._waiting if w[1] is not turn)
            else:
                self._free += num_bytes
            self._serve()

    def _serve(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._free:
            num_bytes, turn = self._waiting.popleft()
            if not turn.cancelled():
                self._free -= num_bytes
                turn.set_result(None)


async def compute(
    client: TokenSource,
    budget: StepBudget,
    computations: Sequence[Computation],
    waited: Callable[[float | None], None],
) -> list[Arrays]:
    """Run all of them, as many at once as the budget lets; leaving early aborts them.

    `waited` is told the seconds that each has waited for its first step. Raises what
    `TokenSource.generate` and its streams raise.
    """
    tasks = [asyncio.create_task(_run(client, budget, each, waited)) for each in computations]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _run(
    client: TokenSource,
    budget: StepBudget,
    each: Computation,
    waited: Callable[[float | None], None],
) -> Arrays:
    async with budget.hold(each.step_bytes):
        stream = client.generate(each.tokens, _COMPUTE_ONLY, priority=each.priority, want=each.want)
        try:
            async for _ in stream:
                pass
            waited(stream.queue_seconds)
            return stream.outputs
        finally:
            stream.abort()
