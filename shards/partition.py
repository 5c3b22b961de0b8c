"""Which stage owns which layers: as the user says, or so that the heaviest stage is lightest."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate, pairwise

LayerRanges = tuple[tuple[int, int], ...]
"""Half-open ranges of layers, one per stage."""


def parse_stage_layers(text: str) -> LayerRanges:
    """`0-8,9-17,18` → half-open ranges (0, 9), (9, 18), (18, 19), one per stage. Raises ValueError.

    Both ends are included; a single layer may stand for itself.
    """
    ranges = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part, re.ASCII)
        if match is None:
            raise ValueError("allowed values are ranges of layers such as 0-8,9-17,18-31")
        ranges.append((int(match[1]), int(match[2] or match[1]) + 1))
    starts = [0, *(end for _, end in ranges)]
    for (first, end), start in zip(ranges, starts, strict=False):
        if first != start or end <= first:
            raise ValueError(
                "allowed values are ranges that begin with layer 0 and follow one another; "
                f"{first}-{end - 1} does not begin with {start}"
                if first != start
                else f"allowed values are ranges that are not empty; {first}-{end - 1} is"
            )
    return tuple(ranges)


def layer_ranges_text(ranges: LayerRanges) -> str:
    """As `parse_stage_layers` reads them."""
    return ",".join(f"{first}-{end - 1}" for first, end in ranges)


def partition_layers(costs: Sequence[int], num_stages: int) -> LayerRanges:
    """Half-open layer ranges of `num_stages` stages, none empty, with the least maximum cost.

    `costs[i]` is layer i's cost in any unit. Exact dynamic program over the linear partition
    problem; ties go to the split whose cuts come first. Raises ValueError.
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
