"""What a reader feels of a fault: the longest wait between two tokens while it was being healed.

For each fault and each stream that was being read: its longest gap that overlaps the time from the
fault until the instance was whole again (0.3 s at least). The undisturbed figure is the same, of
windows of the same lengths drawn from the time before the first fault. So a fault that nobody
notices adds nothing.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.faults.load import StreamRecord

Window = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class GapStatistics:
    """Percentiles in milliseconds over `count` (stream, window) pairs."""

    count: int
    p50: float
    p99: float
    most: float

    def minus(self, calm: GapStatistics) -> GapStatistics:
        """What was added to the undisturbed figures."""
        return GapStatistics(
            count=self.count,
            p50=self.p50 - calm.p50,
            p99=self.p99 - calm.p99,
            most=self.most - calm.most,
        )


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed; nan of none."""
    if not values:
        return float("nan")
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def longest_gap(times: Sequence[float], window: Window) -> float | None:
    """A stream's longest wait between tokens, in seconds, that overlaps the window, if any."""
    first = max(bisect_right(times, window[0]) - 1, 0)
    last = min(bisect_left(times, window[1]), len(times) - 1)
    if last <= first:
        return None
    return max(times[i + 1] - times[i] for i in range(first, last))


def gaps_around(records: Sequence[StreamRecord], windows: Sequence[Window]) -> list[float]:
    """The longest gap of every stream in every window, in seconds."""
    found = (longest_gap(record.times, window) for window in windows for record in records)
    return [gap for gap in found if gap is not None]


def calm_windows(calm: Window, lengths: Sequence[float], seed: int, each: int = 8) -> list[Window]:
    """`each` windows of every length, cut to fit, at random places of the undisturbed time."""
    rng = random.Random(seed)
    windows = []
    for length in lengths:
        fitting = min(length, calm[1] - calm[0])
        for _ in range(each):
            start = rng.uniform(calm[0], calm[1] - fitting)
            windows.append((start, start + fitting))
    return windows


def statistics_of(gaps: Sequence[float]) -> GapStatistics:
    """Seconds → percentiles in milliseconds."""
    return GapStatistics(
        count=len(gaps),
        p50=1000 * percentile(gaps, 0.50),
        p99=1000 * percentile(gaps, 0.99),
        most=1000 * max(gaps, default=float("nan")),
    )
