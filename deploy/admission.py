"""How many sequences may be under way at once, and when to come back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from deploy.openai_errors import ApiError

_SMOOTHING = 0.1
_MAX_RETRY_S = 60


class Admission:
    """Bounds running plus waiting sequences of one replica; beyond it requests are refused."""

    def __init__(self, max_running: int, max_waiting: int) -> None:
        self._max_running = max_running
        self._bound = max_running + max_waiting
        self._live = 0
        self._mean_s = 1.0

    @property
    def live(self) -> int:
        """Sequences that are under way."""
        return self._live

    def check(self, num_sequences: int, param: str = "n") -> None:
        """Raises ApiError: 503 with the time after which there should be room, 400 if never.

        `param` is the request's field that asks for so many.
        """
        if num_sequences > self._bound:
            raise ApiError(
                f"{param}: {num_sequences} sequences in one request, allowed are {self._bound}",
                param=param,
            )
        if self._live + num_sequences <= self._bound:
            return
        # The queue drains at max_running sequences per mean duration.
        behind = self._live + num_sequences - self._max_running
        wait = self._mean_s * behind / self._max_running
        raise ApiError(
            f"The server is overloaded: {self._live} sequences are under way, "
            f"allowed are {self._bound}.",
            status=503,
            kind="service_unavailable_error",
            code="overloaded",
            retry_after=min(_MAX_RETRY_S, max(1, round(wait))),
        )

    @contextmanager
    def hold(self, num_sequences: int) -> Iterator[None]:
        """Count sequences for as long as they run."""
        started = time.monotonic()
        self._live += num_sequences
        try:
            yield
        finally:
            self._live -= num_sequences
            self._mean_s += _SMOOTHING * (time.monotonic() - started - self._mean_s)
