"""The openai package against the API on a loopback port; and what a client that leaves causes."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import openai
import pytest
import uvicorn

MakeApi = Callable[..., Any]
USER: Any = [{"role": "user", "content": "Hi"}]


@asynccontextmanager
async def served(api: Any, keys: tuple[str, ...] = (), **app: Any) -> AsyncIterator[str]:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    server = uvicorn.Server(uvicorn.Config(api.app(keys, **app), log_level="error"))
    running = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        await running


def client(base: str, key: str = "k") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=base, api_key=key, max_retries=0)


async def test_chat_completion_and_models(make_api: MakeApi) -> None:
    async with served(make_api("Hello there"), ("k",)) as base:
        api = client(base)
        reply = await api.chat.completions.create(model="nano-jamba", messages=USER, logprobs=True)
        assert reply.choices[0].message.content == "Hello there"
        assert reply.choices[0].logprobs is not None
        assert reply.choices[0].logprobs.content is not None
        assert reply.choices[0].logprobs.content[0].logprob == -0.5
        assert reply.usage is not None
        assert [model.id async for model in api.models.list()] == ["nano-jamba"]
        completion = await api.completions.create(
            model="nano-jamba", prompt="x", logprobs=1, extra_body={"top_k": 3}
        )
        assert completion.choices[0].text == "Hello there"


async def test_stream(make_api: MakeApi) -> None:
    async with served(make_api("Hello there")) as base:
        stream = await client(base).chat.completions.create(
            model="nano-jamba",
            messages=USER,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == "Hello there"
        assert chunks[-1].usage is not None


async def test_errors_are_the_clients_own_exceptions(make_api: MakeApi) -> None:
    async with served(make_api(), ("k",)) as base:
        with pytest.raises(openai.AuthenticationError):
            await client(base, "other").models.list()
        with pytest.raises(openai.NotFoundError) as missing:
            await client(base).chat.completions.create(model="other", messages=USER)
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as bad:
            await client(base).chat.completions.create(
                model="nano-jamba", messages=USER, temperature=-1
            )
        assert bad.value.param == "temperature"


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_aborts_its_sequences(make_api: MakeApi, stream: bool) -> None:
    api = make_api(ids=[70] * 200, delay=0.02)
    body = {"prompt": [5], "max_tokens": 200, "n": 2, "stream": stream}
    async with served(api) as base, httpx.AsyncClient() as http:
        if stream:
            async with http.stream("POST", f"{base}/completions", json=body) as response:
                await anext(response.aiter_lines())
        else:
            with pytest.raises(httpx.TimeoutException):
                await http.post(f"{base}/completions", json=body, timeout=0.3)
        for _ in range(100):
            if all(s.aborted for s in api.client.streams):
                break
            await asyncio.sleep(0.02)
        assert len(api.client.streams) == 2
        assert all(s.aborted and s.emitted < 150 for s in api.client.streams)
        assert api.service._admission.live == 0
