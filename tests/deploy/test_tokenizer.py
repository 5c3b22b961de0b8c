"""What every kind of tokenizer shares: which file is read, unused ids, incremental text."""

from __future__ import annotations

import itertools
import json
import shutil
import unicodedata
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers

from deploy.demo import NANO_MODELS, nano_checkpoint
from deploy.openai_errors import ApiError
from deploy.tokenizer import Detokenizer, TextTokenizer, TokenizerError, load_tokenizer
from tests.deploy.unicode_texts import texts, train_sentencepiece


def load(folder: Path) -> TextTokenizer:
    tokenizer, _ = load_tokenizer(folder)
    assert tokenizer is not None
    return tokenizer


@lru_cache
def nano(name: str) -> tuple[TextTokenizer, Any]:
    file = nano_checkpoint(name) / "tokenizer.json"
    return load(file.parent), Tokenizer.from_file(str(file))


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
@given(names, texts())
def test_text_comes_back_and_characters_are_never_split(name: str, text: str) -> None:
    ours, theirs = nano(name)
    ids = ours.encode(text, add_special_tokens=False)
    assert list(ids) == theirs.encode(text, add_special_tokens=False).ids
    detokenizer = Detokenizer(ours, skip_special_tokens=False)
    pieces = [detokenizer.push(token_id) for token_id in ids]
    assert "".join(pieces) == text
    assert detokenizer.flush() == ""
    assert b"".join(map(ours.token_bytes, ids)) == text.encode()
    # As soon as its last byte is there, a character is out.
    done = 0
    for count, token_id in enumerate(ids, 1):
        done += len(ours.token_bytes(token_id))
        emitted = "".join(pieces[:count])
        assert emitted == text.encode()[:done].decode(errors="ignore")


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
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return load(tmp_path), tokenizer


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


@settings(deadline=None)
@given(st.binary(max_size=12))
def test_ill_formed_bytes_become_replacements_as_in_the_whole(data: bytes) -> None:
    ours, theirs = nano("nano-dbrx")
    letters = {ours.token_bytes(i): i for i in range(256)}
    ids = [letters[bytes([byte])] for byte in data]
    detokenizer = Detokenizer(ours)
    streamed = "".join(map(detokenizer.push, ids)) + detokenizer.flush()
    assert streamed == data.decode(errors="replace") == theirs.decode(ids)


def test_spaces_are_never_cleaned_up(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(nano_checkpoint("nano-dbrx") / name, tmp_path)
    config = tmp_path / "tokenizer_config.json"
    asked = json.loads(config.read_text()) | {"clean_up_tokenization_spaces": True}
    config.write_text(json.dumps(asked))
    spaced = "Hello , it is n't 's . Yes !  ? "
    ours = load(tmp_path)
    assert ours.decode(ours.encode(spaced, add_special_tokens=False)) == spaced


@pytest.mark.parametrize("name", NANO_MODELS)
def test_lone_surrogates_are_refused(name: str) -> None:
    with pytest.raises(ApiError, match="prompt: not valid Unicode"):
        nano(name)[0].encode("a\ud800", add_special_tokens=False, param="prompt")


@settings(deadline=None)
@given(names, st.integers(0, 600))
def test_unused_ranges_are_the_ids_without_a_token(name: str, vocab_size: int) -> None:
    ours, theirs = nano(name)
    unused = {i for a, b in ours.unused_ranges(vocab_size) for i in range(a, b)}
    assert unused == {i for i in range(vocab_size) if theirs.id_to_token(i) is None}
    assert all(ours.decode([i], skip_special_tokens=False) == "" for i in unused)
    ranges = ours.unused_ranges(vocab_size)
    assert all(a < b for a, b in ranges)
    assert all(left[1] < right[0] for left, right in itertools.pairwise(ranges))


def test_files_are_preferred_in_order(tmp_path: Path) -> None:
    with TemporaryDirectory() as empty:
        tokenizer, [warning] = load_tokenizer(Path(empty))
        assert tokenizer is None
        assert "no tokenizer" in warning
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece())
    for name in ("tokenizer.json", "tokenizer.tiktoken"):
        shutil.copy(nano_checkpoint("nano-dbrx") / name, tmp_path)
    kinds = []
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer.tiktoken"):
        kinds.append(type(load(tmp_path)).__name__)
        (tmp_path / name).unlink()
    assert kinds == ["JsonTokenizer", "SentencePieceTokenizer", "TiktokenTokenizer"]
    assert load_tokenizer(tmp_path)[0] is None


@pytest.mark.parametrize("content", ["[1]", "{", "\ufffe"])
def test_a_malformed_config_is_named(tmp_path: Path, content: str) -> None:
    shutil.copy(nano_checkpoint("nano-dbrx") / "tokenizer.tiktoken", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.tiktoken").unlink()
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json"):
        load_tokenizer(tmp_path)


def test_marks_are_kept_as_they_came() -> None:
    ours, _ = nano("nano-phimoe")
    for form in ("NFC", "NFD"):
        text = unicodedata.normalize(form, "Crème brûlée Å ﬁ")
        assert ours.decode(ours.encode(text, add_special_tokens=False)) == text
