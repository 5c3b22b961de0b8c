"""Penalties, biases and bans of a request, over a real model."""

from __future__ import annotations

from typing import Any

import pytest

from deploy.demo import nano_checkpoint
from deploy.openai_errors import ApiError
from deploy.service import ApiService
from tests.deploy.conftest import load_nano, running_service

NANO = load_nano("nano-jamba")
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def service() -> Any:
    folder = nano_checkpoint("nano-jamba")
    with running_service(folder, executor="local", max_model_len=128) as service:
        yield service


@pytest.fixture
def ask(service: ApiService) -> Any:
    async def chat(**fields: Any) -> tuple[str, list[int]]:
        body = {"messages": QUESTION, "temperature": 0, "return_token_ids": True, "max_tokens": 12}
        reply = await service.chat({**body, **fields})
        assert isinstance(reply, dict)
        choice = reply["choices"][0]
        return choice["message"]["content"], choice["token_ids"]

    return chat


async def test_bias_forces_and_forbids(ask: Any) -> None:
    text, ids = await ask()
    assert "Paris" in text
    assert (await ask(logit_bias={str(ids[0]): -100}))[1][0] != ids[0]
    assert set((await ask(logit_bias={"40": 100}))[1]) == {40}
    assert set((await ask(allowed_token_ids=[41, 42]))[1]) <= {41, 42}


async def test_bad_words_do_not_appear(ask: Any) -> None:
    assert "Paris" not in (await ask(bad_words=["Paris"]))[0]


async def test_a_penalty_ends_a_repetition(ask: Any) -> None:
    forced = {"allowed_token_ids": [41, 42], "ignore_eos": True}
    plain = (await ask(**forced))[1]
    assert len(set(plain[-4:])) == 1, "left alone, it repeats itself"
    # The penalty grows with every repetition, until the other one wins.
    assert len(set((await ask(**forced, frequency_penalty=2))[1][-8:])) == 2


@pytest.mark.parametrize(
    "fields",
    [
        {"allowed_token_ids": [NANO.vocab_size]},
        {"logit_bias": {str(NANO.vocab_size): 1}},
        {"stop_token_ids": [NANO.vocab_size]},
    ],
)
async def test_ids_beyond_the_vocabulary_are_named(service: ApiService, fields: Any) -> None:
    with pytest.raises(ApiError) as refused:
        await service.chat({"messages": QUESTION, **fields})
    assert refused.value.body()["error"]["param"] == next(iter(fields))
    assert str(NANO.vocab_size - 1) in str(refused.value)
