"""Open-loop load on a model instance: requests come when they come, however slow the answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.faults.requests import Request
from benchmarks.faults.verdicts import Judgement, judge
from router.step import Token
from shards.client import ModelClient
from tests.groups import Answer, answer_of

_POLL_S = 0.25


@dataclass(slots=True)
class StreamRecord:
    """One stream as its reader saw it; times are of the monotonic clock, one per token."""

    request_idx: int
    asked_at: float
    tokens: list[Token] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    error: str = ""
    ended_at: float | None = None

    def judge(self, expected: Answer) -> Judgement:
        """Compare with the undisturbed answer."""
        return judge(expected, answer_of(self.tokens), self.error)


class Load:
    """Asks `requests[i % n]` for the i-th arrival and records every token of every answer."""

    def __init__(self, group: ModelClient, requests: Sequence[Request]) -> None:
        self._group = group
        self._requests = requests
        self._streams: set[asyncio.Task[None]] = set()
        self.records: list[StreamRecord] = []
        self.last_token_at = time.monotonic()
        self.done = False
        """Every stream has ended, or none will."""
        self._asking = True

    @property
    def num_open(self) -> int:
        """Streams that have not ended."""
        return len(self._streams)

    def finish(self) -> None:
        """Ask nothing more; what was asked is still answered."""
        self._asking = False

    async def run(self, arrivals: Sequence[float], patience: float) -> None:
        """Ask at `arrivals` (seconds from now) and wait for all ends.

        Streams are given up when no token has come on any of them for `patience` seconds.
        """
        try:
            begin = self.last_token_at = time.monotonic()
            for i, arrival in enumerate(arrivals):
                await asyncio.sleep(begin + arrival - time.monotonic())
                task = asyncio.create_task(self._read(i % len(self._requests)))
                self._streams.add(task)
                task.add_done_callback(self._streams.discard)
                if self._is_stuck(patience) or not self._asking:
                    break
            while self._streams and not self._is_stuck(patience):
                await asyncio.sleep(_POLL_S)
        finally:
            self.done = True
            for task in self._streams:
                task.cancel()
            await asyncio.gather(*self._streams, return_exceptions=True)

    def _is_stuck(self, patience: float) -> bool:
        return bool(self._streams) and time.monotonic() - self.last_token_at > patience

    async def _read(self, request_idx: int) -> None:
        request = self._requests[request_idx]
        record = StreamRecord(request_idx, time.monotonic())
        self.records.append(record)
        if self.num_open <= 1:
            # Nothing was asked for until now: silence begins here.
            self.last_token_at = record.asked_at
        stream = None
        try:
            stream = self._group.generate(request.prompt, request.sampling)
            async for token in stream:
                self.last_token_at = time.monotonic()
                record.times.append(self.last_token_at)
                record.tokens.append(token)
        except asyncio.CancelledError:
            if stream is not None:
                stream.abort()
            raise
        except Exception as error:  # whatever it is, the stream has failed
            record.error = f"{type(error).__name__}: {error}"
        record.ended_at = time.monotonic()
