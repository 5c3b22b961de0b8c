"""Random checkpoints as Transformers saves them, served: its greedy tokens and its logprobs."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from router.step import SamplingParams
from tests.e2e.conftest import serving
from tests.groups import ask_all, running_group
from tests.tiny import FAMILIES, VOCAB_SIZE, load_reference, reference_logits, write_tiny

NUM_TOKENS = 32
TIE = 1e-4
"""A step whose two best logits are closer than this may be decided either way."""

TOPOLOGIES: dict[str, dict[str, Any]] = {
    "2x2": {"stages": 2, "expert_shards": 2},
    "local": {"executor": "local"},
    "1x4": {"stages": 1, "expert_shards": 4},
    "2x2-direct": {"stages": 2, "expert_shards": 2, "dispatch": "direct"},
    "uneven": {"stages": 3, "expert_shards": 3},
}


def prompts() -> list[tuple[int, ...]]:
    rng = random.Random(3)
    return [tuple(rng.randrange(3, VOCAB_SIZE) for _ in range(n)) for n in (1, 2, 9, 30, 41)]


def check_against_transformers(
    folder: Path, prompt: tuple[int, ...], token_ids: list[int], logprobs: list[float]
) -> None:
    """One full forward of the reference over prompt + answer judges every step."""
    model = load_reference(folder)
    for step, (token_id, logprob) in enumerate(zip(token_ids, logprobs, strict=True)):
        # Each step by its own forward: PhiMoE's LongRoPE depends on the length.
        logits = reference_logits(model, [*prompt, *token_ids[:step]])[-1]
        expected = torch.log_softmax(logits.float(), dim=-1)
        best, second = logits.topk(2).values.tolist()
        if best - second < TIE:
            return
        assert int(logits.argmax()) == token_id, f"step {step}"
        assert abs(float(expected[token_id]) - logprob) < 1e-3, f"step {step}"
    assert len(token_ids) == NUM_TOKENS


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("family", FAMILIES)
async def test_workers_agree_with_transformers(family: str, topology: str, tmp_path: Path) -> None:
    folder = write_tiny(family, tmp_path / family)
    sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, logprobs=0)
    with running_group(folder, **TOPOLOGIES[topology]) as group:
        answers = await ask_all(group, prompts(), sampling)
    for prompt, answer in zip(prompts(), answers, strict=True):
        logprobs = [float(p) for p in answer.logprobs if p is not None]
        check_against_transformers(folder, prompt, list(answer.token_ids), logprobs)


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("dbrx", ["--stages", "2", "--expert-shards", "2"]),
        ("phimoe", ["--stages", "2", "--expert-shards", "3", "--dispatch", "direct"]),
        ("jamba", ["--executor", "local"]),
    ],
)
async def test_served_over_http_without_a_tokenizer(
    family: str, options: list[str], tmp_path: Path, log: Path
) -> None:
    folder = write_tiny(family, tmp_path / "tiny")
    with serving(log, str(folder), "--dtype", "float32", *options) as server:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            replies = await asyncio.gather(*(complete(client, p) for p in prompts()))
            text = await client.post("/v1/completions", json={"prompt": "hello"})
    assert text.status_code == 400
    assert text.json()["error"]["code"] == "tokenizer_missing"
    for prompt, choice in zip(prompts(), replies, strict=True):
        logprobs = choice["logprobs"]["token_logprobs"]
        assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in choice["token_ids"]]
        check_against_transformers(folder, prompt, choice["token_ids"], logprobs)


async def complete(client: httpx.AsyncClient, prompt: tuple[int, ...]) -> dict[str, Any]:
    """The one choice of a greedy completion with token ids and logprobs."""
    body = {
        "model": "tiny",
        "prompt": list(prompt),
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "logprobs": 1,
        "ignore_eos": True,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }
    reply = await client.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    choice: dict[str, Any] = reply.json()["choices"][0]
    return choice
