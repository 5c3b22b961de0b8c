"""The openai package over every endpoint of one real server, sync and async, streamed and not."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.conftest import serving
from tests.sdk_shapes import (
    check_chat,
    check_chat_chunks,
    check_completion,
    check_completion_chunks,
    check_model,
)

pytestmark = pytest.mark.e2e
MODEL = "nano-jamba"
KEY = "conformance"
USER: Any = [{"role": "user", "content": "What is 20 + 15?"}]
CHAT: dict[str, Any] = {"model": MODEL, "messages": USER, "temperature": 0, "max_tokens": 12}
TEXT: dict[str, Any] = {"model": MODEL, "prompt": "What is", "temperature": 0, "max_tokens": 8}
CHAT_OPTIONS: list[dict[str, Any]] = [
    {},
    {"n": 3, "temperature": 1.0, "seed": 5},
    {"logprobs": True, "top_logprobs": 4},
    {"stop": ["5"]},
    {"max_tokens": 1},
    {"presence_penalty": 1.5, "frequency_penalty": 1.5, "logit_bias": {"70": -100}},
    {"extra_body": {"return_token_ids": True, "top_k": 2, "repetition_penalty": 1.1}},
    {"extra_body": {"min_tokens": 12, "ignore_eos": True, "skip_special_tokens": False}},
]
COMPLETION_OPTIONS: list[dict[str, Any]] = [
    {},
    {"prompt": [5, 6, 7], "logprobs": 3},
    {"prompt": ["What", "is"], "n": 2, "seed": 3, "temperature": 1.0},
    {"echo": True, "logprobs": 1, "max_tokens": 2},
    {"extra_body": {"truncate_prompt_tokens": 2, "return_token_ids": True}},
]
CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Bern", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "c", "schema": CITY}}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "go", "parameters": CITY}}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One server for all of this file: starting Ray takes longer than all the requests."""
    log: Path = tmp_path_factory.mktemp("sdk") / "server.log"
    flags = ("--dtype", "float32", "--api-key", KEY, "--trust-request-chat-template")
    with serving(log, MODEL, *flags) as server:
        yield server.url


@pytest.fixture
def api(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


def async_api(url: str, key: str = KEY) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)


def root(url: str) -> openai.OpenAI:
    """For the routes that are not under /v1."""
    return openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=60)


@pytest.mark.parametrize("options", CHAT_OPTIONS)
async def test_chat_four_ways(api: openai.OpenAI, url: str, options: dict[str, Any]) -> None:
    given: dict[str, Any] = {**CHAT, **options}
    raw = api.chat.completions.with_raw_response.create(**given)
    whole = check_chat(raw.http_response.json())
    assert whole.model == MODEL
    streamed = {**given, "stream": True, "stream_options": {"include_usage": True}}
    sync_bodies = [chunk.to_dict() for chunk in api.chat.completions.create(**streamed)]
    async with async_api(url) as client:
        again = await client.chat.completions.with_raw_response.create(**given)
        other = check_chat(again.http_response.json())
        stream = await client.chat.completions.create(**streamed)
        async_bodies = [chunk.to_dict() async for chunk in stream]
    assert other.choices == whole.choices
    for bodies in (sync_bodies, async_bodies):
        chunks = check_chat_chunks(bodies, len(whole.choices))
        assert chunks[-1].usage is not None
        assert whole.usage is not None
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
        for choice in whole.choices:
            mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
            assert "".join(c.delta.content or "" for c in mine) == choice.message.content
            assert mine[-1].finish_reason == choice.finish_reason
            entries = [entry for c in mine if c.logprobs for entry in c.logprobs.content or []]
            assert entries == ((choice.logprobs and choice.logprobs.content) or [])


@pytest.mark.parametrize("options", COMPLETION_OPTIONS)
async def test_completions_four_ways(api: openai.OpenAI, url: str, options: dict[str, Any]) -> None:
    given: dict[str, Any] = {**TEXT, **options}
    raw = api.completions.with_raw_response.create(**given)
    whole = check_completion(raw.http_response.json())
    sync_bodies = [chunk.to_dict() for chunk in api.completions.create(**given, stream=True)]
    async with async_api(url) as client:
        again = await client.completions.with_raw_response.create(**given)
        other = check_completion(again.http_response.json())
        stream = await client.completions.create(**given, stream=True)
        async_bodies = [chunk.to_dict() async for chunk in stream]
    assert other.choices == whole.choices
    for bodies in (sync_bodies, async_bodies):
        chunks = check_completion_chunks(bodies, len(whole.choices))
        for choice in whole.choices:
            mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
            assert "".join(c.text for c in mine) == choice.text
            assert mine[-1].finish_reason == choice.finish_reason


