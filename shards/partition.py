"""Which stage owns which layers: a pure split that makes the heaviest stage as light as can be."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise


def partition_layers(costs: Sequence[int], num_stages: int) -> tuple[tuple[int, int], ...]:
    """Half-open layer ranges of `num_stages` stages, none empty, with the least maximum cost.

    `costs[i]` is layer i's cost in any unit (parameter bytes). Exact dynamic program over the
    linear partition problem; ties go to the split whose cuts come first. Raises ValueError.
    """
    num_layers = len(costs)
    if not 1 <= num_stages <= num_layers:
        raise ValueError(f"stages={num_stages}: allowed 1..{num_layers} for {num_layers} layers")
    before = (0, *accumulate(costs))
    # least[end] is the best maximum for layers 0..end-1 split over the stages seen so far.
    least = list(before)
    cuts: list[list[int]] = []
    for stage in range(1, num_stages):
        last_cut = [0] * (num_layers + 1)
        least_so_far = least.copy()
        for end in range(stage + 1, num_layers + 1):
            least[end], last_cut[end] = min(
                (max(least_so_far[cut], before[end] - before[cut]), cut)
                for cut in range(stage, end)
            )
        cuts.append(last_cut)
    bounds = [num_layers]
    for last_cut in reversed(cuts):
        bounds.append(last_cut[bounds[-1]])
    return tuple(pairwise((0, *reversed(bounds))))
