"""Calls over Python handles: what HTTP answers, as dicts; its errors; calls that are cancelled."""

from __future__ import annotations

import asyncio
import json
import pickle
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from deploy.demo import nano_checkpoint
from deploy.handle_calls import HandleCalls
from deploy.openai_errors import ApiError
from shards.client import GroupState, SequenceRefused
from tests.deploy.conftest import running_service
from tests.deploy.http_client import client_of, is_openai_error, post
from tests.deploy.open_streams import Steps, at_rest

MakeApi = Callable[..., Any]
USER = [{"role": "user", "content": "Hi"}]
PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("chat", {"messages": USER}),
        ("chat", {"messages": USER, "temperature": 99}),
        ("chat", {"messages": USER, "model": "other"}),
        ("chat", {"prompt": "x"}),
        ("completions", {"prompt": "x", "max_tokens": 10**6}),
        ("completions", {"prompt": "x", "n": 2, "logprobs": 1}),
        ("completions", {"prompt": [10**9]}),
        ("completions", None),
        ("completions", "text"),
    ],
)
async def test_handles_say_what_http_says(make_api: MakeApi, name: str, body: Any) -> None:
    api = make_api()
    expected = (await post(api, PATHS[name], body)).json()
    given = await HandleCalls(api.service).generate(name, body)
    for answer in (expected, given):
        for key in ("id", "created"):
            answer.pop(key, None)
    assert given == expected


def nested(levels: int, value: Any = 1) -> Any:
    for level in range(levels):
        value = [value] if level % 2 else {"a": value}
    return value


@pytest.mark.parametrize(
    "x", [nested(99), nested(100), nested(101), nested(500), [10**4299], [10**4300]]
)
async def test_bodies_have_the_bounds_of_http(make_api: MakeApi, x: Any) -> None:
    api = make_api()
    body = {"prompt": [5], "max_tokens": 1, "x": x}
    sys.set_int_max_str_digits(10**4)  # to write it; what the server reads has Python's own bound
    try:
        raw = json.dumps(body)
    finally:
        sys.set_int_max_str_digits(sys.int_info.default_max_str_digits)
    async with client_of(api.app()) as client:
        over_http = await client.post("/v1/completions", content=raw)
    expected = over_http.json()
    for given in (
        await HandleCalls(api.service).generate("completions", body),
        *[
            c
            async for c in await HandleCalls(api.service).generate(
                "completions", {**body, "stream": True}
            )
        ],
    ):
        assert given.get("error") == expected.get("error")
    assert over_http.status_code == (400 if "error" in expected else 200)


class Odd:
    """No JSON."""


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        ((1, 2), "tuple"),
        ({1, 2}, "set"),
        (b"x", "bytes"),
        (Odd(), "Odd"),
        (np.int64(5), "numpy.int64"),
        (np.zeros(3), "numpy.ndarray"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        ({1: 2}, "int"),
        ({None: 2}, "NoneType"),
    ],
)
async def test_bodies_that_no_json_could_be(make_api: MakeApi, odd: Any, words: str) -> None:
    api = make_api()
    calls = HandleCalls(api.service)
    messages = [{"role": "user", "content": "Hi", "x": [odd]}]
    for name, body in (
        ("chat", {"messages": messages}),
        ("completions", {"prompt": "x", "x": {"y": odd}}),
        ("classify", {"input": odd}),
        ("tokenize", [odd]),
        ("detokenize", odd),
    ):
        answer = await calls.generate(name, body)
        assert is_openai_error(answer)
        assert (answer["error"]["param"], answer["error"]["code"]) == (None, None)
        assert "not valid JSON" in answer["error"]["message"]
        assert words in answer["error"]["message"]
    assert not api.client.streams


async def test_a_body_that_holds_itself_is_too_deep(make_api: MakeApi) -> None:
    body: dict[str, Any] = {"prompt": "x"}
    body["x"] = [body, body]
    answer = await HandleCalls(make_api().service).generate("completions", body)
    assert "nested more than 100" in answer["error"]["message"]


