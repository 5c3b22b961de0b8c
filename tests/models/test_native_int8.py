"""Native products with int8 weights: exact where float32 is, one order, and rows kept apart."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from models.interface import ExpertWeights
from tests.models.built import needs_kernels
from tests.models.test_native_linear import NATIVE, at_the_end_of_memory, int8, randn

# Around every number of rows at which the way of computing changes.
ROWS = [1, 2, 15, 16, 17, 31, 32, 33, 48, 64, 65, 130]
SHAPES = [(64, 32), (128, 33), (200, 40), (1024, 64), (65, 15), (1031, 95), (33, 1)]

pytestmark = [needs_kernels, pytest.mark.parametrize("name", sorted(NATIVE))]


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def extreme_values(seed: int, outputs: int, width: int) -> Tensor:
    """Every int8 there is and, half of the time, its ends and zero."""
    generator = torch.Generator().manual_seed(seed)
    ends = torch.tensor([-128, -127, -1, 0, 1, 127], dtype=torch.int8)
    chosen = ends[torch.randint(len(ends), (outputs, width), generator=generator)]
    everywhere = torch.rand(outputs, width, generator=generator) < 0.5
    return torch.where(everywhere, int8(seed + 1, outputs, width), chosen)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", ROWS)
def test_sums_that_float32_holds_are_exact(name: str, shape: tuple[int, int], rows: int) -> None:
    """Whole numbers below 2^24, scaled by powers of two: no order rounds them but at the end."""
    width, outputs = shape
    generator = torch.Generator().manual_seed(rows)
    x = torch.randint(-8, 9, (rows, width), generator=generator).bfloat16()
    w = extreme_values(rows, outputs, width)
    scale = 2.0 ** torch.randint(-9, 3, (outputs,), generator=generator)
    scale[::5] = 0
    expected = (x.double() @ w.double().T * scale.double()).float().bfloat16()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert torch.equal(NATIVE[name].linear(x, w, None, scale), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_has_the_same_bits_in_any_batch(name: str, shape: tuple[int, int]) -> None:
    width, outputs = shape
    x = randn(0, max(ROWS), width, dtype=torch.bfloat16)
    w, scale = extreme_values(1, outputs, width), randn(2, outputs).abs() / 100
    torch.set_num_threads(1)
    alone = torch.cat([NATIVE[name].linear(row[None], w, None, scale) for row in x])
    for rows in ROWS:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            last = NATIVE[name].linear(x[-rows:], w, None, scale)
            assert torch.equal(last, alone[-rows:]), (rows, threads)


@pytest.mark.parametrize("rows", [1, 16, 32, 64, 130])
def test_error_is_that_of_a_float32_sum_and_one_rounding(name: str, rows: int) -> None:
    width = 2048
    x, w = randn(0, rows, width, dtype=torch.bfloat16), extreme_values(1, 70, width)
    scale = randn(2, 70).abs() / 100
    exact = x.double() @ w.double().T * scale.double()
    size = x.double().abs() @ w.double().abs().T * scale.double()
    got = NATIVE[name].linear(x, w, None, scale).double()
    # Terms add up one after another, at worst 2048 of them; bfloat16 keeps 8 bits.
    bound = exact.abs() * 2.0**-8 + size * 2.0**-24 * 100
    assert bool(((got - exact).abs() <= bound).all())


@pytest.mark.parametrize("rows", [1, 5, 20, 40, 100])
def test_tiny_activations_vanish_or_count(name: str, rows: int) -> None:
    """Below 2^-126 activations may count as zero; what comes out is never larger than it should."""
    x = torch.full((rows, 200), 2.0**-130, dtype=torch.bfloat16)
    w, scale = extreme_values(3, 40, 200), torch.ones(40)
    exact = x.double() @ w.double().T
    got = NATIVE[name].linear(x, w, None, scale).double()
    assert bool((got.abs() <= exact.abs() * (1 + 2.0**-7)).all())
    normal = torch.full((rows, 200), 2.0**-100, dtype=torch.bfloat16)
    exact = normal.double() @ w.double().T
    got = NATIVE[name].linear(normal, w, None, scale).double()
    assert bool(((got - exact).abs() <= exact.abs() * 2.0**-8).all())


@pytest.mark.parametrize("rows", [16, 32, 64, 130])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_rows_that_are_not_finite_leave_the_others_alone(name: str, rows: int, bad: float) -> None:
    x, w = randn(0, rows, 150, dtype=torch.bfloat16), extreme_values(1, 50, 150)
    scale = randn(2, 50).abs()
    expected = NATIVE[name].linear(x, w, None, scale)
    x[3, 7] = x[rows - 1, 149] = bad
    got = NATIVE[name].linear(x, w, None, scale)
    others = torch.ones(rows, dtype=torch.bool)
    others[[3, rows - 1]] = False
    assert torch.equal(got[others], expected[others])
    assert not bool(got[[3, rows - 1]][:, (w[:, 7] != 0) & (w[:, 149] != 0)].isfinite().any())


@pytest.mark.parametrize("rows", [1, 16, 20, 50, 100])
def test_nothing_is_read_beyond_the_end(name: str, rows: int) -> None:
    for width, outputs in ((64, 64), (128, 48), (65, 33), (1031, 31)):
        x, w = randn(0, rows, width, dtype=torch.bfloat16), extreme_values(1, outputs, width)
        scale = randn(2, outputs).abs()
        expected = NATIVE[name].linear(x, w, None, scale)
        kept = [at_the_end_of_memory(t) for t in (x, w, scale)]
        values, weight, factor = (t for t, _ in kept)
        assert torch.equal(NATIVE[name].linear(values, weight, None, factor), expected)


def test_experts_in_company_and_alone(name: str) -> None:
    """The rows of an expert, whoever is computed beside it, on any number of threads."""
    shapes = ((96, 160), (96, 160), (160, 96))
    counts = [1, 20, 0, 64, 7, 33, 130]
    groups = []
    for seed, count in enumerate(counts):
        values = [extreme_values(9 * seed + i, *shape) for i, shape in enumerate(shapes)]
        scales = [randn(seed + i, shape[0]).abs() / 300 for i, shape in enumerate(shapes)]
        groups.append((ExpertWeights(*values, *scales), count))
    x = randn(1, sum(counts), 160, dtype=torch.bfloat16)
    full = NATIVE[name].experts(x, groups)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(NATIVE[name].experts(x, groups), full)
    torch.set_num_threads(1)
    start = 0
    for weights, count in groups:
        for row in range(start, start + count, 9):
            alone = NATIVE[name].experts(x[row : row + 1], [(weights, 1)])
            assert torch.equal(alone[0], full[row])
        start += count
