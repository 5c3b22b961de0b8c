"""A trace, replicas and who decides on their number, in virtual time."""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.autoscale_replica import Costs, Replica, Served, emptier
from benchmarks.autoscale_scalers import Scaler
from benchmarks.autoscale_traces import Request
from deploy.autoscaling import REPORT_S

_DECIDE, _READY, _DONE = range(3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a trace."""

    served: list[Served]
    replica_s: float
    """Seconds of replicas, from the decision to start them until they have drained."""
    most: int
    changes: int
    """Times that another number was aimed at."""

    def attained(self, ttft_s: float, token_s: float) -> float:
        """Share of the requests that met both targets; refused ones did not."""
        return sum(each.meets(ttft_s, token_s) for each in self.served) / len(self.served)


class Simulation:
    """Plays one trace; `instant` replicas serve as soon as they are asked for."""

    def __init__(
        self, costs: Costs, scaler: Scaler, *, instant: bool = False, seed: int = 0, first: int = 1
    ) -> None:
        self._costs = costs
        self._scaler = scaler
        self._startup_s = 0.0 if instant else costs.startup_s
        self._rng = random.Random(seed)
        self._events: list[tuple[float, int, int, Replica | None]] = []
        self._order = 0
        self._ready: list[Replica] = [Replica(costs, 0.0) for _ in range(first)]
        self._starting: list[Replica] = []
        self._draining = 0
        self._target = first
        self._held: deque[Served] = deque()
        self._replica_s = 0.0
        self._most = first
        self._changes = 0

    def run(self, requests: Sequence[Request]) -> Outcome:
        """Until the last request has ended."""
        served = [Served(request) for request in requests]
        left = len(served)
        self._push(0.0, _DECIDE, None)
        now, arriving = 0.0, iter(served)
        coming = next(arriving, None)
        while left:
            if coming is not None and coming.request.arrival <= self._events[0][0]:
                now = coming.request.arrival
                self._arrive(coming, now)
                left -= coming.refused
                coming = next(arriving, None)
                continue
            now, kind, _, replica = heapq.heappop(self._events)
            if kind == _DECIDE:
                self._decide(now)
                self._push(now + REPORT_S, _DECIDE, None)
            elif replica is not None and kind == _READY:
                left -= self._now_ready(replica, now)
            elif replica is not None and now == replica.until:
                left -= len(replica.advance())
                self._follow(replica, now)
        for replica in (*self._ready, *self._starting):
            self._replica_s += now - replica.begun
        return Outcome(
            served=served, replica_s=self._replica_s, most=self._most, changes=self._changes
        )

    def _push(self, when: float, kind: int, replica: Replica | None) -> None:
        self._order += 1
        heapq.heappush(self._events, (when, kind, self._order, replica))

    def _arrive(self, served: Served, now: float) -> None:
        if not self._ready:
            self._held.append(served)
            return
        replica = self._ready[0]
        if len(self._ready) > 1:
            first, second = self._rng.sample(range(len(self._ready)), 2)
            replica = emptier(self._ready, first, second)
        if replica.arrive(served, now):
            self._push(replica.until, _DONE, replica)

    def _follow(self, replica: Replica, now: float) -> None:
        """After its steps: the next ones, or its end."""
        if replica.until < float("inf"):
            self._push(replica.until, _DONE, replica)
        elif replica.draining:
            self._gone(replica, now)

    def _gone(self, replica: Replica, now: float) -> None:
        self._draining -= replica.draining
        self._replica_s += now - replica.begun

    def _now_ready(self, replica: Replica, now: float) -> int:
        """A replica has started, unless it was taken away meanwhile; how many were refused."""
        if replica not in self._starting:
            return 0
        self._starting.remove(replica)
        self._ready.append(replica)
        waiting, self._held = self._held, deque()
        for served in waiting:
            self._arrive(served, now)
        return sum(served.refused for served in waiting)

    def _decide(self, now: float) -> None:
        target = self._scaler.decide(now, self._ready, self._target, len(self._held))
        self._changes += target != self._target
        self._target = target
        there = len(self._ready) + len(self._starting)
        for _ in range(target - there):
            replica = Replica(self._costs, now)
            self._starting.append(replica)
            if self._startup_s:
                self._push(now + self._startup_s, _READY, replica)
            else:
                self._now_ready(replica, now)
        for _ in range(there - target):
            self._take_away(now)
        self._most = max(self._most, len(self._ready) + len(self._starting) + self._draining)

    def _take_away(self, now: float) -> None:
        """The newest; one that serves goes on with what it has."""
        if self._starting:
            self._gone(self._starting.pop(), now)
            return
        replica = self._ready.pop()
        if not replica.live:
            self._gone(replica, now)
            return
        replica.draining = True
        self._draining += 1
