"""Gate kernels against their definitions in float64; a token's choice is its own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.kernels import gates
from models.layers.moe import divide_by_p_norm, softmax_top_k, sparse_mixer
from tests.models.built import VARIANTS, needs_kernels
from tests.models.test_native_rows import ERROR, dtypes, randn, row_counts, same_threads, seeds

__all__ = ["same_threads"]

pytestmark = needs_kernels

NAN = float("nan")


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.sampled_from(VARIANTS),
    dtypes,
    row_counts,
    st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([4, 7, 16, 33, 100])),
    st.sampled_from([None, 1.0, 2.0]),
    seeds,
)
def test_softmax_gate(
    variant: str,
    dtype: torch.dtype,
    tokens: int,
    shape: tuple[int, int],
    p: float | None,
    seed: int,
) -> None:
    top_k, experts = shape
    # Few distinct values: equal logits, whose lower ids come first, are common.
    logits = (randn(seed, tokens, experts) * 4).round().div(2).to(dtype)
    torch.set_num_threads(2)
    ids, weights = gates.softmax_top_k(variant, logits, top_k, p)
    shares = torch.softmax(logits.double(), -1)
    expected = torch.sort(shares, descending=True, stable=True)
    chosen = expected.values[:, :top_k]
    if p is not None:
        chosen = chosen / chosen.norm(p, -1, keepdim=True)
    assert torch.equal(ids, expected.indices[:, :top_k])
    assert weights.dtype == dtype
    torch.testing.assert_close(weights.double(), chosen, atol=0, rtol=2 * ERROR[dtype])
    torch.set_num_threads(1)
    row = seed % tokens
    alone = gates.softmax_top_k(variant, logits[row : row + 1].clone(), top_k, p)
    assert torch.equal(alone[0][0], ids[row])
    assert torch.equal(alone[1][0], weights[row])


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.sampled_from(VARIANTS),
    dtypes,
    row_counts,
    st.sampled_from([2, 7, 16, 33]),
    st.sampled_from([0.0, 0.01, 0.3, 2.0]),
    seeds,
)
def test_mixer_gate(
    variant: str, dtype: torch.dtype, tokens: int, experts: int, jitter: float, seed: int
) -> None:
    logits = 4 * randn(seed, tokens, experts)
    # Equal values, or values of which some lie at the edge of the band.
    logits = (logits.round() if seed % 2 else logits).div(2).to(dtype)
    torch.set_num_threads(2)
    ids, weights = gates.sparse_mixer(variant, logits, 2 * jitter)
    # The definition, in the logits' own dtype: which experts are dropped depends on its rounding.
    expected_ids, expected = sparse_mixer(logits, jitter)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected, atol=0, rtol=2 * ERROR[dtype])
    torch.set_num_threads(1)
    row = seed % tokens
    alone = gates.sparse_mixer(variant, logits[row : row + 1].clone(), 2 * jitter)
    assert torch.equal(alone[0][0], ids[row])
    assert torch.equal(alone[1][0], weights[row])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "row", [[NAN] * 4, [1.0, NAN, 2.0, 3.0], [1.0, float("inf"), 2.0, 0.0], [float("-inf")] * 4]
)
def test_logits_that_are_not_finite(variant: str, row: list[float]) -> None:
    """Choices stay in range, weights say that something is wrong where PyTorch's do."""
    logits = torch.tensor([row])
    for got, defined in (
        (gates.softmax_top_k(variant, logits, 2, 1.0), _softmax(logits)),
        (gates.sparse_mixer(variant, logits, 0.02), sparse_mixer(logits, 0.01)),
    ):
        assert got[0].min() >= 0
        assert got[0].max() < 4
        assert torch.equal(got[1].isnan().any(), defined[1].isnan().any())


def _softmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    ids, weights = softmax_top_k(logits, 2)
    return ids, divide_by_p_norm(weights, 1.0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_far_logits_have_no_share(variant: str) -> None:
    _, weights = gates.softmax_top_k(variant, torch.tensor([[0.0, -90.0, -1e30]]), 3, None)
    assert weights.tolist() == [[1.0, 0.0, 0.0]]
