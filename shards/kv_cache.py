"""What a stage remembers between steps: its memory, and how much of it there is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

import torch

from models.interface import CacheShape, KVCache, LayerCache, ModelConfig, StateCache
from router.step import StateOp, StateOpKind
from shards.pages import map_pages


def allocate_caches(
    config: ModelConfig,
    layers: Iterable[int],
    *,
    num_blocks: int,
    block_size: int,
    num_state_rows: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> tuple[LayerCache, ...]:
    """One zeroed cache per layer. On CPU the pages are committed only when first written."""

    def allocate(shape: CacheShape) -> LayerCache:
        if shape.kind == "kv":
            size = (num_blocks, shape.num_kv_heads, block_size, shape.head_dim)
            return KVCache(_zeros(size, dtype, device), _zeros(size, dtype, device))
        rows = num_state_rows
        return StateCache(
            _zeros((rows, *shape.conv_shape), dtype, device),
            _zeros((rows, *shape.ssm_shape), torch.float32, device),
        )

    return tuple(allocate(config.cache_shape(layer)) for layer in layers)


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    num_bytes = prod(size) * dtype.itemsize
    if not num_bytes or torch.device(device).type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    # torch.zeros would write every page.
    return torch.frombuffer(map_pages(num_bytes), dtype=dtype).view(size)


def apply_state_ops(caches: Sequence[LayerCache], ops: Iterable[StateOp]) -> None:
    """Clear or copy recurrent-state slots, in the order given, in every layer that has them."""
    states = [cache for cache in caches if isinstance(cache, StateCache)]
    for op in ops:
        for state in states:
            for tensor in (state.conv, state.ssm):
                if op.kind is StateOpKind.ZERO:
                    tensor[op.target].zero_()
                else:
                    tensor[op.target].copy_(tensor[op.source])
