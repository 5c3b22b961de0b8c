"""The numbers contract's base once more, at the sizes of real models and on several threads."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from models.interface import ExpertWeights, KVCache, StateCache
from models.kernels.scan import ScanWeights
from models.layers.activation import silu
from models.layers.attention import PagedAttention
from models.layers.mamba import Selection, SelectiveState
from models.layers.moe import expert_rows, softmax_top_k, sparse_mixer
from models.layers.norm import layer_norm, rms_norm
from models.layers.rope import RotaryEmbedding
from models.layers.rowwise import linear, row_tile
from models.long_rope import LongRope
from tests.models.test_attention import meta_of
from tests.models.test_bit_stability import DTYPES, alone, randn

SERVED = DTYPES[:2]


@pytest.fixture(params=[1, 2], ids=lambda count: f"{count} threads", autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


# Widths and outputs of projections, gates, experts and vocabularies; odd ones too.
@pytest.mark.parametrize(
    ("width", "out"), [(4096, 16), (1024, 2048), (6144, 512), (160, 8192), (1000, 4099)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(dtype: torch.dtype, width: int, out: int) -> None:
    tile = row_tile(dtype)
    x, weight = randn(0, 5 * tile, width, dtype=dtype), randn(1, out, width, dtype=dtype)
    bias = randn(2, out, dtype=dtype)
    full = linear(x, weight, bias)
    for row in range(0, 5 * tile, 3):
        at = (row * 5) % tile
        assert torch.equal(linear(alone(x, row, at), weight, bias)[at], full[row])


@pytest.mark.parametrize("dtype", SERVED)
@pytest.mark.parametrize("width", [16, 1024, 4096, 6145])
def test_norms(dtype: torch.dtype, width: int) -> None:
    x, weight, bias = (
        randn(i, *shape, dtype=dtype) for i, shape in enumerate([(200, width), (width,), (width,)])
    )
    for norm in (
        lambda x: layer_norm(x, weight, bias, 1e-5),
        lambda x: layer_norm(x, weight, None, 1e-5),
        lambda x: rms_norm(x, weight, 1e-6),
    ):
        rows_alone(norm, x, row_tile(dtype))


def rows_alone(function: Callable[[Tensor], Tensor], x: Tensor, tile: int) -> None:
    """A tile of rows from anywhere, in any order, gives what all rows together give."""
    full = function(x)
    for first in range(0, len(x) - tile, 3 * tile + 1):
        picked = torch.arange(first, first + tile).flip(0)
        assert torch.equal(function(x[picked]), full[picked])


@pytest.mark.parametrize("dtype", SERVED)
def test_gates(dtype: torch.dtype) -> None:
    # So many rows that every thread has its share.
    logits = randn(0, 9000, 16, dtype=dtype)
    for part in (0, 1):
        rows_alone(lambda x, part=part: softmax_top_k(x, 4)[part], logits, 700)
        rows_alone(lambda x, part=part: sparse_mixer(x, 0.01)[part], logits, 700)


@pytest.mark.parametrize("dtype", SERVED)
def test_experts(dtype: torch.dtype) -> None:
    gate, up = randn(0, 640, 1024, dtype=dtype) / 32, randn(1, 640, 1024, dtype=dtype) / 32
    weights = ExpertWeights(gate, up, randn(2, 1024, 640, dtype=dtype) / 25)
    x = randn(3, 77, 1024, dtype=dtype)
    full = expert_rows(x, [(weights, len(x))], silu)
    for first, last in [(0, 1), (5, 7), (30, 47), (76, 77)]:
        assert torch.equal(
            expert_rows(x[first:last], [(weights, last - first)], silu), full[first:last]
        )


@pytest.mark.parametrize("dtype", SERVED)
@pytest.mark.parametrize("shape", [(8, 2, 128), (16, 4, 64), (6, 1, 128)])
def test_attention(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """Chunks of any size, alone or beside a longer sequence, against one whole prefill."""
    heads, kv_heads, width = shape
    length, block_size = 200, 16
    tables = torch.randperm(3 * 20, generator=torch.Generator().manual_seed(0)).view(3, 20)
    attention = PagedAttention(num_heads=heads, num_kv_heads=kv_heads, head_dim=width)
    q = randn(0, length, heads, width, dtype=dtype)
    k, v = (randn(i, length, kv_heads, width, dtype=dtype) for i in (1, 2))
    size = (3 * 20, kv_heads, block_size, width)

    def run(cuts: list[int], seq: int, company: bool) -> Tensor:
        cache = KVCache(torch.zeros(size, dtype=dtype), torch.zeros(size, dtype=dtype))
        outputs = []
        for start, end in itertools.pairwise([0, *cuts, length]):
            chunks, picked = [(start, end - start)], torch.arange(start, end)
            owners = [seq]
            if company:  # a neighbour in front, one behind
                chunks = [(start, min(7, length - start)), *chunks, (start, 1)]
                owners = [(seq + 1) % 3, seq, (seq + 2) % 3]
                front = torch.arange(start, start + chunks[0][1])
                picked = torch.cat([front, picked, torch.tensor([start])])
            meta = meta_of(chunks, tables[owners], block_size)
            rows = torch.cat([picked, picked.new_zeros(meta.num_rows - len(picked))])
            out = attention(q[rows], k[rows], v[rows], meta, cache)
            own = meta.query_starts[owners.index(seq)]
            outputs.append(out[own : own + end - start])
        return torch.cat(outputs)

    whole = run([], 0, company=False)
    for cuts in ([1], [64, 128], [150, 151, 152]):
        for company in (False, True):
            assert torch.equal(run(cuts, 1, company), whole), (cuts, company)


@pytest.mark.parametrize("dtype", SERVED)
def test_rope(dtype: torch.dtype) -> None:
    long_rope = LongRope(
        short_factor=(1.0,) * 32,
        long_factor=tuple(1.0 + i / 3 for i in range(32)),
        short_mscale=1.1,
        long_mscale=1.3,
        original_max_position_embeddings=1500,
    )
    tables = torch.zeros(3, 4096, dtype=torch.int64)
    chunks = [(1020, 60), (0, 33), (1490, 40)]
    together = meta_of(chunks, tables, 1)
    x = randn(0, together.num_rows, 5, 64, dtype=dtype)
    full = RotaryEmbedding(64, 1e4, dtype, long_rope).rotate(x, together, 5)
    grown = RotaryEmbedding(64, 1e4, dtype, long_rope)
    for seq, (start, count) in enumerate(chunks):
        for offset in (0, count // 2, count - 1):
            row = together.query_starts[seq] + offset
            one = meta_of([(start + offset, 1)], tables[:1], 1)
            object.__setattr__(one, "lengths", (start + count,))
            rotated = grown.rotate(x[row].expand(16, -1, -1).contiguous(), one, 5)
            assert torch.equal(rotated[0], full[row])


@pytest.mark.parametrize("dtype", SERVED)
@pytest.mark.parametrize(("width", "state"), [(2048, 16), (130, 7)])
def test_convolution_and_scan(dtype: torch.dtype, width: int, state: int) -> None:
    """Chunks of any size, alone or between neighbours, against one whole prefill."""
    length = 20
    u, step, z = (randn(i, length, width, dtype=dtype) for i in range(3))
    b, c = (randn(i, length, state, dtype=dtype) for i in (3, 4))
    taps, bias = randn(5, 4, width), randn(6, width, dtype=dtype)
    a_log, d, step_bias = randn(7, width, state), randn(8, width), randn(9, width)
    weights = ScanWeights(*(t.to(dtype) for t in (a_log, d, step_bias)))
    mamba = SelectiveState(4)

    def run(cuts: list[int], slot: int, company: bool) -> tuple[Tensor, ...]:
        cache = StateCache(torch.zeros(3, width, 3, dtype=dtype), torch.zeros(3, width, state))
        outputs = []
        for start, end in itertools.pairwise([0, *cuts, length]):
            counts, slots, picked = [end - start], [slot], torch.arange(start, end)
            if company:  # a longer neighbour in front, a shorter one behind
                counts, slots = [length, *counts, 1], [(slot + 1) % 3, slot, (slot + 2) % 3]
                picked = torch.cat([torch.arange(length), picked, torch.tensor([0])])
            meta = meta_of(
                [(0, count) for count in counts],
                torch.zeros(len(counts), 128, dtype=torch.int64),
                1,
            )
            object.__setattr__(meta, "state_slots", tuple(slots))
            rows = torch.cat([picked, picked.new_zeros(meta.num_rows - len(picked))])
            signal = mamba.signal(u[rows], taps, bias, meta, cache)
            selection = Selection(step[rows], b[rows], c[rows])
            scanned = mamba.gated_scan(signal, z[rows], selection, weights, meta, cache)
            own = slice(*meta.query_starts[slots.index(slot) :][:2])
            outputs.append(torch.stack([signal[own], scanned[own]]))
        return torch.cat(outputs, dim=1), cache.conv[slot], cache.ssm[slot]

    whole = run([], 0, company=False)
    for cuts in ([1], [8, 16], list(range(12, length))):
        for company in (False, True):
            parts = run(cuts, 2, company)
            assert all(map(torch.equal, parts, whole)), (cuts, company)
