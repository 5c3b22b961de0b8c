"""Kernels touch nothing beyond the end of what they are given: the next page is not to be read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.interface import ExpertWeights, KVCache
from models.kernels import gates, rowops
from models.kernels.attention import PagedBatch
from models.kernels.routed import RoutedExperts
from models.kernels.scan import RecurrentBatch, ScanWeights
from tests.models.built import VARIANTS, needs_kernels
from tests.models.test_attention import meta_of
from tests.models.test_native_linear import at_the_end_of_memory, randn
from tests.models.test_native_scan import batch_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = [
    needs_kernels,
    pytest.mark.parametrize("variant", VARIANTS),
    pytest.mark.parametrize("dtype", DTYPES),
]


@pytest.mark.parametrize("width", [1, 10, 33, 64, 100])
def test_attention(variant: str, dtype: torch.dtype, width: int) -> None:
    meta = meta_of([(60, 36)], torch.tensor([[0, 1, 2, 3, 4, 5]]), 16)
    q, k, v = (
        randn(seed, 48, heads, width, dtype=dtype) for seed, heads in ((0, 4), (1, 2), (2, 2))
    )
    cached = [randn(seed, 6, 2, 16, width, dtype=dtype) for seed in (3, 4)]
    batch = PagedBatch(meta, 16)
    expected = batch.attend(variant, q, k, v, KVCache(*(c.clone() for c in cached)), None)
    kept = [at_the_end_of_memory(t) for t in (q, k, v, *cached)]
    q, k, v, *guarded = (t for t, _ in kept)
    assert torch.equal(batch.attend(variant, q, k, v, KVCache(*guarded), None), expected)


@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 16, 33), (3, 5, 70)])
def test_scan(variant: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    num_taps, num_states, width = shape
    _, batch = batch_of([0, 1], [9, 7])
    u, step, z = (randn(seed, 16, width, dtype=dtype) for seed in range(3))
    b, c = (randn(seed, 16, num_states, dtype=dtype) for seed in range(3, 5))
    bias, step_bias, d = (randn(seed, width, dtype=dtype) for seed in range(5, 8))
    taps, a_log = randn(8, num_taps, width), randn(9, width, num_states)
    history = torch.zeros(2, width, num_taps - 1, dtype=dtype)
    states = torch.zeros(2, width, num_states)

    def run(batch: RecurrentBatch, *t: torch.Tensor) -> torch.Tensor:
        u, step, z, b, c, bias, step_bias, d, taps, history, states = t
        signal = batch.convolve(variant, u, taps, bias, history)
        weights = ScanWeights(a_log, d, step_bias)
        return batch.scan(variant, (signal, step, z, b, c), weights, states)

    tensors = (u, step, z, b, c, bias, step_bias, d, taps, history, states)
    expected = run(batch, *(t.clone() for t in tensors))
    kept = [at_the_end_of_memory(t) if t.numel() else (t, None) for t in tensors]
    assert torch.equal(run(batch, *(t for t, _ in kept)), expected)


@pytest.mark.parametrize("width", [2, 10, 34, 100])
def test_rows(variant: str, dtype: torch.dtype, width: int) -> None:
    x, added = randn(0, 5, width, dtype=dtype), randn(4, 5, width, dtype=dtype)
    weight = randn(1, width, dtype=dtype)
    heads, angles = randn(2, 5, 3, width, dtype=dtype), randn(3, 5, 1, width // 2, dtype=dtype)
    tensors = (x, added, weight, heads, angles)
    kept = [at_the_end_of_memory(t) for t in tensors]

    def run(x: Tensor, added: Tensor, weight: Tensor, *rotated: Tensor) -> Tensor:
        norms = rowops.rms_norm(variant, x, weight, 1e-5, added=added)
        heads = rowops.rotate(variant, *rotated, rotated[1], 2, 0.5)
        return torch.cat([*(norm.flatten() for norm in norms), heads.flatten()])

    assert torch.equal(run(*(t for t, _ in kept)), run(*tensors))


@pytest.mark.parametrize("experts", [2, 7, 16, 17, 40])
def test_gates(variant: str, dtype: torch.dtype, experts: int) -> None:
    logits = randn(0, 5, experts, dtype=dtype)
    guarded, _ = at_the_end_of_memory(logits)
    for gate in (
        lambda x: gates.softmax_top_k(variant, x, 2, 1.0),
        lambda x: gates.sparse_mixer(variant, x, 0.02),
    ):
        for got, expected in zip(gate(guarded), gate(logits), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("width", [2, 10, 34, 100])
def test_routed(variant: str, dtype: torch.dtype, width: int) -> None:
    x, scales = randn(0, 5, width, dtype=dtype), randn(1, 5, 2, dtype=dtype)
    ids = torch.tensor([[0, 2], [2, 1], [0, 1], [1, 0], [2, 0]])
    shapes = [(3, 6, width), (3, 6, width), (3, width, 6)]
    stacks = [randn(2 + i, *shape, dtype=dtype) for i, shape in enumerate(shapes)]
    kept = [at_the_end_of_memory(t) for t in (x, ids, scales, *stacks)]

    def run(x: Tensor, ids: Tensor, scales: Tensor, *stacks: Tensor) -> Tensor:
        experts = RoutedExperts([ExpertWeights(*parts) for parts in zip(*stacks, strict=True)])
        return experts(variant, x, ids, scales)

    assert torch.equal(run(*(t for t, _ in kept)), run(x, ids, scales, *stacks))
