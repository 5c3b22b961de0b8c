"""Nothing large that a client sends comes back in an error, nor goes into a log line."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import pytest

from deploy.handle_calls import HandleCalls
from tests.deploy.http_client import client_of, is_openai_error
from tests.deploy.odd_requests import FULL, spoiled

MakeApi = Callable[..., Any]
LARGE = "é" * 500_000  # a megabyte
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {
        **{key: FULL[key] for key in ("model", "stop", "bad_words", "structured_outputs")},
        "prompt": ["x"],
        "nobody": "n",
        "seed": 1,
        "stream_options": {"nobody": "n"},
    },
    "/v1/classify": {"input": ["x"], "priority": 0, "nobody": "n"},
    "/tokenize": {"messages": FULL["messages"], "tools": FULL["tools"], "chat_template": "x"},
    "/detokenize": {"tokens": [5], "nobody": ["x"]},
}
MOST_BYTES = 4000
MOST_WARNINGS = 20_000


def cases() -> list[tuple[str, dict[str, Any]]]:
    """Each text and name spoiled, and each field with the text in its place."""
    found = []
    for path, body in {"/v1/chat/completions": FULL, **BODIES}.items():
        found += [(path, odd) for odd in spoiled(body, LARGE)]
        for key in body:
            found += [(path, {**body, key: odd}) for odd in (LARGE, [LARGE], {LARGE: LARGE})]
    return found


async def test_errors_are_short_whatever_was_sent(
    make_api: MakeApi, caplog: pytest.LogCaptureFixture
) -> None:
    api = make_api("ok")
    statuses = []
    with caplog.at_level(logging.DEBUG, "conclave"):
        async with client_of(api.app()) as client:
            for path, body in cases():
                raw = json.dumps(body, ensure_ascii=False).encode()
                response = await client.post(path, content=raw)
                statuses.append(response.status_code)
                assert response.status_code in (200, 400, 404), (path, response.text[:500])
                if response.status_code == 200:
                    said = response.json().get("warnings", [])
                    assert len(json.dumps(said)) < MOST_WARNINGS
                    continue
                assert is_openai_error(response.json())
                assert len(response.content) < MOST_BYTES, (path, response.text[:500])
    assert statuses.count(400) > 50
    assert all(len(record.getMessage()) < MOST_BYTES for record in caplog.records)


async def test_nor_over_handles(make_api: MakeApi) -> None:
    calls = HandleCalls(make_api("ok").service)
    for path, body in cases():
        name = {"/v1/chat/completions": "chat"}.get(path, path.rpartition("/")[2])
        answer = await calls.answer(name, body)
        if "error" in answer:
            assert len(json.dumps(answer, ensure_ascii=False).encode()) < MOST_BYTES
    for body in (LARGE, [LARGE], {LARGE: {1: 2}}, {"x": {LARGE}}):
        answer = await calls.answer("forward" if isinstance(body, dict) else "chat", body)
        assert len(json.dumps(answer, ensure_ascii=False).encode()) < MOST_BYTES


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        ("GET", "/v1/models/LONG", {}),
        ("GET", "/LONG", {}),
        ("POST", "/v1/completions", {"content-type": "text/LONG"}),
        ("POST", "/v1/completions", {"authorization": "Bearer LONG"}),
        ("GET", "/v1/models", {"x-request-id": "LONG", "authorization": "LONG"}),
        ("POST", "/v1/completions?LONG", {"origin": "LONG"}),
        ("BREW", "/v1/completions/LONG", {}),
    ],
)
async def test_nor_what_stands_outside_of_bodies(
    make_api: MakeApi, method: str, path: str, headers: dict[str, str]
) -> None:
    long = "y" * 60_000
    for keys in ((), ("secret",)):
        async with client_of(make_api().app(keys)) as client:
            response = await client.request(
                method,
                path.replace("LONG", long),
                headers={key: value.replace("LONG", long) for key, value in headers.items()},
            )
        size = len(response.content) + sum(map(len, response.headers.values()))
        assert size < MOST_BYTES
