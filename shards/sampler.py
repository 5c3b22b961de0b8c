"""From logits to tokens: every row of a step at once, and none of them feels its neighbours.

Whatever is added up here is added in an order that depends on the row alone; the rest are exact
operations (greatest, least, compare, count) and operations on single elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.kernels.greedy import greatest_or_none
from models.kernels.native import native_kernels
from router.step import NO_TOKEN, Sampled, SamplingParams
from shards.draw import draw, uniform
from shards.grammar import Constraint
from shards.logits_processors import IdRanges, Masks, TokenHistory, asks, process

_NUM_LANE_TOKENS = 32
_NOTHING_LEFT = -3

Logprobs = tuple[float | None, tuple[tuple[int, float], ...]]
"""That of the chosen token, and (id, log-probability) of the best ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRequest:
    """One row to sample: the next token after `history`."""

    seq_id: int
    history: TokenHistory
    sampling: SamplingParams
    constraint: Constraint | None = None

    @property
    def position(self) -> int:
        """Index, among the emitted tokens, of the one to come."""
        return len(self.history.emitted)

    @property
    def number(self) -> float:
        """The random number of the token to come."""
        return uniform(self.sampling.seed, self.sampling.sample_idx, self.position)

    def give_up(self) -> Sampled:
        """The end of a sequence whose grammar leaves nothing to draw."""
        assert self.constraint is not None, "nothing else leaves nothing"
        return self.constraint.give_up(self.seq_id)


def sample(
    logits: Tensor, requests: Sequence[SampleRequest], unused_ids: IdRanges = ()
) -> list[Sampled]:
    """Choose one token per row of `logits` [n, V] (any float dtype), in the order of `requests`.

    Logits processors, temperature, then min_p, top_k and top_p as vLLM orders them; never one of
    `unused_ids`, the rows of a padded vocabulary, unless the caller allows it by name.
    Log-probabilities are those of the raw float32 logits. NO_TOKEN where a logit is not finite, or
    where a grammar leaves nothing.
    """
    assert logits.dim() == 2, logits.shape
    assert len(logits) == len(requests), (logits.shape, len(requests))
    plain = _plain_rows(logits, requests, unused_ids)
    others = [i for i in range(len(requests)) if i not in plain]
    if others:
        rows = logits[others] if plain else logits
        chosen = _sample(rows, [requests[i] for i in others], unused_ids)
        plain.update(zip(others, chosen, strict=True))
    return [plain[i] for i in range(len(requests))]


def _plain_rows(
    logits: Tensor, requests: Sequence[SampleRequest], unused_ids: IdRanges
) -> dict[int, Sampled]:
    """By row: the choice where the greatest logit is all that is asked for, if C can find it."""
    kernels = native_kernels("greedy", logits.dtype, logits.device)
    plain = [i for i, request in enumerate(requests) if _is_plain(request)]
    if kernels is None or unused_ids or not plain:
        return {}
    found = greatest_or_none(kernels.name, logits)
    token_ids = [NO_TOKEN if token_id is None else token_id for token_id in found]
    return {i: Sampled(seq_id=requests[i].seq_id, token_id=token_ids[i]) for i in plain}


def _sample(
    logits: Tensor, requests: Sequence[SampleRequest], unused_ids: IdRanges
) -> list[Sampled]:
    raw = logits.to("cpu", torch.float32).contiguous()
    token_ids = _choose(raw.numpy(), requests, unused_ids)
    logprobs = _logprobs(raw, requests, token_ids)
    return [
        request.give_up()
        if token_id == _NOTHING_LEFT
        else Sampled(seq_id=request.seq_id, token_id=token_id, logprob=own, top_logprobs=best)
        for request, token_id, (own, best) in zip(
            requests, token_ids.tolist(), logprobs, strict=True
        )
    ]


def _is_plain(request: SampleRequest) -> bool:
    """Whether the greatest logit is all that is asked for."""
    sampling = request.sampling
    return (
        sampling.temperature == 0
        and sampling.logprobs is None
        and request.constraint is None
        and not asks(sampling, request.history)
    )


