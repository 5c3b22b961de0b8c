"""Targets beside what was measured, with the arithmetic; pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

OVER_RIGHT = 1.3
"""Decode: over the best peer whose numbers are right."""
OF_CEILING = {1: 0.85}
OF_CEILING_ABOVE_ONE = 0.75
PREFILL_OVER_BEST = {"dbrx": 1.0, "phimoe": 1.0, "jamba": 3.0}
TINY_DECODE = {"transformers": 3.0, "vllm": 1.5}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One target, in tokens per second."""

    what: str
    target: float
    ours: float
    arithmetic: str

    @property
    def is_met(self) -> bool:
        """Whether we reached it."""
        return self.ours >= self.target

    def line(self) -> str:
        """As it is printed."""
        state = "met" if self.is_met else f"short: {self.ours / self.target:.2f} of it"
        rates = f"target {self.target:.1f}, ours {self.ours:.1f}"
        return f"{self.what}: {rates}: {state} ({self.arithmetic})"


def decode_verdict(
    what: str,
    batch: int,
    ours: float,
    right: Mapping[str, float],
    every: Mapping[str, float],
    ceiling: float,
) -> Verdict:
    """`right` and `every` are decode rates of the right peers and of all that run; `ceiling` is
    what reading each touched weight once per step allows."""
    share = OF_CEILING.get(batch, OF_CEILING_ABOVE_ONE)
    target, arithmetic = share * ceiling, f"{share:.2f} x ceiling {ceiling:.1f}"
    if right:
        best = max(right, key=lambda name: right[name])
        over = OVER_RIGHT * right[best]
        arithmetic = f"min of {OVER_RIGHT} x {best} {right[best]:.1f} and {arithmetic}"
        target = min(target, over)
    for name, rate in every.items():
        if rate > target:
            target, arithmetic = rate, f"{arithmetic}; not behind {name} {rate:.1f}"
    return Verdict(what=what, target=target, ours=ours, arithmetic=arithmetic)


def prefill_verdict(what: str, family: str, ours: float, every: Mapping[str, float]) -> Verdict:
    """Over the best peer that runs; `every` is not empty."""
    best = max(every, key=lambda name: every[name])
    over = PREFILL_OVER_BEST[family]
    arithmetic = f"{over} x {best} {every[best]:.1f}"
    return Verdict(what=what, target=over * every[best], ours=ours, arithmetic=arithmetic)


def tiny_verdicts(what: str, ours: float, every: Mapping[str, float]) -> list[Verdict]:
    """Decode of tiny models at batch 1, where steps cost more than weights."""
    return [
        Verdict(
            what=what,
            target=over * every[name],
            ours=ours,
            arithmetic=f"{over} x {name} {every[name]:.1f}",
        )
        for name, over in TINY_DECODE.items()
        if name in every
    ]
