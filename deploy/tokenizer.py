"""Text to token ids and back, from a checkpoint's tokenizer.json."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from deploy.openai_errors import ApiError

_SPACE_MARK = "▁"


class TokenizerError(ValueError):
    """A tokenizer file that cannot be read; the message names it."""


class TextTokenizer:
    """Encodes text and knows the bytes behind every token id."""

    def __init__(self, file: Path) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
            decoder = json.loads(file.read_text(encoding="utf-8")).get("decoder")
        except Exception as error:  # the library raises bare Exception for a malformed file
            raise TokenizerError(f"{file}: cannot be read: {error}") from error
        # Padding and truncation that a training script left on would change every prompt.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._byte_level = _has_decoder(decoder, "ByteLevel")
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = frozenset(i for i, token in added.items() if token.special)
        self._added = frozenset(added)
        self._pieces: dict[int, bytes] = {}

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of control tokens, which are left out of text by default."""
        return self._special

    def token_id(self, token: str) -> int | None:
        """Id of a token by its text in the vocabulary."""
        found = self._tokenizer.token_to_id(token)
        return None if found is None else int(found)

    def encode(
        self, text: str, *, add_special_tokens: bool, param: str = "text"
    ) -> tuple[int, ...]:
        """Token ids of `text`. Raises ApiError naming `param` when it is not valid Unicode."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ApiError(f"{param}: not valid Unicode: {error.reason}", param=param) from error
        encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return tuple(encoding.ids)

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to the text; empty for ids without a token (padded vocabularies)."""
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = self._piece(token_id)
        return piece

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of a whole sequence that continues a prompt (a leading space is kept)."""
        detokenizer = Detokenizer(self, skip_special_tokens=skip_special_tokens)
        return "".join(map(detokenizer.push, token_ids)) + detokenizer.flush()

    def _piece(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level:
            letters = [_BYTE_OF_LETTER.get(letter) for letter in token]
            if None not in letters:
                return bytes(b for b in letters if b is not None)
            return str(token).encode()
        if token_id in self._added:
            return str(token).encode()
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return str(token).replace(_SPACE_MARK, " ").encode()


class Detokenizer:
    """Token ids to text, one at a time; never emits a part of a character.

    The pieces add up to the decoding of the whole sequence, with ill-formed bytes replaced the
    same way (one U+FFFD per maximal ill-formed part, Unicode 15 section 3.9).
    """

    def __init__(self, tokenizer: TextTokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Text that this token completes; often empty inside a character of several bytes."""
        if token_id in self._skipped:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """The rest, once no token can come: an unfinished character becomes U+FFFD."""
        return self._decoder.decode(b"", final=True)


def load_tokenizer(folder: Path) -> tuple[TextTokenizer | None, list[str]]:
    """The folder's tokenizer, or None, with warnings that say why. Raises TokenizerError."""
    file = folder / "tokenizer.json"
    if file.is_file():
        return TextTokenizer(file), []
    others = [folder / "tokenizer.model", *sorted(folder.glob("*.tiktoken"))]
    found = [other.name for other in others if other.is_file()]
    why = f"{found[0]} is not read yet" if found else "there is no tokenizer.json"
    return None, [f"no tokenizer: {why}; only token-id requests are served"]


def _has_decoder(decoder: Any, kind: str) -> bool:
    if not isinstance(decoder, dict):
        return False
    if decoder.get("type") == kind:
        return True
    return any(_has_decoder(inner, kind) for inner in decoder.get("decoders", ()))


def _letters_of_bytes() -> dict[str, int]:
    """GPT-2's printable letter of every byte (openai/gpt-2 `bytes_to_unicode`), inverted."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_LETTER = _letters_of_bytes()