def _choose(
    raw: NDArray[np.float32], requests: Sequence[SampleRequest], unused_ids: IdRanges
) -> NDArray[np.intp]:
    """Token ids [n]: of the greatest allowed logit (the lowest of equals), or drawn.

    NO_TOKEN where a logit is not finite, else _NOTHING_LEFT where a grammar leaves nothing.
    """
    token_ids: NDArray[np.intp] = raw.argmax(axis=1)
    greatest = _at(raw, token_ids)
    # argmax finds NaN and inf, min finds NaN and -inf.
    finite = np.isfinite(greatest) & np.isfinite(raw.min(axis=1))
    samplings = [request.sampling for request in requests]
    histories = [request.history for request in requests]
    changed, rows = process(raw, samplings, histories, unused_ids, _masks(requests, raw.shape[1]))
    token_ids[changed] = rows.argmax(axis=1)
    greatest[changed] = _at(rows, token_ids[changed])
    left = greatest > -np.inf
    drawn = [i for i, s in enumerate(samplings) if s.temperature > 0 and finite[i] and left[i]]
    if drawn:
        allowed = dict(zip(changed, rows, strict=True))
        token_ids[drawn] = draw(
            [allowed.get(i, raw[i]) for i in drawn],
            greatest[drawn],
            [samplings[i] for i in drawn],
            [requests[i].number for i in drawn],
        )
    token_ids[~left] = _NOTHING_LEFT
    token_ids[~finite] = NO_TOKEN
    return token_ids


def _masks(requests: Sequence[SampleRequest], size: int) -> Masks:
    return {
        i: request.constraint.mask(size)
        for i, request in enumerate(requests)
        if request.constraint is not None
    }


def _logprobs(
    raw: Tensor, requests: Sequence[SampleRequest], token_ids: NDArray[np.intp]
) -> list[Logprobs]:
    """One per row, empty where there is no token or nobody asked."""
    found: list[Logprobs] = [(None, ())] * len(requests)
    counts = {
        i: request.sampling.logprobs
        for i, request in enumerate(requests)
        if request.sampling.logprobs is not None and token_ids[i] >= 0
    }
    if not counts:
        return found
    asked = list(counts)
    rows = raw if len(asked) == len(raw) else raw[asked]
    logprobs = torch.log_softmax(rows, dim=-1).numpy()
    chosen = _at(logprobs, token_ids[asked]).tolist()
    ids = greatest_ids(rows.numpy(), max(counts.values()))
    values = np.take_along_axis(logprobs, ids, axis=1)
    for (i, count), own, *best in zip(
        counts.items(), chosen, ids.tolist(), values.tolist(), strict=True
    ):
        found[i] = own, tuple(zip(*best, strict=True))[:count]
    return found


def greatest_ids(rows: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    """Ids [n, min(count, V)] of the greatest values of rows [n, V], equal ones by rising id."""
    num_rows, size = rows.shape
    count = min(count, size)
    if count == 0:
        return np.empty((num_rows, 0), np.intp)
    bound = _bound(rows, count)
    row, token_id = np.divmod(np.flatnonzero(rows >= bound[:, None]), size)
    order = np.lexsort((-rows[row, token_id], row))  # stable: equal values stay in order of id
    first = np.searchsorted(row, np.arange(num_rows))
    ids: NDArray[np.intp] = token_id[order[first[:, None] + np.arange(count)]]
    return ids


def _bound(rows: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """Per row a value that at least `count` of its values reach, and few more.

    Lanes of 32 tokens are compared by their greatest: one cheap pass instead of a partition of
    the whole row.
    """
    num_rows, size = rows.shape
    width = size // _NUM_LANE_TOKENS
    if width >= 4 * count:
        lanes = rows[:, : width * _NUM_LANE_TOKENS].reshape(num_rows, _NUM_LANE_TOKENS, width)
        rows = lanes.max(axis=1)
    at = rows.shape[1] - count
    bound: NDArray[np.float32] = np.partition(rows, at, axis=1)[:, at]
    return bound


def _at(rows: NDArray[np.float32], token_ids: NDArray[np.intp]) -> NDArray[np.float32]:
    """The value of one token per row."""
    values: NDArray[np.float32] = rows[np.arange(len(rows)), token_ids]
    return values
