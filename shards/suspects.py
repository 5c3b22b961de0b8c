"""Which sequences may run, so that one that kills its workers fails alone.

A sequence that was being computed at two deaths, without a token of its own in between, is suspect.
Suspects are tried apart from everybody else, in halves of halves, until each has got on, or has
been alone when a worker died.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

MAX_VERDICTS = 4
"""Verdicts in a row, with nobody getting on in between, that may excuse the workers."""
SUSPICIOUS = 2
"""Deaths without progress that make a suspect."""


class Suspects:
    """I/O-free. `begin` says who may run in an epoch; deaths and progress decide about the next.

    Healthy sequences never fail: a verdict needs a death while its sequence was the only one
    running.
    """

    def __init__(self) -> None:
        self._epoch = 0
        self._epoch_died = False
        self._running: set[int] = set()
        """Sequences whose computation began in this epoch."""
        self._strikes: dict[int, int] = {}
        """Deaths since a sequence last got on."""
        self._trial: tuple[int, ...] = ()
        """Who is tried in this epoch."""
        self._open: set[int] = set()
        """Those of them who have not got on yet."""
        self._groups: deque[tuple[int, ...]] = deque()
        """Who is tried next, group by group."""
        self._stale = False
        self._verdicts = 0
        self.narrowed = False
        """Whether the last death has told who else is not to blame, or who is."""

    @property
    def wants_epoch(self) -> bool:
        """Whether this epoch must give way to the next trial, or to the end of trials."""
        return self._stale or (not self._open and bool(self._groups))

    @property
    def everyone_may_run(self) -> bool:
        """Whether nobody is tried now, or waits for it."""
        return not (self._stale or self._open or self._groups)

    def begin(self, epoch: int) -> frozenset[int] | None:
        """A new epoch: the only sequences that may run in it; None: all."""
        self._epoch, self._epoch_died, self._stale = epoch, False, False
        self._running.clear()
        if not (self._open or self._groups):
            # Judged only now: what an engine said last may come after the death.
            self._groups.extend(_halves(s for s, n in self._strikes.items() if n >= SUSPICIOUS))
        if self._open:
            self._trial = tuple(sorted(self._open))
        elif self._groups:
            self._trial = self._groups.popleft()
            self._open = set(self._trial)
        else:
            self._trial = ()
        return frozenset(self._trial) or None

    def on_started(self, epoch: int, seq_ids: Iterable[int]) -> None:
        """The computation of these sequences has begun, says the engine of that epoch."""
        if epoch != self._epoch:
            return
        new = set(seq_ids) - self._running
        self._running |= new
        if self._epoch_died:
            self._strike(new)

    def on_progress(self, seq_id: int) -> None:
        """It got a token, or another part of its answer."""
        self._verdicts = 0
        self._strikes.pop(seq_id, None)
        self._open.discard(seq_id)

    def on_end(self, seq_id: int) -> None:
        """It is over, however it ended."""
        self._strikes.pop(seq_id, None)
        self._running.discard(seq_id)
        self._open.discard(seq_id)
        rest = (tuple(s for s in group if s != seq_id) for group in self._groups)
        self._groups = deque(group for group in rest if group)

    def on_death(self, *, ends_epoch: bool) -> int | None:
        """A worker died of what was running, perhaps: the sequence that is now known to do it."""
        self._epoch_died |= ends_epoch
        self._strike(self._running)
        self.narrowed = False
        if not self._open:
            self._stale = any(n >= SUSPICIOUS for n in self._strikes.values())
            return None
        accused = sorted(self._open & self._running)
        if not accused:
            return None
        self._stale = True
        # Where everybody dies and nobody ever gets on, the workers are at fault after all.
        self.narrowed = self._verdicts < MAX_VERDICTS
        if len(self._trial) == 1:
            self._open.clear()
            self._verdicts += 1
            return accused[0]
        # Whoever has not begun yet is tried by itself: nothing is known of it.
        self._groups.extendleft(reversed([*_halves(accused), *_halves(self._open - set(accused))]))
        self._open.clear()
        return None

    def check_invariants(self) -> None:
        """Nobody is tried twice at a time, and only who may run runs."""
        waiting = [s for group in self._groups for s in group]
        assert len(waiting) == len(set(waiting))
        assert not self._open & set(waiting)
        assert self._open <= set(self._trial)
        assert all(self._groups)

    def _strike(self, seq_ids: Iterable[int]) -> None:
        for seq_id in seq_ids:
            self._strikes[seq_id] = self._strikes.get(seq_id, 0) + 1


def _halves(seq_ids: Iterable[int]) -> list[tuple[int, ...]]:
    """The two halves of a group, or all of it where there is nothing to halve."""
    group = tuple(sorted(seq_ids))
    middle = len(group) // 2
    return [part for part in (group[:middle], group[middle:]) if part]
