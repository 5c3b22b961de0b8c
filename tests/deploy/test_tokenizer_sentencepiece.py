"""tokenizer.model against sentencepiece itself and Transformers' Llama tokenizers."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from transformers import AddedToken, LlamaTokenizer
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from deploy.tokenizer import Detokenizer, TextTokenizer, TokenizerError, load_tokenizer
from tests.deploy.unicode_texts import texts, train_sentencepiece, write_json

# Flags as some published revisions of these families set them, and worse ones.
FLAGS: dict[str, dict[str, bool]] = {
    "<|user|>": {"rstrip": True},
    "<|user|>x": {},
    "<|left|>": {"lstrip": True},
    "<|both|>": {"lstrip": True, "rstrip": True},
    "word": {"single_word": True, "special": False},
    "plain": {"special": False},
}
BASE = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
added_texts = texts(*FLAGS, *(f" {text} " for text in FLAGS), "<|user|>\n", " word ", "words")


@lru_cache
def model_bytes() -> bytes:
    return train_sentencepiece()


@lru_cache
def size() -> int:
    return int(sentencepiece.SentencePieceProcessor(model_proto=model_bytes()).get_piece_size())


def decoder_entries() -> dict[str, dict[str, Any]]:
    base = {"special": True, "normalized": False}
    entries = {text: {"content": text, **base} for text in BASE.values()}
    ids = {"<unk>": 0, "<s>": 1, "</s>": 2} | {text: size() + i for i, text in enumerate(FLAGS)}
    entries |= {text: {"content": text, **base, **flags} for text, flags in FLAGS.items()}
    return {str(ids[text]): entry for text, entry in entries.items()}


@lru_cache
def folder(**config: Any) -> TemporaryDirectory[str]:
    made = TemporaryDirectory()
    path = Path(made.name)
    (path / "tokenizer.model").write_bytes(model_bytes())
    entries = {"added_tokens_decoder": decoder_entries()}
    write_json(path, "tokenizer_config.json", {**BASE, **entries, **config})
    return made


@lru_cache
def ours(**config: Any) -> TextTokenizer:
    tokenizer, warnings = load_tokenizer(Path(folder(**config).name))
    assert tokenizer is not None
    assert warnings == []
    return tokenizer


@lru_cache
def bare() -> tuple[TextTokenizer, Any]:
    """A tokenizer.model alone in its folder."""
    made = TemporaryDirectory()
    path = Path(made.name) / "tokenizer.model"
    path.write_bytes(model_bytes())
    tokenizer, _ = load_tokenizer(path.parent)
    made.cleanup()
    assert tokenizer is not None
    return tokenizer, sentencepiece.SentencePieceProcessor(model_proto=model_bytes())


@lru_cache
def slow() -> Any:
    """Transformers' slow tokenizer, the reference for added tokens' flags."""
    path = Path(folder().name) / "tokenizer.model"
    tokenizer = SentencePieceBackend(vocab_file=str(path), legacy=True, **BASE)
    tokens = [AddedToken(text, normalized=False, **f) for text, f in FLAGS.items()]
    tokenizer.add_tokens(tokens)
    return tokenizer


@lru_cache
def fast() -> Any:
    """Transformers' conversion of the same file, in its folder's words."""
    return LlamaTokenizer.from_pretrained(folder(legacy=False).name)


@settings(deadline=None, max_examples=500)
@given(texts())
def test_a_bare_model_is_sentencepiece(text: str) -> None:
    mine, library = bare()
    assert list(mine.encode(text, add_special_tokens=False)) == library.encode(text)
    assert list(mine.encode(text, add_special_tokens=True)) == [1, *library.encode(text)]


@settings(deadline=None, max_examples=500)
@given(texts())
def test_decoding_gives_back_what_sentencepiece_decodes(text: str) -> None:
    mine, library = bare()
    ids = library.encode(text)
    # The library drops the dummy prefix; here text goes on from a prompt.
    assert mine.decode(ids).removeprefix(" ") == library.decode(ids)
    detokenizer = Detokenizer(mine)
    pieces = [detokenizer.push(i) for i in ids]
    assert "".join(pieces) + detokenizer.flush() == mine.decode(ids)
    assert "\ufffd" not in "".join(pieces) or "\ufffd" in text


@settings(deadline=None, max_examples=500)
@given(added_texts)
def test_added_tokens_are_cut_out_as_transformers_does(text: str) -> None:
    expected = slow().encode(text, add_special_tokens=False)
    assert list(ours().encode(text, add_special_tokens=False)) == expected


@settings(deadline=None, max_examples=500)
@given(texts("<s>", "<|user|>x", "plain", " plain"))
def test_only_the_start_of_a_text_gets_a_space_without_legacy(text: str) -> None:
    # The conversion keeps a literal mark, which sentencepiece cannot tell from a space, and takes
    # a leading space for the prefix, which sentencepiece would add to it.
    text = text.replace("▁", "_").lstrip(" ")
    expected = fast().encode(text, add_special_tokens=False)
    assert list(ours(legacy=False).encode(text, add_special_tokens=False)) == expected


@pytest.mark.parametrize(
    ("config", "before", "after"),
    [
        ({}, [1], []),
        ({"add_bos_token": True, "add_eos_token": True}, [1], [2]),
        ({"add_bos_token": False}, [], []),
        ({"add_bos_token": False, "add_eos_token": True}, [], [2]),
        ({"add_bos_token": True, "bos_token": "<|user|>"}, ["<|user|>"], []),
    ],
)
def test_bos_and_eos(config: dict[str, Any], before: list[Any], after: list[Any]) -> None:
    tokenizer = ours(**config)
    middle = tokenizer.encode("The dog", add_special_tokens=False)
    before = [tokenizer.token_id(t) if isinstance(t, str) else t for t in before]
    assert tokenizer.encode("The dog", add_special_tokens=True) == (*before, *middle, *after)


def test_a_rendered_chat_gets_no_second_bos() -> None:
    tokenizer = ours(add_bos_token=True)
    rendered = "<s><|user|> Hello</s>"
    assert tokenizer.encode(rendered, add_special_tokens=False).count(1) == 1
    assert tokenizer.encode(rendered, add_special_tokens=True).count(1) == 2


def test_special_tokens_are_skipped_or_kept() -> None:
    tokenizer = ours()
    ids = tokenizer.encode("<s>The<|user|>dog plain", add_special_tokens=False)
    assert tokenizer.decode(ids) == " The dog plain"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s> The<|user|> dog plain"
    assert tokenizer.special_ids == {0, 1, 2, *range(size(), size() + 4)}


def test_legacy_files_name_added_tokens(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model_bytes())
    write_json(tmp_path, "added_tokens.json", {"<|end|>": size() + 2, "<|user|>": size()})
    marks = {"additional_special_tokens": [{"content": "<|user|>", "rstrip": True}, "</s>"]}
    write_json(tmp_path, "special_tokens_map.json", {**marks, "pad_token": "<pad>"})
    write_json(tmp_path, "tokenizer_config.json", {"add_bos_token": False})
    tokenizer, warnings = load_tokenizer(tmp_path)
    assert tokenizer is not None
    assert warnings == ["tokenizer: special token '<pad>' has no id and is left out"]
    dog = tokenizer.encode("dog", add_special_tokens=False)
    assert tokenizer.encode("<|user|>\n dog", add_special_tokens=True) == (size(), *dog)
    assert tokenizer.encode("<|end|></s>", add_special_tokens=True) == (size() + 2, 2)
    assert tokenizer.special_ids == {0, 1, 2, size()}
    assert tokenizer.unused_ranges(size() + 5) == (
        (size() + 1, size() + 2),
        (size() + 3, size() + 5),
    )
    assert tokenizer.decode([size() + 1, size() + 4, 10**9]) == ""


def test_pieces_that_only_help_to_merge_belong_to_no_token(tmp_path: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model_bytes())
    proto = ModelProto()
    proto.ParseFromString(model_bytes())
    the = processor.piece_to_id("▁the")
    proto.pieces[the].type = 5
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    tokenizer, _ = load_tokenizer(tmp_path)
    assert tokenizer is not None
    assert the not in tokenizer.encode("the the", add_special_tokens=False)
    assert tokenizer.unused_ranges(size()) == ((the, the + 1),)
    assert tokenizer.token_bytes(the) == b""


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": []}, "added_tokens_decoder"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}, "'x'"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"900": "a"}}, "900"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"900": {"content": "a", "rstrip": 1}}},
            "rstrip",
        ),
        *(
            ("tokenizer_config.json", {key: value}, f"{key} of tokenizer_config.json")
            for key in ("additional_special_tokens", "extra_special_tokens")
            for value in (5, True, False, "<x>")
        ),
        ("added_tokens.json", {"a": "1"}, "'a'"),
        ("added_tokens.json", {"a": 900, "b": 900}, "share id 900"),
    ],
)
def test_malformed_files_are_named(
    tmp_path: Path, name: str, value: dict[str, Any], message: str
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model_bytes())
    write_json(tmp_path, name, value)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\n", b""])
def test_a_file_that_is_no_model(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], content: bytes
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.model"):
        load_tokenizer(tmp_path)
    assert content or capfd.readouterr().err == ""
