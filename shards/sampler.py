"""From logits to tokens, one row at a time, so that a row never feels its neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from router.step import NO_TOKEN, Sampled, SamplingParams
from shards.logits_processors import IdRanges, TokenHistory, process

_FIRST_CANDIDATES = 1024
_UINT64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRequest:
    """One row to sample: the next token after `history`."""

    seq_id: int
    history: TokenHistory
    sampling: SamplingParams

    @property
    def position(self) -> int:
        """Index, among the emitted tokens, of the one to come."""
        return len(self.history.emitted)


def sample(
    logits: Tensor, requests: Sequence[SampleRequest], unused_ids: IdRanges = ()
) -> list[Sampled]:
    """Choose one token per row of `logits` [n, V] (any float dtype), in the order of `requests`.

    Logits processors, temperature, then min_p, top_k and top_p as vLLM orders them; never one of
    `unused_ids`, the rows of a padded vocabulary, unless the caller allows it by name.
    Log-probabilities are those of the raw float32 logits. NO_TOKEN where a logit is not finite.
    """
    assert logits.dim() == 2, logits.shape
    assert len(logits) == len(requests), (logits.shape, len(requests))
    # Row by row: torch picks kernels and thread splits by shape, and a row's bits must not
    # depend on how many others came along.
    return [
        _sample_row(row, request, unused_ids)
        for row, request in zip(logits.to("cpu", torch.float32), requests, strict=True)
    ]


def uniform(seed: int, sample_idx: int, position: int) -> float:
    """The one random number of a token, in [0, 1): Philox4x64 keyed (seed, sample), counted by
    position, so that a resumed sequence draws what it would have drawn."""
    philox = np.random.Philox(
        key=np.array([seed & _UINT64, sample_idx & _UINT64], np.uint64),
        counter=np.array([position, 0, 0, 0], np.uint64),
    )
    return float(int(philox.random_raw()) >> 11) * 2.0**-53


def _sample_row(row: Tensor, request: SampleRequest, unused_ids: IdRanges) -> Sampled:
    sampling = request.sampling
    if not np.isfinite(row.numpy()).all():
        return Sampled(seq_id=request.seq_id, token_id=NO_TOKEN)
    allowed = process(row.numpy(), sampling, request.history, unused_ids)
    if sampling.temperature == 0:
        token_id = int(allowed.argmax())
    else:
        number = uniform(sampling.seed, sampling.sample_idx, request.position)
        token_id = _draw(allowed, sampling, number)
    if sampling.logprobs is None:
        return Sampled(seq_id=request.seq_id, token_id=token_id)
    logprobs = torch.log_softmax(row[None], dim=-1)[0].numpy()
    best = _descending(row.numpy(), min(sampling.logprobs, len(logprobs)))
    return Sampled(
        seq_id=request.seq_id,
        token_id=token_id,
        logprob=float(logprobs[token_id]),
        top_logprobs=tuple((int(i), float(logprobs[i])) for i in best),
    )


def _draw(logits: NDArray[np.float32], sampling: SamplingParams, number: float) -> int:
    """Inverse CDF at `number` over the tokens that the filters keep.

    The kept tokens are ordered by falling probability, equal ones by id; without top_k and top_p
    nothing needs sorting and they are ordered by id.
    """
    scaled = logits.astype(np.float64)
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the maximum to -inf
        weights = np.exp((scaled - scaled.max()) / sampling.temperature)
    weights[weights < sampling.min_p] = 0.0  # the maximum weighs 1: min_p is relative to it
    if 0 < sampling.top_k < len(weights):
        order = _descending(weights, sampling.top_k)
        kept = order[: _nucleus(weights[order], weights[order].sum(), sampling.top_p)]
    elif sampling.top_p < 1.0:
        kept = _top_p(weights, sampling.top_p)
    else:
        kept = np.arange(len(weights))
    cumulative = weights[kept].cumsum()
    chosen = int(cumulative.searchsorted(number * cumulative[-1], side="right"))
    return int(kept[min(chosen, len(kept) - 1)])


def _top_p(weights: NDArray[np.float64], top_p: float) -> NDArray[np.intp]:
    # A nucleus is nearly always small: sort a short head first, all of it only if that falls
    # short. The head of a sorted list is the same either way.
    total = weights.sum()
    order = _descending(weights, min(_FIRST_CANDIDATES, len(weights)))
    if weights[order].cumsum()[-1] < top_p * total:
        order = _descending(weights, len(weights))
    return order[: _nucleus(weights[order], total, top_p)]


def _nucleus(falling: NDArray[np.float64], total: np.float64, top_p: float) -> int:
    """How many of the `falling` weights it takes to reach `top_p` of `total`; at least one."""
    if top_p >= 1.0:
        return len(falling)
    return max(1, int(falling.cumsum().searchsorted(top_p * total, side="left")) + 1)


def _descending(values: NDArray[np.float32] | NDArray[np.float64], count: int) -> NDArray[np.intp]:
    """Ids of the `count` greatest values, greatest first, equal ones by rising id."""
    if count == 0:
        return np.empty(0, np.intp)
    candidates = np.arange(len(values))
    if count < len(values):
        least = np.partition(values, len(values) - count)[len(values) - count]
        candidates = np.flatnonzero(values >= least)
    order: NDArray[np.intp] = candidates[np.argsort(-values[candidates], kind="stable")]
    return order[:count]
