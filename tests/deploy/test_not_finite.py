"""NaN in a checkpoint reaches the caller as an error, never as a number that JSON cannot hold."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from deploy.http_api import build_api
from shards.client import GroupState
from tests.deploy.conftest import Api, running_service
from tests.layouts import read_tensors, write_tensors
from tests.tiny import write_tiny

UNLUCKY = 50
BAD = [7, UNLUCKY, 9]


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    folder = write_tiny("phimoe", tmp_path, classifier=True)
    tensors = read_tensors(folder)
    tensors["model.embed_tokens.weight"][UNLUCKY] = torch.nan
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].nan_to_num().clone()
    tensors["lm_head.bias"] = torch.zeros(len(tensors["lm_head.weight"]))
    write_tensors(folder, tensors)
    with running_service(folder, executor="local") as service:
        transport = httpx.ASGITransport(build_api(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": BAD, "max_tokens": 4}),
        ("/v1/completions", {"prompt": BAD, "max_tokens": 4, "logprobs": 2}),
        ("/v1/completions", {"prompt": BAD, "max_tokens": 0, "echo": True, "logprobs": 1}),
        ("/v1/completions", {"prompt": BAD, "max_tokens": 1, "prompt_logprobs": 1}),
        ("/v1/completions", {"prompt": BAD, "max_tokens": 4, "stream": True}),
        ("/v1/classify", {"input": BAD}),
    ],
)
async def test_an_error_and_no_number(
    client: httpx.AsyncClient, path: str, fields: dict[str, Any]
) -> None:
    if path == "/v1/completions":  # never the unlucky token itself
        fields = {**fields, "allowed_token_ids": [1, 2, 3]}
    reply = await client.post(path, json=fields)
    assert reply.status_code == 500
    assert reply.json()["error"]["code"] == "not_finite"
    good = {key: [7, 8, 9] if value == BAD else value for key, value in fields.items()}
    assert (await client.post(path, json=good)).status_code == 200


async def test_health_says_what_is_wrong(make_api: Any) -> None:
    api: Api = make_api()
    api.client.state, api.client.failure = GroupState.FAILED, "an expert dies again and again"
    transport = httpx.ASGITransport(build_api(api.service))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        reply = await client.get("/health")
    assert reply.status_code == 503
    assert reply.json() == {"state": "failed", "reason": "an expert dies again and again"}
