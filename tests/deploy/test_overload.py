"""Beyond what is admitted: refused at once, and served when the client comes again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest

from tests.deploy.conftest import ScriptedClient
from tests.deploy.http_client import client_of, is_openai_error
from tests.deploy.test_openai_client import served

MakeApi = Callable[..., Any]
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/classify")
ROOM = 17  # one seat, and 16 may wait


class NoEncoding:
    """A tokenizer that must not be asked."""

    def encode(self, text: str, **_: object) -> tuple[int, ...]:
        raise AssertionError("a request that is refused was tokenized")


class Counted:
    """A tokenizer that remembers what it was asked."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.texts: list[str] = []

    def encode(self, text: str, **options: Any) -> Any:
        self.texts.append(text)
        return self._inner.encode(text, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@pytest.fixture
def crowded(make_api: MakeApi) -> Any:
    return make_api(ids=[70] * 300, max_num_seqs=1, delay=60)


async def fill(api: Any) -> list[asyncio.Task[Any]]:
    calls = [
        asyncio.create_task(api.service.completions({"prompt": [5], "max_tokens": 5}))
        for _ in range(ROOM)
    ]
    while len(api.client.streams) < ROOM:
        await asyncio.sleep(0.01)
    return calls


async def test_a_full_server_reads_nothing(crowded: Any) -> None:
    calls = await fill(crowded)
    read: list[bytes] = []

    async def body() -> AsyncIterator[bytes]:
        for _ in range(3):
            read.append(b"{")
            yield b"{"

    async with client_of(crowded.app()) as client:
        for path in PATHS:
            response = await client.post(path, content=body())
            assert response.status_code == 429
            assert is_openai_error(response.json())
            assert response.json()["error"]["type"] == "rate_limit_error"
    assert not read
    for call in calls:
        call.cancel()


async def test_work_is_refused_before_it_is_tokenized(crowded: Any) -> None:
    calls = await fill(crowded)
    calls.pop().cancel()
    await asyncio.sleep(0.05)
    crowded.service._model = replace(crowded.model, tokenizer=NoEncoding())
    texts = ["some words"] * 2
    user = {"role": "user", "content": "x"}
    async with client_of(crowded.app()) as client:
        for path, asked in (
            ("/v1/completions", {"prompt": texts}),
            ("/v1/completions", {"prompt": "x", "n": 2}),
            ("/v1/chat/completions", {"messages": [user], "n": 2}),
        ):
            response = await client.post(path, json=asked)
            assert response.status_code == 429, response.text
            assert int(response.headers["retry-after"]) >= 1
    for call in calls:
        call.cancel()


async def test_a_burst_is_decided_before_it_is_tokenized(crowded: Any) -> None:
    """Those that are let in count at once, and not only when they have been tokenized."""
    counted = Counted(crowded.model.tokenizer)
    crowded.service._model = replace(crowded.model, tokenizer=counted)
    body = {"prompt": "some words", "max_tokens": 5}
    async with client_of(crowded.app()) as client:
        calls = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(100)]
        refused: set[asyncio.Task[httpx.Response]] = set()
        async with asyncio.timeout(30):
            while len(refused) < len(calls) - ROOM:
                refused |= {call for call in calls if call.done()}
                await asyncio.sleep(0.01)
        assert {call.result().status_code for call in refused} == {429}
        while len(crowded.client.streams) < ROOM:
            await asyncio.sleep(0.01)
        assert counted.texts == ["some words"] * ROOM
        assert crowded.service._admission.live == ROOM
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
    assert crowded.service._admission.live == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_refused_after_all_gives_its_place_back(
    make_api: MakeApi, stream: bool
) -> None:
    api = make_api()
    async with client_of(api.app()) as client:
        for path, body in (
            ("/v1/completions", {"prompt": [10**6]}),
            ("/v1/completions", {"prompt": "x", "max_tokens": 10**6}),
            ("/v1/completions", {"prompt": "x", "structured_outputs": {"regex": "("}}),
            ("/v1/chat/completions", {"messages": [{"role": "nobody", "content": "x" * 900}]}),
            ("/v1/classify", {"input": [10**6]}),
        ):
            response = await client.post(path, json={**body, "stream": stream})
            assert response.status_code == 400, response.text
            assert api.service._admission.live == 0


async def test_openais_client_comes_again_and_is_served(make_api: MakeApi) -> None:
    api = make_api("abc", max_num_seqs=1, delay=0.02)
    statuses: list[int] = []

    async def note(response: httpx.Response) -> None:
        statuses.append(response.status_code)

    async with (
        served(api) as base,
        httpx.AsyncClient(event_hooks={"response": [note]}) as http,
        openai.AsyncOpenAI(base_url=base, api_key="k", http_client=http) as client,
    ):
        await client.completions.create(model="nano-jamba", prompt="x")  # shows its speed
        replies = await asyncio.gather(
            *(client.completions.create(model="nano-jamba", prompt="x") for _ in range(3 * ROOM))
        )
    assert {reply.choices[0].text for reply in replies} == {"abc"}
    rates = api.service._admission.rates
    assert 0.02 <= rates.decode_s_per_token < 1
    assert 0 < rates.prefill_s_per_token < 1
    assert rates.tokens_per_answer == len(api.client.streams[0].ids)
    assert rates.tokens_per_prompt == len(api.client.prompts[0])
    assert statuses.count(200) == 3 * ROOM + 1
    assert statuses.count(429) >= 2 * ROOM - 5
    assert api.service._admission.live == 0
    assert api.service._admission.num_refused == statuses.count(429)


async def test_a_cancelled_call_gives_its_place_back(crowded: Any) -> None:
    calls = await fill(crowded)
    assert isinstance(crowded.client, ScriptedClient)
    assert crowded.service._admission.live == ROOM
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    assert crowded.service._admission.live == 0
    assert all(stream.aborted for stream in crowded.client.streams)
