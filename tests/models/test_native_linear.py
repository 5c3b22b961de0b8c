"""Native products: right against float64, and with one order for every row count and neighbour."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.interface import ExpertWeights
from models.kernels.native import NativeKernels
from models.kernels.variants import KernelsUnavailable, Variant, supported_variants
from tests.models.built import VARIANTS, needs_kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ERROR = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
ROWS = [0, 1, 2, 5, 15, 16, 17, 31, 33, 48, 64, 70, 257]
WIDTHS = [1, 7, 16, 31, 32, 33, 63, 64, 65, 96, 160, 300, 1031, 1100]
OUTPUTS = [1, 3, 15, 16, 17, 31, 32, 33, 64, 70, 97, 257]
Floats = npt.NDArray[np.float32]


pytestmark = needs_kernels

NATIVE = {v.name: NativeKernels(v) for v in supported_variants() if v.name in VARIANTS}

names = st.sampled_from(sorted(NATIVE))
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 1 << 30)
shapes = st.tuples(
    st.sampled_from(ROWS) | st.integers(0, 90),
    st.sampled_from(WIDTHS) | st.integers(1, 400),
    st.sampled_from(OUTPUTS) | st.integers(1, 130),
)


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def int8(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)


def misaligned(x: Tensor) -> Tensor:
    """The same values one element off any vector boundary."""
    memory = x.new_zeros(x.numel() + 1)
    memory[1:] = x.flatten()
    return memory[1:].view(x.shape)


def check_rows(native: NativeKernels, x: Tensor, w: Tensor, extra: tuple[Tensor, ...]) -> Tensor:
    """The product, after checking that rows, order, alignment and threads do not matter."""
    bias, scale = extra[0], extra[1] if len(extra) > 1 else None
    torch.set_num_threads(1)
    full = native.linear(x, w, bias, scale)
    for count in {1, 2, 16, 17, 40} & set(range(x.shape[0] + 1)):
        start = x.shape[0] - count
        assert torch.equal(native.linear(x[start:].clone(), w, bias, scale), full[start:]), count
    order = torch.randperm(x.shape[0], generator=torch.Generator().manual_seed(x.shape[0]))
    assert torch.equal(native.linear(x[order], w, bias, scale), full[order])
    assert torch.equal(native.linear(misaligned(x), misaligned(w), bias, scale), full)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(native.linear(x, w, bias, scale), full)
    return full


@settings(max_examples=150, deadline=None, derandomize=True)
@given(names, dtypes, shapes, seeds)
def test_linear(name: str, dtype: torch.dtype, shape: tuple[int, int, int], seed: int) -> None:
    rows, width, outputs = shape
    x, w = randn(seed, rows, width, dtype=dtype), randn(seed + 1, outputs, width, dtype=dtype)
    bias = randn(seed + 2, outputs, dtype=dtype)
    full = check_rows(NATIVE[name], x, w, (bias,))
    expected = x.double() @ w.double().T + bias.double()
    error = ERROR[dtype]
    torch.testing.assert_close(full.double(), expected, atol=error * width**0.5, rtol=error)
    assert full.dtype is dtype
    without = NATIVE[name].linear(x, w)
    torch.testing.assert_close(
        without.double(), expected - bias.double(), atol=2 * error * width**0.5, rtol=error
    )


@settings(max_examples=100, deadline=None, derandomize=True)
@given(names, dtypes, shapes, seeds)
def test_int8(name: str, dtype: torch.dtype, shape: tuple[int, int, int], seed: int) -> None:
    rows, width, outputs = shape
    x, w = randn(seed, rows, width, dtype=dtype), int8(seed + 1, outputs, width)
    bias, scale = randn(seed + 2, outputs, dtype=dtype), 0.01 * randn(seed + 3, outputs).abs()
    full = check_rows(NATIVE[name], x, w, (bias, scale))
    expected = x.double() @ (w.double() * scale.double()[:, None]).T + bias.double()
    error = ERROR[dtype]
    torch.testing.assert_close(full.double(), expected, atol=error * width**0.5, rtol=error)


def amx_order(x: Floats, w: Floats) -> Floats:
    """AMX's sums, written down: per 32 values an even and an odd chain, denormals are zero."""

    def flushed(values: Floats) -> Floats:
        values[np.abs(values) < np.finfo(np.float32).tiny] = 0
        return values

    total = np.zeros((len(x), len(w)), np.float32)
    for block in range(0, x.shape[1], 32):
        even, odd = np.zeros_like(total), np.zeros_like(total)
        # A product of two bfloat16 is exact in float32: adding it rounds as a fused operation.
        for k in range(block, min(block + 32, x.shape[1]), 2):
            even = flushed(even + np.outer(x[:, k], w[:, k]))
            if k + 1 < x.shape[1]:
                odd = flushed(odd + np.outer(x[:, k + 1], w[:, k + 1]))
        total = flushed(total + flushed(even + odd))
    return total


