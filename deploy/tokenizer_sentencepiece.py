"""tokenizer.model, read by the sentencepiece library, with Llama's conventions around it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from deploy.added_tokens import AddedToken, AddedTokenSplitter, read_folder
from deploy.tokenizer import TextTokenizer, TokenizerError

_SPACE_MARK = "▁"
# Protobuf merges a repeated message into the earlier one, so these bytes at the end of a model
# (field 3, the normalizer: field 3, add_dummy_prefix, = 0) switch the prefix off.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceTokenizer(TextTokenizer):
    """A sentencepiece model and its added tokens (Transformers' `LlamaTokenizer`).

    `legacy` (the default) puts the model's own leading space before every stretch of text between
    added tokens; without it only the start of the text gets one, unless `add_prefix_space` is off.
    """

    def __init__(self, file: Path) -> None:
        super().__init__()
        model = file.read_bytes()
        if not model:
            # The library takes no bytes for no model, and logs an error at every call.
            raise TokenizerError(f"{file}: is not a sentencepiece model: it has no pieces")
        try:
            self._model = SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError) as error:
            raise TokenizerError(f"{file}: is not a sentencepiece model: {error}") from error
        self._num_pieces: int = self._model.get_piece_size()
        files = read_folder(file.parent, self._piece_id)
        config = files.config
        self.warnings = files.warnings
        self._added = {token.token_id: token for token in files.added}
        self._id_of_added = {token.text: token.token_id for token in files.added}
        self._splitter = AddedTokenSplitter(files.added)
        self._legacy = config.get("legacy") is not False
        self._starts_with_space = config.get("add_prefix_space") is not False
        if not self._legacy:
            self._model = SentencePieceProcessor(model_proto=model + _NO_DUMMY_PREFIX)
        self._unk = files.text_of("unk_token") or self._model.id_to_piece(self._model.unk_id())
        self._num_unk_pieces = len(self._model.encode(self._unk))
        bos = self._side(config.get("add_bos_token", True), files.text_of("bos_token"), "bos")
        eos = self._side(config.get("add_eos_token", False), files.text_of("eos_token"), "eos")
        self._bos, self._eos = bos, eos
        self._special = frozenset(self._find_special())

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of control tokens, which are left out of text by default."""
        return self._special

    def token_id(self, token: str) -> int | None:
        """Id of a token by its text in the vocabulary."""
        found = self._id_of_added.get(token)
        return self._piece_id(token) if found is None else found

    def token_text(self, token_id: int) -> str:
        """The token as the vocabulary spells it; empty for ids without a token."""
        added = self._added.get(token_id)
        if added is not None:
            return added.text
        if not 0 <= token_id < self._num_pieces or self._model.is_unused(token_id):
            return ""
        return str(self._model.id_to_piece(token_id))

    def _encode(self, text: str, add_special_tokens: bool) -> Sequence[int]:
        ids = [i for part in self._parts(text) for i in self._part_ids(part)]
        return [*self._bos, *ids, *self._eos] if add_special_tokens else ids

    def _parts(self, text: str) -> list[str | AddedToken]:
        if self._legacy or not text:
            return self._splitter.split(text)
        text = text.replace(_SPACE_MARK, " ")
        prefix = _SPACE_MARK if self._starts_with_space else ""
        parts = self._splitter.split(prefix + text)
        leads = len(parts) > 1 and isinstance(parts[1], AddedToken)
        return parts[1:] if leads and parts[0] == prefix else parts

    def _part_ids(self, part: str | AddedToken) -> Sequence[int]:
        if isinstance(part, AddedToken):
            return [part.token_id]
        if self._legacy or not part.startswith((_SPACE_MARK, " ")):
            ids: Sequence[int] = self._model.encode(part)
            return ids
        # Many models drop leading space: behind the unknown token it is kept.
        ids = self._model.encode(self._unk + part)
        return ids[self._num_unk_pieces :]

    def _piece_id(self, text: str) -> int | None:
        found: int = self._model.piece_to_id(text)
        # Texts that it does not have are given the unknown token's id.
        return found if self._model.id_to_piece(found) == text else None

    def _side(self, add: object, text: str | None, name: str) -> tuple[int, ...]:
        """The ids put at one end of an encoded text."""
        if not add:
            return ()
        found = None if text is None else self.token_id(text)
        if found is None:
            found = self._model.bos_id() if name == "bos" else self._model.eos_id()
        return () if found is None or found < 0 else (found,)

    def _find_special(self) -> list[int]:
        model = self._model
        pieces = range(self._num_pieces)
        control = [i for i in pieces if model.is_control(i) or model.is_unknown(i)]
        return [*control, *(token.token_id for token in self._added.values() if token.special)]

    def _owned_ids(self) -> Collection[int]:
        # Unused pieces only help to merge others; no encoding ever held them.
        pieces = {i for i in range(self._num_pieces) if not self._model.is_unused(i)}
        return pieces | self._added.keys()

    def _piece(self, token_id: int) -> bytes:
        added = self._added.get(token_id)
        if added is not None:
            return added.text.encode()
        piece = self.token_text(token_id)
        if piece and self._model.is_byte(token_id):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(_SPACE_MARK, " ").encode()
