"""What a configuration says about LongRoPE (Ding et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LongRope:
    """LongRoPE: per-frequency divisors and a multiplier of cos and sin, for two regimes.

    A sequence of more than `original_max_position_embeddings` tokens is in the long regime.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    short_mscale: float
    long_mscale: float
    original_max_position_embeddings: int
