"""What callers want changed in the logits before a token is drawn, in vLLM's order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from router.step import SamplingParams

IdRanges = tuple[tuple[int, int], ...]
"""Half-open ranges of token ids."""

Row = NDArray[np.float32]


class TokenHistory:
    """A sequence's tokens as penalties see them: which are in the prompt, how often each came."""

    def __init__(self, prompt: Sequence[int], emitted: Sequence[int]) -> None:
        self.prompt = prompt
        self.emitted = list(emitted)
        self._in_prompt: NDArray[np.int64] | None = None
        self._counts: Counter[int] | None = None

    @property
    def last(self) -> int | None:
        """The token sampled last."""
        return self.emitted[-1] if self.emitted else None

    def append(self, token_id: int) -> None:
        """One more token was sampled."""
        self.emitted.append(token_id)
        if self._counts is not None:
            self._counts[token_id] += 1

    @property
    def counts(self) -> Counter[int]:
        """How often each token was sampled."""
        if self._counts is None:
            self._counts = Counter(self.emitted)
        return self._counts

    @property
    def in_prompt(self) -> NDArray[np.int64]:
        """The prompt's distinct tokens."""
        if self._in_prompt is None:
            self._in_prompt = np.unique(np.array(self.prompt, dtype=np.int64))
        return self._in_prompt


def process(
    logits: Row, sampling: SamplingParams, history: TokenHistory, unused_ids: IdRanges = ()
) -> Row:
    """Logits [V] to draw from; `logits` itself, untouched, where nothing is to be changed.

    What may not be drawn becomes -inf. Bans on words and early ends give way where they would
    leave nothing.
    """
    row = _masked(logits, sampling, unused_ids)
    banned = _banned(sampling, history, len(row))
    if banned:
        without = row.copy()
        without[banned] = -np.inf
        if without.max() > -np.inf:
            row = without
    if sampling.logit_bias:
        row = _own(row, logits)
        for token_id, bias in sampling.logit_bias:
            row[token_id] += np.float32(bias)
    return _penalised(row, logits, sampling, history)


def _masked(logits: Row, sampling: SamplingParams, unused_ids: IdRanges) -> Row:
    if sampling.allowed_token_ids:
        row = np.full_like(logits, -np.inf)
        allowed = list(sampling.allowed_token_ids)
        row[allowed] = logits[allowed]
        return row
    if not unused_ids:
        return logits
    row = logits.copy()
    for start, stop in unused_ids:
        row[start:stop] = -np.inf
    return row


def _banned(sampling: SamplingParams, history: TokenHistory, vocab_size: int) -> list[int]:
    """Tokens that would end the sequence too early, or complete a bad word."""
    emitted = history.emitted
    banned = list(sampling.stop_token_ids) if len(emitted) < sampling.min_tokens else []
    for *before, last in sampling.bad_words:
        if not before or emitted[-len(before) :] == before:
            banned.append(last)
    return [token_id for token_id in banned if 0 <= token_id < vocab_size]


def _penalised(row: Row, logits: Row, sampling: SamplingParams, history: TokenHistory) -> Row:
    """Repetition penalty (Keskar et al. 2019) on prompt and answer, the others on the answer."""
    repetition = np.float32(sampling.repetition_penalty)
    if repetition != 1.0:
        row = _own(row, logits)
        seen = np.union1d(history.in_prompt, np.fromiter(history.counts, np.int64))
        values = row[seen]
        row[seen] = np.where(values > 0, values / repetition, values * repetition)
    if (sampling.frequency_penalty or sampling.presence_penalty) and history.counts:
        row = _own(row, logits)
        ids = np.fromiter(history.counts, np.int64)
        times = np.fromiter(history.counts.values(), np.float32)
        row[ids] -= np.float32(sampling.frequency_penalty) * times
        row[ids] -= np.float32(sampling.presence_penalty)
    return row


def _own(row: Row, logits: Row) -> Row:
    """A row that may be written to."""
    return row.copy() if row is logits else row
