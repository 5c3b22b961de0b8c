"""Values at the edge of what is allowed are computed with: no failure, and no other's answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from deploy.demo import nano_checkpoint
from deploy.service import ApiService
from tests.deploy.conftest import running_service

TINY = 5e-324
BODY = {"prompt": [5, 6, 7], "max_tokens": 8, "seed": 3, "ignore_eos": True}


@pytest.fixture(scope="module")
def service() -> Iterator[ApiService]:
    with running_service(nano_checkpoint("nano-jamba"), executor="local", max_model_len=64) as it:
        yield it


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": TINY},
        {"temperature": 1e-40},
        {"temperature": 1e-6},
        {"temperature": TINY, "top_p": TINY, "min_p": TINY},
        {"temperature": 2, "top_p": TINY},
        {"temperature": 2, "min_p": 1},
        {"temperature": 2, "top_k": 2**63 - 1},
        {"temperature": 0, "repetition_penalty": 0.01},
        {"temperature": 1, "repetition_penalty": 0.01, "logit_bias": {"5": 100}},
        {"temperature": TINY, "repetition_penalty": 100, "logit_bias": {"5": -100}},
        {"temperature": 1, "logit_bias": {str(i): -100 for i in range(512)}},
        {"temperature": 1, "logit_bias": {str(i): TINY for i in range(512)}},
        {"temperature": TINY, "presence_penalty": 2, "frequency_penalty": -2, "logprobs": 20},
        {"temperature": 1, "allowed_token_ids": [5], "bad_words": ["a"], "logprobs": 20},
        {"temperature": 1, "seed": -(2**63), "n": 3},
        {"temperature": 1, "min_tokens": 8, "stop_token_ids": list(range(64))},
    ],
)
async def test_extremes(service: ApiService, fields: dict[str, Any]) -> None:
    reply = await service.completions({**BODY, **fields})
    assert isinstance(reply, dict)
    assert reply["usage"]["completion_tokens"] == 8 * fields.get("n", 1)