async def test_the_answer_is_right_and_ends_itself(api: openai.OpenAI) -> None:
    reply = api.chat.completions.create(**CHAT)
    assert (reply.choices[0].message.content or "").strip() == "35"
    assert reply.choices[0].finish_reason == "stop"


async def test_many_streams_at_once(url: str) -> None:
    async with async_api(url) as client:

        async def one(number: int) -> str:
            messages: Any = [{"role": "user", "content": f"What is {number} + 3?"}]
            stream = await client.chat.completions.create(
                **{**CHAT, "messages": messages}, stream=True
            )
            bodies = [chunk.to_dict() async for chunk in stream]
            chunks = check_chat_chunks(bodies)
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

        together = await asyncio.gather(*map(one, range(40)))
        alone = [await one(number) for number in range(0, 40, 8)]
    assert together[::8] == alone


async def test_models(api: openai.OpenAI, url: str) -> None:
    assert [model.id for model in api.models.list()] == [MODEL]
    raw = api.models.with_raw_response.retrieve(MODEL)
    assert check_model(raw.http_response.json()).id == MODEL
    async with async_api(url) as client:
        assert [model.id async for model in client.models.list()] == [MODEL]
        assert (await client.models.retrieve(MODEL)).id == MODEL


def test_tokenize_is_what_is_generated_from(url: str) -> None:
    with root(url) as client:
        tokenized: Any = client.post("/tokenize", cast_to=object, body={"messages": USER})
        assert tokenized["count"] == len(tokenized["tokens"])
        reply = client.post(
            "/v1/chat/completions", cast_to=object, body={**CHAT, "return_token_ids": True}
        )
        assert reply["prompt_token_ids"] == tokenized["tokens"]  # type: ignore[index]
        back: Any = client.post("/detokenize", cast_to=object, body={"tokens": tokenized["tokens"]})
        assert USER[0]["content"] in back["prompt"]
        again: Any = client.post(
            "/tokenize",
            cast_to=object,
            body={"prompt": back["prompt"], "add_special_tokens": False},
        )
        assert again["tokens"] == tokenized["tokens"]


def test_a_trusted_template_of_the_request(api: openai.OpenAI) -> None:
    own = "{{ bos_token }}{{ messages[0].content }}"
    reply = api.chat.completions.create(
        **CHAT, extra_body={"chat_template": own, "return_token_ids": True}
    )
    with pytest.raises(openai.BadRequestError) as error:
        api.chat.completions.create(**CHAT, extra_body={"chat_template": "a\n{{ x.y.z }}"})
    assert reply.choices[0].message.content is not None
    assert (error.value.param, error.value.code) == ("chat_template", "chat_template_error")
    assert "line 2" in error.value.message


@pytest.mark.parametrize(
    ("given", "kind", "param", "code"),
    [
        ({"model": "other"}, openai.NotFoundError, "model", "model_not_found"),
        ({"temperature": -1}, openai.BadRequestError, "temperature", None),
        ({"max_tokens": 10**6}, openai.BadRequestError, "max_tokens", "context_length_exceeded"),
        ({"modalities": ["audio"]}, openai.BadRequestError, "modalities", "unsupported_parameter"),
        ({"messages": [{"role": "user", "content": 5}]}, openai.BadRequestError, "messages", None),
        ({"logit_bias": {"-1": 1}}, openai.BadRequestError, "logit_bias", None),
    ],
)
async def test_errors_are_the_clients_own(
    api: openai.OpenAI,
    url: str,
    given: dict[str, Any],
    kind: type[openai.APIStatusError],
    param: str,
    code: str | None,
) -> None:
    for stream in (False, True):
        with pytest.raises(kind) as error:
            api.chat.completions.create(**{**CHAT, **given}, stream=stream)
        assert error.value.param == param
        assert code is None or error.value.code == code
        async with async_api(url) as client:
            with pytest.raises(kind):
                await client.chat.completions.create(**{**CHAT, **given}, stream=stream)


