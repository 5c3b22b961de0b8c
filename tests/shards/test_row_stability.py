"""What the shards and the dispatcher do to rows never depends on the other rows of a step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from models.layers.rowwise import pad_rows
from models.registry import load_config
from router.permutation import combine, permute
from router.step import ScheduledSequence, Want
from shards.checkpoint import Checkpoint
from shards.loading import load_experts, load_stage
from shards.logits_processors import TokenHistory
from shards.sampler import SampleRequest, sample
from shards.wanted import head_rows
from tests.e2e.traffic import SAMPLINGS
from tests.tiny import FAMILIES, VOCAB_SIZE, write_tiny

DTYPES = [torch.float32, torch.bfloat16]


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 4096])
def test_combine(dtype: torch.dtype, width: int) -> None:
    # At the larger width they are more than one block of sums.
    num_tokens, top_k, num_experts = 70, 3, 8
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(num_tokens, num_experts, generator=generator).argsort(1)[:, :top_k]
    weights = torch.rand(num_tokens, top_k, generator=generator).to(dtype)
    outputs = randn(1, num_tokens, top_k, width, dtype=dtype)

    def of(tokens: Tensor) -> Tensor:
        permutation = permute(ids[tokens], num_experts)
        rows = outputs.new_empty(len(tokens) * top_k, width)
        rows[permutation.positions.flatten()] = outputs[tokens].flatten(0, 1)
        return combine(rows, permutation, weights[tokens], dtype)

    everyone = torch.arange(num_tokens)
    full = of(everyone)
    assert torch.equal(of(everyone.flip(0)).flip(0), full)
    for token in range(0, num_tokens, 6):
        assert torch.equal(of(everyone[token : token + 1])[0], full[token])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_an_expert_bank(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config = load_config(write_tiny(family, tmp_path))
    layer = next(i for i in range(config.num_layers) if config.is_moe_layer(i))
    # Two banks: the copies that two workers hold.
    for quantization in ("none", "int8"):
        all_experts, one_expert = (
            load_experts(config, Checkpoint(tmp_path), held, dtype, quantization=quantization)
            for held in (range(config.num_experts), [2])
        )
        rows = randn(0, 40, config.hidden_size, dtype=dtype)
        full = all_experts.forward(layer, [(1, 9), (2, 31)], rows)
        for row in range(9, 40, 5):
            alone = one_expert.forward(layer, [(2, 1)], rows[row : row + 1])
            assert torch.equal(alone[0], full[row])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [130, 5003, 32064])
def test_every_sampling_option(dtype: torch.dtype, vocab: int) -> None:
    logits = 3 * randn(2, 2 * len(SAMPLINGS), vocab, dtype=dtype)
    requests = [
        SampleRequest(
            seq_id=number,
            history=TokenHistory((3, 4, 5, 9), [6, 20, 20, 7, 9][: number % 6]),
            sampling=SAMPLINGS[number % len(SAMPLINGS)],
        )
        for number in range(len(logits))
    ]
    together = sample(logits, requests)
    for number, request in enumerate(requests):
        assert sample(logits[number : number + 1].clone(), [request]) == [together[number]]
    assert sample(logits.flip(0), requests[::-1])[::-1] == together


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_wanted_rows_of_chunks(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config, checkpoint = load_config(write_tiny(family, tmp_path)), Checkpoint(tmp_path)
    stage = load_stage(config, checkpoint, 0, config.num_layers, dtype)
    length = 45
    hidden = randn(5, length, config.hidden_size, dtype=dtype)
    prompt = tuple(i * 7 % VOCAB_SIZE for i in range(length))
    want = Want(logits=True, prompt_logprobs=3)

    def in_chunks(size: int) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        for start in range(0, length, size):
            count = min(size, length - start)
            scheduled = ScheduledSequence(
                seq_id=1, start=start, num_tokens=count, token_ids=prompt[start:][:count], length=45
            )
            normed = stage.norm(pad_rows(hidden[start : start + count]))[:count]
            for rows in head_rows(stage, want, prompt, scheduled, normed):
                found[rows.name] = found.get(rows.name, b"") + rows.data
        return found

    whole = in_chunks(length)
    assert len(np.frombuffer(whole["prompt_logprobs"], np.float32)) == (length - 1) * 4
    for size in (1, 5, 16):
        assert in_chunks(size) == whole
