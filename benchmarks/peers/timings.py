"""From the times of every token to the figures of a cell; pure functions."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

Times = Sequence[Sequence[float]]
"""By request, seconds from the start of the batch to each token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Rates in tokens per second over the batch, times in seconds.

    `prefill` counts until every request has its first token, `decode` and
    the times between tokens all that come after that.
    """

    prefill: float
    decode: float
    first_token_p50: float
    inter_token_p50: float
    inter_token_p99: float


def figures(times: Times, prompt: int) -> Figures:
    """Of one run in which all requests, of `prompt` tokens each, came at once."""
    all_started = max(request[0] for request in times)
    ended = max(request[-1] for request in times)
    later = sum(time > all_started for request in times for time in request)
    gaps = [
        gap for request in times for gap in _gaps([time for time in request if time >= all_started])
    ]
    return Figures(
        prefill=len(times) * prompt / all_started,
        decode=later / (ended - all_started) if later else 0.0,
        first_token_p50=statistics.median(request[0] for request in times),
        inter_token_p50=percentile(gaps, 50),
        inter_token_p99=percentile(gaps, 99),
    )


def medians(runs: Sequence[Figures]) -> Figures:
    """The median of each figure over the rounds."""
    names = Figures.__slots__
    return Figures(
        **{name: statistics.median(getattr(run, name) for run in runs) for name in names}
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """Nearest rank; 0 of no values."""
    if not values:
        return 0.0
    rank = max(0, -(-int(len(values) * percent) // 100) - 1)
    return sorted(values)[rank]


def _gaps(times: Sequence[float]) -> list[float]:
    return [later - earlier for earlier, later in pairwise(times)]
