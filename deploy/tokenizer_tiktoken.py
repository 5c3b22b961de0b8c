"""Tiktoken ranks (`*.tiktoken`), encoded by the tiktoken library as GPT-4's tokenizer is."""

from __future__ import annotations

import base64
from collections.abc import Collection, Sequence
from pathlib import Path

from tiktoken import Encoding

from deploy.added_tokens import AddedToken, AddedTokenSplitter, read_folder
from deploy.byte_letters import LETTER_OF_BYTE
from deploy.tokenizer import TextTokenizer, TokenizerError

# cl100k_base's split as published with GPT-4 and used to train DBRX; newer tiktoken releases keep
# white space at the very end of a text in one piece, which this one cuts after its last newline.
CL100K_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# cl100k_base is told by its size; its own special tokens need not be in the folder's files.
_CL100K_RANKS = 100_256
_CL100K_SPECIAL = {
    "<|endoftext|>": 100257,
    "<|fim_prefix|>": 100258,
    "<|fim_middle|>": 100259,
    "<|fim_suffix|>": 100260,
    "<|endofprompt|>": 100276,
}


class TiktokenTokenizer(TextTokenizer):
    """A file of ranks and the added tokens beside it (DBRX's `TiktokenTokenizerWrapper`)."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        ranks = read_ranks(file)
        self._ranks = ranks
        self._bytes_of = {rank: token for token, rank in ranks.items()}
        implied = _CL100K_SPECIAL if len(ranks) == _CL100K_RANKS else {}
        files = read_folder(file.parent, implied.get)
        config = files.config
        self.warnings = files.warnings
        added = {token.token_id: token for token in files.added}
        for text, token_id in implied.items():
            added.setdefault(token_id, AddedToken(text=text, token_id=token_id, special=True))
        clash = next((i for i in added if i in self._bytes_of), None)
        if clash is not None:
            raise TokenizerError(f"{file}: {added[clash].text!r} has id {clash}, which is a rank")
        self._added = added
        self._id_of_added = {token.text: token.token_id for token in added.values()}
        self._splitter = AddedTokenSplitter(added.values())
        self._encoding = Encoding(
            file.stem, pat_str=CL100K_SPLIT, mergeable_ranks=ranks, special_tokens={}
        )
        self._bos = self._side(config.get("add_bos_token"), files.text_of("bos_token"))
        self._eos = self._side(config.get("add_eos_token"), files.text_of("eos_token"))

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of control tokens, which are left out of text by default."""
        return frozenset(i for i, token in self._added.items() if token.special)

    def token_id(self, token: str) -> int | None:
        """Id of a token by its text in the vocabulary."""
        found = self._id_of_added.get(token)
        return self._ranks.get(token.encode()) if found is None else found

    def token_text(self, token_id: int) -> str:
        """The token as a tokenizer.json spells it; empty for ids without a token."""
        added = self._added.get(token_id)
        if added is not None:
            return added.text
        return "".join(LETTER_OF_BYTE[byte] for byte in self._bytes_of.get(token_id, b""))

    def _side(self, add: object, text: str | None) -> tuple[int, ...]:
        found = self._id_of_added.get(text) if add and text is not None else None
        return () if found is None else (found,)

    def _encode(self, text: str, add_special_tokens: bool) -> Sequence[int]:
        ids: list[int] = []
        for part in self._splitter.split(text):
            if isinstance(part, AddedToken):
                ids.append(part.token_id)
            else:
                ids.extend(self._encoding.encode_ordinary(part))
        return [*self._bos, *ids, *self._eos] if add_special_tokens else ids

    def _owned_ids(self) -> Collection[int]:
        return self._bytes_of.keys() | self._added.keys()

    def _piece(self, token_id: int) -> bytes:
        added = self._added.get(token_id)
        return self._bytes_of.get(token_id, b"") if added is None else added.text.encode()


def read_ranks(file: Path) -> dict[bytes, int]:
    """Token bytes and their ranks, one `base64 rank` a line. Raises TokenizerError.

    The library's own reader copies files to a cache in the shared temporary folder.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise TokenizerError(f"{file}: line {number} is not `base64 rank`: {error}") from error
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise TokenizerError(f"{file}: byte {missing[0]:#04x} has no rank; every byte needs one")
    if len(set(ranks.values())) != len(ranks):
        raise TokenizerError(f"{file}: two tokens share a rank")
    return ranks
