"""Token ids to text, one token at a time."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deploy.tokenizer import TextTokenizer


class Detokenizer:
    """Token ids to text, one at a time; never emits a part of a character.

    The pieces add up to the decoding of the whole sequence, with ill-formed bytes replaced the
    same way (one U+FFFD per maximal ill-formed part, Unicode 15 section 3.9). Spaces are never
    cleaned up, whatever `clean_up_tokenization_spaces` says: text must come back as it was.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        *,
        skip_special_tokens: bool = True,
        visible_ids: frozenset[int] = frozenset(),
    ) -> None:
        """`visible_ids` are special tokens that are not skipped."""
        self._tokenizer = tokenizer
        skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._skipped = skipped - visible_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Text that this token completes; often empty inside a character of several bytes."""
        if token_id in self._skipped:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """The rest, once no token can come: an unfinished character becomes U+FFFD."""
        return self._decoder.decode(b"", final=True)
