"""What a replica tells whoever decides how many there are. No I/O, no clock."""

from __future__ import annotations

from deploy.admission import Admission
from deploy.scaling_policy import ReplicaLoad
from router.step import EngineLoad

_SHORTEST_S = 0.1
"""Rates over less time are noise."""


class LoadReporter:
    """One per replica; `now` is the clock of its admission."""

    def __init__(self, admission: Admission, *, startup_s: float, now: float) -> None:
        self._admission = admission
        self._startup_s = startup_s
        self._last = (now, *self._counts())
        self._rates: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)

    def report(self, now: float, load: EngineLoad) -> ReplicaLoad:
        """The load now; rates are those since the last report."""
        admission = self._admission
        per_token_s = admission.rates.prefill_s_per_token
        arrivals, tokens, departures, residence = self._rates_since(now)
        backlog = admission.backlog
        blocks = load.used_blocks / load.total_blocks if load.total_blocks else 0.0
        slots = load.used_slots / load.total_slots if load.total_slots else 0.0
        return ReplicaLoad(
            seats=admission.capacity(load),
            sequences=admission.live,
            arrivals=arrivals,
            departures=departures,
            residence=residence,
            prefill=tokens * per_token_s,
            backlog_s=per_token_s * sum(ticket.work.prompt_tokens for ticket in backlog),
            oldest_wait_s=now - backlog[0].arrived if backlog else 0.0,
            memory=max(blocks, slots),
            slowdown=admission.rates.slowdown,
            startup_s=self._startup_s,
        )

    def _counts(self) -> tuple[float, ...]:
        each = self._admission
        return each.num_offered, each.offered_tokens, each.num_ended, each.ended_s

    def _rates_since(self, now: float) -> tuple[float, ...]:
        """Of what is counted: sequences, their tokens, those that ended, what they took."""
        before, *old = self._last
        passed = now - before
        if passed >= _SHORTEST_S:
            new = self._counts()
            self._rates = tuple((b - a) / passed for a, b in zip(old, new, strict=True))
            self._last = (now, *new)
        return self._rates
