"""Gates against worked values and brute force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.layers.moe import divide_by_p_norm, softmax_top_k, sparse_mixer


@pytest.mark.parametrize(
    ("scores", "eps", "ids", "weights"),
    [
        ([1, 0.99, 0.5, 0], 0.01, (0, 1), (0.5025, 1.0)),
        ([1, 1, 0.5, 0], 0.01, (0, 1), (0.5, 1.0)),
        ([0, 0, 0, 0], 0.01, (0, 1), (0.25, 1 / 3)),
        ([2, -2, -2, -2], 0.01, (0, 1), (1.0, 1 / 3)),
        ([-1, -1.005, -2, -3], 0.01, (0, 1), (0.50125, 1.0)),
        ([1, 1, 1, 1], 0.0, (0, 1), (0.25, 1 / 3)),
        ([1, 0.99, 0.5, 0], 0.0, (0, 1), (1.0, 1.0)),
        ([0.2, 3, 1, 2.9], 0.01, (1, 3), (1.0, 1.0)),
        ([0.2, 3, 1, 2.9], 0.02, (1, 3), (0.52498, 1.0)),
        ([-5, 4], 0.5, (1, 0), (1.0, 1.0)),
    ],
)
def test_sparse_mixer_worked_values(
    scores: list[float], eps: float, ids: tuple[int, int], weights: tuple[float, float]
) -> None:
    got_ids, got_weights = sparse_mixer(torch.tensor([scores], dtype=torch.float32), eps)
    assert tuple(got_ids[0].tolist()) == ids
    assert got_weights[0].tolist() == pytest.approx(weights, abs=1e-4)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from([0, 0.5, 0.51, 1, 1.01, -1, -1.02, -3]), min_size=2, max_size=8),
    st.sampled_from([0.0, 0.01, 0.1, 0.5, 2.0]),
)
def test_sparse_mixer_is_transformers(scores: list[float], eps: float) -> None:
    from transformers.models.phimoe.modeling_phimoe import sparsemixer

    logits = torch.tensor([scores], dtype=torch.float32)
    weights, ids = sparsemixer(logits, jitter_eps=eps, training=False)
    got_ids, got_weights = sparse_mixer(logits, eps)
    assert torch.equal(got_ids, ids)
    assert torch.equal(got_weights, weights)


def test_equal_probabilities_go_to_the_lower_expert() -> None:
    ids, weights = softmax_top_k(torch.zeros(3, 40), 3)
    assert ids.tolist() == [[0, 1, 2]] * 3
    assert weights.flatten().tolist() == pytest.approx([1 / 40] * 9)


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0, 2.0, 3.0])
def test_p_norm_is_torchs(p: float) -> None:
    weights = torch.rand(20, 4, generator=torch.Generator().manual_seed(1))
    norms = torch.linalg.vector_norm(weights, ord=p, dim=-1, keepdim=True)
    torch.testing.assert_close(divide_by_p_norm(weights, p), weights / norms)
