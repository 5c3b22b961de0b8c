"""One worker as the supervisor sees it: alive or not, how often it died, when it starts again."""

from __future__ import annotations

from dataclasses import dataclass, replace

from shards.client import Trouble, WorkerStatus
from shards.control import Started
from shards.spec import WorkerSpec

MAX_FAILURES = 8
"""Deaths in a row; at the next one the group gives up, unless it works without that worker."""
PROVEN_S = 5.0
"""An expert worker that lived this long while tokens came does what it is for."""
STABLE_S = 60.0
"""Who lived this long has not failed in starting: its death is the first in a row."""
_AT_ONCE = 2
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0


def respawn_pause_s(failures: int) -> float:
    """Seconds before a worker is started again that died `failures` times in a row.

    None after the first two; then half a second, doubled each time.
    """
    if failures <= _AT_ONCE:
        return 0.0
    return min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** (failures - _AT_ONCE - 1))


@dataclass(slots=True)
class Member:
    """A place in the group and the incarnation that fills it, or is to."""

    spec: WorkerSpec
    started: Started | None = None
    started_at: float = 0.0
    start_no: int = 0
    """Which of the group's events its start was."""
    spawn_at: float | None = None
    """When the next incarnation is to be started; None: it has been."""
    failures: int = 0
    """Deaths in a row: without a token of anybody in between, and without a stable life."""
    deaths: int = 0
    recoveries: int = 0
    last_reason: str = ""

    def rise(self, started: Started, now: float, start_no: int) -> None:
        """It has loaded."""
        self.recoveries += self.deaths > 0
        self.started, self.started_at, self.start_no = started, now, start_no

    def fall(self, reason: str, now: float) -> None:
        """It is dead; its successor waits for its turn."""
        stable = self.started is not None and now - self.started_at >= STABLE_S
        self.failures = 1 if stable else self.failures + 1
        self.deaths += 1
        self.last_reason = reason
        self.started = None
        self.spawn_at = now + respawn_pause_s(self.failures)
        self.spec = replace(self.spec, incarnation=self.spec.incarnation + 1)

    def status(self, experts: tuple[int, ...], layers: tuple[int, int] | None) -> WorkerStatus:
        """What `/v1/experts` shows of it."""
        spec, started = self.spec, self.started
        waiting = "starting" if self.spawn_at is None else "backing off"
        return WorkerStatus(
            role=str(spec.role),
            index=spec.index,
            pid=started.pid if started else 0,
            node_id=started.node_id if started else "",
            state="alive" if started else waiting,
            incarnation=spec.incarnation,
            deaths=self.deaths,
            recoveries=self.recoveries,
            last_reason=self.last_reason,
            experts=experts,
            layers=layers,
        )

    def trouble(self, now: float, since: float) -> Trouble:
        """What `/health` shows of it when it is missing; the group heals since `since`."""
        return Trouble(
            worker=self.spec.peer,
            reason=self.last_reason,
            deaths_in_a_row=self.failures,
            healing_s=round(now - since, 3),
            respawn_in_s=0.0 if self.spawn_at is None else round(max(0.0, self.spawn_at - now), 3),
        )
