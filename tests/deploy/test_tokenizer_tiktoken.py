"""Tiktoken ranks against tiktoken itself and Transformers' conversion of them."""

from __future__ import annotations

import base64
import itertools
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import regex
import tiktoken
from hypothesis import given, settings
from tiktoken_ext import openai_public
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode

from deploy.tokenizer import Detokenizer, TextTokenizer, TokenizerError, load_tokenizer
from deploy.tokenizer_tiktoken import CL100K_SPLIT
from tests.deploy.unicode_texts import CORPUS, texts, write_json

SPECIALS = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>")
mixed = texts(*SPECIALS, "x<|im_start|>user\n", " <|im_end|> ", "<|im_start|", "<|im_end|>\n")


@lru_cache
def ranks() -> dict[bytes, int]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CL100K_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=450, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    vocab = tokenizer.get_vocab()
    return {bytes(byte_of[c] for c in t): vocab[t] for t in sorted(vocab, key=vocab.__getitem__)}


def write_ranks(file: Path, table: dict[bytes, int]) -> None:
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in table.items())
    file.write_text("".join(lines))


def special_ids() -> dict[str, int]:
    return {text: len(ranks()) + 1 + i for i, text in enumerate(SPECIALS)}


@lru_cache
def folder() -> TemporaryDirectory[str]:
    made = TemporaryDirectory()
    path = Path(made.name)
    write_ranks(path / "vocabulary.tiktoken", ranks())
    write_json(path, "added_tokens.json", special_ids())
    others = {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
    write_json(path, "special_tokens_map.json", names | others)
    write_json(path, "tokenizer_config.json", {"add_bos_token": False, "add_eos_token": False})
    return made


@lru_cache
def ours() -> TextTokenizer:
    tokenizer, warnings = load_tokenizer(Path(folder().name))
    assert tokenizer is not None
    assert warnings == []
    return tokenizer


@lru_cache
def library() -> Any:
    return tiktoken.Encoding(
        "test", pat_str=CL100K_SPLIT, mergeable_ranks=ranks(), special_tokens=special_ids()
    )


@settings(deadline=None, max_examples=300)
@given(mixed)
def test_ids_are_tiktokens(text: str) -> None:
    expected = library().encode(text, allowed_special="all")
    assert list(ours().encode(text, add_special_tokens=False)) == expected
    # The family's tokenizer adds no BOS.
    assert list(ours().encode(text, add_special_tokens=True)) == expected


@settings(deadline=None, max_examples=300)
@given(mixed)
def test_pieces_add_up_to_the_text(text: str) -> None:
    ids = ours().encode(text, add_special_tokens=False)
    assert b"".join(map(ours().token_bytes, ids)) == library().decode_bytes(ids) == text.encode()
    detokenizer = Detokenizer(ours(), skip_special_tokens=False)
    pieces = [detokenizer.push(token_id) for token_id in ids]
    assert "".join(pieces) == text
    assert detokenizer.flush() == ""
    plain = [i for i in ids if i not in special_ids().values()]
    assert ours().decode(ids) == library().decode(plain)


@lru_cache
def converted() -> Any:
    """Transformers' conversion to the tokenizers library."""
    file = str(Path(folder().name) / "vocabulary.tiktoken")
    return TikTokenConverter(vocab_file=file).converted()


@settings(deadline=None, max_examples=300)
@given(texts())
def test_transformers_conversion_agrees(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", "")
        expected = converted().encode(text, add_special_tokens=False).ids
    assert list(ours().encode(text, add_special_tokens=False)) == expected


@settings(deadline=None, max_examples=300)
@given(texts())
def test_the_split_is_gpt4s(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openai_public, "load_tiktoken_bpe", lambda *args, **kwargs: {})
        newest = openai_public.cl100k_base()["pat_str"]
    # Newer releases keep white space at the end of a text whole.
    text = text.rstrip() + "."
    assert regex.findall(CL100K_SPLIT, text) == regex.findall(newest, text)


def test_a_rendered_chat_gets_no_bos() -> None:
    rendered = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    ids = ours().encode(rendered, add_special_tokens=False)
    assert special_ids()["<|endoftext|>"] not in ids
    assert ids[0] == special_ids()["<|im_start|>"]


def test_ids_that_no_token_owns() -> None:
    first = len(ranks())
    assert ours().unused_ranges(first + 20) == ((first, first + 1), (first + 5, first + 20))
    assert ours().unused_ranges(first) == ()
    assert ours().decode([first, first + 19, 10**6], skip_special_tokens=False) == ""
    assert ours().token_id("<|pad|>") == first + 2
    assert ours().token_id(" the") == ranks()[b" the"]
    assert ours().token_id("<|none|>") is None


def cl100k_like() -> dict[bytes, int]:
    longer = (bytes(three) for three in itertools.product(range(256), repeat=3))
    tokens = itertools.chain((bytes([b]) for b in range(256)), itertools.islice(longer, 100_000))
    return {token: rank for rank, token in enumerate(tokens)}


def test_dbrx_vocabulary_has_a_hole_and_a_tail(tmp_path: Path) -> None:
    write_ranks(tmp_path / "tokenizer.tiktoken", cl100k_like())
    added = {"<|pad|>": 100277, "<|im_start|>": 100278, "<|im_end|>": 100279}
    write_json(tmp_path, "added_tokens.json", added)
    write_json(tmp_path, "special_tokens_map.json", {"bos_token": "<|endoftext|>"})
    write_json(tmp_path, "tokenizer_config.json", {"model_name": "gpt-4"})
    tokenizer, warnings = load_tokenizer(tmp_path)
    assert tokenizer is not None
    assert warnings == []
    assert tokenizer.token_id("<|endoftext|>") == 100257
    holes = ((100256, 100257), (100261, 100276), (100280, 100352))
    assert tokenizer.unused_ranges(100352) == holes
    assert tokenizer.encode("<|endoftext|><|im_end|>", add_special_tokens=True) == (100257, 100279)


def test_nothing_is_downloaded_for_a_wrapper_without_ranks(tmp_path: Path) -> None:
    write_json(tmp_path, "tokenizer_config.json", {"model_name": "gpt-4", "encoding_name": None})
    tokenizer, [warning] = load_tokenizer(tmp_path)
    assert tokenizer is None
    assert "gpt-4" in warning
    assert "nothing is downloaded" in warning
    assert "tokenizer.tiktoken" in warning


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"AA== 0\nQQ== one\n", "line 2"),
        (b"AA==\n", "line 1"),
        (b"A* 0\n", "line 1"),
        (b"AA== 0\n", "byte 0x01 has no rank"),
        (b"", "byte 0x00 has no rank"),
    ],
)
def test_a_malformed_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "tokenizer.tiktoken").write_bytes(content)
    with pytest.raises(TokenizerError, match=rf"tokenizer\.tiktoken: .*{message}"):
        load_tokenizer(tmp_path)


def test_ids_given_twice_are_refused(tmp_path: Path) -> None:
    table = ranks() | {b"another": 7}
    write_ranks(tmp_path / "tokenizer.tiktoken", table)
    with pytest.raises(TokenizerError, match="share a rank"):
        load_tokenizer(tmp_path)
    write_ranks(tmp_path / "tokenizer.tiktoken", ranks())
    write_json(tmp_path, "added_tokens.json", {"<|pad|>": 7})
    with pytest.raises(TokenizerError, match="which is a rank"):
        load_tokenizer(tmp_path)


def test_two_files_of_ranks_are_refused_unless_one_has_the_standard_name(tmp_path: Path) -> None:
    write_ranks(tmp_path / "a.tiktoken", ranks())
    (tmp_path / "b.tiktoken").write_bytes(b"")
    with pytest.raises(TokenizerError, match=r"a\.tiktoken, b\.tiktoken"):
        load_tokenizer(tmp_path)
    write_ranks(tmp_path / "tokenizer.tiktoken", ranks())
    assert load_tokenizer(tmp_path)[0] is not None
