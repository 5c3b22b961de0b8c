"""What a request may take before it is answered: bytes, time, and what it may be made of."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from deploy.http_limits import RequestDeadline
from deploy.http_options import HttpOptions
from tests.deploy.http_client import client_of, is_openai_error

MakeApi = Callable[..., Any]
JSON = {"content-type": "application/json"}
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/classify", "/classify")
GOOD = {"prompt": [5], "max_tokens": 2}


def refused(response: httpx.Response, status: int, code: str | None) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert is_openai_error(response.json())
    error: dict[str, Any] = response.json()["error"]
    assert error["code"] == code
    return error


class Chunks:
    """A body of unknown length that counts what was taken of it."""

    def __init__(self, count: int, size: int = 1000, pause: float = 0.0) -> None:
        self.count, self.size, self.pause = count, size, pause
        self.taken = 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for _ in range(self.count):
            await asyncio.sleep(self.pause)
            self.taken += 1
            yield b" " * self.size


@pytest.mark.parametrize("path", PATHS)
async def test_a_body_that_is_too_large(make_api: MakeApi, path: str) -> None:
    async with client_of(make_api().app(options=HttpOptions(max_request_bytes=10_000))) as client:
        body = json.dumps(GOOD).encode().ljust(10_001)
        refused(await client.post(path, content=body, headers=JSON), 413, "request_too_large")
        claimed = {**JSON, "content-length": "9" * 100}
        refused(await client.post(path, content=b"{}", headers=claimed), 413, "request_too_large")
        endless = Chunks(10**6)
        refused(await client.post(path, content=endless), 413, "request_too_large")
        assert endless.taken <= 11
        fits = body[:10_000]
        assert (await client.post("/v1/completions", content=fits)).status_code == 200


async def test_a_declared_length_is_refused_before_anything_is_read(make_api: MakeApi) -> None:
    chunks = Chunks(10)
    async with client_of(make_api().app(options=HttpOptions(max_request_bytes=100))) as client:
        headers = {"content-length": "10000"}
        response = await client.post("/v1/completions", content=chunks, headers=headers)
    refused(response, 413, "request_too_large")
    assert chunks.taken == 0


async def test_a_body_that_does_not_come(make_api: MakeApi) -> None:
    async with client_of(make_api().app(options=HttpOptions(body_timeout_s=0.05))) as client:
        response = await client.post("/v1/completions", content=Chunks(10**6, 1, pause=0.01))
    refused(response, 408, "request_timeout")
    assert response.headers["connection"] == "close"


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "x" * 10**5]
)
async def test_other_content_types(make_api: MakeApi, kind: str) -> None:
    async with client_of(make_api().app()) as client:
        response = await client.post(
            "/v1/completions", content=json.dumps(GOOD), headers={"content-type": kind}
        )
        error = refused(response, 415, "unsupported_content_type")
        assert "application/json" in error["message"]
        assert len(error["message"]) < 300
        for good in ("application/json; charset=utf-8", "APPLICATION/JSON", "application/x+json"):
            response = await client.post(
                "/v1/completions", content=json.dumps(GOOD), headers={"content-type": good}
            )
            assert response.status_code == 200


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "empty"),
        (b"\xff\xfe{\x00}\x00", "UTF-8"),
        (b'{"prompt": "\xed\xa0\x80"}', "UTF-8"),
        (b'{"prompt": NaN}', "NaN"),
        (b'{"prompt": [5], "temperature": -Infinity}', "Infinity"),
        (b'{"prompt": [5], "temperature": 1e999}', "out of range"),
        (b'{"prompt": [5], "seed": ' + b"9" * 10_000 + b"}", "too many digits"),
        (b'{"prompt": [5], "prompt": [6]}', "more than once"),
        (b'{"prompt": [5], "x": {"a": 1, "a": 1}}', "more than once"),
        (b'{"x": ' + b"[" * 101 + b"]" * 101 + b"}", "nested"),
        (b'{"x": ' + b'{"a":' * 200 + b"1" + b"}" * 201, "nested"),
        (b"[" * 10**6, "nested"),
        (b'{"prompt": [5]} x', "valid JSON"),
        (b"null", "JSON object"),
    ],
)
async def test_bodies_that_are_no_json_of_ours(make_api: MakeApi, raw: bytes, words: str) -> None:
    async with client_of(make_api().app()) as client:
        for path in PATHS:
            response = await client.post(path, content=raw, headers=JSON)
            assert response.status_code == 400
            assert is_openai_error(response.json())
            assert words in response.json()["error"]["message"]
            assert len(response.content) < 2000


async def test_odd_bodies_that_are_json(make_api: MakeApi) -> None:
    async with client_of(make_api().app()) as client:
        for raw in (
            b"\xef\xbb\xbf" + json.dumps(GOOD).encode(),
            b'{"prompt": [5], "x": ' + b"[" * 99 + b"]" * 99 + b"}",
            b'{"prompt": [5], "x": [' + b"[[]]," * 500 + b"[]]}",
        ):
            response = await client.post("/v1/completions", content=raw, headers=JSON)
            assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "prompt", "missing_required_parameter"),
        ({"prompt": None}, "prompt", "missing_required_parameter"),
        ({"prompt": 5}, "prompt", "invalid_type"),
        ({"prompt": [1.5]}, "prompt", "invalid_type"),
        ({"prompt": [-1]}, "prompt", "invalid_value"),
        ({"prompt": [5], "temperature": "1"}, "temperature", "invalid_type"),
        ({"prompt": [5], "temperature": 10**400}, "temperature", "invalid_type"),
        ({"prompt": [5], "temperature": 3}, "temperature", "invalid_value"),
        ({"prompt": [5], "max_tokens": 2.0}, "max_tokens", "invalid_type"),
        ({"prompt": [5], "stream_options": {}}, "stream_options", "invalid_value"),
        ({"prompt": [5], "stop": ["x"] * 10_000}, "stop", "invalid_value"),
        ({"prompt": [5], "stop": "x" * 10_000}, "stop", "invalid_value"),
        ({"prompt": [5] * 300}, "prompt", "context_length_exceeded"),
        ({"prompt": ["x"] * 2 + [1] * 10**6}, "prompt", "invalid_type"),
        ({"prompt": [10**20] * 10**5}, "prompt", "invalid_value"),
        ({"prompt": [5], "suffix": "x"}, "suffix", "unsupported_parameter"),
    ],
)
async def test_codes_of_refused_fields(
    make_api: MakeApi, body: dict[str, Any], param: str, code: str
) -> None:
    async with client_of(make_api().app()) as client:
        response = await client.post("/v1/completions", json=body)
    error = refused(response, 400, code)
    assert error["param"] == param
    assert error["message"].startswith((param, "This model")), error["message"]
    assert len(error["message"]) < 1100


async def test_nothing_large_comes_back(make_api: MakeApi) -> None:
    long = "y" * 10**6
    async with client_of(make_api(ids=[70] * 300).app()) as client:
        for body in (
            {**GOOD, "model": long},
            {**GOOD, "logit_bias": {long: 1}},
            {**GOOD, long + "\ud800": 1},
            {**GOOD, "stop": [long]},
            {**GOOD, **{f"{i}{long[:50]}": 1 for i in range(10_000)}},
            {**GOOD, long: 1},
        ):
            response = await client.post("/v1/completions", content=json.dumps(body), headers=JSON)
            assert response.status_code in (200, 400, 404)
            assert len(response.content) < 20_000
        response = await client.get("/" + long[:60_000])
        assert response.status_code == 404
        assert len(response.content) < 2000


async def test_strict_requests_name_the_unknown_field(make_api: MakeApi) -> None:
    async with client_of(make_api(ids=[70] * 300, strict=True).app()) as client:
        for body, param in (
            ({**GOOD, "typo": 1}, "typo"),
            ({**GOOD, "typo": None}, None),
            ({**GOOD, "stream": True, "stream_options": {"typo": 1}}, "stream_options.typo"),
            ({**GOOD, "user": "me"}, None),
        ):
            response = await client.post("/v1/completions", json=body)
            if param is None:
                assert response.status_code == 200
            else:
                assert refused(response, 400, "unknown_parameter")["param"] == param
    async with client_of(make_api(ids=[70] * 300).app()) as client:
        response = await client.post("/v1/completions", json={**GOOD, "typo": 1})
        assert response.json()["warnings"] == ["unknown field typo has no effect"]


async def test_head_is_get_without_a_body(make_api: MakeApi) -> None:
    async with client_of(make_api().app()) as client:
        for path in ("/health", "/ready", "/v1/models"):
            head, get = await client.head(path), await client.get(path)
            assert head.status_code == get.status_code == 200
            assert head.content == b""
            ids = (head.headers.pop("x-request-id"), get.headers.pop("x-request-id"))
            assert ids[0] != ids[1]
            assert head.headers == get.headers


async def test_unknown_routes_and_methods(make_api: MakeApi) -> None:
    async with client_of(make_api().app()) as client:
        refused(await client.post("/v1/nothing", json={}), 404, "not_found")
        refused(await client.get("/v1/completions"), 405, "method_not_allowed")
        response = await client.delete("/v1/models")
        refused(response, 405, "method_not_allowed")
        assert "GET" in response.headers["allow"]


async def test_a_slash_too_many_is_another_route(make_api: MakeApi) -> None:
    async with client_of(make_api().app()) as client:
        refused(await client.post("/v1/completions/", json=GOOD), 404, "not_found")
        refused(await client.get("/health/"), 404, "not_found")
        refused(await client.get("/v1/models/"), 404, "model_not_found")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_takes_too_long(make_api: MakeApi, stream: bool) -> None:
    api = make_api(ids=[70] * 200, delay=0.02)
    body = {"prompt": [5], "max_tokens": 200, "stream": stream}
    async with client_of(api.app(options=HttpOptions(request_timeout_s=0.3))) as client:
        response = await client.post("/v1/completions", json=body)
        if stream:
            assert response.status_code == 200
            *_, last, done, _ = response.text.split("\n\n")
            assert done == "data: [DONE]"
            error = json.loads(last.removeprefix("data: "))
            assert is_openai_error(error)
            assert error["error"]["code"] == "request_timeout"
        else:
            refused(response, 408, "request_timeout")
        [sequence] = api.client.streams
        for _ in range(100):
            await asyncio.sleep(0.01)
            if sequence.aborted:
                break
        assert sequence.aborted
        assert api.service._admission.live == 0
        assert (await client.get("/health")).status_code == 200


async def test_the_server_itself_has_no_deadline() -> None:
    ended = []

    async def served(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.1)
        ended.append(scope["type"])

    deadline = RequestDeadline(served, seconds=0.01)
    await deadline({"type": "lifespan"}, asyncio.Event().wait, refuse_to_send)  # type: ignore[arg-type]
    assert ended == ["lifespan"]


async def refuse_to_send(message: Any) -> None:
    raise AssertionError(message)