async def test_streams_over_handles(make_api: MakeApi) -> None:
    calls = HandleCalls(make_api("Hello there").service)
    stream = await calls.generate("chat", {"messages": USER, "stream": True})
    chunks = [chunk async for chunk in stream]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == "Hello there"
    refused = await calls.generate("chat", {"messages": USER, "stream": True, "n": -1})
    [error] = [chunk async for chunk in refused]
    assert is_openai_error(error)
    assert error["error"]["param"] == "n"


async def test_errors_end_a_stream_as_its_last_item(make_api: MakeApi) -> None:
    for error, code in ((SequenceRefused("no"), "sequence_refused"), (ValueError(), None)):
        calls = HandleCalls(make_api(ids=[70, 71], error=error).service)
        body = {"prompt": [5], "max_tokens": 9, "stream": True}
        *chunks, last = [chunk async for chunk in await calls.generate("completions", body)]
        assert len(chunks) == 2
        assert is_openai_error(last)
        assert last["error"]["code"] == (code or "internal_error")


@pytest.mark.parametrize("stream", [True, False])
async def test_a_call_that_is_cancelled_aborts_within_a_step(
    stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(monkeypatch)
    body = {"prompt": [5, 6], "n": 2, "max_tokens": 480, "ignore_eos": True, "stream": stream}
    with running_service(nano_checkpoint("nano-jamba")) as service:
        calls = HandleCalls(service)

        async def read() -> None:
            answer = await calls.generate("completions", body)
            assert stream, "it was cancelled before there was an answer"
            async for _ in answer:
                pass

        reading = asyncio.create_task(read())
        async with asyncio.timeout(30):
            while len(steps.before) < 2 or min(steps.before.values()) < 5:
                await asyncio.sleep(0.01)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await at_rest(service)
        assert service._admission.live == 0
        text = service.metrics.text().decode()
    steps.assert_aborted_within_a_step(2, 480)
    assert 'route="handle.completions",status="499"} 1.0' in text


async def test_a_stream_that_is_closed_early_aborts_too(make_api: MakeApi) -> None:
    api = make_api(ids=[70] * 99, delay=0.001)
    calls = HandleCalls(api.service)
    body = {"prompt": [5], "max_tokens": 99, "stream": True}
    stream = await calls.generate("completions", body)
    await anext(stream)
    await stream.aclose()
    assert api.client.streams[0].aborted
    assert api.service._admission.live == 0


async def test_nothing_is_asked_of_an_instance_that_failed(make_api: MakeApi) -> None:
    api = make_api()
    api.client.state = GroupState.FAILED
    answer = await HandleCalls(api.service).answer("completions", {"prompt": "x"})
    assert answer["error"]["code"] == "model_failed"


@pytest.mark.parametrize("stream", [False, True])
async def test_handles_say_when_to_come_again(make_api: MakeApi, stream: bool) -> None:
    """As HTTP does in its headers; other errors are as over HTTP to the key."""
    api = make_api(ids=[70] * 300, max_num_seqs=1, delay=60)
    calls = HandleCalls(api.service)
    body = {"prompt": [5], "max_tokens": 5, "n": 17}
    running = asyncio.create_task(calls.answer("completions", body))
    while api.service._admission.live < 17:
        await asyncio.sleep(0.01)
    answer = await calls.generate("completions", {**body, "n": 1, "stream": stream})
    if stream:
        [answer] = [chunk async for chunk in answer]
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code", "retry_after_s"}
    assert error["code"] == "rate_limit_exceeded"
    assert 0 < error["retry_after_s"] <= 60
    assert f"Try again in {error['retry_after_s']:.1f} s" in error["message"]
    running.cancel()


def test_errors_survive_pickling() -> None:
    error = ApiError("no", status=429, kind="k", param="p", code="c", retry_after=7)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is ApiError
    assert vars(copy) == vars(error)
    assert (copy.body(), str(copy)) == (error.body(), "no")
