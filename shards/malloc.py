"""The C library's memory: loading leaves no holes, and what steps compute in is kept."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

# glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LOADING_MMAP = 2**20
# Steps allocate and free the same activations again and again: pages that went back in between
# would be zeroed for each layer, a tenth of a prefill. 32 MiB is the most that glibc accepts.
_SERVING_MMAP, _SERVING_TRIM = 32 * 2**20, 2**30


@contextmanager
def large_blocks_apart() -> Iterator[None]:
    """Each block of 1 MiB or more has pages of its own, which go back once it is freed.

    Otherwise buffers that come and go while weights stay leave holes as large as the weights.
    Afterwards up to 1 GiB that was freed is kept. Does nothing where the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, _LOADING_MMAP)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, _SERVING_MMAP)
        mallopt(_M_TRIM_THRESHOLD, _SERVING_TRIM)
