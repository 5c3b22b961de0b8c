"""Whether an engine computes these models at all: its log probabilities beside the reference's.

Every engine runs a tiny checkpoint in float32, where rounding hides nothing, and says how likely
each token of its own greedy answers is. The reference is one full forward of Transformers in
float32 (with remedies) over the same tokens.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

RIGHT = 0.005
"""Largest difference of a right engine: kernels' rounding."""
NEARLY = 0.01
"""Largest median difference where single tokens differ more: near ties of the gate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rightness:
    """`state` is right, nearly, wrong, fails or absent; `words` is what the table says."""

    state: str
    words: str


def judge(own: Sequence[Sequence[float]], reference: Sequence[Sequence[float]]) -> Rightness:
    """Of log probabilities by prompt and position."""
    pairs = [
        pair
        for row, expected in zip(own, reference, strict=True)
        for pair in zip(row, expected, strict=True)
    ]
    differences = [abs(one - other) for one, other in pairs]
    largest, middle = max(differences), statistics.median(differences)
    if any(map(math.isnan, differences)):
        return Rightness(state="wrong", words="wrong (not a number)")
    if largest <= RIGHT:
        return Rightness(state="right", words=f"right (max logprob difference {largest:.1e})")
    state = "nearly" if middle <= NEARLY else "wrong"
    words = "nearly right" if state == "nearly" else "wrong"
    measured = f"logprob difference: median {middle:.1e}, max {largest:.2f}"
    return Rightness(state=state, words=f"{words} ({measured})")
