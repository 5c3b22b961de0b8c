"""Kernels touch nothing beyond the end of what they are given: the next page is not to be read."""

from __future__ import annotations

import pytest
import torch

from models.interface import KVCache
from models.kernels import rowops
from models.kernels.attention import PagedBatch
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
    x, weight = randn(0, 5, width, dtype=dtype), randn(1, width, dtype=dtype)
    heads, angles = randn(2, 5, 3, width, dtype=dtype), randn(3, 5, 1, width // 2, dtype=dtype)
    kept = [at_the_end_of_memory(t) for t in (x, weight, heads, angles)]
    guarded = [t for t, _ in kept]
    expected = rowops.rms_norm(variant, x, weight, 1e-5)
    assert torch.equal(rowops.rms_norm(variant, guarded[0], guarded[1], 1e-5), expected)
    expected = rowops.rotate(variant, heads, angles, angles)
    assert torch.equal(rowops.rotate(variant, guarded[2], guarded[3], guarded[3]), expected)
