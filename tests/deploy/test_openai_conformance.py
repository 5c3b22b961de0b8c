"""Every option through the openai package, whose types the raw answers must satisfy strictly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai
import pytest

from tests.deploy.test_openai_client import client, served
from tests.sdk_shapes import (
    check_chat,
    check_chat_chunks,
    check_completion,
    check_completion_chunks,
    check_model,
)

MakeApi = Callable[..., Any]
USER: Any = [{"role": "user", "content": "Hi"}]
CHAT_OPTIONS: list[dict[str, Any]] = [
    {},
    {"n": 3},
    {"logprobs": True},
    {"logprobs": True, "top_logprobs": 3},
    {"max_tokens": 1},
    {"max_completion_tokens": 2, "stop": ["there"]},
    {"temperature": 0.0, "top_p": 0.5, "seed": 7, "user": "u", "metadata": {"a": "b"}},
    {"presence_penalty": 1, "frequency_penalty": -1.5, "logit_bias": {"70": -100}},
    {"extra_body": {"return_token_ids": True, "prompt_logprobs": None, "odd": 1}},
    {"extra_body": {"top_k": 3, "min_p": 0.1, "return_tokens_as_token_ids": True}},
]
COMPLETION_OPTIONS: list[dict[str, Any]] = [
    {},
    {"prompt": ["a", "b"], "n": 2},
    {"prompt": [5, 6]},
    {"prompt": [[5], [6, 7]], "max_tokens": 2},
    {"logprobs": 0},
    {"logprobs": 2},
    {"echo": True, "stop": "there"},
    {"extra_body": {"return_token_ids": True, "truncate_prompt_tokens": 1}},
]


@pytest.mark.parametrize("options", CHAT_OPTIONS)
async def test_chat_completions(make_api: MakeApi, options: dict[str, Any]) -> None:
    async with served(make_api("Hello there")) as base:
        create = client(base).chat.completions.with_raw_response.create
        raw = await create(model="nano-jamba", messages=USER, **options)
        body = raw.http_response.json()
        reply = check_chat(body)
        assert len(reply.choices) == options.get("n", 1)
        assert reply == raw.parse()
        stream = await client(base).chat.completions.create(
            model="nano-jamba",
            messages=USER,
            stream=True,
            stream_options={"include_usage": True},
            **options,
        )
        chunks = check_chat_chunks([c.to_dict() async for c in stream], options.get("n", 1))
    assert chunks[-1].usage == reply.usage
    for choice in reply.choices:
        mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(c.delta.content or "" for c in mine) == choice.message.content
        assert mine[-1].finish_reason == choice.finish_reason
        entries = [entry for c in mine if c.logprobs for entry in c.logprobs.content or []]
        theirs = choice.logprobs and choice.logprobs.content
        assert entries == (theirs or [])


@pytest.mark.parametrize("options", COMPLETION_OPTIONS)
async def test_completions(make_api: MakeApi, options: dict[str, Any]) -> None:
    given: dict[str, Any] = {"model": "nano-jamba", "prompt": "Hi", **options}
    async with served(make_api("Hello there")) as base:
        raw = await client(base).completions.with_raw_response.create(**given)
        reply = check_completion(raw.http_response.json())
        stream = await client(base).completions.create(**given, stream=True)
        chunks = check_completion_chunks([c.to_dict() async for c in stream], len(reply.choices))
    for choice in reply.choices:
        mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(c.text for c in mine) == choice.text
        assert mine[-1].finish_reason == choice.finish_reason


async def test_continuous_usage_rises_to_the_whole(make_api: MakeApi) -> None:
    async with served(make_api("Hello there")) as base:
        stream = await client(base).chat.completions.create(
            model="nano-jamba",
            messages=USER,
            stream=True,
            stream_options={"include_usage": True, "continuous_usage_stats": True},  # type: ignore
        )
        chunks = check_chat_chunks([chunk.to_dict() async for chunk in stream])
    counts = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage]
    assert len(counts) == len(chunks)
    assert counts == sorted(counts)
    assert counts[-1] > 1


async def test_models(make_api: MakeApi) -> None:
    async with served(make_api()) as base:
        raw = await client(base).models.with_raw_response.list()
        body = raw.http_response.json()
        assert body.keys() == {"object", "data"}
        assert [check_model(card).id for card in body["data"]] == ["nano-jamba"]
        one = await client(base).models.with_raw_response.retrieve("nano-jamba")
        assert check_model(one.http_response.json()).owned_by == "conclave"
        with pytest.raises(openai.NotFoundError) as missing:
            await client(base).models.retrieve("other")
        assert (missing.value.param, missing.value.code) == ("model", "model_not_found")


@pytest.mark.parametrize(
    ("options", "param", "code"),
    [
        ({"messages": []}, "messages", None),
        ({"temperature": 3}, "temperature", None),
        ({"n": 0}, "n", None),
        ({"max_tokens": 10**6}, "max_tokens", "context_length_exceeded"),
        ({"logit_bias": {"x": 1}}, "logit_bias", None),
        ({"modalities": ["audio"]}, "modalities", "unsupported_parameter"),
        ({"extra_body": {"best_of": 2}}, "best_of", "unsupported_parameter"),
        ({"messages": [{"role": "user", "content": "word " * 400}]}, "messages", None),
    ],
)
async def test_refusals_are_bad_requests_with_the_field(
    make_api: MakeApi, options: dict[str, Any], param: str, code: str | None
) -> None:
    async with served(make_api()) as base:
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError) as error:
                await client(base).chat.completions.create(
                    **{"model": "nano-jamba", "messages": USER, **options}, stream=stream
                )
            assert error.value.param == param
            assert code is None or error.value.code == code
            assert error.value.type == "invalid_request_error"


async def test_an_error_inside_a_stream_is_the_clients_exception(make_api: MakeApi) -> None:
    from shards.client import SequenceFailed

    api = make_api(ids=[70, 71], error=SequenceFailed("the logits are not finite"))
    async with served(api) as base:
        stream = await client(base).chat.completions.create(
            model="nano-jamba", messages=USER, stream=True
        )
        with pytest.raises(openai.APIError) as error:
            async for _ in stream:
                pass
        assert error.value.code == "not_finite"
