"""Requests that the HTTP application refuses: each answer names the field at fault."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.deploy.http_client import client_of, is_openai_error, post

USER = [{"role": "user", "content": "Hi"}]
MakeApi = Callable[..., Any]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "x"}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
        ({"messages": USER, "temperature": "0.5"}, "temperature"),
        ({"messages": USER, "temperature": -1}, "temperature"),
        ({"messages": USER, "top_p": 0}, "top_p"),
        ({"messages": USER, "n": 0}, "n"),
        ({"messages": USER, "n": True}, "n"),
        ({"messages": USER, "seed": 2**63}, "seed"),
        ({"messages": USER, "max_tokens": 0}, "max_tokens"),
        ({"messages": USER, "max_completion_tokens": 10**6}, "max_completion_tokens"),
        ({"messages": USER, "stop": ""}, "stop"),
        ({"messages": USER, "stop_token_ids": [-1]}, "stop_token_ids"),
        ({"messages": USER, "min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({"messages": USER, "top_logprobs": 2}, "top_logprobs"),
        ({"messages": USER, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": USER, "tools": [{"type": "function"}]}, "tools"),
        ({"messages": USER, "response_format": {"type": "xml"}}, "response_format"),
        ({"messages": USER, "logit_bias": {"5": 101}}, "logit_bias"),
        ({"messages": USER, "logit_bias": {"x": 1}}, "logit_bias"),
        ({"messages": USER, "logit_bias": {"": 1}}, "logit_bias"),
        ({"messages": USER, "logit_bias": {"-1": 1}}, "logit_bias"),
        ({"messages": USER, "logit_bias": {"-0": 1}}, "logit_bias"),
        ({"messages": USER, "logit_bias": {"05": 1}}, "logit_bias"),
        ({"messages": USER, "logit_bias": {"+5": 1}}, "logit_bias"),
        ({"messages": USER, "logit_bias": {" 5": 1}}, "logit_bias"),
        ({"messages": USER, "logit_bias": {"1_0": 1}}, "logit_bias"),
        ({"messages": USER, "logit_bias": {"\u0665": 1}}, "logit_bias"),
        ({"messages": USER, "logit_bias": {"5": 1, "5 ": 2}}, "logit_bias"),
        ({"messages": USER, "logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"messages": USER, "logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"messages": USER, "allowed_token_ids": []}, "allowed_token_ids"),
        ({"messages": USER, "allowed_token_ids": [-1]}, "allowed_token_ids"),
        ({"messages": USER, "bad_words": [""]}, "bad_words"),
        ({"messages": USER, "repetition_penalty": 0}, "repetition_penalty"),
        ({"messages": USER, "frequency_penalty": 2.1}, "frequency_penalty"),
        ({"messages": USER, "best_of": 2}, "best_of"),
        ({"messages": USER, "echo": True}, "echo"),
        ({"messages": USER, "structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"messages": USER, "continue_final_message": True}, "continue_final_message"),
    ],
)
async def test_bad_chat_requests_name_the_field(
    make_api: MakeApi, body: dict[str, Any], param: str
) -> None:
    api = make_api()
    for stream in ({}, {"stream": True}):
        response = await post(api, "/v1/chat/completions", {**body, **stream})
        assert response.status_code == 400, response.text
        assert is_openai_error(response.json())
        assert response.json()["error"]["param"] == param
        assert response.json()["error"]["type"] == "invalid_request_error"
    assert not api.client.streams


async def test_stream_options_need_a_stream(make_api: MakeApi) -> None:
    response = await post(make_api(), "/v1/completions", {"prompt": [5], "stream_options": {}})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "stream_options"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [512]}, "prompt"),
        ({"prompt": [5], "echo": 1}, "echo"),
        ({"prompt": [5], "max_tokens": 0}, "max_tokens"),
        ({"prompt": [5], "prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt": [5], "prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt": [5], "prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"prompt": [5], "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"prompt": [5], "truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"prompt": [5], "truncation_side": "left"}, "truncation_side"),
        ({"prompt": [5], "truncate_prompt_tokens": 3, "truncation_side": "x"}, "truncation_side"),
        ({"prompt": [5], "suffix": "x"}, "suffix"),
        ({"prompt": [5], "logprobs": True}, "logprobs"),
    ],
)
async def test_bad_completion_requests_name_the_field(
    make_api: MakeApi, body: dict[str, Any], param: str
) -> None:
    response = await post(make_api(), "/v1/completions", body)
    assert response.status_code == 400, response.text
    assert is_openai_error(response.json())
    assert response.json()["error"]["param"] == param


async def test_prompt_that_does_not_fit(make_api: MakeApi) -> None:
    for body in ({"prompt": [5] * 256}, {"prompt": [5] * 200, "max_tokens": 57}):
        error = (await post(make_api(), "/v1/completions", body)).json()["error"]
        assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b"\xff\xfe", b"nul", b"[" * 100_000, b'"x"'])
async def test_bodies_that_are_no_json_object(make_api: MakeApi, raw: bytes) -> None:
    async with client_of(make_api().app()) as client:
        for path in ("/v1/chat/completions", "/v1/completions"):
            response = await client.post(path, content=raw)
            assert response.status_code == 400
            assert is_openai_error(response.json())


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"\ud800": 1}, "\\ud800"),
        ({"a\udfffb": "x"}, "a\\udfffb"),
        ({"messages": [{"role": "user", "content": "x", "\ud800": 1}]}, "messages"),
        ({"stream": True, "stream_options": {"\ud800": 1}}, "stream_options"),
    ],
)
async def test_a_name_that_is_no_unicode(
    make_api: MakeApi, body: dict[str, Any], param: str
) -> None:
    response = await post(make_api(), "/v1/chat/completions", {"messages": USER, **body})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert error["message"].startswith(param)
