"""Text to token ids and back, from whichever tokenizer file a checkpoint carries."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from deploy.detokenizer import Detokenizer
from deploy.json_file import read_json_object
from deploy.openai_errors import ApiError

__all__ = ["Detokenizer", "TextTokenizer", "TokenizerError", "load_tokenizer"]


class TokenizerError(ValueError):
    """A tokenizer file that cannot be read; the message names it."""


class TextTokenizer(ABC):
    """Encodes text and knows the bytes behind every token id; one subclass per kind of file."""

    warnings: tuple[str, ...] = ()

    def __init__(self) -> None:
        self._pieces: dict[int, bytes] = {}

    @property
    @abstractmethod
    def special_ids(self) -> frozenset[int]:
        """Ids of control tokens, which are left out of text by default."""

    @abstractmethod
    def token_id(self, token: str) -> int | None:
        """Id of a token by its text in the vocabulary."""

    @abstractmethod
    def _encode(self, text: str, add_special_tokens: bool) -> Sequence[int]: ...

    @abstractmethod
    def _piece(self, token_id: int) -> bytes:
        """The token's bytes; empty for ids without a token."""

    @abstractmethod
    def token_text(self, token_id: int) -> str:
        """The token as the vocabulary spells it; empty for ids without a token."""

    @abstractmethod
    def _owned_ids(self) -> Collection[int]:
        """Every id that has a token."""

    def encode(
        self, text: str, *, add_special_tokens: bool, param: str = "text"
    ) -> tuple[int, ...]:
        """Token ids of `text`. Raises ApiError naming `param` when it is not valid Unicode."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ApiError(f"{param}: not valid Unicode: {error.reason}", param=param) from error
        return tuple(self._encode(text, add_special_tokens))

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to the text; empty for ids without a token (padded vocabularies)."""
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = self._piece(token_id)
        return piece

    @functools.cached_property
    def longest_token(self) -> int:
        """Bytes of the longest token, whitespace at its ends not counted; at least 1."""
        return max((len(self._piece(i).strip()) for i in self._owned_ids()), default=0) or 1

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of a whole sequence that continues a prompt (a leading space is kept)."""
        detokenizer = Detokenizer(self, skip_special_tokens=skip_special_tokens)
        return "".join(map(detokenizer.push, token_ids)) + detokenizer.flush()

    def unused_ranges(self, vocab_size: int) -> tuple[tuple[int, int], ...]:
        """Half-open ranges of ids below `vocab_size` that no token owns, in ascending order."""
        owned = sorted({i for i in self._owned_ids() if 0 <= i < vocab_size})
        starts = [0, *(i + 1 for i in owned)]
        ends = [*owned, vocab_size]
        return tuple((a, b) for a, b in zip(starts, ends, strict=True) if a < b)


def load_tokenizer(folder: Path) -> tuple[TextTokenizer | None, list[str]]:
    """The folder's tokenizer, or None, with warnings that say why. Raises TokenizerError.

    tokenizer.json comes before tokenizer.model, and that before tiktoken ranks.
    """
    try:
        tokenizer = _open(folder)
        if tokenizer is None:
            return None, [_why_none(folder)]
        return tokenizer, list(tokenizer.warnings)
    except TokenizerError:
        raise
    except (ValueError, OSError) as error:
        raise TokenizerError(str(error)) from error


def _open(folder: Path) -> TextTokenizer | None:
    # Each kind imports its library, so that a start pays only for the kind it uses.
    if (file := folder / "tokenizer.json").is_file():
        from deploy.tokenizer_json import JsonTokenizer

        return JsonTokenizer(file)
    if (file := folder / "tokenizer.model").is_file():
        from deploy.tokenizer_sentencepiece import SentencePieceTokenizer

        return SentencePieceTokenizer(file)
    if (ranks := _ranks_file(folder)) is not None:
        from deploy.tokenizer_tiktoken import TiktokenTokenizer

        return TiktokenTokenizer(ranks)
    return None


def _ranks_file(folder: Path) -> Path | None:
    standard = folder / "tokenizer.tiktoken"
    if standard.is_file():
        return standard
    found = sorted(file for file in folder.glob("*.tiktoken") if file.is_file())
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise TokenizerError(
            f"{folder}: more than one file of tiktoken ranks ({names}); "
            "name the one to use tokenizer.tiktoken"
        )
    return found[0] if found else None


def _why_none(folder: Path) -> str:
    config = read_json_object(folder / "tokenizer_config.json")
    named = config.get("encoding_name") or config.get("model_name")
    why = "there is no tokenizer.json, tokenizer.model or *.tiktoken file"
    if named:
        why += (
            f"; tokenizer_config.json names tiktoken's {named}, but nothing is downloaded: "
            "put its ranks beside it as tokenizer.tiktoken"
        )
    return f"no tokenizer: {why}; only token-id requests are served"
