"""The C library's memory: loading must not take more of it than the weights."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

# glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# What glibc's own adjustment ends at in a process that has freed large blocks.
_USUAL_MMAP, _USUAL_TRIM = 32 * 2**20, 64 * 2**20
_LOADING_MMAP = 2**20


@contextmanager
def large_blocks_apart() -> Iterator[None]:
    """Each block of 1 MiB or more has pages of its own, which go back once it is freed.

    Otherwise buffers that come and go while weights stay leave holes as large as the weights.
    Does nothing where the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, _LOADING_MMAP)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, _USUAL_MMAP)
        mallopt(_M_TRIM_THRESHOLD, _USUAL_TRIM)
