"""The ingress journal: owns every emitted token, so that any worker behind it may die."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from router.step import NOTHING, Abort, Admit, SamplingParams, Token, TokenBatch, Want, WantedRows

Deliver = Callable[[Token | WantedRows | Exception], None]


@dataclass(slots=True)
class JournalEntry:
    """One live sequence: what was asked, what was emitted, where tokens go."""

    seq_id: int
    prompt: tuple[int, ...]
    sampling: SamplingParams
    priority: int
    deliver: Deliver
    want: Want = NOTHING
    cache_salt: str = ""
    emitted: list[int] = field(default_factory=list)

    def admit(self, epoch: int) -> Admit:
        """The message that starts or resumes this sequence in `epoch`."""
        return Admit(
            seq_id=self.seq_id,
            epoch=epoch,
            prompt=self.prompt,
            emitted=tuple(self.emitted),
            sampling=self.sampling,
            priority=self.priority,
            want=self.want,
            cache_salt=self.cache_salt,
        )


class Journal:
    """I/O-free. Epoch 0 means that no engine is there: admissions wait for the next epoch."""

    def __init__(self) -> None:
        self.epoch = 0
        self._entries: dict[int, JournalEntry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, entry: JournalEntry) -> Admit | None:
        """Record a sequence; the message to send now, or None while no epoch is open."""
        assert entry.seq_id not in self._entries, f"sequence {entry.seq_id} is already journalled"
        self._entries[entry.seq_id] = entry
        return entry.admit(self.epoch) if self.epoch else None

    def drop(self, seq_id: int) -> Abort | None:
        """Forget a sequence whose client left; the message to send, if any."""
        if self._entries.pop(seq_id, None) is None or not self.epoch:
            return None
        return Abort(seq_id=seq_id, epoch=self.epoch)

    def suspend(self) -> None:
        """The epoch is over: rows still on their way are stale."""
        self.epoch = 0

    def begin(self, epoch: int) -> tuple[Admit, ...]:
        """Open an epoch; every live sequence resumes from prompt + emitted, oldest first."""
        self.epoch = epoch
        return tuple(entry.admit(epoch) for _, entry in sorted(self._entries.items()))

    def accept(self, batch: TokenBatch, refused: Callable[[str], Exception]) -> int:
        """Deliver the rows of the current epoch in order; returns how many were accepted.

        Rows of other epochs, of forgotten sequences and repeated positions are dropped. Wanted
        rows come before the tokens of their step; those that come again have the same bits.
        """
        if batch.epoch != self.epoch:
            return 0
        accepted = 0
        for rows in batch.wanted:
            entry = self._entries.get(rows.seq_id)
            if entry is not None:
                entry.deliver(rows)
                accepted += 1
        for token in batch.tokens:
            entry = self._entries.get(token.seq_id)
            if entry is None or token.position != len(entry.emitted):
                continue
            entry.emitted.append(token.token_id)
            if token.finish is not None:
                del self._entries[token.seq_id]
            entry.deliver(token)
            accepted += 1
        for refusal in batch.refusals:
            entry = self._entries.pop(refusal.seq_id, None)
            if entry is not None:
                entry.deliver(refused(refusal.reason))
        return accepted

    def fail(self, error: Exception) -> None:
        """End every live sequence with `error`."""
        entries, self._entries = self._entries, {}
        for entry in entries.values():
            entry.deliver(error)
