"""Mixers and mixtures of experts in one C call: the very bits of their parts, one by one."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.gate import Gate
from models.interface import BatchMeta, ExpertWeights, KVCache, StateCache
from models.jamba_mixer import MambaMix
from models.jamba_tensors import mixer_tensors
from models.kernels.native import use_kernels
from models.kernels.routed import RoutedExperts
from models.kernels.whole_moe import WholeDense, WholeMoe
from models.layers.activation import silu
from models.layers.attention import PagedAttention
from models.layers.attention_mix import AttentionMix
from models.layers.mamba import SelectiveState
from models.layers.moe import feed_forward, moe_kernels, route
from models.layers.rope import RotaryEmbedding
from tests.models.built import VARIANTS, needs_kernels

pytestmark = needs_kernels

BLOCK, NUM_BLOCKS = 4, 200
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
batches = st.sampled_from([[(0, 1)], [(9, 1), (0, 17), (3, 1)], [(5, 1)] * 7, [(0, 70), (2, 5)]])
"""(start, number of tokens) of each sequence."""
seeds = st.integers(0, 1 << 30)
several = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.fixture(autouse=True, scope="module")
def afterwards() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
    use_kernels("auto")


class Random:
    """Tensors from one seed."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        self.pick = random.Random(seed)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, generator=self._generator).to(dtype or self.dtype)

    def product(self, name: str, outputs: int, width: int) -> dict[str, Tensor]:
        """A weight, perhaps int8, perhaps with a bias."""
        found = {name: self(outputs, width) / width**0.5}
        if self.pick.random() < 0.5:
            found[f"{name}_bias"] = self(outputs)
        if self.pick.random() < 0.5:
            found[name] = (20 * self(outputs, width)).clamp(-127, 127).to(torch.int8)
            found[f"{name}_scale"] = self(outputs, dtype=torch.float32).abs() / 100
        return found


def meta_of(batch: list[tuple[int, int]], generator: Random) -> BatchMeta:
    counts = [count for _, count in batch]
    width = max(start + count for start, count in batch) // BLOCK + 1
    blocks = generator.pick.sample(range(NUM_BLOCKS), width * len(batch))
    tables = torch.tensor(blocks).view(len(batch), width)
    positions = [torch.arange(start, start + count) for start, count in batch]
    slots = [
        table[p // BLOCK] * BLOCK + p % BLOCK for table, p in zip(tables, positions, strict=True)
    ]
    return BatchMeta(
        num_tokens=sum(counts),
        num_rows=sum(counts),
        query_starts=(0, *accumulate(counts)),
        starts=tuple(start for start, _ in batch),
        lengths=tuple(start + count for start, count in batch),
        positions=torch.cat(positions),
        slot_mapping=torch.cat(slots),
        block_tables=tables,
        state_slots=tuple(generator.pick.sample(range(10), len(batch))),
    )


@several
@given(st.sampled_from(VARIANTS), dtypes, batches, st.booleans(), st.booleans(), seeds)
def test_an_attention_mixer(
    variant: str,
    dtype: torch.dtype,
    batch: list[tuple[int, int]],
    is_rms: bool,
    rotates: bool,
    seed: int,
) -> None:
    """Either norm, with and without rotary embedding, limit, window, biases and int8."""
    use_kernels(variant)
    randn = Random(seed, dtype)
    pick = randn.pick.choice
    kv_heads, group, head_dim, width = pick([1, 2]), pick([1, 3]), pick([8, 16, 34]), pick([24, 65])
    heads, kv_rows = kv_heads * group, 2 * kv_heads * head_dim
    shape = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim}
    rope = RotaryEmbedding(head_dim, 1e4, dtype) if rotates else None
    mix = AttentionMix(
        PagedAttention(**shape, window=pick([None, 6])),
        rope,
        projection="out",
        norms=("before", "after"),
        norm_eps=1e-5,
        is_rms=is_rms,
        limit=pick([None, 0.5]) if rotates else None,
    )
    weights = {"before": randn(width), "after": randn(width)}
    if not is_rms and pick([False, True]):
        weights |= {"before_bias": randn(width), "after_bias": randn(width)}
    weights |= randn.product("qkv", heads * head_dim + kv_rows, width)
    weights |= randn.product("out", width, heads * head_dim)
    mix.load(weights)
    meta = meta_of(batch, randn)
    cache = KVCache(*[randn(NUM_BLOCKS, kv_heads, BLOCK, head_dim) for _ in range(2)])
    other = KVCache(cache.key.clone(), cache.value.clone())
    x = randn(meta.num_rows, width)
    for _ in range(2):
        whole, parts = mix(x, meta, cache), mix.step_by_step(x, meta, other)
        assert all(map(torch.equal, whole, parts))
        assert torch.isfinite(whole[1]).all()
        assert torch.equal(cache.key, other.key)
        assert torch.equal(cache.value, other.value)
        x = whole[1]