@pytest.mark.skipif("amx" not in NATIVE, reason="this processor has no AMX")
@pytest.mark.parametrize("size", [1.0, 1e-19])
@pytest.mark.parametrize("shape", [(1, 2048, 64), (3, 100, 37), (17, 333, 129), (300, 1100, 65)])
def test_tiles_add_in_the_order_that_is_written_down(
    shape: tuple[int, int, int], size: float
) -> None:
    rows, width, outputs = shape
    x = (size * randn(0, rows, width)).bfloat16()
    w = (size * randn(1, outputs, width)).bfloat16()
    expected = torch.from_numpy(amx_order(x.float().numpy(), w.float().numpy())).bfloat16()
    assert torch.equal(NATIVE["amx"].linear(x, w), expected)


@pytest.mark.skipif("amx" not in NATIVE, reason="this processor has no AMX")
def test_int8_tiles_add_even_and_odd_places_of_64_apart() -> None:
    x, w = randn(0, 20, 200, dtype=torch.bfloat16), int8(1, 40, 200)
    padded_x, padded_w = torch.zeros(20, 256), torch.zeros(40, 256)
    padded_x[:, :200], padded_w[:, :200] = x.float(), w.float()
    order = torch.arange(256).view(4, 32, 2).transpose(1, 2).flatten()
    sums = amx_order(padded_x[:, order].numpy(), padded_w[:, order].numpy() / 256) * 256
    expected = torch.from_numpy(sums).bfloat16()
    assert torch.equal(NATIVE["amx"].linear(x, w, None, torch.ones(40)), expected)


@pytest.mark.parametrize("name", sorted(NATIVE))
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_where_it_is(name: str, dtype: torch.dtype) -> None:
    x, w = randn(0, 40, 37, dtype=dtype), randn(1, 50, 37, dtype=dtype)
    expected = NATIVE[name].linear(x, w)
    x[7, 3], w[20, 36], w[33, 0] = math.nan, math.inf, math.nan
    got = NATIVE[name].linear(x, w)
    bad = torch.zeros(40, 50, dtype=torch.bool)
    bad[7], bad[:, 20], bad[:, 33] = True, True, True
    assert torch.equal(got.isfinite(), ~bad)
    assert torch.equal(got[~bad], expected[~bad])