async def test_keys(url: str) -> None:
    async with async_api(url, "wrong") as client:
        with pytest.raises(openai.AuthenticationError) as error:
            await client.models.list()
        assert error.value.code == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            await client.chat.completions.create(**CHAT, stream=True)
    for path in ("/tokenize", "/detokenize"):
        assert httpx.post(f"{url}{path}", json={"prompt": "a"}).status_code == 401
    assert httpx.get(f"{url}/health").json() == {"state": "ready"}
    assert httpx.get(f"{url}/ready").status_code == 200


def test_the_other_routes(url: str) -> None:
    with root(url) as client:
        version: Any = client.get("/version", cast_to=object)
        assert version["dtype"] == "float32"
        experts: Any = client.get("/v1/experts", cast_to=object)
        assert {actor["role"] for actor in experts["actors"]} >= {"engine"}
        for path in ("/v1/classify", "/classify"):
            with pytest.raises(openai.BadRequestError):
                client.post(path, cast_to=object, body={"input": "x"})
        with pytest.raises(openai.NotFoundError):
            client.get("/v1/nothing", cast_to=object)


def test_a_stream_that_is_closed_leaves_the_server_well(api: openai.OpenAI) -> None:
    body: Any = {**TEXT, "max_tokens": 200, "extra_body": {"ignore_eos": True}}
    for _ in range(20):
        with api.completions.create(**body, stream=True) as stream:
            next(iter(stream))
    content = api.chat.completions.create(**CHAT).choices[0].message.content
    assert (content or "").strip() == "35"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "go"}}])
async def test_forced_calls_four_ways(api: openai.OpenAI, url: str, choice: Any) -> None:
    given: dict[str, Any] = {**CHAT, "max_tokens": 60, "tools": [TOOL], "tool_choice": choice}
    given["parallel_tool_calls"] = False
    raw = api.chat.completions.with_raw_response.create(**given)
    [whole] = check_chat(raw.http_response.json()).choices
    sync_bodies = [c.to_dict() for c in api.chat.completions.create(**given, stream=True)]
    async with async_api(url) as client:
        stream = await client.chat.completions.create(**given, stream=True)
        async_bodies = [chunk.to_dict() async for chunk in stream]
    assert (whole.finish_reason, whole.message.content) == ("tool_calls", None)
    [call] = whole.message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "go"
    assert json.loads(call.function.arguments)["city"] in ("Bern", "Rome")
    for bodies in (sync_bodies, async_bodies):
        chunks = check_chat_chunks(bodies)
        assert chunks[-1].choices[0].finish_reason == "tool_calls"
        deltas = [d for c in chunks for d in c.choices[0].delta.tool_calls or [] if d.function]
        assert len({delta.id for delta in deltas if delta.id}) == 1
        assert [d.function.name for d in deltas if d.function and d.function.name] == ["go"]
        arguments = [d.function.arguments or "" for d in deltas if d.function]
        assert "".join(arguments) == call.function.arguments


@pytest.mark.parametrize(
    ("options", "form"),
    [
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "c", "schema": CITY},
                }
            },
            r'\s*\{\s*"city"\s*:\s*"(Bern|Rome)"\s*\}\s*',
        ),
        ({"extra_body": {"structured_outputs": {"choice": ["yes", "no"]}}}, "yes|no"),
        ({"extra_body": {"structured_outputs": {"regex": "[A-C]{3}[0-9]"}}}, "[A-C]{3}[0-9]"),
        ({"extra_body": {"structured_outputs": {"grammar": 'start: "a" "b"+ "."'}}}, r"ab+\."),
    ],
)
async def test_answers_of_a_form(
    api: openai.OpenAI, url: str, options: dict[str, Any], form: str
) -> None:
    given: dict[str, Any] = {**CHAT, "max_tokens": 60, "temperature": 1.0, "seed": 4, **options}
    whole = check_chat(api.chat.completions.with_raw_response.create(**given).http_response.json())
    async with async_api(url) as client:
        stream = await client.chat.completions.create(**given, stream=True)
        chunks = check_chat_chunks([chunk.to_dict() async for chunk in stream])
    text = whole.choices[0].message.content or ""
    assert whole.choices[0].finish_reason == "length" or re.fullmatch(form, text)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
