"""Halves of characters anywhere in a request: 400 with the field's name, over HTTP and handles."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from deploy.handle_calls import HandleCalls
from tests.deploy.http_client import client_of, is_openai_error, post
from tests.deploy.odd_requests import FULL, spoiled
from tests.deploy.test_tools_api import ask, model_of, prompt_of, scripted

MakeApi = Callable[..., Any]
HALF = "a\udc00b"


async def test_each_text_of_a_request(make_api: MakeApi) -> None:
    api = make_api()
    calls = HandleCalls(api.service)
    cases = [(key, odd) for key, value in FULL.items() for odd in spoiled(value, HALF)]
    assert len(cases) > 60
    async with client_of(api.app()) as client:
        for key, odd in cases:
            body = {**FULL, key: odd}
            response = await client.post("/v1/chat/completions", content=json.dumps(body))
            assert response.status_code == 400, (key, odd)
            assert is_openai_error(response.json())
            error = response.json()["error"]
            assert (error["param"], error["code"]) == (key, "invalid_value")
            assert error["message"].startswith(key)
            assert "\\udc00" in error["message"]
            assert "Unicode" in error["message"]
            assert await calls.generate("chat", body) == response.json()
    assert not api.client.streams


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": ["x", HALF]}, "prompt"),
        ("/v1/completions", {"prompt": "x", "stop": HALF}, "stop"),
        ("/v1/classify", {"input": HALF}, "input"),
        ("/tokenize", {"prompt": HALF}, "prompt"),
        ("/detokenize", {"tokens": [5], "model": HALF}, "model"),
        ("/v1/completions", HALF, None),
        ("/v1/completions", [HALF], None),
    ],
)
async def test_on_every_route(make_api: MakeApi, path: str, body: Any, param: str | None) -> None:
    response = await post(make_api(), path, body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_whole_characters_pass_however_they_are_spelt(make_api: MakeApi) -> None:
    for raw in (rb'{"prompt": "\ud83d\ude00"}', '{"prompt": "😀"}'.encode()):
        async with client_of(make_api().app()) as client:
            answer = await client.post("/tokenize", content=raw)
            back = await client.post("/detokenize", json={"tokens": answer.json()["tokens"]})
        assert back.json()["prompt"].endswith("😀")


@pytest.mark.parametrize("form", ["jamba", "hermes", "json"])
async def test_arguments_that_spell_a_half_go_back_as_they_came(
    make_api: MakeApi, form: str, tmp_path: Any
) -> None:
    """A model may write it; its own words must not end the conversation."""
    model = model_of(form, tmp_path)
    api = scripted(make_api, model, "</think>ok")
    arguments = r'{"a": "\udc00"}'
    call = {"id": "i", "type": "function", "function": {"name": "f", "arguments": arguments}}
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "i", "content": "c"},
    ]
    await ask(api, messages=turns)
    assert r"udc00" in prompt_of(api, model)
