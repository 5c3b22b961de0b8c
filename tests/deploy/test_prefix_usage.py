"""What a request is told of the prefix that it found, and who shares prefixes with whom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deploy.openai_errors import Json
from deploy.service import ApiService
from tests.deploy.conftest import running_service
from tests.tiny import write_tiny

PROMPT = [3 + i % 90 for i in range(50)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("jamba", tmp_path_factory.mktemp("jamba"))


async def ask(service: ApiService, **fields: Any) -> tuple[int, list[Json]]:
    """Cached prompt tokens, and the choices without what differs by request."""
    body = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0, "return_token_ids": True, **fields}
    reply = await service.completions(body)
    assert isinstance(reply, dict)
    assert reply["usage"]["prompt_tokens"] == len(PROMPT)
    cached: int = reply["usage"]["prompt_tokens_details"]["cached_tokens"]
    return cached, reply["choices"]


async def test_usage_counts_what_was_there(folder: Path) -> None:
    with running_service(folder, executor="local", block_size=8) as service:
        cold, first = await ask(service)
        warm, again = await ask(service)
        assert (cold, warm) == (0, 48)
        assert again == first
        # A prompt counts once, however many answers it gets.
        assert (await ask(service, n=3))[0] == 48
        stream = await service.completions(
            {"prompt": PROMPT, "stream": True, "stream_options": {"include_usage": True}}
        )
        assert not isinstance(stream, dict)
        chunks = [chunk async for chunk in stream]
        assert chunks[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 48}


async def test_salts_keep_prefixes_apart(folder: Path) -> None:
    with running_service(folder, executor="local", block_size=8) as service:
        assert (await ask(service))[0] == 0
        assert (await ask(service, cache_salt="mine"))[0] == 0
        assert (await ask(service, cache_salt="mine"))[0] == 48
        assert (await ask(service, cache_salt="yours"))[0] == 0


async def test_switched_off(folder: Path) -> None:
    options: dict[str, Any] = {"executor": "local", "enable_prefix_caching": False}
    with running_service(folder, **options) as service:
        assert [(await ask(service))[0] for _ in range(2)] == [0, 0]
