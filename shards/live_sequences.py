"""The sequences of a group: journalled, suspected, and what the engine must hear of them."""

from __future__ import annotations

import logging

from router.step import Abort, Admit, TokenBatch
from shards.actions import Mourn
from shards.client import SequenceRefused, WorkerKilled
from shards.journal import Journal, JournalEntry
from shards.suspects import Suspects

log = logging.getLogger("conclave.group")

Messages = tuple[Admit | Abort, ...]
"""To be sent to the engine, in this order."""


class LiveSequences:
    """I/O-free: keeps the journal and the suspects in step with each other."""

    def __init__(self) -> None:
        self._journal = Journal()
        self._suspects = Suspects()

    def __len__(self) -> int:
        return len(self._journal)

    @property
    def wants_epoch(self) -> bool:
        """Whether the open epoch must give way to another one."""
        return bool(self._journal.epoch) and self._suspects.wants_epoch

    @property
    def everyone_may_run(self) -> bool:
        """Whether no sequence waits because another one is tried."""
        return self._suspects.everyone_may_run

    def add(self, entry: JournalEntry) -> Messages:
        """A new sequence."""
        return _sent(self._journal.add(entry))

    def drop(self, seq_id: int) -> Messages:
        """Its client has left."""
        self._suspects.on_end(seq_id)
        return _sent(self._journal.drop(seq_id))

    def fail(self, seq_id: int, error: Exception) -> Messages:
        """End one sequence with `error`."""
        self._suspects.on_end(seq_id)
        return _sent(self._journal.fail(seq_id, error))

    def fail_all(self, error: Exception) -> Messages:
        """End every sequence with `error`."""
        return tuple(m for seq_id in self._journal.live for m in self.fail(seq_id, error))

    def suspend(self) -> None:
        """The epoch is over."""
        self._journal.suspend()

    def begin(self, epoch: int) -> Messages:
        """An epoch begins: everyone resumes, or those whose trial it is."""
        return self._journal.begin(epoch, self._suspects.begin(epoch))

    def let_in(self) -> Messages:
        """Whoever has waited for a trial, once there is none any more."""
        if not self._journal.epoch or not self._suspects.everyone_may_run:
            return ()
        return self._journal.let_in()

    def take(self, batch: TokenBatch) -> bool:
        """What the engine says of one step; whether anybody got on by it."""
        if batch.started:
            known = [seq_id for seq_id in batch.started if seq_id in self._journal]
            self._suspects.on_started(batch.epoch, known)
            self._journal.note_begun(known)
        moved = self._journal.accept(batch, SequenceRefused)
        for seq_id in moved.on:
            self._suspects.on_progress(seq_id)
        for seq_id in moved.over:
            self._suspects.on_end(seq_id)
        return bool(moved.on or moved.over)

    def note_steps(self, batch: TokenBatch, heard: float) -> None:
        """What the engine says of traced steps; `heard` on the monotonic clock."""
        self._journal.note_steps(batch, heard)

    def on_death(self, death: Mourn) -> tuple[bool, Messages]:
        """A worker died, perhaps of what was running: whether that narrowed down who is to blame.

        Whoever is found to be fails.
        """
        if not death.blames:
            return False, ()
        seq_id = self._suspects.on_death(ends_epoch=death.ends_epoch)
        if seq_id is None:
            return self._suspects.narrowed, ()
        log.error("sequence %d fails: workers died whenever it ran", seq_id)
        error = WorkerKilled(f"{death.spec.peer} died, and not for the first time of this request")
        return self._suspects.narrowed, self.fail(seq_id, error)


def _sent(message: Admit | Abort | None) -> Messages:
    return () if message is None else (message,)
