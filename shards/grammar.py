"""Answers that keep to a grammar: which tokens may come next, by llguidance.

A grammar's state follows from the emitted tokens alone, so it is never sent: whoever resumes a
sequence reads what it has emitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from router.step import NO_TOKEN, Sampled
from shards.vocabulary import Vocabulary

Mask = NDArray[np.bool_]
"""[V], true for what may be drawn."""

_SILENT = 0
_NUM_KEPT = 32
_MOST_KEPT_CHARS = 1 << 20
_MOST_ITEMS = 1100
"""Ways in which what was written so far can be read; a mask's time grows with their square. A
choice of 1,000 has so many, any other honest grammar a few dozen."""
_NO_TOKENIZER = "grammar: this model has no tokenizer, so nobody knows what its tokens spell"


class _TokenTable:
    """What llguidance reads of a tokenizer. It never encodes: grammars switch forcing off."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        tokens = vocabulary.tokens()
        special_ids = list(vocabulary.special_ids)
        eos_ids = list(vocabulary.eos_ids)
        if not eos_ids:
            # llguidance wants one; this one lies behind the logits, where nothing is drawn.
            special_ids.append(len(tokens))
            eos_ids.append(len(tokens))
            tokens.append(b"<eos>")
        self.tokens = tokens
        self.special_token_ids = special_ids
        self.eos_token_id = eos_ids[0]
        self.eos_token_ids = eos_ids

    def __call__(self, text: bytes | str) -> list[int]:
        raise AssertionError("a grammar without no_forcing")


class Constraint:
    """One sequence's place in its grammar. With an `error` nothing may come next."""

    def __init__(self, matcher: LLMatcher | None, emitted: Sequence[int] = ()) -> None:
        self._matcher = matcher
        if matcher is not None and emitted:
            matcher.consume_tokens(list(emitted))

    @property
    def error(self) -> str:
        """Why it cannot be followed any further, in one line; empty when it can."""
        if self._matcher is None:
            return _NO_TOKENIZER
        reason = self._matcher.get_error() if self._matcher.is_error() else ""
        return "grammar: " + " ".join(reason.split("\n")[0].split()) if reason else ""

    def mask(self, size: int) -> Mask:
        """What may come next, of the first `size` token ids; end-of-sequence tokens among them
        where the answer may end."""
        if self._matcher is None or self._matcher.is_error():
            return np.zeros(size, np.bool_)
        packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            return np.zeros(size, np.bool_)
        return np.unpackbits(packed, count=size, bitorder="little").view(np.bool_)

    def take(self, sampled: Sampled) -> Sampled:
        """Go on by a token; `ends` where nothing but the end may follow it."""
        matcher = self._matcher
        if matcher is None or sampled.token_id == NO_TOKEN:
            return sampled
        matcher.consume_token(sampled.token_id)
        ends = matcher.is_stopped() and not matcher.is_error()
        return replace(sampled, ends=True) if ends else sampled

    def give_up(self, seq_id: int) -> Sampled:
        """The end of a sequence for which nothing is left to draw."""
        matcher = self._matcher
        if matcher is not None and not matcher.is_error() and matcher.is_accepting():
            return Sampled(seq_id=seq_id, token_id=NO_TOKEN, ends=True)
        why = self.error or "grammar: together with allowed_token_ids it leaves no token to choose"
        return Sampled(seq_id=seq_id, token_id=NO_TOKEN, error=why)


class Grammars:
    """Makes the constraints of one process, and keeps the latest grammars as they begin.

    The first one takes the time to index the vocabulary: about 0.2 s for 100 000 tokens.
    """

    def __init__(self, vocabulary: Vocabulary | None) -> None:
        self._vocabulary = vocabulary
        self._tokenizer: LLTokenizer | None = None
        self._limits = LLParserLimits(max_items_in_row=_MOST_ITEMS, verbose_errors=False)
        self._kept: dict[str, LLMatcher] = {}

    def begin(self, grammar: str, emitted: Sequence[int]) -> Constraint:
        """Of a sequence that has emitted these tokens."""
        tokenizer = self._index()
        if tokenizer is None:
            return Constraint(None)
        matcher = self._kept.pop(grammar, None)
        if matcher is None:
            matcher = LLMatcher(tokenizer, grammar, log_level=_SILENT, limits=self._limits)
        if not matcher.is_error():
            self._kept[grammar] = matcher
        while len(self._kept) > _NUM_KEPT or sum(map(len, self._kept)) > _MOST_KEPT_CHARS:
            del self._kept[next(iter(self._kept))]
        # A copy has states of its own: what others did with the grammar leaves no trace in it.
        return Constraint(matcher.deep_copy(), emitted)

    def _index(self) -> LLTokenizer | None:
        if self._tokenizer is None and self._vocabulary is not None:
            table = _TokenTable(self._vocabulary)
            self._tokenizer = LLTokenizer(TokenizerWrapper(table), eos_token=table.eos_token_ids)
        return self._tokenizer
