"""RMSNorm and rotary kernels against float64; a row's bits are its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.kernels import rowops
from tests.models.built import VARIANTS, needs_kernels

pytestmark = needs_kernels

ERROR = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
dtypes = st.sampled_from(sorted(ERROR, key=str))
row_counts = st.sampled_from([1, 2, 5, 17, 300])
seeds = st.integers(0, 1 << 30)


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def misaligned(rows: Tensor) -> Tensor:
    """The same rows apart, and one element off any vector boundary."""
    wide = rows.new_zeros(rows.shape[0], rows[0].numel() + 3)
    wide[:, 1:-2] = rows.flatten(1)
    return wide[:, 1:-2].view(rows.shape)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(VARIANTS),
    dtypes,
    row_counts,
    st.sampled_from([1, 7, 8, 16, 33, 64, 100, 129, 513, 2048]),
    st.booleans(),
    seeds,
)
def test_rms_norm(
    variant: str, dtype: torch.dtype, rows: int, width: int, adds: bool, seed: int
) -> None:
    x, weight = (3 * randn(seed, rows, width)).to(dtype), randn(seed + 1, width).to(dtype)
    added = randn(seed + 2, rows, width).to(dtype) if adds else None
    torch.set_num_threads(2)
    total, out = rowops.rms_norm(variant, x, weight, 1e-3, added=added)
    assert torch.equal(total, x if added is None else x + added)
    wide = total.double()
    normed = wide / torch.sqrt((wide * wide).mean(-1, keepdim=True) + 1e-3)
    torch.testing.assert_close(
        out.double(), normed * weight.double(), atol=ERROR[dtype], rtol=ERROR[dtype]
    )
    torch.set_num_threads(1)
    row = slice(seed % rows, seed % rows + 1)
    own = None if added is None else added[row]
    _, alone = rowops.rms_norm(variant, misaligned(x)[row], weight, 1e-3, added=own)
    assert torch.equal(alone, out[row])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.sampled_from(VARIANTS),
    dtypes,
    st.lists(st.sampled_from([1, 5, 16, 40]), min_size=2, max_size=4),
    seeds,
)
def test_parts_of_a_row_are_normed_alone(
    variant: str, dtype: torch.dtype, parts: list[int], seed: int
) -> None:
    x, weight = randn(seed, 5, sum(parts)).to(dtype), randn(seed + 1, sum(parts)).to(dtype)
    _, out = rowops.rms_norm(variant, x, weight, 1e-3, parts=parts)
    pieces = zip(x.split(parts, 1), weight.split(parts), out.split(parts, 1), strict=True)
    for piece, own, got in pieces:
        _, alone = rowops.rms_norm(variant, piece, own.clone(), 1e-3)
        assert torch.equal(alone, got)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(VARIANTS),
    dtypes,
    row_counts,
    st.tuples(st.sampled_from([1, 3, 8]), st.sampled_from([2, 8, 10, 32, 66, 128])),
    st.sampled_from([None, 0.7]),
    seeds,
)
def test_rotate(
    variant: str,
    dtype: torch.dtype,
    rows: int,
    shape: tuple[int, int],
    limit: float | None,
    seed: int,
) -> None:
    heads, width = shape
    num_rotated = 1 + seed % heads
    x = randn(seed, rows, heads, width).to(dtype)
    angles = 10 * randn(seed + 1, rows, 1, width // 2).double()
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    torch.set_num_threads(2)
    out = rowops.rotate(variant, x, cos, sin, num_rotated, limit)
    within = x if limit is None else x.clamp(-limit, limit)
    turned = torch.complex(*within[:, :num_rotated].double().chunk(2, -1))
    turned = turned * torch.complex(cos.double(), sin.double())
    expected = torch.cat([turned.real, turned.imag], -1)
    torch.testing.assert_close(
        out[:, :num_rotated].double(), expected, atol=4 * ERROR[dtype], rtol=ERROR[dtype]
    )
    assert torch.equal(out[:, num_rotated:], within[:, num_rotated:])
    torch.set_num_threads(1)
    row = slice(seed % rows, seed % rows + 1)
    alone = rowops.rotate(variant, misaligned(x)[row], cos[row], sin[row], num_rotated, limit)
    assert torch.equal(alone, out[row])


def test_what_is_not_a_number_stays() -> None:
    x = torch.tensor([[[float("nan"), 9.0, float("inf"), float("-inf")]]])
    one, zero = torch.ones(1, 1, 2), torch.zeros(1, 1, 2)
    for variant in VARIANTS:
        out = rowops.rotate(variant, x, one, zero, 0, 2.0)
        torch.testing.assert_close(out, x.clamp(-2, 2), equal_nan=True)
        assert rowops.rms_norm(variant, x[0], torch.ones(4), 1e-3)[1].isnan().all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(VARIANTS),
    dtypes,
    row_counts,
    st.sampled_from([1, 5, 8, 31, 64, 128, 136, 257, 300, 2048, 6144]),
    st.booleans(),
    st.sampled_from([0.0, 100.0]),
    seeds,
)
def test_layer_norm(
    variant: str, dtype: torch.dtype, rows: int, width: int, biased: bool, mean: float, seed: int
) -> None:
    """PyTorch's bits in float32 at whole vectors, its errors included; else close to float64."""
    x = (3 * randn(seed, rows, width) + mean * randn(seed + 3, rows, 1)).to(dtype)
    weight = randn(seed + 1, width).to(dtype)
    bias = randn(seed + 2, width).to(dtype) if biased else None
    torch.set_num_threads(2)
    out = rowops.layer_norm(variant, x, weight, bias, 1e-5)
    assert torch.equal(rowops.layer_norm(variant, misaligned(x), weight, bias, 1e-5), out)
    assert torch.equal(rowops.layer_norm(variant, x[:1], weight, bias, 1e-5), out[:1])
    wide = None if bias is None else bias.double()
    expected = torch.layer_norm(x.double(), (width,), weight.double(), wide, 1e-5)
    if dtype == torch.float32:
        theirs = torch.layer_norm(x, (width,), weight, bias, 1e-5)
        # What is behind the last whole vector is added with other roundings in a row out of 200.
        torch.testing.assert_close(out, theirs, rtol=1e-6, atol=2e-6)
        assert width % 8 or torch.equal(out, theirs)
    else:
        torch.testing.assert_close(
            out.double(), expected, rtol=2 * ERROR[dtype], atol=2 * ERROR[dtype]
        )
