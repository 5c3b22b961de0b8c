"""What a stage remembers between steps: its memory, and how much of it there is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

import torch

from models.interface import CacheShape, KVCache, LayerCache, ModelConfig, StateCache
from router.step import StateOp, StateOpKind

_SSM_ITEMSIZE = 4
"""Recurrent SSM state is float32 whatever the model's dtype (Mamba reference)."""


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
            size = (num_blocks, block_size, shape.num_kv_heads, shape.head_dim)
            return KVCache(
                torch.zeros(size, dtype=dtype, device=device),
                torch.zeros(size, dtype=dtype, device=device),
            )
        rows = num_state_rows
        return StateCache(
            torch.zeros((rows, *shape.conv_shape), dtype=dtype, device=device),
            torch.zeros((rows, *shape.ssm_shape), dtype=torch.float32, device=device),
        )

    return tuple(allocate(config.cache_shape(layer)) for layer in layers)


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


def block_bytes(config: ModelConfig, layers: Iterable[int], block_size: int, itemsize: int) -> int:
    """Bytes that one KV block takes over `layers`; 0 when none of them has attention."""
    shapes = (config.cache_shape(layer) for layer in layers)
    return sum(2 * block_size * s.num_kv_heads * s.head_dim * itemsize for s in shapes)


def slot_bytes(config: ModelConfig, layers: Iterable[int], itemsize: int) -> int:
    """Bytes that one recurrent-state slot takes over `layers`; 0 when none is recurrent."""
    shapes = (config.cache_shape(layer) for layer in layers)
    return sum(prod(s.conv_shape) * itemsize + prod(s.ssm_shape) * _SSM_ITEMSIZE for s in shapes)


def num_snapshots_for(
    budget: int,
    config: ModelConfig,
    layers: Sequence[int],
    *,
    block_size: int,
    itemsize: int,
    num_state_slots: int,
    least_blocks: int,
) -> int:
    """Snapshots of recurrent states to keep: four per running sequence, in a quarter of `budget`
    at most, and only in what the slots and `least_blocks` KV blocks leave."""
    per_slot = slot_bytes(config, layers, itemsize)
    if not per_slot:
        return 0
    needed = num_state_slots * per_slot
    needed += least_blocks * block_bytes(config, layers, block_size, itemsize)
    return max(0, min(4 * num_state_slots, min(budget // 4, budget - needed) // per_slot))


def num_blocks_for(
    budget: int,
    config: ModelConfig,
    layers: Sequence[int],
    *,
    block_size: int,
    itemsize: int,
    num_state_rows: int,
    max_blocks: int,
) -> int:
    """KV blocks that fit into `budget` bytes beside the states, never more than `max_blocks`.

    `max_blocks` is what the greatest load could fill (sequences times blocks of the longest one).
    Raises ValueError when not even one block fits.
    """
    states = num_state_rows * slot_bytes(config, layers, itemsize)
    per_block = block_bytes(config, layers, block_size, itemsize)
    if budget < states + per_block:
        raise ValueError(
            f"kv_cache_memory={budget}: at least {states + per_block} bytes are needed for "
            f"{num_state_rows} recurrent states ({states} bytes) and one block of {block_size} "
            "tokens"
        )
    return min(max_blocks, (budget - states) // per_block) if per_block else max_blocks
