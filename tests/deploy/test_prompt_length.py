"""A text is refused unread only if no tokenizer could make it fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from deploy.openai_errors import ApiError
from deploy.prompt_length import check_length
from deploy.tokenizer import TextTokenizer
from tests.deploy.conftest import load_nano
from tests.deploy.http_client import post

NAMES = ("nano-dbrx", "nano-phimoe", "nano-jamba")


def tokenizer_of(name: str) -> TextTokenizer:
    tokenizer = load_nano(name).tokenizer
    assert tokenizer is not None
    return tokenizer


@pytest.mark.parametrize("name", NAMES)
def test_what_fits_is_never_refused(name: str) -> None:
    tokenizer = tokenizer_of(name)
    longest = max((tokenizer.token_bytes(i) for i in range(512)), key=lambda b: len(b.strip()))
    assert tokenizer.longest_token == len(longest.strip())
    texts = [
        longest.decode(errors="replace") * 500,
        " " * 10**5,
        "a\u0301" * 999,
        "\u1112\u1161" * 99,
    ]
    for text in texts:
        needs = len(tokenizer.encode(text, add_special_tokens=False))
        check_length(tokenizer, text, needs, "prompt")


@pytest.mark.parametrize("name", NAMES)
def test_what_cannot_fit_is_refused(name: str) -> None:
    with pytest.raises(ApiError) as caught:
        check_length(tokenizer_of(name), "some words " * 10**5, 256, "prompt")
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")


class NoEncoding(TextTokenizer):
    """Must not be asked for tokens."""

    longest_token = 10

    def encode(self, *_: Any, **__: Any) -> tuple[int, ...]:
        raise AssertionError("tokenized")


NoEncoding.__abstractmethods__ = frozenset()


async def test_hopeless_prompts_are_not_tokenized(make_api: Callable[..., Any]) -> None:
    api = make_api()
    api.service._model = replace(api.model, tokenizer=NoEncoding())  # type: ignore[abstract]
    text = "word " * 10**6
    for path, body, param in (
        ("/v1/completions", {"prompt": text}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}, "messages"),
    ):
        response = await post(api, path, body)
        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", param)
