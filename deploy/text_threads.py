"""A few threads for templates and tokenizers: what computes must not pile up threads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

_MOST_THREADS = 4
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
