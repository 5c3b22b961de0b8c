"""One random token per row: min_p, top_k and top_p on float64 weights, then inverse CDF.

A weight is exp((logit - greatest) / temperature). Sums are running sums, or sums over blocks of
one fixed length: both are the same bits whatever stands beside a row or behind its end.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router.step import SamplingParams

Ids = NDArray[np.intp]
Float64 = NDArray[np.float64]

_UINT64 = (1 << 64) - 1
_BLOCK = 512
_FIRST_CANDIDATES = 1024
_AT_ONCE = 1 << 15
"""Weights that are worked on at once: 256 KiB, so that they stay in a core's own cache."""


def uniform(seed: int, sample_idx: int, position: int) -> float:
    """The one random number of a token, in [0, 1): Philox4x64 keyed (seed, sample), counted by
    position, so that a resumed sequence draws what it would have drawn."""
    philox = np.random.Philox(
        key=np.array([seed & _UINT64, sample_idx & _UINT64], np.uint64),
        counter=np.array([position, 0, 0, 0], np.uint64),
    )
    return float(int(philox.random_raw()) >> 11) * 2.0**-53


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of one kind. `logits` is [g, V] float32, the others are columns [g, 1]."""

    logits: NDArray[np.float32]
    greatest: NDArray[np.float32]
    inverse_temperature: Float64
    min_p: Float64
    top_k: Ids
    top_p: Float64
    number: Float64

    def weigh(self, logits: NDArray[np.float32]) -> Float64:
        """Weights of `logits` [g, k], zero below min_p; the greatest logit weighs 1."""
        # In C order: exp gives other bits where memory runs backwards.
        weights = np.subtract(logits, self.greatest, dtype=np.float64, order="C")
        with np.errstate(over="ignore"):  # a tiny temperature sends the others to -inf
            weights *= self.inverse_temperature
        np.exp(weights, out=weights)
        if self.min_p.any():
            weights[weights < self.min_p] = 0.0
        return weights


def draw(
    rows: Sequence[NDArray[np.float32]],
    greatest: NDArray[np.float32],
    samplings: Sequence[SamplingParams],
    numbers: Sequence[float],
) -> Ids:
    """Token ids [m], one per row [V]: inverse CDF at its number over the tokens that are kept.

    The kept tokens are ordered by falling logit, equal ones by id; without top_k and top_p
    nothing needs sorting and they are ordered by id. `greatest` [m] are the rows' maxima.
    """
    token_ids = np.empty(len(rows), np.intp)
    size = len(rows[0])
    kinds: dict[Callable[[_Rows], Ids], list[int]] = {}
    for i, sampling in enumerate(samplings):
        kinds.setdefault(_kind(sampling, size), []).append(i)
    at_once = max(1, _AT_ONCE // size)
    for kind, members in kinds.items():
        for start in range(0, len(members), at_once):
            group = members[start : start + at_once]
            stacked = np.stack([rows[i] for i in group]) if len(group) > 1 else rows[group[0]][None]
            token_ids[group] = kind(
                _columns(
                    stacked,
                    greatest[group],
                    [samplings[i] for i in group],
                    [numbers[i] for i in group],
                )
            )
    return token_ids


def _kind(sampling: SamplingParams, size: int) -> Callable[[_Rows], Ids]:
    if 0 < sampling.top_k < size:
        return _draw_top_k
    return _draw_top_p if sampling.top_p < 1.0 else _draw_by_id


def _columns(
    logits: NDArray[np.float32],
    greatest: NDArray[np.float32],
    samplings: Sequence[SamplingParams],
    numbers: Sequence[float],
) -> _Rows:
    def column(values: list[float]) -> Float64:
        return np.array(values, np.float64)[:, None]

    with np.errstate(over="ignore"):
        inverse = 1.0 / column([sampling.temperature for sampling in samplings])
    return _Rows(
        logits,
        greatest[:, None],
        np.minimum(inverse, sys.float_info.max),  # 0 times infinity would be NaN
        column([sampling.min_p for sampling in samplings]),
        np.array([sampling.top_k for sampling in samplings])[:, None],
        column([sampling.top_p for sampling in samplings]),
        column(list(numbers)),
    )


def _draw_by_id(rows: _Rows) -> Ids:
    """Over all tokens in the order of their ids: first the block, then the token in it."""
    reached = _mass_by_block(rows)
    target = rows.number * reached[:, -1:]
    block = _count(reached <= target)
    before = np.where(block > 0, reached[np.arange(len(block)), block - 1], 0.0)[:, None]
    ids = block[:, None] * _BLOCK + np.arange(_BLOCK)
    size = rows.logits.shape[1]
    weights = rows.weigh(np.take_along_axis(rows.logits, np.minimum(ids, size - 1), axis=1))
    weights[ids >= size] = 0.0
    inside = weights.cumsum(axis=1)
    # The block's running sum may end a rounding below its mass; its last token with a weight
    # is as far as a draw can get.
    target = np.minimum(target - before, np.nextafter(inside[:, -1:], 0.0))
    return block * _BLOCK + _count(inside <= target)


def _draw_top_k(rows: _Rows) -> Ids:
    count = int(rows.top_k.max())
    head, weights = _head(rows, count)
    weights[np.arange(count) >= rows.top_k] = 0.0
    reached = weights.cumsum(axis=1)
    return _draw_nucleus(rows, head, reached, rows.top_p * reached[:, -1:])


def _draw_top_p(rows: _Rows) -> Ids:
    enough = rows.top_p * _mass_by_block(rows)[:, -1:]
    size = rows.logits.shape[1]
    count = min(_FIRST_CANDIDATES, size)
    while True:
        # A nucleus is nearly always small. A longer head begins with the same running sums.
        head, weights = _head(rows, count)
        reached = weights.cumsum(axis=1)
        if count == size or (reached[:, -1:] >= enough).all():
            return _draw_nucleus(rows, head, reached, enough)
        count = min(8 * count, size)


def _draw_nucleus(rows: _Rows, head: NDArray[np.float32], reached: Float64, enough: Float64) -> Ids:
    """Over the shortest beginning of the falling `head` whose running sum is `enough`."""
    every = np.arange(len(head))
    last = np.minimum(_count(reached < enough), head.shape[1] - 1)
    # Numbers end at 1 - 2**-53, so the target stays below the last running sum that is kept.
    rank = _count(reached <= rows.number * reached[every, last][:, None])
    logit = head[every, rank]
    equals_before = rank - _count(head > logit[:, None])
    found = [
        np.flatnonzero(row == value)[nth]
        for row, value, nth in zip(rows.logits, logit, equals_before, strict=True)
    ]
    return np.array(found, np.intp)


def _head(rows: _Rows, count: int) -> tuple[NDArray[np.float32], Float64]:
    """The `count` greatest logits [g, count], falling, and their weights."""
    at = rows.logits.shape[1] - count
    rising = np.sort(np.partition(rows.logits, at, axis=1)[:, at:], axis=1)
    head = rising[:, ::-1]
    return head, rows.weigh(head)


def _mass_by_block(rows: _Rows) -> Float64:
    """Running sums [g, num_blocks] of the weights of 512 ids each; the last is the whole mass."""
    sums = []
    for start in range(0, rows.logits.shape[1], _AT_ONCE):
        weights = rows.weigh(rows.logits[:, start : start + _AT_ONCE])
        sums.append(np.add.reduceat(weights, np.arange(0, weights.shape[1], _BLOCK), axis=1))
    reached: Float64 = np.concatenate(sums, axis=1).cumsum(axis=1)
    return reached


def _count(flags: NDArray[np.bool_]) -> Ids:
    """How many are true in each row."""
    counts: Ids = flags.sum(axis=1)
    return counts
