"""A checkpoint of more than 100 MB, sharded on disk, over two stages and two expert actors."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import serving
from tests.e2e.test_transformers_parity import check_against_transformers, complete, prompts
from tests.tiny import write_tiny

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]


async def test_a_hundred_megabytes(tmp_path: Path, log: Path) -> None:
    folder = write_tiny(
        "phimoe",
        tmp_path / "tiny",
        max_shard_size="40MB",
        hidden_size=512,
        intermediate_size=768,
        num_hidden_layers=4,
        num_local_experts=8,
        num_attention_heads=8,
        rope_parameters={"short_factor": [1.0] * 32, "long_factor": [2.0] * 32},
    )
    files = list(folder.glob("*.safetensors"))
    assert len(files) > 2
    assert sum(f.stat().st_size for f in files) >= 100_000_000
    flags = ["--dtype", "float32", "--stages", "2", "--expert-shards", "2"]
    with serving(log, str(folder), *flags) as server:
        async with httpx.AsyncClient(base_url=server.url, timeout=300) as client:
            choices = await asyncio.gather(*(complete(client, p) for p in prompts()))
    for prompt, choice in zip(prompts(), choices, strict=True):
        logprobs = choice["logprobs"]["token_logprobs"]
        check_against_transformers(folder, prompt, choice["token_ids"], logprobs)
