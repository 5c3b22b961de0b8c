"""How many replicas the predicted work needs. Knows neither Serve nor a clock.

What is under way, brought forward to when a replica that is asked for now would be ready, is set
against seats, memory and the time within which prompts should be computed.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

_LEVEL_S = 30.0
"""Loads are averaged over so long: over less, chance would ask for replicas."""
_RECENT_S = 10.0
"""Over so long the reports themselves are averaged."""
_TREND_S = 120.0
"""Time constant of the average that the level is compared with, to see where it goes."""
_SAMPLE_S = 1.0
_MOST_GROWTH = 4.0
_SURE = 3.0
"""What is so many standard deviations above the average is no chance."""
_LATE = 0.03
"""Share of prompts that may wait too long for those before them."""
_BUSIEST, _IDLEST = 0.9, 0.2
"""Bounds of the share of their time that replicas may compute prompts."""
_SLACK = 0.05
"""Of one replica: so much too few is enough, and going down leaves so large a part free."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLoad:
    """What one replica says of itself; rates are those of the last seconds."""

    seats: float
    """Sequences that it can run at once."""
    sequences: float
    """Those under way, running or waiting."""
    arrivals: float
    """Sequences offered per second, refused ones too."""
    departures: float
    """Sequences that ended, per second."""
    residence: float
    """Seconds that those had run since their first token, per second."""
    prefill: float
    """Seconds of prompt computation offered per second, refused ones too."""
    backlog_s: float
    """Seconds that the prompts of those without a first token take."""
    oldest_wait_s: float
    """How long the one that has waited longest has had no first token."""
    memory: float
    """Share of the KV blocks or state slots that sequences hold, whichever is fuller."""
    slowdown: float = 0.0
    """By what part of a lone sequence's step each further one lengthens it."""
    startup_s: float = 0.0
    """How long this replica took to start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingTargets:
    """What replicas are to be filled to."""

    ttft_s: float = 2.0
    """Within so long of its arrival a prompt should be computed."""
    occupancy: float = 0.85
    """Share of the seats."""
    memory: float = 0.9
    scale_down_delay_s: float = 60.0
    """The most that was needed within so long is kept."""
    startup_s: float = 20.0
    """Of a new replica, where none says that it took longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """All replicas together, as expected for when a new one would be ready."""

    seats: float
    """Of one replica."""
    sequences: float
    """That run at once."""
    queue: float
    """Sequences beyond the seats that there are."""
    prefill: float
    """Seconds of prompt computation per second."""
    prompt_s: float
    """Mean seconds of a prompt."""
    backlog_s: float
    """Seconds of prompts that will not have been computed by then."""
    memory: float
    """Sum of the replicas' shares."""
    batch: float = 0.0
    """Sequences that one replica runs now."""
    slowdown: float = 0.0
    horizon_s: float = 0.0
    """How far ahead this is."""


def replicas_needed(work: Work, targets: ScalingTargets) -> float:
    """Replicas, not yet whole, that hold the work within the targets."""
    full = max(1.0, work.seats * targets.occupancy)
    # In other company a sequence takes a different time, so there will be more or fewer at once.
    thinned = (1 + work.slowdown * full) / (1 + work.slowdown * min(work.batch, work.seats))
    by_seats = (work.sequences * thinned + work.queue) / full
    by_prompts = _for_prompts(work.prefill, work.prompt_s, targets.ttft_s)
    by_prompts += work.backlog_s / max(work.horizon_s, targets.ttft_s)
    return max(by_seats, by_prompts, work.memory / targets.memory)


def _for_prompts(prefill: float, prompt_s: float, ttft_s: float) -> float:
    """Replicas that begin nearly all prompts in time; a larger number may be busier."""
    number = max(1, math.floor(prefill / _BUSIEST))
    while prefill > number * (share := prefill_share(prompt_s, ttft_s, number)):
        number += 1
    return prefill / share


def prefill_share(prompt_s: float, ttft_s: float, replicas: int) -> float:
    """The share of their time that prompts may take so that few of them are late.

    Waiting has the exponential tail of a queue with Poisson arrivals and services of mean
    `prompt_s` that vary twice as much as their mean; several replicas, of which requests choose
    the emptier of two, even out chance by the square root of their number.
    """
    if prompt_s <= 0:
        return _BUSIEST
    room = max(0.0, ttft_s - prompt_s) / (1.5 * prompt_s) * math.sqrt(replicas)
    low, high = _IDLEST, _BUSIEST
    for _ in range(10):
        share = (low + high) / 2
        if share * math.exp(-(1 - share) * room) <= _LATE:
            low = share
        else:
            high = share
    return low


@dataclass(frozen=True, slots=True)
class _Sample:
    time: float
    sequences: float
    arrivals: float
    departures: float
    residence: float
    prefill: float

    @classmethod
    def of(cls, now: float, loads: Sequence[ReplicaLoad]) -> _Sample:
        return cls(
            now,
            # Those beyond the seats are told apart: they run when others have ended.
            sum(min(each.sequences, each.seats) for each in loads),
            sum(each.arrivals for each in loads),
            sum(each.departures for each in loads),
            sum(each.residence for each in loads),
            sum(each.prefill for each in loads),
        )


