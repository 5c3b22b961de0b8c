"""Texts that cannot fit, however they are tokenized: refused before that costs time and memory."""

from __future__ import annotations

from deploy.openai_errors import ApiError
from deploy.tokenizer import TextTokenizer

_ALWAYS = 1 << 18
"""Characters that are tokenized whatever they are: it takes a second at most."""
_CHARS_PER_TOKEN = 32
"""Texts have 4 or 5; what has more for all of a context is white space or one letter."""
_MARGIN = 4
"""Normalization joins a few characters into one (accents, syllables)."""


def check_length(tokenizer: TextTokenizer, text: str, max_tokens: int, param: str) -> None:
    """Raises ApiError when `text` must have more than `max_tokens` tokens.

    Whitespace does not count at first: tokenizers may join any amount of it. But no text may have
    more than 32 characters for each token of the context, or 262 144.
    """
    bound = max(_ALWAYS, _CHARS_PER_TOKEN * max_tokens)
    if len(text) > bound:
        raise ApiError(
            f"This model's maximum context length is {max_tokens} tokens; a text of {len(text)} "
            f"characters is not tokenized, allowed are {bound}.",
            param=param,
            code="context_length_exceeded",
        )
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
