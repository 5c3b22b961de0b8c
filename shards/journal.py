"""The ingress journal: owns every emitted token, so that any worker behind it may die."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from router.step import NOTHING, Abort, Admit, SamplingParams, Token, TokenBatch, Want, WantedRows
from shards.sequence_trace import TracedStep


@dataclass(frozen=True, slots=True)
class Begun:
    """A sequence is in a step in flight: for the first time, or again after it had to give way."""


Deliver = Callable[[Token | WantedRows | Begun | TracedStep | Exception], None]


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
    grammar: str | None = None
    traced: bool = False
    emitted: list[int] = field(default_factory=list)
    rows_seen: dict[str, int] = field(default_factory=dict)
    """Of each wanted array, how many rows have come: those of a new epoch come again."""
    known_in: int = 0
    """The last epoch whose engine was told of it."""

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
            grammar=self.grammar,
            cache_salt=self.cache_salt,
            traced=self.traced,
        )

    def sees(self, rows: WantedRows) -> bool:
        """Take note of some rows; whether the last of them is new."""
        end = rows.start + rows.shape[0]
        new = end > self.rows_seen.get(rows.name, 0)
        if new:
            self.rows_seen[rows.name] = end
        return new


@dataclass(frozen=True, slots=True)
class Moved:
    """Who got on by a batch of tokens, and who is over by it."""

    on: tuple[int, ...] = ()
    over: tuple[int, ...] = ()


class Journal:
    """I/O-free. Epoch 0 means that no engine is there: admissions wait for the next epoch."""

    def __init__(self) -> None:
        self.epoch = 0
        self._entries: dict[int, JournalEntry] = {}
        self._only: Collection[int] | None = None

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, seq_id: int) -> bool:
        return seq_id in self._entries

    @property
    def live(self) -> tuple[int, ...]:
        """Every sequence, oldest first."""
        return tuple(sorted(self._entries))

    def add(self, entry: JournalEntry) -> Admit | None:
        """Record a sequence; the message to send now, or None while it has to wait."""
        assert entry.seq_id not in self._entries, f"sequence {entry.seq_id} is already journalled"
        self._entries[entry.seq_id] = entry
        return self._tell(entry) if self.epoch and self._only is None else None

    def drop(self, seq_id: int) -> Abort | None:
        """Forget a sequence whose client left; the message to send, if any."""
        entry = self._entries.pop(seq_id, None)
        if entry is None or not self.epoch or entry.known_in != self.epoch:
            return None
        return Abort(seq_id=seq_id, epoch=self.epoch)

    def suspend(self) -> None:
        """The epoch is over: rows still on their way are stale."""
        self.epoch = 0

    def begin(self, epoch: int, only: Collection[int] | None = None) -> tuple[Admit, ...]:
        """Open an epoch; every live sequence resumes from prompt + emitted, oldest first.

        With `only`, just these: the others wait for `let_in` or for another epoch.
        """
        self.epoch, self._only = epoch, only
        chosen = (e for s, e in sorted(self._entries.items()) if only is None or s in only)
        return tuple(self._tell(entry) for entry in chosen)

    def let_in(self) -> tuple[Admit, ...]:
        """Nobody has to wait any more: the messages to send, oldest first."""
        if not self.epoch or self._only is None:
            return ()
        self._only = None
        waiting = (e for _, e in sorted(self._entries.items()) if e.known_in != self.epoch)
        return tuple(self._tell(entry) for entry in waiting)

    def _tell(self, entry: JournalEntry) -> Admit:
        entry.known_in = self.epoch
        return entry.admit(self.epoch)

    def note_begun(self, seq_ids: Collection[int]) -> None:
        """Tell whoever reads these sequences that they wait no more."""
        for seq_id in seq_ids:
            self._entries[seq_id].deliver(Begun())

    def note_steps(self, batch: TokenBatch, heard: float) -> None:
        """Tell whoever reads them what the steps of traced sequences have taken."""
        if batch.epoch != self.epoch:
            return
        for step in batch.steps:
            for row in step.rows:
                entry = self._entries.get(row.seq_id)
                if entry is not None:
                    entry.deliver(TracedStep(step, row, heard))

    def accept(self, batch: TokenBatch, refused: Callable[[str], Exception]) -> Moved:
        """Deliver the rows of the current epoch in order.

        Rows of other epochs, of forgotten sequences and repeated positions are dropped. Wanted
        rows come before the tokens of their step; those that come again have the same bits.
        """
        if batch.epoch != self.epoch:
            return Moved()
        on: list[int] = []
        over: list[int] = []
        for rows in batch.wanted:
            entry = self._entries.get(rows.seq_id)
            if entry is not None:
                entry.deliver(rows)
                if entry.sees(rows):
                    on.append(rows.seq_id)
        for token in batch.tokens:
            entry = self._entries.get(token.seq_id)
            if entry is None or token.position != len(entry.emitted):
                continue
            entry.emitted.append(token.token_id)
            on.append(token.seq_id)
            if token.finish is not None:
                del self._entries[token.seq_id]
                over.append(token.seq_id)
            entry.deliver(token)
        for refusal in batch.refusals:
            entry = self._entries.pop(refusal.seq_id, None)
            if entry is not None:
                over.append(refusal.seq_id)
                entry.deliver(refused(refusal.reason))
        return Moved(tuple(on), tuple(over))

    def fail(self, seq_id: int, error: Exception) -> Abort | None:
        """End one sequence with `error`; the message to send, if any."""
        entry = self._entries.get(seq_id)
        if entry is None:
            return None
        abort = self.drop(seq_id)
        entry.deliver(error)
        return abort
