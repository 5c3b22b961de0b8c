"""A few threads for templates and tokenizers: what computes must not pile up threads.

Tokenizers release the interpreter's lock, so that the event loop goes on meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

from deploy.openai_errors import ApiError

_MOST_THREADS = 4
LONG_TEXT = 1 << 14
"""Characters, or token ids, from which on a text has to wait for others like it."""
_RETRY_S = 1.0
P = ParamSpec("P")
R = TypeVar("R")


class TextThreads:
    """Runs calls off the event loop, at most `num_threads` at once, in the order they came."""

    def __init__(self, num_threads: int) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="conclave-text")

    @classmethod
    def for_cores(cls, cores: int) -> TextThreads:
        """As many as can compute, up to a few: the model needs the cores more."""
        return cls(max(1, min(_MOST_THREADS, cores)))

    async def run(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """The call's result; cancelled before its turn, it is never made."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, partial(call, *args, **kwargs))


class TextLanes:
    """Threads for texts, and one more for long ones: nothing short waits behind seconds of work.

    `most_waiting` bounds the short and the long ones that are under way; None: any number.
    """

    def __init__(self, cores: int, most_waiting: tuple[int, int] | None = None) -> None:
        self._lanes = (TextThreads.for_cores(cores), TextThreads(1))
        self._most_waiting = most_waiting
        self._waiting = [0, 0]

    async def run(self, size: int, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """The result of a call for a text of about that size. Raises ApiError 429."""
        lane = int(size > LONG_TEXT)
        if self._most_waiting is not None and self._waiting[lane] >= self._most_waiting[lane]:
            raise self._too_many(self._most_waiting[lane], "long texts" if lane else "texts")
        self._waiting[lane] += 1
        try:
            return await self._lanes[lane].run(call, *args, **kwargs)
        finally:
            self._waiting[lane] -= 1

    def _too_many(self, most: int, what: str) -> ApiError:
        return ApiError(
            f"The server is overloaded: {most} {what} are being tokenized or detokenized, "
            f"as many as are allowed. Try again in {_RETRY_S:g} s.",
            status=429,
            kind="rate_limit_error",
            code="rate_limit_exceeded",
            retry_after=_RETRY_S,
        )
