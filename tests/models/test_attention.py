"""PyTorch's paged attention against the textbook formula in float64, over random batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.interface import BatchMeta, KVCache
from models.kernels.native import use_kernels
from models.layers.attention import PagedAttention
from models.layers.rope import RotaryEmbedding
from models.long_rope import LongRope

NUM_BLOCKS = 160


@pytest.fixture(autouse=True)
def without_native_kernels() -> Iterator[None]:
    use_kernels("torch")
    yield
    use_kernels("auto")


def meta_of(chunks: list[tuple[int, int]], tables: Tensor, block_size: int) -> BatchMeta:
    """A batch of (start, count) chunks, one per row of `tables`."""
    counts = [count for _, count in chunks]
    query_starts = (0, *itertools.accumulate(counts))
    total = query_starts[-1]
    at = [torch.arange(start, start + count) for start, count in chunks]
    positions = torch.zeros(-(-total // 16) * 16, dtype=torch.int64)
    positions[:total] = torch.cat(at)
    slots = [t[p // block_size] * block_size + p % block_size for t, p in zip(tables, at)]  # noqa: B905
    return BatchMeta(
        num_tokens=total,
        num_rows=len(positions),
        query_starts=query_starts,
        starts=tuple(start for start, _ in chunks),
        lengths=tuple(start + count for start, count in chunks),
        positions=positions,
        slot_mapping=torch.cat(slots),
        block_tables=tables,
        state_slots=(-1,) * len(chunks),
    )


def textbook(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """[n, H, h] last queries over [N, G, h] keys, in float64: [n, H * h]."""
    heads_per_kv = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(heads_per_kv, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * q.shape[2] ** -0.5
    key_at = torch.arange(k.shape[0])
    query_at = key_at[-q.shape[0] :, None]
    hidden = key_at > query_at
    if window is not None:
        hidden |= key_at <= query_at - window
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.sampled_from([(1, 1, 8), (4, 2, 16), (6, 2, 10), (12, 1, 16), (3, 3, 4), (9, 1, 6)]),
    st.sampled_from([None, 1, 7, 64, 100]),
    st.sampled_from([1, 4, 16, 48, 128]),
    st.lists(st.tuples(st.integers(0, 200), st.integers(1, 40)), min_size=1, max_size=4),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 1 << 30),
)
def test_matches_the_textbook_and_itself(
    shape: tuple[int, int, int],
    window: int | None,
    block_size: int,
    chunks: list[tuple[int, int]],
    dtype: torch.dtype,
    seed: int,
) -> None:
    heads, kv_heads, width = shape
    generator = torch.Generator().manual_seed(seed)
    attention = PagedAttention(
        num_heads=heads, num_kv_heads=kv_heads, head_dim=width, window=window
    )
    blocks = -(-240 // block_size)
    tables = torch.randperm(blocks * len(chunks), generator=generator).view(len(chunks), blocks)
    nan = torch.full((blocks * len(chunks), kv_heads, block_size, width), float("nan"), dtype=dtype)
    cache = KVCache(nan, nan.clone())
    history = []
    for (start, count), table in zip(chunks, tables, strict=True):
        k, v = torch.randn(2, start + count, kv_heads, width, generator=generator).to(dtype)
        at = torch.arange(start)
        slots = table[at // block_size], slice(None), at % block_size
        cache.key[slots], cache.value[slots] = k[:start], v[:start]
        history.append((k, v))
    meta = meta_of(chunks, tables, block_size)
    q = torch.randn(meta.num_rows, heads, width, generator=generator).to(dtype)
    k, v = (
        torch.cat([kv[i][start:] for kv, (start, _) in zip(history, chunks, strict=True)])
        for i in (0, 1)
    )
    out = attention(q, k, v, meta, cache)
    assert not out[meta.num_tokens :].any()
    error = 0.02 if dtype == torch.bfloat16 else 1e-5
    for seq, (keys, values) in enumerate(history):
        first, last = meta.query_starts[seq : seq + 2]
        expected = textbook(q[first:last], keys, values, window)
        torch.testing.assert_close(out[first:last].double(), expected, atol=error, rtol=error)
        start, count = chunks[seq]
        for row in {first, (first + last) // 2, last - 1}:
            place = start + row - first
            alone = meta_of([(place, 1)], tables[seq : seq + 1], block_size)
            one = attention(
                q[row].expand(16, -1, -1),
                keys[place : place + 1],
                values[place : place + 1],
                alone,
                cache,
            )
            assert torch.equal(one[0], out[row])


def test_grouping_of_tiles_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = [(0, 150), (130, 1), (7, 1), (64, 30)]
    tables = torch.arange(4 * 20).view(4, 20)
    meta = meta_of(chunks, tables, 16)
    generator = torch.Generator().manual_seed(1)
    k, v = torch.randn(2, meta.num_tokens, 2, 8, generator=generator)
    q = torch.randn(meta.num_rows, 4, 8, generator=generator)
    zeros = torch.zeros(80, 2, 16, 8)
    outputs = []
    import models.layers.attention as module

    for budget in (1, 1 << 13, 1 << 30):
        monkeypatch.setattr(module, "_GROUP_ELEMENTS", budget)
        attention = PagedAttention(num_heads=4, num_kv_heads=2, head_dim=8)
        outputs.append(attention(q, k, v, meta, KVCache(zeros.clone(), zeros.clone())))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_rotary_regimes_and_growth() -> None:
    long_rope = LongRope(
        short_factor=(1.0, 2.0),
        long_factor=(3.0, 4.0),
        short_mscale=1.1,
        long_mscale=1.3,
        original_max_position_embeddings=2000,
    )
    rope = RotaryEmbedding(4, 100.0, torch.float32, long_rope)
    meta = meta_of([(1990, 10), (1995, 6)], torch.zeros(2, 2048, dtype=torch.int64), 1)
    x = torch.randn(meta.num_rows, 3, 4, generator=torch.Generator().manual_seed(2))
    got = rope.rotate(x, meta, x.shape[1])
    for row in range(16):
        is_long = row >= 10
        position = 1990 + row if row < 10 else 1995 + row - 10
        factors, mscale = ((3.0, 4.0), 1.3) if is_long else ((1.0, 2.0), 1.1)
        divisors = torch.tensor(factors) * torch.tensor([1.0, 10.0])
        angles = (position / divisors).double()
        turn = torch.polar(torch.full((2,), mscale, dtype=torch.float64), angles)
        pairs = torch.complex(x[row, :, :2].double(), x[row, :, 2:].double()) * turn
        expected = torch.cat([pairs.real, pairs.imag], dim=-1)
        torch.testing.assert_close(got[row].double(), expected, atol=1e-3, rtol=1e-3)
    fresh = RotaryEmbedding(4, 100.0, torch.float32, long_rope)
    early = meta_of([(3, 1)], torch.zeros(1, 2048, dtype=torch.int64), 1)
    fresh.rotate(x[:16], early, x.shape[1])
    assert torch.equal(fresh.rotate(x, meta, x.shape[1]), got)
