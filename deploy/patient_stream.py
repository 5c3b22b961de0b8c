"""When a stream begins: with its first chunk, or without one when that takes too long."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from deploy.openai_errors import Json


class PatientStream:
    """The chunks of one answer. Who is done with it, for whatever reason, calls `aclose`."""

    def __init__(self, chunks: AsyncGenerator[Json, None]) -> None:
        self._chunks = chunks
        self._first: asyncio.Future[Json] | None = None

    async def begin(self, patience_s: float) -> None:
        """Wait for the first chunk, but no longer than `patience_s`.

        What goes wrong until then is raised here, as a plain error, and not inside the stream.
        """
        self._first = asyncio.ensure_future(anext(self._chunks))
        try:
            await asyncio.wait((self._first,), timeout=patience_s)
            if self._first.done():
                self._first.result()
        except BaseException:
            await self.aclose()
            raise

    def __aiter__(self) -> PatientStream:
        return self

    async def __anext__(self) -> Json:
        if self._first is None:
            return await anext(self._chunks)
        first, self._first = self._first, None
        return await first

    async def aclose(self) -> None:
        """Abort what has not ended; harmless after the end."""
        if self._first is not None:
            # A generator cannot be closed while somebody waits for its next item.
            self._first.cancel()
            await asyncio.gather(self._first, return_exceptions=True)
        await self._chunks.aclose()
