"""How far one worker is with reading its weights."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

log = logging.getLogger("conclave.loading")

_INTERVAL_S = 0.25

OnRead = Callable[[int], None]
"""Told how many bytes of tensor data were just read; 0 when reading begins."""

Report = Callable[[int], None]
"""Told how many bytes a worker has read so far."""


class LoadProgress:
    """Counts what a worker reads and reports it a few times a second.

    A report that fails is logged and is the last one: progress never stops the loading.
    """

    def __init__(
        self, peer: str, report: Report | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._peer = peer
        self._report = report
        self._clock = clock
        self._bytes_read = 0
        self._started: float | None = None
        self._reported = self._latest = 0.0

    def on_read(self, num_bytes: int) -> None:
        """So many bytes were just read; the first call, with 0, marks the beginning."""
        self._bytes_read += num_bytes
        now = self._latest = self._clock()
        if self._started is None:
            self._started = self._reported = now
        elif now - self._reported >= _INTERVAL_S:
            self._reported = now
            self._send()

    def finish(self) -> None:
        """Everything is read: report the sum, log one line. Workers without weights say nothing."""
        if self._started is None:
            return
        self._send()
        read, seconds = self._bytes_read, self.seconds
        log.info("%s: read %d bytes of weights in %.2f s", self._peer, read, seconds)

    @property
    def seconds(self) -> float:
        """From the first call to the latest one."""
        return 0.0 if self._started is None else self._latest - self._started

    def _send(self) -> None:
        if self._report is None:
            return
        try:
            self._report(self._bytes_read)
        except Exception as error:  # whatever carries the reports away: loading goes on without
            log.warning("%s: progress is no longer reported: %s", self._peer, error)
            self._report = None
