"""The attention kernels: right against float64, and a row's bits are its own in any company."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.interface import KVCache
from models.kernels.attention import PagedBatch
from tests.models.built import VARIANTS, needs_kernels
from tests.models.test_attention import meta_of, textbook

ERROR = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.002}
LENGTH = 400
"""Positions of a sequence's table."""


pytestmark = needs_kernels


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Sequences:
    """Random queries, keys and values of some sequences, and a cache whose other rows are NaN."""

    def __init__(
        self, seed: int, lengths: list[int], shape: tuple[int, int, int], dtype: torch.dtype
    ) -> None:
        heads, kv_heads, width = shape
        self.generator = torch.Generator().manual_seed(seed)
        self.q = [self.randn(n, heads, width).to(dtype) for n in lengths]
        self.k = [self.randn(n, kv_heads, width).to(dtype) for n in lengths]
        self.v = [self.randn(n, kv_heads, width).to(dtype) for n in lengths]
        self.shape, self.dtype = shape, dtype

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def place(self, block_size: int) -> tuple[Tensor, KVCache]:
        """Fresh block tables, in random order, and an empty cache."""
        _, kv_heads, width = self.shape
        blocks = -(-LENGTH // block_size)
        total = blocks * len(self.q)
        order = torch.randperm(total, generator=self.generator)
        empty = torch.full((total, kv_heads, block_size, width), float("nan"), dtype=self.dtype)
        return order.view(len(self.q), blocks), KVCache(empty, empty.clone())

    def attend(
        self,
        variant: str,
        chunks: list[tuple[int, int, int]],
        placed: tuple[Tensor, KVCache],
        window: int | None,
        offset: int = 0,
    ) -> list[Tensor]:
        """One batch of (sequence, start, count) chunks: the output of each of them.

        Queries, keys and values are apart from one another, and `offset` elements off.
        """
        tables, cache = placed
        meta = meta_of(
            [(start, count) for _, start, count in chunks],
            tables[[seq for seq, _, _ in chunks]],
            cache.block_size,
        )
        rows = []
        for all_rows in (self.q, self.k, self.v):
            parts = [all_rows[seq][start : start + count] for seq, start, count in chunks]
            packed = torch.cat(parts).flatten(1)
            apart = torch.zeros(meta.num_rows, packed.shape[1] + 7, dtype=self.dtype)
            apart[: meta.num_tokens, offset : offset + packed.shape[1]] = packed
            rows.append(apart[:, offset : offset + packed.shape[1]])
        heads, kv_heads, width = self.shape
        q = rows[0].view(-1, heads, width)
        k, v = (part.view(-1, kv_heads, width) for part in rows[1:])
        batch = PagedBatch(meta, cache.block_size)
        out = batch.attend(variant, q, k, v, cache, window)
        assert not out[meta.num_tokens :].any()
        return [out[a:b] for a, b in pairwise(meta.query_starts)]


def cut(length: int, generator: torch.Generator) -> list[tuple[int, int]]:
    """(start, count) chunks of random sizes, many of them of one token."""
    counts = []
    while sum(counts) < length:
        most = int(torch.randint(1, length - sum(counts) + 1, (), generator=generator))
        counts.append(most if torch.rand((), generator=generator) < 0.5 else 1)
    return [(end - count, count) for end, count in zip(accumulate(counts), counts, strict=True)]


shapes = st.tuples(
    st.sampled_from([1, 2, 3, 4, 6, 17, 33]),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 8, 10, 16, 33, 64, 80, 96, 128, 256]),
)
windows = st.sampled_from([None, None, 1, 7, 64, 100])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(VARIANTS),
    shapes,
    windows,
    st.sampled_from([1, 3, 4, 5, 16, 48, 64]),
    st.lists(st.integers(1, 300), min_size=1, max_size=3),
    st.sampled_from(sorted(ERROR, key=str)),
    st.integers(0, 1 << 30),
)
def test_right_and_the_same_in_any_company(
    variant: str,
    shape: tuple[int, int, int],
    window: int | None,
    block_size: int,
    lengths: list[int],
    dtype: torch.dtype,
    seed: int,
) -> None:
    group, kv_heads, width = shape
    sequences = Sequences(seed, lengths, (group * kv_heads, kv_heads, width), dtype)
    torch.set_num_threads(1)
    everything = [(seq, 0, length) for seq, length in enumerate(lengths)]
    together = sequences.attend(variant, everything, sequences.place(block_size), window)
    for seq, out in enumerate(together):
        q, k, v = sequences.q[seq], sequences.k[seq], sequences.v[seq]
        expected = textbook(q, k, v, window)
        torch.testing.assert_close(out.double(), expected, atol=ERROR[dtype], rtol=ERROR[dtype])
    torch.set_num_threads(2)
    placed = sequences.place(7)
    for seq in range(len(lengths)):
        # Chunks that come one after the other, each in the company of another sequence's start.
        for start, count in cut(lengths[seq], sequences.generator):
            other = (seq + 1) % len(lengths)
            chunks = [(seq, start, count)]
            if other != seq and start % 2:
                chunks.insert(0, (other, 0, 1))
            out = sequences.attend(variant, chunks, placed, window, offset=start % 8)[-1]
            assert torch.equal(out, together[seq][start : start + count])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_far_apart(variant: str, dtype: torch.dtype) -> None:
    sequences = Sequences(3, [200], (4, 2, 32), dtype)
    sequences.q[0] *= 30
    sequences.k[0] *= 30
    (out,) = sequences.attend(variant, [(0, 0, 200)], sequences.place(16), None)
    expected = textbook(sequences.q[0], sequences.k[0], sequences.v[0], None)
    torch.testing.assert_close(out.double(), expected, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_value_that_is_not_finite_stays_in_its_sequence(variant: str) -> None:
    sequences = Sequences(4, [90, 90], (4, 2, 16), torch.bfloat16)
    chunks = [(0, 0, 90), (1, 0, 90)]
    _, healthy = sequences.attend(variant, chunks, sequences.place(16), None)
    sequences.k[0][40], sequences.v[0][50] = float("nan"), float("inf")
    ill, other = sequences.attend(variant, chunks, sequences.place(16), None)
    assert not ill[50:].isfinite().any()
    assert torch.equal(other, healthy)


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_but_the_batch_is_written(variant: str) -> None:
    sequences = Sequences(5, [40, 40], (2, 2, 24), torch.float32)
    tables, cache = sequences.place(16)
    sequences.attend(variant, [(0, 0, 40)], (tables, cache), None)
    at = torch.arange(40)
    for cached, rows in ((cache.key, sequences.k[0]), (cache.value, sequences.v[0])):
        assert torch.equal(cached[tables[0][at // 16], :, at % 16], rows)
        assert cached.isfinite().all(-1).all(1).sum() == 40


@pytest.mark.parametrize("variant", VARIANTS)
def test_more_queries_than_one_thread_takes_at_once(variant: str) -> None:
    """Long chunks are cut by rows of queries, which must not show either."""
    sequences = Sequences(6, [390], (8, 1, 16), torch.bfloat16)
    (whole,) = sequences.attend(variant, [(0, 0, 390)], sequences.place(16), None)
    placed = sequences.place(16)
    for start, count in ((0, 37), (37, 353)):
        (out,) = sequences.attend(variant, [(0, start, count)], placed, None)
        assert torch.equal(out, whole[start : start + count])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nobody_looks_behind_the_window(variant: str, dtype: torch.dtype) -> None:
    """What has left the window may be another sequence's by now."""
    sequences = Sequences(7, [180], (4, 2, 16), dtype)
    window, start = 70, 110
    (whole,) = sequences.attend(variant, [(0, 0, 180)], sequences.place(16), window)
    tables, cache = sequences.place(16)
    sequences.attend(variant, [(0, 0, start)], (tables, cache), window)
    at = torch.arange(start - window + 1)
    for cached in (cache.key, cache.value):
        cached[tables[0][at // 16], :, at % 16] = float("nan")
    (out,) = sequences.attend(variant, [(0, start, 70)], (tables, cache), window)
    assert torch.equal(out, whole[start:])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1500])
@pytest.mark.parametrize(("group", "kv_heads"), [(4, 1), (5, 2), (20, 1)])
def test_long_sequences(
    variant: str, dtype: torch.dtype, window: int | None, group: int, kv_heads: int
) -> None:
    """Segments of 1024 keys: whoever sums up which of them, and wherever a chunk begins."""
    length, block_size = 3300, 16
    sequences = Sequences(8, [length, 40], (group * kv_heads, kv_heads, 32), dtype)
    blocks = -(-length // block_size)
    order = torch.randperm(2 * blocks, generator=sequences.generator).view(2, blocks)
    empty = torch.full((2 * blocks, kv_heads, block_size, 32), float("nan"), dtype=dtype)
    placed = order, KVCache(empty, empty.clone())
    torch.set_num_threads(1)
    whole, _ = sequences.attend(variant, [(0, 0, length), (1, 0, 40)], placed, window)
    q, k, v = sequences.q[0], sequences.k[0], sequences.v[0]
    expected = textbook(q[-90:], k, v, window)
    torch.testing.assert_close(whole[-90:].double(), expected, atol=ERROR[dtype], rtol=ERROR[dtype])
    for start in (1023, 1024, 2047, 2100, 3071, 3299):
        for count in (1, 3, 70):
            chunk = (0, start, min(count, length - start))
            rows = slice(start, start + chunk[2])
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                for company in ([chunk], [chunk, (1, 39, 1)], [(1, 20, 20), chunk]):
                    out = sequences.attend(variant, company, placed, window)
                    assert torch.equal(out[company.index(chunk)], whole[rows])
