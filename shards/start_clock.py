"""How long a worker's start takes, part by part, measured where it happens."""

from __future__ import annotations

import time
from collections.abc import Callable

from shards.control import StartTimes


class StartClock:
    """Runs from its making; the parts come in the order of its methods."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._imports_s = self._read_s = 0.0

    def imported(self) -> None:
        """Everything that the worker's role needs is imported."""
        self._imports_s = self._clock() - self._began

    def read(self, seconds: float) -> None:
        """Reading has taken so long."""
        self._read_s = seconds

    @property
    def times(self) -> StartTimes:
        """As of now; what neither importing nor reading took is initialisation."""
        whole_s = self._clock() - self._began
        return StartTimes(
            imports_s=self._imports_s,
            read_s=self._read_s,
            init_s=max(0.0, whole_s - self._imports_s - self._read_s),
        )
