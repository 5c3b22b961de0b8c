"""Where weights lie: memory of their own, that goes when they go, in pages that are huge."""

from __future__ import annotations

import gc
import mmap
import re
from pathlib import Path

import pytest
import torch

from shards import pages
from shards.pages import Arena, map_pages

MIB = 1 << 20
MODES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def resident(address: int, key: str = "Rss") -> int:
    """Bytes of the mapping around an address that are in memory (or in huge pages of it)."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        found = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if found:
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith(f"{key}:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no such mapping")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_tensors_do_not_overlap(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_CHUNK_BYTES", 3 * MIB)
    arena = Arena()
    shapes = [(3, 5), (1023, 777), (0, 4), (4 * MIB,), (2, MIB), (511, 1025)]
    tensors = [arena.empty(shape, dtype).fill_(i) for i, shape in enumerate(shapes)]
    for i, (shape, tensor) in enumerate(zip(shapes, tensors, strict=True)):
        assert tensor.shape == shape
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 64 == 0
        assert bool((tensor == i).all())


def test_memory_goes_with_its_tensor_and_no_other() -> None:
    arena = Arena()
    kept, dropped = (arena.empty((8 * MIB,), torch.int8).fill_(7) for _ in range(2))
    part, address = dropped[: 5 * MIB : 2], kept.data_ptr()
    assert resident(address) >= 16 * MIB
    del dropped
    gc.collect()
    assert resident(address) >= 16 * MIB, "a view of it is still there"
    assert bool((part == 7).all())
    del part
    gc.collect()
    assert resident(address) <= 11 * MIB
    assert bool((kept == 7).all())


@pytest.mark.skipif(
    not MODES.is_file() or "[never]" in MODES.read_text(), reason="there are no huge pages here"
)
def test_pages_are_huge() -> None:
    tensor = Arena().empty((16 * MIB,), torch.int8).fill_(1)
    if not resident(tensor.data_ptr(), "AnonHugePages"):
        pytest.skip("the system has no huge page left")
    assert resident(tensor.data_ptr(), "AnonHugePages") >= 12 * MIB


def test_a_system_without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", -1)
    assert bytes(map_pages(mmap.PAGESIZE)) == bytes(mmap.PAGESIZE)