class _History:
    """The samples of the last half minute, and a slower average of arrivals."""

    def __init__(self) -> None:
        self._samples: deque[_Sample] = deque()
        self._slow = 0.0

    def add(self, sample: _Sample) -> None:
        """The newest; those that follow it too closely say nothing new."""
        if not self._samples:
            self._slow = sample.arrivals
        else:
            passed = sample.time - self._samples[-1].time
            if passed < _SAMPLE_S:
                return
            self._slow -= math.expm1(-passed / _TREND_S) * (sample.arrivals - self._slow)
        self._samples.append(sample)
        while self._samples[0].time <= sample.time - _LEVEL_S:
            self._samples.popleft()

    def mean(self, name: str) -> float:
        """Of one field of the samples."""
        total: float = sum(getattr(sample, name) for sample in self._samples)
        return total / len(self._samples)

    def rise(self, level: float, horizon_s: float) -> float:
        """By what factor arrivals will have grown, if they go on as they do."""
        sure = level - self._slow - math.sqrt(self._slow / _LEVEL_S)
        if sure <= 0 or not self._slow:
            return 1.0
        ahead = (horizon_s + _LEVEL_S / 2) / (_TREND_S - _LEVEL_S / 2)
        return 1 + sure / level * ahead


class ScalingPolicy:
    """Decides a number of replicas from what they report, again and again.

    Up at once, to what is expected for when a new replica is ready; down to the most that was
    needed within `scale_down_delay_s`. `now` is any clock that only rises.
    """

    def __init__(self, targets: ScalingTargets) -> None:
        self.targets = targets
        self._history = _History()
        self._since: float | None = None
        self._needs: deque[tuple[float, int]] = deque()
        """What was needed and when; never less than anything that came later."""

    def decide(
        self, now: float, loads: Sequence[ReplicaLoad], target: int, bounds: tuple[int, int]
    ) -> int:
        """The number to aim at, where `target` is aimed at now; `bounds` are never left.

        `loads` are the reports of the replicas that serve; without any, nothing changes.
        """
        if not loads:
            return _within(target, bounds)
        self._history.add(_Sample.of(now, loads))
        work = self._expected(loads)
        need = replicas_needed(work, self.targets)
        least = _least(loads, work, self.targets)
        wanted = max(least, math.ceil(need - _SLACK))
        kept = self._most_lately(now, max(least, math.ceil(need * (1 + _SLACK) - _SLACK)), target)
        return _within(max(wanted, min(target, kept)), bounds)

    def _most_lately(self, now: float, need: int, target: int) -> int:
        """The most that was needed of late; `target` until enough was seen to say so."""
        delay_s = self.targets.scale_down_delay_s
        self._since = now if self._since is None else self._since
        while self._needs and self._needs[-1][1] <= need:
            self._needs.pop()
        self._needs.append((now, need))
        while self._needs[0][0] < now - delay_s:
            self._needs.popleft()
        most = self._needs[0][1]
        return max(most, target) if now - self._since < delay_s else most

    def _expected(self, loads: Sequence[ReplicaLoad]) -> Work:
        """What there will be when a replica that is asked for now is ready."""
        history, ready = self._history, len(loads)
        level, departures = history.mean("arrivals"), history.mean("departures")
        running, prefill = history.mean("sequences"), history.mean("prefill")
        horizon_s = max(self.targets.startup_s, *(each.startup_s for each in loads))
        arrivals, jumped = _arrivals_now(sum(each.arrivals for each in loads), level)
        if not jumped:
            rise = history.rise(level, horizon_s)
            arrivals = level * rise
        growth = 1.0
        if running and arrivals > departures + math.sqrt(departures / _LEVEL_S) + 1 / _LEVEL_S:
            # Little's law: as many will run as arrive in the time that one takes.
            takes = history.mean("residence") / departures if departures else math.inf
            growth = max(1.0, min(_MOST_GROWTH, arrivals * takes / running))
        more = arrivals / level if level else 1.0
        queue = sum(max(0.0, each.sequences - each.seats) for each in loads)
        free_s = max(0.0, ready - prefill * more) * horizon_s
        return Work(
            seats=sum(each.seats for each in loads) / ready,
            sequences=running * growth,
            queue=max(0.0, queue - max(0.0, departures - arrivals) * horizon_s),
            prefill=prefill * more,
            prompt_s=prefill / level if level else 0.0,
            backlog_s=max(0.0, sum(each.backlog_s for each in loads) - free_s),
            memory=sum(each.memory for each in loads) * growth,
            batch=running / ready,
            slowdown=sum(each.slowdown for each in loads) / ready,
            horizon_s=horizon_s,
        )


def _arrivals_now(recent: float, level: float) -> tuple[float, bool]:
    """Arrivals per second; the most recent ones alone where they are more than chance brings."""
    surely = level + _SURE * math.sqrt(max(level, 1 / _LEVEL_S) / _RECENT_S)
    return (recent, True) if recent > surely else (level, False)


def _least(loads: Sequence[ReplicaLoad], work: Work, targets: ScalingTargets) -> int:
    """What there must be whatever is expected: seats for those that run, one for anything."""
    least = math.ceil(sum(min(1.0, each.sequences / max(1.0, each.seats)) for each in loads))
    if least == 0 and (work.sequences or any(each.arrivals or each.prefill for each in loads)):
        least = 1
    late = max(each.oldest_wait_s for each in loads) > targets.ttft_s
    # Those that wait will wait on: there is more to do than predictions say.
    return max(least, len(loads) + 1) if late and (work.queue or work.backlog_s) else least


def _within(number: int, bounds: tuple[int, int]) -> int:
    return max(bounds[0], min(bounds[1], number))
