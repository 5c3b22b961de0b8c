"""Spans on their way to a collector, on a thread of their own: nobody ever waits for them."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from deploy.printable import printable

log = logging.getLogger("conclave.traces")

MAX_WAITING = 4096
"""Spans that wait to be sent; any more are dropped."""
MAX_BATCH = 512
_LAST_CALL_S = 2.0
_MAX_REASON = 400


class SpanSender(SpanProcessor):
    """Sends ended spans in batches; `on_dropped` is told how many were not, on whatever thread.

    The start and the end of an outage are logged, and nothing in between.
    """

    def __init__(
        self,
        exporter: SpanExporter,
        on_dropped: Callable[[int], None],
        *,
        max_waiting: int = MAX_WAITING,
        gather_s: float = 1.0,
        why: Callable[[], str] = str,
    ) -> None:
        """After the first span of a batch `gather_s` pass before it is sent.

        `why` says what the exporter has complained about since the last time.
        """
        self._why = why
        self._exporter = exporter
        self._on_dropped = on_dropped
        self._queue: queue.Queue[ReadableSpan | None] = queue.Queue(max_waiting)
        self._gather_s = gather_s
        self._closing = threading.Event()
        self._failing = False
        self._overflowing = False
        self._thread = threading.Thread(target=self._run, name="conclave-spans", daemon=True)
        self._thread.start()

    def on_end(self, span: ReadableSpan) -> None:
        """A span has ended; never waits."""
        try:
            self._queue.put_nowait(span)
            self._overflowing = False
        except queue.Full:
            self._on_dropped(1)
            if not self._overflowing:
                self._overflowing = True
                log.warning("more spans than the collector takes: some are dropped")

    def shutdown(self) -> None:
        """Send what is left, but not for long."""
        self._closing.set()
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            log.warning("spans are left behind")
        self._thread.join(_LAST_CALL_S)
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Wait until everything has been sent or dropped; whether it has."""
        deadline = time.monotonic() + timeout_millis / 1000
        while self._queue.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.01)
        return not self._queue.unfinished_tasks

    def _run(self) -> None:
        ended = False
        while not ended:
            taken = self._gather()
            # The end may have found no room behind all that waits.
            ended = taken[-1] is None or (self._closing.is_set() and self._queue.empty())
            batch = [span for span in taken if span is not None]
            if batch:
                self._send(batch)
            for _ in taken:
                self._queue.task_done()

    def _gather(self) -> list[ReadableSpan | None]:
        """The next span and those that come soon after it; None is the end."""
        taken = [self._queue.get()]
        until = time.monotonic() + self._gather_s
        while taken[-1] is not None and len(taken) < MAX_BATCH:
            left = 0.0 if self._closing.is_set() else until - time.monotonic()
            try:
                taken.append(self._queue.get(timeout=max(left, 0.0)))
            except queue.Empty:
                break
        return taken

    def _send(self, batch: list[ReadableSpan]) -> None:
        self._why()
        try:
            taken = self._exporter.export(batch) is SpanExportResult.SUCCESS
            reason = "" if taken else self._why() or "no reason given"
        except Exception as error:  # whatever it is, it ends no more than this batch
            reason = repr(error)
        if reason:
            self._on_dropped(len(batch))
        if reason and not self._failing:
            reason = printable(reason[:_MAX_REASON])
            log.warning("the collector takes no spans, they are dropped until it does: %s", reason)
        if self._failing and not reason:
            log.warning("the collector takes spans again")
        self._failing = bool(reason)
