"""The operators that the numbers contract forbids, in the place of those that keep every bit."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from models.interface import BatchMeta, KVCache
from models.kernels.native import use_kernels
from models.layers import rowwise
from models.layers.attention import PagedAttention


@contextmanager
def plain_operators() -> Iterator[None]:
    """All rows of a batch in one product, no row tiles, attention by PyTorch's own operator.

    Jamba's scan and the activations are our PyTorch path's: PyTorch has no faster ones on CPU.
    """
    ours = rowwise.linear
    with ExitStack() as stack:
        stack.callback(use_kernels, "auto")
        use_kernels("torch")
        stack.enter_context(patch.dict(rowwise._ROW_TILES, dict.fromkeys(rowwise._ROW_TILES, 1)))
        for name, module in list(sys.modules.items()):
            if name.startswith("models.") and getattr(module, "linear", None) is ours:
                stack.enter_context(patch.object(module, "linear", plain_linear))
        stack.enter_context(patch.object(PagedAttention, "__call__", plain_attention))
        yield


def plain_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """One product, whatever the number of rows."""
    assert scale is None, "only full-precision checkpoints are compared"
    return F.linear(x, weight, bias)


def plain_attention(
    self: PagedAttention, q: Tensor, k: Tensor, v: Tensor, meta: BatchMeta, cache: KVCache
) -> Tensor:
    """`scaled_dot_product_attention` for each sequence, over its gathered pages."""
    assert self.window is None, "a window is not compared"
    block_size, shape = cache.block_size, (self.num_kv_heads, -1, self.head_dim)
    blocks, offsets = meta.slot_mapping // block_size, meta.slot_mapping % block_size
    cache.key[blocks, :, offsets] = k[: meta.num_tokens]
    cache.value[blocks, :, offsets] = v[: meta.num_tokens]
    out = q.new_zeros(meta.num_rows, self.num_heads * self.head_dim)
    for seq, start in enumerate(meta.starts):
        first, last = meta.query_starts[seq : seq + 2]
        length = start + last - first
        pages = meta.block_tables[seq, : -(-length // block_size)]
        keys, values = (
            t.index_select(0, pages).transpose(0, 1).reshape(shape)[None, :, :length]
            for t in (cache.key, cache.value)
        )
        mask = None
        if last - first > 1:
            at = torch.arange(length)
            mask = at <= at[start:, None]
        one = F.scaled_dot_product_attention(
            q[first:last].transpose(0, 1)[None], keys, values, attn_mask=mask, enable_gqa=True
        )
        out[first:last] = one[0].transpose(0, 1).flatten(1)
    return out


def print_costs_of_products() -> None:
    """One bfloat16 product that keeps a row's bits beside the plain operator."""
    print("\none [1792, 1024] bfloat16 product: microseconds of ours, plain, ratio")
    weight = torch.randn(1792, 1024).to(torch.bfloat16)
    for rows in (16, 32, 128, 512):
        x = torch.randn(rows, 1024).to(torch.bfloat16)
        ours = microseconds(partial(rowwise.linear, x, weight))
        plain = microseconds(partial(F.linear, x, weight))
        print(f"{rows:5} rows: {ours:8.0f} {plain:8.0f} {ours / plain:6.2f}")


def microseconds(call: Callable[[], object], repeats: int = 30) -> float:
    """Median of `repeats` calls."""
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds) * 1e6
