"""One model instance as the ingress uses it: started, asked, looked at and stopped."""

from __future__ import annotations

import itertools
from functools import partial

from router.codec import CodecError, encode
from router.layer_totals import LayerTotals
from router.step import NOTHING, EngineLoad, SamplingParams, Want
from router.transport.base import Transport
from shards.client import (
    GroupFailed,
    GroupState,
    GroupUnavailable,
    SequenceRefused,
    Trouble,
    WorkerStatus,
)
from shards.group_loop import GroupLoop
from shards.journal import JournalEntry
from shards.launcher import Launcher
from shards.outputs import Outputs
from shards.sequence_trace import SequenceTrace
from shards.spec import GroupSpec
from shards.start_record import GroupStart
from shards.stream import GroupStream


class ModelGroup:
    """Implements ModelClient over a `GroupLoop`, which keeps the workers and the journal."""

    def __init__(self, spec: GroupSpec, launcher: Launcher, transport: Transport) -> None:
        self.spec = spec
        self._loop = GroupLoop(spec, launcher, transport)
        self._seq_ids = itertools.count(1)

    def start(self, timeout: float | None = None) -> None:
        """Start every worker and wait until the group is ready. Raises GroupFailed."""
        self._loop.start()
        if not self._loop.settled.wait(timeout):
            self.stop()
            raise GroupFailed(f"not ready after {timeout} s")
        if self.state is GroupState.FAILED:
            self.stop()
            raise self._loop.failure()

    @property
    def state(self) -> GroupState:
        """Starting, ready, recovering, failed or stopped."""
        return self._loop.state

    @property
    def failure(self) -> str:
        """Why the group has failed; empty otherwise."""
        return self._loop.reason

    @property
    def trouble(self) -> Trouble | None:
        """The worker whose death is being healed, if any."""
        return self._loop.trouble

    @property
    def unavailable(self) -> GroupUnavailable | None:
        """Why nobody may wait any more; None while the group works or has not healed for long."""
        return self._loop.unavailable

    @property
    def load(self) -> EngineLoad:
        """What the engine last said it holds."""
        return self._loop.load

    @property
    def routing_table_version(self) -> int:
        """Version of the routing table last published."""
        return self._loop.supervisor.table_version

    @property
    def cache_summary(self) -> str:
        """How much the caches hold, and what decided it; empty before that is known."""
        return str(self._loop.supervisor.caches or "")

    @property
    def start_record(self) -> GroupStart:
        """How long it took to become ready, and of what that time was made."""
        return self._loop.record.start

    @property
    def layer_totals(self) -> dict[int, LayerTotals]:
        """What dispatching has cost, by layer, as of the workers' last signs of life."""
        return self._loop.pulse.layer_totals

    def workers(self) -> tuple[WorkerStatus, ...]:
        """The actor map."""
        return self._loop.supervisor.workers()

    def generate(
        self,
        prompt: tuple[int, ...],
        sampling: SamplingParams,
        *,
        priority: int = 0,
        want: Want = NOTHING,
        grammar: str | None = None,
        cache_salt: str = "",
        trace: SequenceTrace | None = None,
    ) -> GroupStream:
        """Journal and start one sequence; call on an event loop.

        Raises SequenceRefused, GroupUnavailable or GroupFailed.
        """
        if self._loop.is_over:
            raise self._loop.failure()
        if (unavailable := self.unavailable) is not None:
            raise unavailable
        seq_id = next(self._seq_ids)
        outputs = Outputs(want, len(prompt))
        stream = GroupStream(lambda: self._loop.drop(seq_id), outputs, trace)
        deliver = partial(self._loop.outbox.put, stream)
        entry = JournalEntry(
            seq_id,
            prompt,
            sampling,
            priority,
            deliver,
            want,
            cache_salt,
            grammar,
            traced=trace is not None,
        )
        try:
            encode(entry.admit(epoch=0))
        except CodecError as error:
            # Found here it ends one request; on the group's thread it would end the group.
            raise SequenceRefused(f"the request cannot be sent to the engine: {error}") from error
        self._loop.add(entry)
        return stream

    def stop(self) -> None:
        """Shut every worker down and wait for them; live streams end with GroupFailed."""
        self._loop.stop()
