"""Mamba's kernels against loops over time in float64; a token's bits are its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.interface import BatchMeta, StateCache
from models.kernels.scan import RecurrentBatch, ScanWeights
from tests.models.built import VARIANTS, needs_kernels
from tests.models.test_attention import meta_of
from tests.models.test_mamba import naive_conv, naive_scan
from tests.models.test_native_attention import cut

pytestmark = needs_kernels

ERROR = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.004}
SLOTS = 6


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def batch_of(slots: list[int], counts: list[int]) -> tuple[BatchMeta, RecurrentBatch]:
    tables = torch.zeros(len(counts), 64, dtype=torch.int64)
    meta = meta_of([(0, count) for count in counts], tables, 1)
    object.__setattr__(meta, "state_slots", tuple(slots))
    return meta, RecurrentBatch(meta)


@dataclass(frozen=True)
class Layer:
    """Random weights; `a_log` and `taps` are float32 always."""

    taps: Tensor
    bias: Tensor | None
    a_log: Tensor
    step_bias: Tensor
    d: Tensor


def apart(rows: Tensor, num_rows: int, offset: int) -> Tensor:
    """The same rows in wider ones, some elements off any boundary, zeros behind."""
    wide = torch.zeros(num_rows, rows.shape[1] + 9, dtype=rows.dtype)
    wide[: len(rows), offset : offset + rows.shape[1]] = rows
    return wide[:, offset : offset + rows.shape[1]]


def run(
    variant: str,
    layer: Layer,
    tokens: dict[str, Tensor],
    batch: tuple[BatchMeta, RecurrentBatch],
    cache: StateCache,
    offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """(signal, gated output) of the tokens of a batch."""
    meta, native = batch
    t = {name: apart(rows, meta.num_rows, offset) for name, rows in tokens.items()}
    signal = native.convolve(variant, t["u"], layer.taps, layer.bias, cache.conv)
    rows = (signal, t["step"], t["z"], t["b"], t["c"])
    weights = ScanWeights(layer.a_log, layer.d, layer.step_bias)
    out = native.scan(variant, rows, weights, cache.ssm)
    assert not signal[meta.num_tokens :].any()
    assert not out[meta.num_tokens :].any()
    return signal[: meta.num_tokens], out[: meta.num_tokens]


def check_sequence(
    layer: Layer,
    tokens: dict[str, Tensor],
    results: tuple[Tensor, Tensor],
    states: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
    error: float,
) -> None:
    """One sequence's results and state after it, from its state before."""
    (signal, out), ((past, before), (kept, after)) = results, states
    close = {"atol": error, "rtol": error}
    bias = torch.zeros(len(before)) if layer.bias is None else layer.bias
    expected = F.silu(naive_conv(past.T, tokens["u"], layer.taps.T, bias))
    torch.testing.assert_close(signal.double(), expected, **close)
    assert torch.equal(kept, torch.cat([past.T, tokens["u"]])[len(signal) :].T)
    a = -layer.a_log.double().exp().T
    delta = F.softplus(tokens["step"].double() + layer.step_bias.double())
    y, state = naive_scan(before, signal.double(), delta, a, tokens["b"], tokens["c"])
    y = (y + layer.d.double() * signal.double()) * F.silu(tokens["z"].double())
    torch.testing.assert_close(out.double(), y, **close)
    torch.testing.assert_close(after.double(), state, atol=1e-4, rtol=1e-4)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(VARIANTS),
    st.lists(st.integers(1, 50), min_size=1, max_size=4),
    st.tuples(
        st.integers(1, 5),
        st.sampled_from([1, 3, 4, 5, 8, 16, 20, 128]),
        st.sampled_from([1, 7, 16, 33, 64, 100, 130, 192]),
    ),
    st.booleans(),
    st.sampled_from(sorted(ERROR, key=str)),
    st.integers(0, 1 << 30),
)
def test_right_and_the_same_in_any_company(
    variant: str,
    counts: list[int],
    shape: tuple[int, int, int],
    has_bias: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    num_taps, num_states, width = shape
    generator = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    layer = Layer(
        taps=randn(num_taps, width),
        bias=randn(width).to(dtype) if has_bias else None,
        a_log=randn(width, num_states),
        step_bias=randn(width).to(dtype),
        d=randn(width).to(dtype),
    )
    widths = {"u": width, "step": width, "z": width, "b": num_states, "c": num_states}
    tokens = {name: randn(sum(counts), size).to(dtype) for name, size in widths.items()}
    slots = torch.randperm(SLOTS, generator=generator)[: len(counts)].tolist()
    before = StateCache(
        randn(SLOTS, width, num_taps - 1).to(dtype), randn(SLOTS, width, num_states)
    )
    cache, again = (StateCache(before.conv.clone(), before.ssm.clone()) for _ in range(2))
    torch.set_num_threads(1)
    batch = batch_of(slots, counts)
    signal, out = run(variant, layer, tokens, batch, cache)
    torch.set_num_threads(2)
    shared = StateCache(before.conv.clone(), before.ssm.clone())
    assert torch.equal(run(variant, layer, tokens, batch, shared)[1], out)
    assert torch.equal(shared.ssm, cache.ssm)
    for seq, slot in enumerate(slots):
        first, last = batch[0].query_starts[seq : seq + 2]
        own = {name: rows[first:last] for name, rows in tokens.items()}
        states = (before.conv[slot], before.ssm[slot]), (cache.conv[slot], cache.ssm[slot])
        check_sequence(layer, own, (signal[first:last], out[first:last]), states, ERROR[dtype])
        for start, count in cut(counts[seq], generator):
            part = {name: rows[start : start + count] for name, rows in own.items()}
            alone = batch_of([slot], [count])
            parts = run(variant, layer, part, alone, again, offset=1 + start % 8)
            at = slice(first + start, first + start + count)
            assert torch.equal(parts[0], signal[at])
            assert torch.equal(parts[1], out[at])
    # The slots of the sequences have come to the same states; the others are as they were.
    assert torch.equal(cache.conv, again.conv)
    assert torch.equal(cache.ssm, again.ssm)
    untouched = [slot for slot in range(SLOTS) if slot not in slots]
    assert torch.equal(cache.conv[untouched], before.conv[untouched])
    assert torch.equal(cache.ssm[untouched], before.ssm[untouched])


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_of_any_size(variant: str) -> None:
    """Δ from nothing to far beyond where exp overflows, and decays that leave nothing."""
    steps = torch.cat([torch.linspace(-120, 120, 64), torch.linspace(-2, 2, 64)])
    step, width = steps.expand(3, -1).contiguous(), len(steps)
    layer = Layer(
        taps=torch.ones(1, width),
        bias=None,
        a_log=torch.tensor([1e-3, 1.0, 50.0, 3e4]).log().expand(width, -1),
        step_bias=torch.zeros(width),
        d=torch.ones(width),
    )
    ones = torch.ones(3, 4)
    tokens = {"u": torch.ones(3, width), "step": step, "z": step, "b": ones, "c": ones}
    cache = StateCache(torch.zeros(1, width, 0), torch.ones(1, width, 4))
    before = (cache.conv[0].clone(), cache.ssm[0].clone())
    results = run(variant, layer, tokens, batch_of([0], [3]), cache)
    check_sequence(layer, tokens, results, (before, (cache.conv[0], cache.ssm[0])), 2e-6)
