"""One row at a time, in plain Python: what the sampler is to choose."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from router.step import SamplingParams
from shards.logits_processors import IdRanges

Row = NDArray[np.float32]


def processed(
    row: Row,
    sampling: SamplingParams,
    prompt: Sequence[int],
    emitted: Sequence[int],
    unused: IdRanges = (),
) -> Row:
    """What to draw from: masks, bans, bias, repetition, frequency, presence; token by token."""
    out = [float("-inf")] * len(row)
    hidden = {i for start, stop in unused for i in range(start, stop)}
    for i, logit in enumerate(row.tolist()):
        if i in sampling.allowed_token_ids if sampling.allowed_token_ids else i not in hidden:
            out[i] = logit
    banned = set(sampling.stop_token_ids) if len(emitted) < sampling.min_tokens else set()
    for word in sampling.bad_words:
        if [*emitted, word[-1]][-len(word) :] == list(word):
            banned.add(word[-1])
    if any(x > -math.inf for i, x in enumerate(out) if i not in banned):
        out = [-math.inf if i in banned else x for i, x in enumerate(out)]
    logits = np.array(out, np.float32)
    for i, bias in sampling.logit_bias:
        logits[i] += np.float32(bias)
    repetition = np.float32(sampling.repetition_penalty)
    for i in {*prompt, *emitted}:
        logits[i] = logits[i] / repetition if logits[i] > 0 else logits[i] * repetition
    for i, count in Counter(emitted).items():
        logits[i] -= np.float32(sampling.frequency_penalty) * np.float32(count)
        logits[i] -= np.float32(sampling.presence_penalty)
    return logits


def distribution(logits: Sequence[float], sampling: SamplingParams) -> dict[int, float]:
    """Weights of the tokens that min_p, top_k and top_p keep, in the order of the inverse CDF."""
    greatest = max(logits)
    weights = {}
    for i, logit in enumerate(logits):
        weight = math.exp((logit - greatest) / sampling.temperature)
        weights[i] = weight if weight >= sampling.min_p else 0.0
    if sampling.top_k in range(1, len(logits)) or sampling.top_p < 1.0:
        falling = sorted(weights, key=lambda i: (-logits[i], i))
        weights = {i: weights[i] for i in falling[: sampling.top_k or None]}
    if sampling.top_p < 1.0:
        enough = sampling.top_p * math.fsum(weights.values())
        reached = list(accumulate(weights.values()))
        length = 1 + sum(r < enough for r in reached)
        weights = dict(list(weights.items())[:length])
    return weights


def choices(logits: Row, sampling: SamplingParams, number: float) -> set[int]:
    """What may be drawn at `number`: more than one token where a rounding decides."""
    values = logits.tolist()
    if sampling.temperature == 0:
        return {values.index(max(values))}
    found = set()
    for factor in (1 - 1e-12, 1 + 1e-12) if sampling.top_p < 1.0 else (1.0,):
        kept = distribution(values, replace(sampling, top_p=sampling.top_p * factor))
        edges = np.array(list(accumulate(kept.values())))
        for near in (number - 1e-12, number, number + 1e-12):
            at = np.searchsorted(edges, max(near, 0.0) * edges[-1], side="right")
            found.add(list(kept)[min(int(at), len(kept) - 1)])
    return found
