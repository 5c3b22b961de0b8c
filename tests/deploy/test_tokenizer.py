"""Tokenizer and incremental detokenizer against the tokenizers library itself."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers

from deploy.demo import NANO_MODELS, nano_checkpoint
from deploy.tokenizer import Detokenizer, TextTokenizer, TokenizerError, load_tokenizer


@lru_cache
def nano(name: str) -> tuple[TextTokenizer, Any]:
    file = nano_checkpoint(name) / "tokenizer.json"
    return TextTokenizer(file), Tokenizer.from_file(str(file))


names = st.sampled_from(NANO_MODELS)
token_ids = st.lists(st.integers(0, 520), max_size=40)


@settings(deadline=None)
@given(names, token_ids, st.booleans())
def test_pieces_add_up_to_the_librarys_decoding(
    name: str, ids: list[int], skip_special: bool
) -> None:
    ours, theirs = nano(name)
    ids = [i for i in ids if theirs.id_to_token(i) is not None]
    detokenizer = Detokenizer(ours, skip_special_tokens=skip_special)
    pieces = [detokenizer.push(token_id) for token_id in ids]
    text = "".join(pieces) + detokenizer.flush()
    assert text == theirs.decode(ids, skip_special_tokens=skip_special)
    assert text == ours.decode(ids, skip_special_tokens=skip_special)


@settings(deadline=None)
@given(names, st.text(max_size=40))
def test_text_comes_back_and_characters_are_never_split(name: str, text: str) -> None:
    ours, theirs = nano(name)
    ids = ours.encode(text, add_special_tokens=False)
    assert list(ids) == theirs.encode(text, add_special_tokens=False).ids
    detokenizer = Detokenizer(ours, skip_special_tokens=False)
    pieces = [detokenizer.push(token_id) for token_id in ids]
    assert "".join(pieces) == text
    assert detokenizer.flush() == ""
    assert b"".join(map(ours.token_bytes, ids)) == text.encode()


def test_ids_without_a_token_are_silent() -> None:
    ours, theirs = nano("nano-dbrx")
    assert theirs.id_to_token(100_000) is None
    assert ours.decode([100_000]) == ""


@pytest.fixture
def llama_like(tmp_path: Path) -> tuple[TextTokenizer, Any]:
    """The decoder of PhiMoE's and Jamba's published tokenizers: metaspace and byte fallback."""
    pieces = ["<unk>", "<s>", "▁", "▁hello", "▁world", "a", *(f"<0x{b:02X}>" for b in range(256))]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(["<s>"])
    file = tmp_path / "tokenizer.json"
    tokenizer.save(str(file))
    return TextTokenizer(file), tokenizer


def test_byte_fallback(llama_like: tuple[TextTokenizer, Any]) -> None:
    ours, theirs = llama_like
    ids = [1, 3, 2, 4, *(6 + byte for byte in "é€😀".encode()), 5, 3]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids, skip_special_tokens=False).startswith("<s>")
    detokenizer = Detokenizer(ours)
    assert [detokenizer.push(6 + byte) for byte in "€".encode()] == ["", "", "€"]
    # Cut off inside a character: one replacement, at the end.
    detokenizer.push(6 + 0xE2)
    assert detokenizer.flush() == "�"


def test_files_that_are_not_read_yet(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path)[0] is None
    (tmp_path / "tokenizer.tiktoken").write_text("")
    tokenizer, [warning] = load_tokenizer(tmp_path)
    assert tokenizer is None
    assert "tokenizer.tiktoken is not read yet" in warning
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
