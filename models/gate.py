"""What a layer's gate is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """How a MoE layer chooses `top_k` experts by the scores x·weightᵀ, `weight` [E, D].

    SparseMixer where there is a `band`, twice its jitter; else softmax, and the chosen weights
    divided by their p-norm where there is one.
    """

    weight: Tensor
    top_k: int
    p_norm: float | None = None
    band: float | None = None
