"""Memory for what lives long and is read over and over: in huge pages where the system has them.

With small pages more of the time of reading large weights goes into looking addresses up.
"""

from __future__ import annotations

import mmap
import weakref
from contextlib import suppress
from math import prod

import torch
from torch import Tensor

_CHUNK_BYTES = 256 << 20
"""Mapped at once; takes memory only where written, and of its last huge page all."""
_LEAST_BYTES = 256 << 10
"""Of a tensor in a chunk: when it goes, so do the pages that are all its own."""
_ALIGNMENT = 64


def map_pages(num_bytes: int) -> mmap.mmap:
    """Zeroed memory, committed when first written."""
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


class Arena:
    """Places tensors one behind the other, so that huge pages are whole whatever their sizes."""

    def __init__(self) -> None:
        self._pages: mmap.mmap | None = None
        self._used = 0

    def empty(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> Tensor:
        """An uninitialised tensor; small ones and those of other devices are torch's own."""
        num_bytes = prod(shape) * dtype.itemsize
        if num_bytes < _LEAST_BYTES or torch.device(device).type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        if self._pages is None or self._used + num_bytes > len(self._pages):
            self._pages = map_pages(max(_CHUNK_BYTES, num_bytes))
            self._used = 0
        start, end = self._used, self._used + num_bytes
        self._used = -(-end // _ALIGNMENT) * _ALIGNMENT
        view = memoryview(self._pages)[start:end]
        # The tensor keeps the view; at the end of the process others may still be computing.
        weakref.finalize(view, _give_back, self._pages, start, end).atexit = False
        return torch.frombuffer(view, dtype=dtype).view(shape)


def _give_back(pages: mmap.mmap, start: int, end: int) -> None:
    """Free the pages that lie wholly between two places."""
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    length = end // mmap.PAGESIZE * mmap.PAGESIZE - first
    if length > 0:
        pages.madvise(mmap.MADV_DONTNEED, first, length)