def at_the_end_of_memory(x: Tensor) -> tuple[Tensor, mmap.mmap]:
    """The same values right before a page that must not be read."""
    page = mmap.PAGESIZE
    size = -(-x.nbytes // page) * page
    memory = mmap.mmap(-1, size + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + size), page, 0) == 0
    buffer = torch.frombuffer(memory, dtype=x.dtype, count=size // x.itemsize)
    copy = buffer[-x.numel() :].view(x.shape)
    return copy.copy_(x), memory


@pytest.mark.parametrize("name", sorted(NATIVE))
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8])
@pytest.mark.parametrize("shape", [(1, 33, 5), (3, 63, 32), (20, 200, 33), (70, 65, 31)])
def test_nothing_is_read_beyond_the_end(
    name: str, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    rows, width, outputs = shape
    is_int8 = dtype == torch.int8
    x = randn(0, rows, width, dtype=torch.bfloat16 if is_int8 else dtype)
    w = int8(1, outputs, width) if is_int8 else randn(1, outputs, width, dtype=dtype)
    bias, scale = randn(2, outputs, dtype=x.dtype), randn(3, outputs) if is_int8 else None
    expected = NATIVE[name].linear(x, w, bias, scale)
    kept = [at_the_end_of_memory(t) for t in (x, w, bias)]
    last = None if scale is None else at_the_end_of_memory(scale)[0]
    assert torch.equal(NATIVE[name].linear(*(t for t, _ in kept), last), expected)


def expert(seed: int, shape: tuple[int, int], dtype: torch.dtype, is_int8: bool) -> ExpertWeights:
    width, hidden = shape
    extents = ((hidden, width), (hidden, width), (width, hidden))
    if is_int8:
        values = [int8(seed + i, *extent) for i, extent in enumerate(extents)]
        scales = [randn(seed + 9 + i, e[0]).abs() / 2000 for i, e in enumerate(extents)]
        return ExpertWeights(*values, *scales)
    return ExpertWeights(*(randn(seed + i, *e, dtype=dtype) / 8 for i, e in enumerate(extents)))


def exact_expert(x: Tensor, w: ExpertWeights) -> Tensor:
    gate, up, down = (
        values.double() * (1.0 if scale is None else scale.double()[:, None])
        for values, scale in (
            (w.gate, w.gate_scale),
            (w.up, w.up_scale),
            (w.down, w.down_scale),
        )
    )
    wide = x.double()
    gated = wide @ gate.T
    hidden = gated * torch.sigmoid(gated) * (wide @ up.T)
    return hidden @ down.T


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    names,
    dtypes,
    st.booleans(),
    st.sampled_from([(64, 48), (96, 65)]) | st.tuples(st.integers(1, 140), st.integers(1, 140)),
    st.lists(st.sampled_from([0, 1, 2, 3, 16, 17, 40, 300]), max_size=6),
    seeds,
)
def test_experts(
    name: str,
    dtype: torch.dtype,
    is_int8: bool,
    shape: tuple[int, int],
    counts: list[int],
    seed: int,
) -> None:
    native = NATIVE[name]
    groups = [(expert(seed + 20 * i, shape, dtype, is_int8), n) for i, n in enumerate(counts)]
    x = randn(seed - 1, sum(counts), shape[0], dtype=dtype)
    torch.set_num_threads(1)
    full = native.experts(x, groups)
    assert full.shape == x.shape
    torch.set_num_threads(2)
    assert torch.equal(native.experts(x, groups), full)
    start = 0
    for weights, count in groups:
        rows, outputs = x[start : start + count], full[start : start + count]
        expected = exact_expert(rows, weights)
        size = expected.abs().max().item() if count else 0.0
        error = 4 * ERROR[dtype]
        torch.testing.assert_close(outputs.double(), expected, atol=error * size, rtol=error)
        for row in range(0, count, 29):
            assert torch.equal(native.experts(rows[row : row + 1], [(weights, 1)])[0], outputs[row])
        start += count


@pytest.mark.parametrize("name", sorted(NATIVE))
def test_more_experts_than_are_computed_at_once(name: str) -> None:
    groups = [(expert(7 * i, (32, 16), torch.bfloat16, False), i % 4) for i in range(150)]
    x = randn(0, sum(count for _, count in groups), 32, dtype=torch.bfloat16)
    full = NATIVE[name].experts(x, groups)
    start = 0
    for weights, count in groups:
        end = start + count
        assert torch.equal(NATIVE[name].experts(x[start:end], [(weights, count)]), full[start:end])
        start = end


@pytest.mark.parametrize("name", sorted(NATIVE))
def test_silu_far_from_zero(name: str) -> None:
    """The gate's activation over float32's range: x · sigmoid(x), zero far below."""
    x = torch.cat([torch.linspace(-200, 200, 4001), torch.tensor([0.0, -1e30, 1e30])])[:, None]
    one = torch.ones(1, 1)
    gated = NATIVE[name].experts(x, [(ExpertWeights(one, one, one), len(x))])
    expected = x.double() * x.double() * torch.sigmoid(x.double())
    torch.testing.assert_close(gated.double(), expected.float().double(), atol=1e-30, rtol=1e-6)


def test_variants_that_the_processor_lacks_are_refused() -> None:
    lacking = Variant(name="next", needs=frozenset({"avx4096"}), flags=())
    with pytest.raises(KernelsUnavailable, match="avx4096"):
        NativeKernels(lacking)
