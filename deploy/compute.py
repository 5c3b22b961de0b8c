"""Sequences that are computed and not continued: what the model makes of given tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router.step import SamplingParams, Want
from shards.client import ModelClient, TokenStream

Arrays = dict[str, NDArray[np.generic]]

_COMPUTE_ONLY = SamplingParams(max_tokens=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Computation:
    """One sequence's tokens and the arrays that are wanted of them."""

    tokens: tuple[int, ...]
    want: Want
    priority: int = 0


async def compute(client: ModelClient, computations: Sequence[Computation]) -> list[Arrays]:
    """Run all of them at once; leaving early, for whatever reason, aborts them.

    Raises SequenceRefused or GroupFailed.
    """
    streams: list[TokenStream] = []
    try:
        for each in computations:
            streams.append(
                client.generate(each.tokens, _COMPUTE_ONLY, priority=each.priority, want=each.want)
            )
        for stream in streams:
            async for _ in stream:
                pass
        return [stream.outputs for stream in streams]
    finally:
        for stream in streams:
            stream.abort()
