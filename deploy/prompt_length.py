"""Texts that cannot fit, however they are tokenized: refused before that costs time and memory."""

from __future__ import annotations

from deploy.openai_errors import ApiError
from deploy.tokenizer import TextTokenizer

_MARGIN = 4
"""Normalization joins a few characters into one (accents, syllables)."""


def check_length(tokenizer: TextTokenizer, text: str, max_tokens: int, param: str) -> None:
    """Raises ApiError when `text` must have more than `max_tokens` tokens.

    Whitespace does not count: tokenizers may join any amount of it.
    """
    if len(text) <= _MARGIN * max_tokens:
        return
    most = _MARGIN * max_tokens * tokenizer.longest_token
    if len(text) > most and sum(map(len, text.split())) > most:
        raise ApiError(
            f"This model's maximum context length is {max_tokens} tokens; "
            f"a text of {len(text)} characters has more.",
            param=param,
            code="context_length_exceeded",
        )
