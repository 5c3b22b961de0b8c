"""Texts that break tokenizers, and small tokenizers to break, trained on the spot."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sentencepiece
from hypothesis import strategies as st

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the lazy dog sleeps.",
    "What is the capital of France? The capital of France is Paris.",
    "def main():\n    return [x for x in range(10) if x % 2 == 0]\n",
    "Übergrößenträger fließen über die Straße; où est l'œuvre d'été?",
    "Москва столица России. 東京は日本の首都です。",
    "don't can't WE'RE I'll 12 345 6789  two  spaces   three",
]
_FRAGMENTS = [
    *(" ", "  ", "     ", "\n", "\n\n\n", "\t", "\r\n", " \n ", "\x00", "\x07", "\x1c", "\x7f"),
    *("\u00a0", "\u2028", "\u200b", "\u200d", "\ufeff", "\u0301", "e\u0301\u0323", "▁", "▁▁a"),
    *("😀", "👩‍👩‍👧", "🇫🇷", "𝔘𝔫𝔦", "é", "ß", "ſ", "İ", "ﬁ", "Москва", "日本", "ا", "한국"),
    *("The", " the", " quick brown", "capital", "don't", "WE'RE", "12345", "x", "?!", "Ġ", "Ċ"),
    *("<0x41>", "<unk>", "<s>", "</s>", "<|", "|>", "<"),
]


def texts(*extra: str) -> st.SearchStrategy[str]:
    """Random Unicode without surrogates, awkward fragments, and `extra` glued to both."""
    characters = st.characters(exclude_categories=["Cs"])
    part = st.one_of(st.text(characters, max_size=6), st.sampled_from([*_FRAGMENTS, *extra]))
    return st.lists(part, max_size=8).map("".join)


def train_sentencepiece(vocab_size: int = 420, **options: Any) -> bytes:
    """A BPE model with byte fallback, as Llama's: no normalisation, every space kept."""
    model = io.BytesIO()
    defaults: dict[str, Any] = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "num_threads": 1,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4),
        model_writer=model,
        vocab_size=vocab_size,
        **(defaults | options),
    )
    return model.getvalue()


def write_json(folder: Path, name: str, value: Mapping[str, Any]) -> None:
    (folder / name).write_text(json.dumps(value), encoding="utf-8")
