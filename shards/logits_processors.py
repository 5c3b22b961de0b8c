"""What callers want changed in the logits before a token is drawn, in vLLM's order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from router.step import SamplingParams

IdRanges = tuple[tuple[int, int], ...]
"""Half-open ranges of token ids."""

Rows = NDArray[np.float32]
"""[n, V]."""

Masks = Mapping[int, NDArray[np.bool_]]
"""By row: [V], true for what its grammar lets through."""


class TokenHistory:
    """A sequence's tokens as penalties see them: which there are, how often each was sampled."""

    def __init__(self, prompt: Sequence[int], emitted: Sequence[int]) -> None:
        self.prompt = prompt
        self.emitted = list(emitted)
        # Kept up to date from the first use on, for a long history is too much for every step.
        self._slots: dict[int, int] | None = None
        self._ids: NDArray[np.int64]
        self._times: NDArray[np.float32]

    @property
    def last(self) -> int | None:
        """The token sampled last."""
        return self.emitted[-1] if self.emitted else None

    def append(self, token_id: int) -> None:
        """One more token was sampled."""
        self.emitted.append(token_id)
        if self._slots is not None:
            self._count(self._slots, token_id)

    @property
    def seen(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The distinct tokens of prompt and answer, and how often each was sampled."""
        if self._slots is None:
            self._slots = {token_id: i for i, token_id in enumerate(dict.fromkeys(self.prompt))}
            self._ids = np.array([*self._slots, 0], np.int64)
            self._times = np.zeros(len(self._ids), np.float32)
            for token_id in self.emitted:
                self._count(self._slots, token_id)
        return self._ids[: len(self._slots)], self._times[: len(self._slots)]

    def _count(self, slots: dict[int, int], token_id: int) -> None:
        slot = slots.setdefault(token_id, len(slots))
        if slot == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._times = np.concatenate([self._times, np.zeros_like(self._times)])
        self._ids[slot] = token_id
        self._times[slot] += 1


_MOST = np.finfo(np.float32).max


def process(
    logits: Rows,
    samplings: Sequence[SamplingParams],
    histories: Sequence[TokenHistory],
    unused_ids: IdRanges = (),
    masks: Masks = MappingProxyType({}),
) -> tuple[list[int], Rows]:
    """The rows of `logits` that are to be changed, by index, and what to draw from there [k, V].

    What may not be drawn becomes -inf. Bans on words and early ends give way where they would
    leave nothing; grammars and allowed tokens do not. `logits` stay as they are.
    """
    asked = [
        (i, sampling, history)
        for i, (sampling, history) in enumerate(zip(samplings, histories, strict=True))
        if unused_ids or i in masks or asks(sampling, history)
    ]
    changed = [i for i, _, _ in asked]
    rows = logits[changed]
    if changed:
        own, past = [sampling for _, sampling, _ in asked], [history for _, _, history in asked]
        _mask(rows, own, unused_ids)
        for row, i in zip(rows, changed, strict=True):
            if i in masks:
                row[~masks[i]] = -np.inf
        _ban(rows, own, past)
        _bias(rows, own)
        _penalise(rows, own, past)
    return changed, rows


def asks(sampling: SamplingParams, history: TokenHistory) -> bool:
    """Whether a row of this sequence is to be changed before a token is chosen."""
    num_emitted = len(history.emitted)
    return bool(
        sampling.allowed_token_ids
        or sampling.bad_words
        or sampling.logit_bias
        or (sampling.stop_token_ids and num_emitted < sampling.min_tokens)
        or _penalises(sampling, history)
    )


def _mask(rows: Rows, samplings: Iterable[SamplingParams], unused_ids: IdRanges) -> None:
    for row, sampling in zip(rows, samplings, strict=True):
        if sampling.allowed_token_ids:
            allowed = list(sampling.allowed_token_ids)
            kept = row[allowed]
            row[:] = -np.inf
            row[allowed] = kept
        else:
            for start, stop in unused_ids:
                row[start:stop] = -np.inf


def _ban(
    rows: Rows, samplings: Sequence[SamplingParams], histories: Sequence[TokenHistory]
) -> None:
    """Tokens that would end a sequence too early, or complete a bad word."""
    at, token_ids = _pairs(
        [
            [t for t in _banned(sampling, history) if 0 <= t < rows.shape[1]]
            for sampling, history in zip(samplings, histories, strict=True)
        ]
    )
    before = rows[at, token_ids]
    rows[at, token_ids] = -np.inf
    with_bans = np.unique(at)
    empty = with_bans[[rows[i].max() == -np.inf for i in with_bans]]
    restored = np.isin(at, empty)
    rows[at[restored], token_ids[restored]] = before[restored]


def _banned(sampling: SamplingParams, history: TokenHistory) -> list[int]:
    emitted = history.emitted
    banned = list(sampling.stop_token_ids) if len(emitted) < sampling.min_tokens else []
    for *before, last in sampling.bad_words:
        if not before or emitted[-len(before) :] == before:
            banned.append(last)
    return banned


def _bias(rows: Rows, samplings: Iterable[SamplingParams]) -> None:
    biases = [sampling.logit_bias for sampling in samplings]
    at, token_ids = _pairs([[token_id for token_id, _ in bias] for bias in biases])
    values = np.array([value for bias in biases for _, value in bias], np.float32)
    before = rows[at, token_ids]
    with np.errstate(over="ignore"):
        np.add.at(rows, (at, token_ids), values)  # one by one: an id may come twice
    rows[at, token_ids] = _finite(rows[at, token_ids], before)


def _penalise(
    rows: Rows, samplings: Sequence[SamplingParams], histories: Sequence[TokenHistory]
) -> None:
    """Repetition penalty (Keskar et al. 2019) on prompt and answer, the others on the answer."""
    own = [i for i, s in enumerate(samplings) if _penalises(s, histories[i])]
    if not own:
        return
    seen = [histories[i].seen for i in own]
    lengths = [len(ids) for ids, _ in seen]

    def each(values: Iterable[float]) -> NDArray[np.float32]:
        within = np.clip(np.array(list(values)), -_MOST, _MOST).astype(np.float32)
        return np.repeat(within, lengths)

    # Rows and ids apart, not one flat index: an id outside the vocabulary must not hit a neighbour.
    at = np.repeat(own, lengths), np.concatenate([ids for ids, _ in seen])
    times = np.concatenate([times for _, times in seen])
    repetition = each(samplings[i].repetition_penalty for i in own)
    before = rows[at]
    with np.errstate(over="ignore"):
        values = np.where(before > 0, before / repetition, before * repetition)
    values -= each(samplings[i].frequency_penalty for i in own) * times
    values -= each(samplings[i].presence_penalty for i in own) * (times > 0)
    rows[at] = _finite(values, before)


def _finite(values: NDArray[np.float32], before: NDArray[np.float32]) -> NDArray[np.float32]:
    """`values` within float32's range; what may not be drawn stays -inf."""
    return np.where(before == -np.inf, before, np.clip(values, -_MOST, _MOST))


def _penalises(sampling: SamplingParams, history: TokenHistory) -> bool:
    if sampling.repetition_penalty != 1.0:
        return True
    return bool(sampling.frequency_penalty or sampling.presence_penalty) and bool(history.emitted)


def _pairs(token_ids: Sequence[Sequence[int]]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Row numbers and token ids, one of each for every id of every row."""
    rows = np.repeat(np.arange(len(token_ids)), [len(ids) for ids in token_ids])
    return rows, np.array([t for ids in token_ids for t in ids], np.intp)