@several
@given(st.sampled_from(VARIANTS), dtypes, batches, seeds)
def test_a_mamba_mixer(
    variant: str, dtype: torch.dtype, batch: list[tuple[int, int]], seed: int
) -> None:
    use_kernels(variant)
    randn = Random(seed, dtype)
    pick = randn.pick.choice
    width, inner, states, taps, rank = (
        pick(choices) for choices in ([24, 65], [40, 97], [5, 16], [2, 4], [3, 12])
    )
    shapes = mixer_tensors(
        "",
        hidden=width,
        inner=inner,
        state=states,
        kernel=taps,
        rank=rank,
        conv_bias=pick([False, True]),
        proj_bias=pick([False, True]),
    )
    weights = {name: randn(*part.shape) / part.shape[-1] ** 0.5 for name, part in shapes.items()}
    norms = randn(width), randn(width)
    mix = MambaMix(weights, norms, SelectiveState(taps), 1e-6)
    meta = meta_of(batch, randn)
    cache = StateCache(randn(10, inner, taps - 1), randn(10, inner, states, dtype=torch.float32))
    other = StateCache(cache.conv.clone(), cache.ssm.clone())
    x = randn(meta.num_rows, width)
    for _ in range(2):
        whole, parts = mix(x, meta, cache), mix.step_by_step(x, meta, other)
        assert all(map(torch.equal, whole, parts))
        assert torch.isfinite(whole[1]).all()
        assert torch.equal(cache.conv, other.conv)
        assert torch.equal(cache.ssm, other.ssm)
        x = whole[1]


@several
@given(
    st.sampled_from(VARIANTS),
    dtypes,
    st.sampled_from([1, 2, 9, 70]),
    st.sampled_from([(1, None, None), (4, 1.0, None), (3, 2.0, None), (2, None, 0.02)]),
    st.booleans(),
    seeds,
)
def test_an_ffn(
    variant: str,
    dtype: torch.dtype,
    tokens: int,
    choice: tuple[int, float | None, float | None],
    quantized: bool,
    seed: int,
) -> None:
    use_kernels(variant)
    randn = Random(seed, dtype)
    pick = randn.pick.choice
    num_experts, width, hidden = pick([5, 16]), pick([24, 65]), pick([8, 40])

    def matrix(outputs: int, inputs: int) -> Tensor:
        values = randn(outputs, inputs) / inputs**0.5
        return (40 * values).clamp(-127, 127).to(torch.int8) if quantized else values

    def scale(outputs: int) -> Tensor | None:
        return randn(outputs, dtype=torch.float32).abs() / 40 if quantized else None

    shapes = ((hidden, width), (hidden, width), (width, hidden))
    experts = RoutedExperts(
        [
            ExpertWeights(*[matrix(*shape) for shape in shapes], *[scale(n) for n, _ in shapes])
            for _ in range(num_experts)
        ]
    )
    top_k, p_norm, band = choice
    gate = Gate(weight=randn(num_experts, width), top_k=top_k, p_norm=p_norm, band=band)
    residual, h = randn(tokens, width), randn(tokens, width)
    kernels = moe_kernels(h, gate, silu)
    assert kernels is not None
    routing = route(h, gate)
    parts = residual + experts(kernels.name, h, routing.expert_ids, routing.weights)
    assert torch.equal(WholeMoe(gate, experts)(kernels.name, residual, h), parts)
    assert torch.isfinite(parts).all()
    one = ExpertWeights(*[matrix(*shape) for shape in shapes], *[scale(n) for n, _ in shapes])
    dense = WholeDense(one, dtype)(kernels.name, residual, h)
    assert torch.equal(dense, residual + feed_forward(h, one, silu))


def test_one_kernel_that_is_off_takes_the_call_apart() -> None:
    gate, h = Gate(weight=torch.zeros(4, 8), top_k=1), torch.zeros(1, 8)
    for kernel in ("linear", "gate", "experts"):
        use_kernels(f"native,-{kernel}")
        assert moe_kernels(h, gate, silu) is None
    use_kernels("torch")
    assert moe_kernels(h, gate, silu) is None
    use_kernels("native,-scan")
    assert moe_kernels(h, gate, silu) is not None
    assert moe_kernels(h, gate, torch.relu) is None
    assert moe_kernels(h.double(), gate, silu) is None
