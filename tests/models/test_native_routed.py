"""The routed experts of a layer against a loop over tokens; a token's sum is its own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.interface import ExpertWeights
from models.kernels.routed import RoutedExperts
from router.permutation import combine, permute
from shards.quantization import quantize_rows
from tests.models.built import VARIANTS, needs_kernels
from tests.models.test_native_rows import dtypes, randn, same_threads, seeds

__all__ = ["same_threads"]

pytestmark = needs_kernels

ERROR = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3}


def experts_of(seed: int, num: int, shape: tuple[int, int], dtype: torch.dtype, int8: bool) -> list:
    width, hidden = shape
    experts = []
    for e in range(num):
        parts = [
            (randn(seed + 3 * e + i, *sides) / sides[1] ** 0.5).to(dtype)
            for i, sides in enumerate([(hidden, width), (hidden, width), (width, hidden)])
        ]
        pairs = [quantize_rows(part) for part in parts]
        if int8:
            parts, scales = ([pair[i] for pair in pairs] for i in (0, 1))
            experts.append(ExpertWeights(*parts, *scales))
        else:
            experts.append(ExpertWeights(*parts))
    return experts


def matrices(w: ExpertWeights) -> list[Tensor]:
    pairs = ((w.gate, w.gate_scale), (w.up, w.up_scale), (w.down, w.down_scale))
    return [m.double() if s is None else m.double() * s[:, None].double() for m, s in pairs]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(VARIANTS),
    dtypes,
    st.booleans(),
    st.sampled_from([1, 2, 3, 17, 70]),
    st.tuples(st.sampled_from([1, 33, 64, 300]), st.sampled_from([1, 48, 130])),
    st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([4, 16])),
    seeds,
)
def test_routed(
    variant: str,
    dtype: torch.dtype,
    int8: bool,
    tokens: int,
    shape: tuple[int, int],
    choice: tuple[int, int],
    seed: int,
) -> None:
    top_k, num = choice
    weights = experts_of(seed, num, shape, dtype, int8)
    experts = RoutedExperts(weights)
    x, scales = randn(seed, tokens, shape[0]).to(dtype), randn(seed + 1, tokens, top_k).to(dtype)
    # Half of the experts have nothing to do.
    ids = randn(seed + 2, tokens, num // 2 + top_k).argsort(-1)[:, :top_k] % num
    torch.set_num_threads(2)
    out = experts(variant, x, ids, scales)
    wide = [matrices(w) for w in weights]
    for token in range(tokens):
        exact = torch.zeros(shape[0], dtype=torch.float64)
        for expert, scale in zip(ids[token].tolist(), scales[token].double(), strict=True):
            gate, up, down = wide[expert]
            row = x[token].double()
            exact += scale * (down @ (torch.nn.functional.silu(gate @ row) * (up @ row)))
        torch.testing.assert_close(out[token].double(), exact, atol=ERROR[dtype], rtol=ERROR[dtype])
    torch.set_num_threads(1)
    row = slice(seed % tokens, seed % tokens + 1)
    assert torch.equal(experts(variant, x[row], ids[row].clone(), scales[row].clone()), out[row])


def test_bits_are_those_of_the_distributed_path() -> None:
    from models.kernels.native import native_kernels

    kernels = native_kernels("experts", torch.float32, torch.device("cpu"))
    if kernels is None:
        pytest.skip("native kernels are off")
    weights = experts_of(0, 8, (64, 48), torch.float32, int8=False)
    x, scales = randn(1, 40, 64), randn(2, 40, 3)
    ids = randn(3, 40, 8).argsort(-1)[:, :3].contiguous()
    permutation = permute(ids, 8)
    groups = [(weights[e], count) for e, count in enumerate(permutation.counts)]
    rows = kernels.experts(x[permutation.tokens], groups)
    expected = combine(rows, permutation, scales, x.dtype)
    assert torch.equal(RoutedExperts(weights)(kernels.name, x, ids, scales), expected)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("unknown", [-1, 4])
def test_an_unknown_expert_is_refused(variant: str, unknown: int) -> None:
    experts = RoutedExperts(experts_of(0, 4, (8, 8), torch.float32, int8=False))
    with pytest.raises(ValueError, match=r"allowed 0\.\.3"):
        experts(variant, torch.ones(1, 8), torch.tensor([[0, unknown]]), torch.ones(1, 2))


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_tokens(variant: str) -> None:
    experts = RoutedExperts(experts_of(0, 4, (8, 8), torch.float32, int8=False))
    none = torch.empty(0, 2, dtype=torch.int64)
    assert experts(variant, torch.empty(0, 8), none, torch.empty(0, 2)).shape == (0, 8)
