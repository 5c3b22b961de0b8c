"""A sequence's tokens on their way from the group's thread to the event loop that wants them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from router.step import FinishReason, Token, WantedRows
from shards.client import ReaderTooSlow, SequenceFailed, SequenceRefused
from shards.journal import Begun
from shards.outputs import Outputs
from shards.sequence_trace import SequenceTrace, TracedStep

log = logging.getLogger("conclave.group")

MAX_BEHIND = 8192
"""Tokens that may wait for who reads them: the engine never does."""

Item = Token | WantedRows | Begun | TracedStep


class GroupStream:
    """Tokens of one sequence, delivered on the event loop that asked for them."""

    def __init__(
        self, abort: Callable[[], None], outputs: Outputs, trace: SequenceTrace | None = None
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._outputs = outputs
        self._trace = trace
        self._queue: asyncio.Queue[Token | Exception] = asyncio.Queue()
        self._abort = abort
        self._ended = False
        self._cut = False
        self._made_at = time.monotonic()
        self._begun_at: float | None = None

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop that `put` must be called on."""
        return self._loop

    @property
    def queue_seconds(self) -> float | None:
        """How long it waited for its first step; None while it does."""
        return None if self._begun_at is None else self._begun_at - self._made_at

    @property
    def outputs(self) -> dict[str, NDArray[np.generic]]:
        """The arrays that were asked for; whole once the first token has come."""
        return self._outputs.arrays

    def put(self, item: Item | Exception) -> None:
        """Hand over a token or some rows, or the error that ends the stream.

        A reader who is `MAX_BEHIND` tokens behind gets those and then ReaderTooSlow.
        """
        if isinstance(item, WantedRows):
            self._outputs.put(item)
        elif isinstance(item, Begun | TracedStep):
            self._note(item)
        elif self._queue.qsize() < MAX_BEHIND:
            self._queue.put_nowait(item)
        elif not self._cut:
            self._cut = True
            self._queue.put_nowait(ReaderTooSlow(f"its reader is {MAX_BEHIND} tokens behind"))
            self._abort()

    def _note(self, item: Begun | TracedStep) -> None:
        if isinstance(item, Begun):
            now = time.monotonic()
            self._begun_at = self._begun_at or now
            if self._trace is not None:
                self._trace.begin(now)
        elif self._trace is not None:
            self._trace.see(item)

    async def __aiter__(self) -> AsyncIterator[Token]:
        while not self._ended:
            item = await self._queue.get()
            if isinstance(item, Exception):
                self._ended = True
                raise item
            self._ended = item.finish is not None
            if item.error:
                raise SequenceRefused(item.error)
            if item.finish is FinishReason.ERROR:
                raise SequenceFailed("the model computed a value that is not finite")
            yield item

    def abort(self) -> None:
        """Stop generating; harmless after the end. Thread-safe."""
        self._abort()


class Outbox:
    """Tokens of one step: one wake-up per event loop, however many streams it feeds."""

    def __init__(self) -> None:
        self._waiting: dict[asyncio.AbstractEventLoop, list[tuple[GroupStream, Item]]] = {}

    def put(self, stream: GroupStream, item: Item | Exception) -> None:
        """Hand over with the next `flush`; errors at once, from whatever thread they come."""
        if isinstance(item, Exception):
            _call(stream.loop, 1, stream.put, item)
        else:
            self._waiting.setdefault(stream.loop, []).append((stream, item))

    def flush(self) -> None:
        """Wake every event loop for which something has been put."""
        waiting, self._waiting = self._waiting, {}
        for loop, items in waiting.items():
            _call(loop, len(items), _put_all, items)


def _put_all(items: Iterable[tuple[GroupStream, Item]]) -> None:
    for stream, item in items:
        stream.put(item)


def _call(
    loop: asyncio.AbstractEventLoop, num_streams: int, put: Callable[..., None], what: object
) -> None:
    try:
        loop.call_soon_threadsafe(put, what)
    except RuntimeError:
        log.warning("an event loop closed with %d streams open", num_streams)
