"""Texts that cost seconds: bounded, off the event loop, and in nobody's way."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from deploy.openai_errors import ApiError
from deploy.text_threads import LONG_TEXT, TextLanes
from tests.deploy.http_client import client_of, is_openai_error, post
from tests.deploy.test_overload import Counted
from tests.deploy.test_prompt_length import NoEncoding

MakeApi = Callable[..., Any]


@pytest.mark.parametrize("blank", [" ", "\n", " \t\r\n", "\u3000"])
@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/tokenize", "prompt"),
        ("/tokenize", "messages"),
        ("/v1/completions", "prompt"),
        ("/v1/chat/completions", "messages"),
    ],
)
async def test_white_space_without_end_is_not_tokenized(
    make_api: MakeApi, path: str, field: str, blank: str
) -> None:
    api = make_api()
    api.service._model = replace(api.model, tokenizer=NoEncoding())  # type: ignore[abstract]
    text = blank * (262_145 // len(blank) + 1)
    value: Any = [{"role": "user", "content": text}] if field == "messages" else text
    response = await post(api, path, {field: value})
    assert response.status_code == 400
    assert is_openai_error(response.json())
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", field)
    assert "allowed are 262144" in error["message"]


async def test_ids_are_counted_before_they_are_looked_at(make_api: MakeApi) -> None:
    api = make_api()
    refused = await post(api, "/detokenize", {"tokens": ["x"] * 10**6})
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert (error["param"], error["code"]) == ("tokens", "invalid_value")
    assert error["message"] == "tokens: 1000000 token ids, allowed are 65536"
    assert (await post(api, "/detokenize", {"tokens": [70] * 65_536})).status_code == 200


class Slow(Counted):
    """A tokenizer that takes as long as a test says for a long text."""

    longest_token = 10**6

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.go = threading.Event()
        self.at_once = self.most = 0

    def encode(self, text: str, **options: Any) -> Any:
        if len(text) > LONG_TEXT:
            self.at_once += 1
            self.most = max(self.most, self.at_once)
            assert self.go.wait(60)
            self.at_once -= 1
            return (5, 6)
        return super().encode(text, **options)


async def test_long_texts_are_in_nobodys_way(make_api: MakeApi) -> None:
    api = make_api("ok")
    slow = Slow(api.model.tokenizer)
    api.service._model = replace(api.model, tokenizer=slow)
    long = "x" * (LONG_TEXT + 1)
    async with client_of(api.app()) as client:
        waiting = [
            asyncio.create_task(client.post("/tokenize", json={"prompt": long})) for _ in range(4)
        ]
        own = asyncio.create_task(client.post("/v1/completions", json={"prompt": long}))
        try:
            while slow.at_once < 2:  # one of each kind
                await asyncio.sleep(0.01)
            more = await client.post("/tokenize", json={"prompt": long})
            assert more.status_code == 429
            assert is_openai_error(more.json())
            assert "4 long texts" in more.json()["error"]["message"]
            assert more.headers["retry-after"] == "1"
            short = await client.post("/tokenize", json={"prompt": "x"})
            assert short.json()["count"] == 2
            body = {"prompt": [5], "max_tokens": 1}
            assert (await client.post("/v1/completions", json=body)).status_code == 200
            assert (await client.get("/health")).status_code == 200
        finally:
            slow.go.set()
        assert [(await task).status_code for task in waiting] == [200] * 4
        assert (await own).status_code in (200, 400)
        again = await client.post("/tokenize", json={"prompt": long})
    assert again.status_code == 200
    assert slow.most == 2


async def test_lanes_forget_who_has_left() -> None:
    lanes = TextLanes(1, most_waiting=(2, 1))
    go = threading.Event()
    waiting = [asyncio.create_task(lanes.run(1, go.wait)) for _ in range(2)]
    await asyncio.sleep(0.01)
    with pytest.raises(ApiError) as refused:
        await lanes.run(1, len, "abc")
    assert (refused.value.status, refused.value.code) == (429, "rate_limit_exceeded")
    assert await lanes.run(LONG_TEXT + 1, len, "abc") == 3
    waiting[1].cancel()
    await asyncio.gather(waiting[1], return_exceptions=True)
    last = asyncio.create_task(lanes.run(1, len, "abc"))
    await asyncio.sleep(0.01)
    go.set()
    assert await last == 3
    assert await waiting[0]
