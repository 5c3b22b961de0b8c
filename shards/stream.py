"""A sequence's tokens on their way from the group's thread to the event loop that wants them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from router.step import FinishReason, Token, WantedRows
from shards.client import SequenceFailed
from shards.outputs import Outputs

Item = Token | WantedRows


class GroupStream:
    """Tokens of one sequence, delivered on the event loop that asked for them."""

    def __init__(self, abort: Callable[[], None], outputs: Outputs) -> None:
        self._loop = asyncio.get_running_loop()
        self._outputs = outputs
        self._queue: asyncio.Queue[Token | Exception] = asyncio.Queue()
        self._abort = abort
        self._ended = False

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop that `put` must be called on."""
        return self._loop

    @property
    def outputs(self) -> dict[str, NDArray[np.generic]]:
        """The arrays that were asked for; whole once the first token has come."""
        return self._outputs.arrays

    def put(self, item: Item | Exception) -> None:
        """Hand over a token or some rows, or the error that ends the stream."""
        if isinstance(item, WantedRows):
            self._outputs.put(item)
        else:
            self._queue.put_nowait(item)

    async def __aiter__(self) -> AsyncIterator[Token]:
        while not self._ended:
            item = await self._queue.get()
            if isinstance(item, Exception):
                self._ended = True
                raise item
            self._ended = item.finish is not None
            if item.finish is FinishReason.ERROR:
                raise SequenceFailed("the model computed a value that is not finite")
            yield item

    def abort(self) -> None:
        """Stop generating; harmless after the end. Thread-safe."""
        self._abort()


def put_all(items: Iterable[tuple[GroupStream, Item]]) -> None:
    """Hand over one step's tokens; one wake-up of the loop however many streams it feeds."""
    for stream, item in items:
        stream.put(item)
