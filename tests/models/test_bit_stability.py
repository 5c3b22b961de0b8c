"""Every operation's rows keep their bits whatever surrounds them: the numbers contract's base."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.interface import ExpertWeights
from models.layers import activation
from models.layers.mamba import halving_sum
from models.layers.moe import divide_by_p_norm, expert_rows, softmax_top_k, sparse_mixer
from models.layers.norm import layer_norm, rms_norm
from models.layers.rowwise import linear, pad_rows, row_tile

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
dtypes = st.sampled_from(DTYPES[:2])
seeds = st.integers(0, 1 << 30)


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def alone(x: Tensor, row: int, at: int) -> Tensor:
    """One row of x in a tile of its own, at place `at`, zeros elsewhere."""
    tile = x.new_zeros(row_tile(x.dtype), x.shape[1])
    tile[at] = x[row]
    return tile


def misaligned(x: Tensor) -> Tensor:
    """The same values one element off any vector boundary."""
    memory = x.new_zeros(x.numel() + 1)
    memory[1:] = x.flatten()
    return memory[1:].view(x.shape)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    dtypes,
    st.sampled_from([1, 2, 3, 7, 64]),
    st.sampled_from([1, 3, 16, 33, 48, 64, 97, 100, 256, 300, 512]),
    st.sampled_from([1, 2, 3, 4, 16, 33, 48, 64, 97, 131, 256, 513]),
    seeds,
)
def test_linear(dtype: torch.dtype, tiles: int, width: int, out: int, seed: int) -> None:
    tile = row_tile(dtype)
    x, w = randn(seed, tiles * tile, width, dtype=dtype), randn(seed + 1, out, width, dtype=dtype)
    bias = randn(seed + 2, out, dtype=dtype)
    full = linear(x, w, bias)
    expected = x.double() @ w.double().T + bias.double()
    error = 0.02 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(full.double(), expected, atol=error * width**0.5, rtol=error)
    row, at = seed % x.shape[0], seed % tile
    assert torch.equal(linear(alone(x, row, at), w, bias)[at], full[row])
    order = torch.randperm(x.shape[0], generator=torch.Generator().manual_seed(seed))
    assert torch.equal(linear(x[order], w, bias), full[order])
    assert torch.equal(linear(misaligned(x), misaligned(w), bias), full)


def test_linear_of_no_rows() -> None:
    assert linear(torch.zeros(0, 5), torch.zeros(3, 5)).shape == (0, 3)


def test_one_row_of_blas_is_another_number() -> None:
    # Why the tiles exist: where this stops holding, they can go.
    x, w = randn(0, 8, 256), randn(1, 512, 256)
    assert not torch.equal(F.linear(x[:1], w), F.linear(x, w)[:1])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(dtypes, st.integers(0, 40), st.sampled_from([33, 48, 96]), seeds)
def test_expert_of_any_number_of_rows(dtype: torch.dtype, n: int, width: int, seed: int) -> None:
    weights = ExpertWeights(
        randn(seed, width, 64, dtype=dtype) / 8,
        randn(seed + 1, width, 64, dtype=dtype) / 8,
        randn(seed + 2, 64, width, dtype=dtype) / 8,
    )
    x = randn(seed + 3, n, 64, dtype=dtype)
    for act in (activation.silu, activation.gelu):
        full = expert_rows(x, [(weights, n)], act)
        assert full.shape == x.shape
        assert torch.equal(expert_rows(x, [(weights, n // 3), (weights, n - n // 3)], act), full)
        for row in range(0, n, 7):
            assert torch.equal(expert_rows(x[row : row + 1], [(weights, 1)], act)[0], full[row])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", sorted(activation.ACTIVATIONS))
def test_activation_values_do_not_depend_on_the_array(name: str, dtype: torch.dtype) -> None:
    stable(activation.ACTIVATIONS[name], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_softplus_values_do_not_depend_on_the_array(dtype: torch.dtype) -> None:
    stable(activation.softplus, dtype)


def stable(function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    """Long arrays, every short length, odd starts, another thread count: the same values."""
    x = 4 * randn(3, 100_003, dtype=dtype)
    full = function(x)
    for length in [*range(1, 70), 127, 1001]:
        for start in (0, 1, 5):
            piece = x[start : start + length]
            assert torch.equal(function(piece.clone()), full[start : start + length])
            assert torch.equal(function(piece), full[start : start + length])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(function(x), full)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("ours", "torchs"),
    [
        (activation.silu, F.silu),
        (activation.sigmoid, torch.sigmoid),
        (activation.softplus, F.softplus),
        (activation.gelu, F.gelu),
        (activation.gelu_tanh, lambda x: F.gelu(x, approximate="tanh")),
    ],
)
def test_activations_are_torchs(
    ours: Callable[[Tensor], Tensor], torchs: Callable[[Tensor], Tensor]
) -> None:
    x = torch.cat([torch.linspace(-120, 120, 4001), torch.tensor([0.0, -0.0, 20.0, 1e-8])])
    torch.testing.assert_close(ours(x), torchs(x), atol=1e-6, rtol=2e-6)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(dtypes, st.integers(1, 130), st.integers(1, 200), seeds)
def test_norms(dtype: torch.dtype, rows: int, width: int, seed: int) -> None:
    x = randn(seed, rows, width + 3, dtype=dtype)[:, 2:-1]
    weight, bias = randn(seed + 1, width, dtype=dtype), randn(seed + 2, width, dtype=dtype)
    for norm in (
        lambda x: layer_norm(x, weight, bias, 1e-5),
        lambda x: layer_norm(x, weight, None, 1e-5),
        lambda x: rms_norm(x, weight, 1e-6),
    ):
        full = norm(x)
        for row in range(0, rows, 11):
            assert torch.equal(norm(x[row : row + 1].clone())[0], full[row])
    wide = x.double()
    exact = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * weight.double()
    error = 0.02 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(rms_norm(x, weight, 1e-6).double(), exact, atol=error, rtol=error)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(dtypes, st.integers(1, 70), st.integers(2, 40), seeds)
def test_gates(dtype: torch.dtype, rows: int, experts: int, seed: int) -> None:
    logits = randn(seed, rows, experts, dtype=dtype)
    top_k = 1 + seed % min(experts, 8)
    for gate in (
        lambda x: softmax_top_k(x, top_k),
        lambda x: (softmax_top_k(x, top_k)[0], divide_by_p_norm(softmax_top_k(x, top_k)[1], 1.0)),
        lambda x: (softmax_top_k(x, top_k)[0], divide_by_p_norm(softmax_top_k(x, top_k)[1], 3.0)),
        lambda x: sparse_mixer(x, 0.1),
    ):
        ids, weights = gate(logits)
        for row in range(0, rows, 9):
            one_id, one_weight = gate(logits[row : row + 1].clone())
            assert torch.equal(one_id[0], ids[row])
            assert torch.equal(one_weight[0], weights[row])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 20), st.integers(1, 60), seeds)
def test_halving_sum(rows: int, terms: int, width: int, seed: int) -> None:
    x = randn(seed, rows, terms, width)
    full = halving_sum(x)
    torch.testing.assert_close(full.double(), x.double().sum(1), atol=1e-5, rtol=1e-5)
    assert torch.equal(halving_sum(x[-1:].clone())[0], full[-1])


def test_pad_rows_adds_zero_rows() -> None:
    x = randn(0, 5, 3)
    padded = pad_rows(x)
    assert padded.shape[0] % row_tile(x.dtype) == 0
    assert 5 <= padded.shape[0] < 5 + row_tile(x.dtype)
    assert torch.equal(padded[:5], x)
    assert not padded[5:].any()
    assert pad_rows(padded) is padded
