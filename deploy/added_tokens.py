"""Tokens that a checkpoint adds to its tokenizer's own vocabulary, and text split at them."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deploy.json_file import read_json_object

_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_LISTS = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedToken:
    """One added token. `lstrip` and `rstrip` take the white space beside it with it.

    `normalized` matters to tokenizer.json alone; `declared` tells added_tokens_decoder's tokens.
    """

    text: str
    token_id: int
    special: bool
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False
    declared: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFolder:
    """What the small files beside a vocabulary say."""

    config: Mapping[str, Any]
    added: tuple[AddedToken, ...]
    warnings: tuple[str, ...]

    def text_of(self, name: str) -> str | None:
        """The text of a named token such as `bos_token`."""
        return token_text(self.config.get(name))


def read_folder(folder: Path, vocab_id: Callable[[str], int | None]) -> TokenizerFolder:
    """Read the added tokens; `vocab_id` finds a text in the vocabulary. Raises ValueError.

    tokenizer_config.json's `added_tokens_decoder` goes before added_tokens.json, as in
    Transformers; a named special token without an entry there has the vocabulary's id.
    """
    file = folder / "tokenizer_config.json"
    named = read_json_object(folder / "special_tokens_map.json")
    # A null in tokenizer_config.json says nothing.
    config = named | {k: v for k, v in read_json_object(file).items() if v is not None}
    specials = dict(_special_entries(folder, config))
    tokens = dict(_declared(file, config.get("added_tokens_decoder")))
    added_file = folder / "added_tokens.json"
    for text, token_id in read_json_object(added_file).items():
        if text not in tokens:
            where = f"{added_file}: {text!r}"
            tokens[text] = _token(where, text, token_id, specials.get(text, {}), text in specials)
    warnings: list[str] = []
    for text, entry in specials.items():
        if text in tokens:
            tokens[text] = replace(tokens[text], special=True)
        elif (found := vocab_id(text)) is not None:
            tokens[text] = _token(f"{file}: {text!r}", text, found, entry, True)
        else:
            warnings.append(f"tokenizer: special token {text!r} has no id and is left out")
    _check_distinct(folder, tokens.values())
    return TokenizerFolder(config=config, added=tuple(tokens.values()), warnings=tuple(warnings))


def token_text(entry: object) -> str | None:
    """The text of a token written as a string or as an object with `content`."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) and text else None


class AddedTokenSplitter:
    """Cuts added tokens out of text before the model's own splitting sees the rest.

    The longest token at the leftmost place wins, and the flags act on the neighbouring text, as
    in Transformers' slow tokenizers (`PreTrainedTokenizer.tokenize`).
    """

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        self._by_text = {token.text: token for token in tokens}
        longest_first = sorted(self._by_text, key=len, reverse=True)
        pattern = "|".join(map(re.escape, longest_first))
        self._pattern = re.compile(f"({pattern})") if pattern else None

    def split(self, text: str) -> list[str | AddedToken]:
        """The added tokens and the text between them, in order; nothing is empty."""
        if self._pattern is None:
            return [text] if text else []
        parts = [part for part in self._pattern.split(text) if part]
        for i in range(len(parts)):
            token = self._by_text.get(parts[i])
            if token is not None:
                _apply_flags(token, parts, i)
        return [self._by_text.get(part, part) for part in parts if part]


def _apply_flags(token: AddedToken, parts: list[str], i: int) -> None:
    """Change the neighbours of `parts[i]`, which is `token`, as its flags ask."""
    left = parts[i - 1] if i > 0 else ""
    right = parts[i + 1] if i + 1 < len(parts) else ""
    if token.rstrip and right:
        parts[i + 1] = right.lstrip()
    if token.lstrip and left:
        parts[i - 1] = left.rstrip()
    if token.single_word and left and left[-1] != " ":
        parts[i - 1] += token.text
        parts[i] = ""
    elif token.single_word and right and right[0] != " ":
        parts[i + 1] = token.text + parts[i + 1]
        parts[i] = ""


def _special_entries(
    folder: Path, config: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    entries = [config.get(name) for name in _NAMES]
    for name in _LISTS:
        listed = config.get(name)
        # Newer files name extra tokens: {"image_token": "<image>"}.
        listed = list(listed.values()) if isinstance(listed, dict) else listed
        if not isinstance(listed, list | None):
            raise ValueError(
                f"{folder}: {name} of tokenizer_config.json or special_tokens_map.json must be "
                f"a list or an object of tokens, not {reprlib.repr(listed)}"
            )
        entries += listed or []
    for entry in entries:
        text = token_text(entry)
        if text is not None:
            yield text, entry if isinstance(entry, dict) else {}


def _declared(file: Path, decoder: object) -> Iterator[tuple[str, AddedToken]]:
    if decoder is None:
        return
    if not isinstance(decoder, dict):
        raise ValueError(f"{file}: added_tokens_decoder must be an object of ids and tokens")
    for key, entry in decoder.items():
        where = f"{file}: added_tokens_decoder[{key!r}]"
        text = token_text(entry)
        if text is None or not isinstance(entry, dict):
            raise ValueError(f"{where}: must be an object with a non-empty `content`")
        token_id = int(key) if key.isascii() and key.isdigit() else key
        token = _token(where, text, token_id, entry, _flag(where, entry, "special"))
        yield text, replace(token, declared=True)


def _token(
    where: str, text: str, token_id: object, entry: dict[str, Any], special: bool
) -> AddedToken:
    if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
        raise ValueError(
            f"{where}: the id must be an integer of at least 0, not {reprlib.repr(token_id)}"
        )
    return AddedToken(
        text=text,
        token_id=token_id,
        special=special,
        lstrip=_flag(where, entry, "lstrip"),
        rstrip=_flag(where, entry, "rstrip"),
        single_word=_flag(where, entry, "single_word"),
        normalized=_flag(where, {"normalized": not special} | entry, "normalized"),
    )


def _flag(where: str, entry: Mapping[str, Any], name: str) -> bool:
    value = entry.get(name, False)
    if not isinstance(value, bool):
        raise ValueError(f"{where}: {name} must be true or false, not {reprlib.repr(value)}")
    return value


def _check_distinct(folder: Path, tokens: Iterable[AddedToken]) -> None:
    by_id: dict[int, str] = {}
    for token in tokens:
        other = by_id.setdefault(token.token_id, token.text)
        if other != token.text:
            raise ValueError(
                f"{folder}: added tokens {other!r} and {token.text!r} share id {token.token_id}"
            )
