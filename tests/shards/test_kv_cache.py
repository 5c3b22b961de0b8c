"""Cache memory: its sizes against what is really allocated, and slot operations."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from models.interface import KVCache, LayerCache, StateCache
from models.registry import load_config
from router.step import StateOp, StateOpKind
from shards.cache_bytes import block_bytes, slot_bytes
from shards.kv_cache import allocate_caches, apply_state_ops
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


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="pages are counted by Linux")
def test_pages_are_committed_when_they_are_written(tmp_path: Path) -> None:
    config = load_config(write_tiny("jamba", tmp_path))
    num_blocks = (256 << 20) // block_bytes(config, range(4), 16, 4)
    before = resident_bytes()
    caches = allocate_caches(
        config,
        range(4),
        num_blocks=num_blocks,
        block_size=16,
        num_state_rows=4,
        dtype=torch.float32,
    )
    assert allocated_bytes(caches, KVCache) > 255 << 20
    assert resident_bytes() - before < 32 << 20
    pages = next(cache for cache in caches if isinstance(cache, KVCache))
    assert not pages.key[-1].any()
    pages.key.fill_(1.0)
    assert resident_bytes() - before > 96 << 20, "this test counts what it says"


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
