"""Cache memory: its sizes against what is really allocated, and slot operations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.interface import KVCache, LayerCache, StateCache
from models.registry import load_config
from router.step import StateOp, StateOpKind
from shards.kv_cache import (
    allocate_caches,
    apply_state_ops,
    block_bytes,
    num_blocks_for,
    num_snapshots_for,
    slot_bytes,
)
from tests.tiny import FAMILIES, write_tiny


def allocated_bytes(caches: tuple[LayerCache, ...], kind: type[LayerCache]) -> int:
    tensors = (
        (cache.key, cache.value) if isinstance(cache, KVCache) else (cache.conv, cache.ssm)
        for cache in caches
        if isinstance(cache, kind)
    )
    return sum(tensor.nbytes for pair in tensors for tensor in pair)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_what_is_allocated(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config = load_config(write_tiny(family, tmp_path))
    layers = range(1, config.num_layers)
    caches = allocate_caches(
        config, layers, num_blocks=5, block_size=4, num_state_rows=3, dtype=dtype
    )
    size = dtype.itemsize
    assert len(caches) == len(layers)
    assert allocated_bytes(caches, KVCache) == 5 * block_bytes(config, layers, 4, size) > 0
    assert allocated_bytes(caches, StateCache) == 3 * slot_bytes(config, layers, size)
    assert (slot_bytes(config, layers, size) > 0) == (family == "jamba")


def test_jamba_bytes_by_hand(tmp_path: Path) -> None:
    config = load_config(write_tiny("jamba", tmp_path))
    assert block_bytes(config, range(4), 16, 2) == 1 * 2 * 16 * 2 * 16 * 2
    assert slot_bytes(config, range(4), 2) == 3 * (128 * 3 * 2 + 128 * 16 * 4)


def test_the_budget_is_kept(tmp_path: Path) -> None:
    config = load_config(write_tiny("jamba", tmp_path))
    slots = 4 * slot_bytes(config, range(4), 4)
    block = block_bytes(config, range(4), 16, 4)

    def blocks(budget: int, layers: range = range(4), max_blocks: int = 100) -> int:
        return num_blocks_for(
            budget,
            config,
            layers,
            block_size=16,
            itemsize=4,
            num_state_rows=4,
            max_blocks=max_blocks,
        )

    assert blocks(slots + 7 * block) == 7
    assert blocks(slots + 8 * block - 1) == 7
    assert blocks(slots + 7 * block, max_blocks=3) == 3
    assert blocks(slots, layers=range(2)) == 100  # no attention: blocks cost nothing
    with pytest.raises(ValueError, match=rf"kv_cache_memory={slots}: at least {slots + block}"):
        blocks(slots)


def test_state_ops_apply_in_order_to_every_layer(tmp_path: Path) -> None:
    config = load_config(write_tiny("jamba", tmp_path))
    caches = allocate_caches(
        config, range(4), num_blocks=2, block_size=4, num_state_rows=4, dtype=torch.float32
    )
    states = [cache for cache in caches if isinstance(cache, StateCache)]
    assert len(states) == 3
    for state in states:
        for slot in range(4):
            state.conv[slot] = slot + 1.0
            state.ssm[slot] = slot + 1.0
    apply_state_ops(
        caches,
        (
            StateOp(kind=StateOpKind.SNAPSHOT, source=1, target=3),
            StateOp(kind=StateOpKind.ZERO, target=1),
            StateOp(kind=StateOpKind.COPY, source=3, target=0),
        ),
    )
    for state in states:
        for tensor in (state.conv, state.ssm):
            assert [float(slot.max()) for slot in tensor] == [2.0, 0.0, 3.0, 2.0]
            assert [float(slot.min()) for slot in tensor] == [2.0, 0.0, 3.0, 2.0]


def test_snapshots_take_only_what_is_left(tmp_path: Path) -> None:
    config = load_config(write_tiny("jamba", tmp_path / "jamba"))
    layers = range(config.num_layers)
    slot, block = slot_bytes(config, layers, 4), block_bytes(config, layers, 4, 4)
    sizes: dict[str, int] = {
        "block_size": 4,
        "itemsize": 4,
        "num_state_slots": 3,
        "least_blocks": 10,
    }
    needed = 3 * slot + 10 * block
    assert num_snapshots_for(needed, config, layers, **sizes) == 0
    assert num_snapshots_for(needed - 1, config, layers, **sizes) == 0
    assert num_snapshots_for(needed + slot, config, layers, **sizes) == 1
    assert num_snapshots_for(40 * slot, config, layers, **sizes) == 10
    assert num_snapshots_for(400 * slot, config, layers, **sizes) == 12
    dense = load_config(write_tiny("dbrx", tmp_path / "dbrx"))
    assert num_snapshots_for(1 << 30, dense, range(dense.num_layers), **sizes) == 0
