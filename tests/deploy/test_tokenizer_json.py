"""tokenizer.json against Transformers' fast tokenizers."""

from __future__ import annotations

import json
import shutil
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from deploy.tokenizer import Detokenizer, TextTokenizer, TokenizerError, load_tokenizer
from tests.deploy.unicode_texts import CORPUS, texts, write_json

GPT4_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BASE = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
ADDED = [
    AddedToken("<|user|>", special=True, rstrip=True, normalized=False),
    AddedToken("<|left|>", special=True, lstrip=True, normalized=False),
    AddedToken("<|user|>x", special=False, normalized=False),
    AddedToken("word", special=False, single_word=True, normalized=False),
]
mixed = texts("<|user|>", " <|user|> ", "<|left|>", " <|left|>", "<|user|>x", "word", "<s>")


def byte_level() -> Any:
    """DBRX's kind: GPT-4's split, byte-level letters."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(GPT4_SPLIT), behavior="isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=list(BASE.values())
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return tokenizer


def llama() -> Any:
    """PhiMoE's and Jamba's kind: spaces as marks, bytes for characters that are not known."""
    pieces = [*BASE.values(), *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.train_from_iterator(
        CORPUS * 4, trainers.BpeTrainer(vocab_size=150, show_progress=False)
    )
    model = trained.to_str()
    parsed = json.loads(model)["model"]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, *parsed["vocab"]]))}
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in parsed["merges"]]
    bpe = models.BPE(
        vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(list(BASE.values()))
    return tokenizer


def llama_metaspace() -> Any:
    """The same as newer conversions write it."""
    tokenizer = llama()
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


KINDS = {"byte_level": byte_level, "llama": llama, "llama_metaspace": llama_metaspace}
kinds = st.sampled_from(list(KINDS))


@lru_cache
def folder(kind: str) -> TemporaryDirectory[str]:
    made = TemporaryDirectory()
    tokenizer = {"byte_level": byte_level, "llama": llama, "llama_metaspace": llama_metaspace}[
        kind
    ]()
    tokenizer.add_tokens(ADDED)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    # What a training script leaves behind must not reach prompts.
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(Path(made.name) / "tokenizer.json"))
    return made


@lru_cache
def pair(kind: str) -> tuple[TextTokenizer, Any]:
    path = Path(folder(kind).name)
    tokenizer, warnings = load_tokenizer(path)
    assert tokenizer is not None
    assert warnings == []
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"))
    theirs.backend_tokenizer.no_truncation()
    theirs.backend_tokenizer.no_padding()
    return tokenizer, theirs


@settings(deadline=None, max_examples=500)
@given(kinds, mixed, st.booleans())
def test_ids_are_transformers(kind: str, text: str, add_special_tokens: bool) -> None:
    ours, theirs = pair(kind)
    expected = theirs.encode(text, add_special_tokens=add_special_tokens)
    assert list(ours.encode(text, add_special_tokens=add_special_tokens)) == expected


@settings(deadline=None, max_examples=500)
@given(kinds, mixed, st.booleans())
def test_pieces_add_up_to_transformers_decoding(kind: str, text: str, skip: bool) -> None:
    ours, theirs = pair(kind)
    ids = ours.encode(text, add_special_tokens=True)
    detokenizer = Detokenizer(ours, skip_special_tokens=skip)
    pieces = [detokenizer.push(token_id) for token_id in ids]
    joined = "".join(pieces) + detokenizer.flush()
    assert joined == ours.decode(ids, skip_special_tokens=skip)
    expected = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    assert joined == expected
    assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "config",
    [
        {},
        BASE,
        {**BASE, "add_bos_token": True},
        {**BASE, "add_bos_token": False},
        {**BASE, "add_bos_token": True, "add_eos_token": True},
        {**BASE, "add_eos_token": True},
        {"add_bos_token": True},
        {**BASE, "additional_special_tokens": ["word"], "add_bos_token": True},
    ],
)
def test_the_post_processor_decides_on_bos_and_eos_as_in_transformers(
    tmp_path: Path, kind: str, config: dict[str, Any]
) -> None:
    shutil.copy(Path(folder(kind).name) / "tokenizer.json", tmp_path)
    named = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    write_json(tmp_path, "tokenizer_config.json", named)
    ours, _ = load_tokenizer(tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    theirs.backend_tokenizer.no_truncation()
    theirs.backend_tokenizer.no_padding()
    assert ours is not None
    for text in ("The dog", "<s>The dog</s>", ""):
        for special in (True, False):
            expected = theirs.encode(text, add_special_tokens=special)
            assert list(ours.encode(text, add_special_tokens=special)) == expected


def test_a_rendered_chat_gets_no_second_bos() -> None:
    ours, _ = pair("llama")
    bos = ours.token_id("<s>")
    rendered = "<s><|user|> Hello</s>"
    assert ours.encode(rendered, add_special_tokens=False).count(bos) == 1
    assert ours.encode("Hello", add_special_tokens=True)[0] == bos


def test_declared_tokens_change_flags_as_in_transformers(tmp_path: Path) -> None:
    shutil.copy(Path(folder("byte_level").name) / "tokenizer.json", tmp_path)
    plain, _ = pair("byte_level")
    user, left = plain.token_id("<|user|>"), plain.token_id("<|left|>")
    declared = {
        str(user): {"content": "<|user|>", "special": True, "normalized": False},
        str(left): {"content": "<|left|>", "special": True, "rstrip": True, "normalized": False},
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": declared}
    write_json(tmp_path, "tokenizer_config.json", config)
    ours, warnings = load_tokenizer(tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    theirs.backend_tokenizer.no_truncation()
    theirs.backend_tokenizer.no_padding()
    assert ours is not None
    assert warnings == []
    for text in ("a <|user|> b <|left|> c", "<|left|>\n\n<|user|>\n"):
        ids = theirs.encode(text, add_special_tokens=False)
        assert list(ours.encode(text, add_special_tokens=False)) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_files_that_disagree_on_an_id_are_told(tmp_path: Path) -> None:
    shutil.copy(Path(folder("llama").name) / "tokenizer.json", tmp_path)
    write_json(tmp_path, "added_tokens.json", {"<|user|>": 7, "<|none|>": 9})
    _, warnings = load_tokenizer(tmp_path)
    assert len(warnings) == 2
    assert all("tokenizer.json" in warning for warning in warnings)


def test_added_tokens_decode_to_their_own_text(tmp_path: Path) -> None:
    tokenizer = byte_level()
    # "é" is also the byte-level letter of a byte.
    tokenizer.add_tokens([AddedToken("<é>", normalized=False)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours, _ = load_tokenizer(tmp_path)
    assert ours is not None
    text = "a<é>b"
    assert ours.decode(ours.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize("content", ["{", "[]", '{"version": "1.0"}', "\ufeff"])
def test_a_malformed_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_pieces_that_only_look_like_bytes_are_text(tmp_path: Path) -> None:
    pieces = ["<0x41>", "<0xe2>", "<0xZZ>", "<0xé0>", "<0x4>", "<0x041>"]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours, _ = load_tokenizer(tmp_path)
    assert ours is not None
    assert ours.token_bytes(1) == b"\xe2"
    for i in (0, 2, 3, 4, 5):
        assert ours.token_bytes(i).decode() == tokenizer.decode([i])
