"""A sequence's tokens on their way from the group's thread to the event loop that wants them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable

from router.step import Token


class GroupStream:
    """Tokens of one sequence, delivered on the event loop that asked for them."""

    def __init__(self, abort: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Token | Exception] = asyncio.Queue()
        self._abort = abort
        self._ended = False

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop that `put` must be called on."""
        return self._loop

    def put(self, item: Token | Exception) -> None:
        """Hand over a token, or the error that ends the stream."""
        self._queue.put_nowait(item)

    async def __aiter__(self) -> AsyncIterator[Token]:
        while not self._ended:
            item = await self._queue.get()
            if isinstance(item, Exception):
                self._ended = True
                raise item
            self._ended = item.finish is not None
            yield item

    def abort(self) -> None:
        """Stop generating; harmless after the end. Thread-safe."""
        self._abort()


def put_all(items: Iterable[tuple[GroupStream, Token]]) -> None:
    """Hand over one step's tokens; one wake-up of the loop however many streams it feeds."""
    for stream, token in items:
        stream.put(token)
