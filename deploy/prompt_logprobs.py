"""Log-probabilities of a prompt's own tokens, in vLLM's shape and in OpenAI's legacy one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deploy.compute import Arrays
from deploy.openai_errors import Json, not_finite
from deploy.tokenizer import TextTokenizer
from router.step import Token

# What JSON cannot say; OpenAI and vLLM write the same number for "impossible".
LEAST_LOGPROB = -9999.0


def finite(value: float | None) -> float | None:
    """A log-probability as JSON can hold it."""
    return None if value is None else max(value, LEAST_LOGPROB)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLogprobs:
    """What the model thought of a prompt's tokens, from its second on (nothing predicts the first).

    `ranks` count from 1.
    """

    tokens: tuple[Token, ...]
    """Prompt tokens with their logprob and the best alternatives."""
    ranks: tuple[int, ...]

    @classmethod
    def read(cls, arrays: Arrays) -> PromptLogprobs:
        """From the arrays of `Want.prompt_logprobs`; a prompt of one token has none.

        Raises ApiError where the model computed something that is not finite.
        """
        if "prompt_logprobs" not in arrays:
            return cls(tokens=(), ranks=())
        ids = arrays["prompt_top_ids"].tolist()
        if not np.isfinite(arrays["prompt_logprobs"]).all():
            raise not_finite()
        values = arrays["prompt_logprobs"].tolist()
        rows = zip(ids, values, strict=True)
        return cls(
            tokens=tuple(
                Token(
                    seq_id=0,
                    position=position,
                    token_id=row_ids[0],
                    logprob=row_values[0],
                    top_logprobs=tuple(zip(row_ids[1:], row_values[1:], strict=True)),
                )
                for position, (row_ids, row_values) in enumerate(rows)
            ),
            ranks=tuple(arrays["prompt_ranks"].tolist()),
        )

    def as_vllm(
        self, num_best: int, tokenizer: TextTokenizer | None
    ) -> list[dict[str, Json] | None]:
        """One object per prompt token, by token id: its own entry and those of `num_best` best."""
        return [None, *(self._entries(i, num_best, tokenizer) for i in range(len(self.tokens)))]

    def _entries(
        self, index: int, num_best: int, tokenizer: TextTokenizer | None
    ) -> dict[str, Json]:
        token = self.tokens[index]
        own = (token.token_id, token.logprob, self.ranks[index])
        best = [(i, value, rank) for rank, (i, value) in enumerate(token.top_logprobs, 1)]
        entries: dict[str, Json] = {}
        for token_id, value, rank in (own, *best[:num_best]):
            entry = {
                "logprob": finite(value),
                "rank": rank,
                "decoded_token": None if tokenizer is None else _text(tokenizer, token_id),
            }
            entries.setdefault(str(token_id), entry)
        return entries


def _text(tokenizer: TextTokenizer, token_id: int) -> str:
    return tokenizer.token_bytes(token_id).decode("utf-8", "replace")
