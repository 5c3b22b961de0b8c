"""Convolution and selective scan against loops over time in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import models.layers.mamba as module
from models.interface import StateCache
from models.kernels.native import use_kernels
from models.layers.mamba import SelectiveState
from tests.models.test_attention import meta_of


@pytest.fixture(autouse=True)
def without_native_kernels() -> Iterator[None]:
    use_kernels("torch")
    yield
    use_kernels("auto")


def naive_conv(past: Tensor, u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """[K-1, I] history, [n, I] inputs → [n, I], float64."""
    extended = torch.cat([past, u]).double()
    width = weight.shape[1]
    rows = [(extended[t : t + width].T * weight.double()).sum(1) for t in range(len(u))]
    return torch.stack(rows) + bias.double()


def naive_scan(
    state: Tensor, c: Tensor, delta: Tensor, a: Tensor, b: Tensor, out_of: Tensor
) -> tuple[Tensor, Tensor]:
    """[I, N] state, [n, I] signal → ([n, I], final state), float64."""
    state, rows = state.double(), []
    for t in range(len(c)):
        decay = torch.exp(delta[t].double()[:, None] * a.double().T)
        state = decay * state + (delta[t] * c[t]).double()[:, None] * b[t].double()
        rows.append((state * out_of[t].double()).sum(1))
    return torch.stack(rows), state


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=5),
    st.integers(1, 4),
    st.sampled_from([1, 5, 16]),
    st.sampled_from([1, 7, 32]),
    st.integers(0, 1 << 30),
)
def test_matches_a_loop_over_time(
    counts: list[int], kernel: int, n: int, width: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    slots = torch.randperm(8, generator=generator)[: len(counts)].tolist()
    meta = meta_of([(0, c) for c in counts], torch.zeros(len(counts), 64, dtype=torch.int64), 1)
    object.__setattr__(meta, "state_slots", tuple(slots))
    cache = StateCache(randn(8, width, kernel - 1), randn(8, width, n))
    before = StateCache(cache.conv.clone(), cache.ssm.clone())
    total = meta.num_tokens
    u, weight, bias = randn(total, width), randn(width, kernel), randn(width)
    c, delta, a = randn(total, width), randn(total, width).abs(), -randn(n, width).abs()
    b, out_of = randn(total, n), randn(total, n)
    state = SelectiveState(kernel)
    convolved = state.convolve(u, weight.t(), bias, meta, cache)
    scanned = state.scan(c, delta, a, (b, out_of), meta, cache)
    close = {"atol": 1e-4, "rtol": 1e-4}
    for seq, slot in enumerate(slots):
        rows = slice(*meta.query_starts[seq : seq + 2])
        past = before.conv[slot].T
        expected = naive_conv(past, u[rows], weight, bias)
        torch.testing.assert_close(convolved[rows].double(), expected, **close)
        tail = torch.cat([past, u[rows]])[len(past) + counts[seq] - (kernel - 1) :]
        assert torch.equal(cache.conv[slot], tail.T)
        expected, final = naive_scan(
            before.ssm[slot], c[rows], delta[rows], a, b[rows], out_of[rows]
        )
        torch.testing.assert_close(scanned[rows].double(), expected, **close)
        torch.testing.assert_close(cache.ssm[slot].double(), final, **close)
    untouched = [s for s in range(8) if s not in slots]
    assert torch.equal(cache.conv[untouched], before.conv[untouched])
    assert torch.equal(cache.ssm[untouched], before.ssm[untouched])


def test_spans_of_the_scan_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [9, 1, 30, 1, 17]
    meta = meta_of([(0, c) for c in counts], torch.zeros(5, 64, dtype=torch.int64), 1)
    object.__setattr__(meta, "state_slots", (4, 0, 2, 1, 3))
    generator = torch.Generator().manual_seed(0)
    c, delta = torch.randn(2, meta.num_tokens, 12, generator=generator)
    b, out_of = torch.randn(2, meta.num_tokens, 6, generator=generator)
    a = -torch.rand(6, 12, generator=generator)
    results = []
    for budget in (1, 500, 1 << 30):
        monkeypatch.setattr(module, "_SCAN_ELEMENTS", budget)
        cache = StateCache(torch.zeros(5, 12, 3), torch.ones(5, 12, 6))
        y = SelectiveState(4).scan(c, delta.abs(), a, (b, out_of), meta, cache)
        results.append((y, cache.ssm))
    for y, ssm in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(ssm, results[0][1])
