"""tokenizer.json, read by the tokenizers library."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken as LibraryToken
from tokenizers import Tokenizer

from deploy.added_tokens import AddedToken, read_folder
from deploy.byte_letters import BYTE_OF_LETTER
from deploy.tokenizer import TextTokenizer, TokenizerError

_SPACE_MARK = "▁"
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class JsonTokenizer(TextTokenizer):
    """A tokenizer.json and the added tokens that the files beside it declare.

    Its own post-processor decides on BOS and EOS, whatever `add_bos_token` says (Transformers 5).
    """

    def __init__(self, file: Path) -> None:
        super().__init__()
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
            decoder = json.loads(file.read_text(encoding="utf-8")).get("decoder")
        except Exception as error:  # the library raises bare Exception for a malformed file
            raise TokenizerError(f"{file}: cannot be read: {error}") from error
        # Padding and truncation that a training script left on would change every prompt.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._byte_level = _has_decoder(decoder, "ByteLevel")
        self._read_added_tokens(file.parent)
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = frozenset(i for i, token in added.items() if token.special)
        self._added = frozenset(added)

    def _read_added_tokens(self, folder: Path) -> None:
        """Flags of added tokens: added_tokens_decoder goes before tokenizer.json's own."""
        files = read_folder(folder, self.token_id)
        self.warnings = tuple(
            f"tokenizer: {token.text!r} has id {self.token_id(token.text)} in tokenizer.json, "
            f"which counts, and {token.token_id} in the files beside it"
            for token in files.added
            if self.token_id(token.text) != token.token_id
        )
        own = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        for token in files.added:
            same = self.token_id(token.text) == token.token_id
            if same and (token.declared or token.text not in own):
                self._tokenizer.add_tokens([_library_token(token)])

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of control tokens, which are left out of text by default."""
        return self._special

    def token_id(self, token: str) -> int | None:
        """Id of a token by its text in the vocabulary."""
        found = self._tokenizer.token_to_id(token)
        return None if found is None else int(found)

    def token_text(self, token_id: int) -> str:
        """The token as the vocabulary spells it; empty for ids without a token."""
        token = self._tokenizer.id_to_token(token_id) if 0 <= token_id < 2**32 else None
        return "" if token is None else str(token)

    def _encode(self, text: str, add_special_tokens: bool) -> Sequence[int]:
        ids: Sequence[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def _owned_ids(self) -> Collection[int]:
        vocab: Mapping[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        return vocab.values()

    def _piece(self, token_id: int) -> bytes:
        token = self.token_text(token_id)
        if token_id in self._added:
            return token.encode()
        if self._byte_level:
            letters = [BYTE_OF_LETTER.get(letter) for letter in token]
            if None not in letters:
                return bytes(b for b in letters if b is not None)
            return token.encode()
        if byte := _BYTE_PIECE.fullmatch(token):
            return bytes.fromhex(byte[1])
        return token.replace(_SPACE_MARK, " ").encode()


def _library_token(token: AddedToken) -> LibraryToken:
    return LibraryToken(
        token.text,
        special=token.special,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        single_word=token.single_word,
        normalized=token.normalized,
    )


def _has_decoder(decoder: Any, kind: str) -> bool:
    if not isinstance(decoder, dict):
        return False
    if decoder.get("type") == kind:
        return True
    return any(_has_decoder(inner, kind) for inner in decoder.get("decoders", ()))
