"""Memory while a worker loads and after: no holes are left, and what steps compute in is kept."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager

# glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LOADING_MMAP = 2**20
# Steps allocate and free the same activations again and again: pages that went back in between
# would be zeroed for each layer, a tenth of a prefill. 32 MiB is the most that glibc accepts.
_SERVING_MMAP, _SERVING_TRIM = 32 * 2**20, 2**30


@contextmanager
def loading() -> Iterator[None]:
    """Each block of 1 MiB or more has pages of its own, which go back once it is freed.

    Otherwise buffers that come and go while weights stay leave holes as large as the weights.
    Afterwards up to 1 GiB that was freed is kept, and Python's garbage collector no longer looks
    at what is there. Of malloc nothing is changed where the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", _unchanged)
    mallopt(_M_MMAP_THRESHOLD, _LOADING_MMAP)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, _SERVING_MMAP)
        mallopt(_M_TRIM_THRESHOLD, _SERVING_TRIM)
    # A full collection that visits all that torch has made takes a tenth of a second.
    gc.collect()
    gc.freeze()


def _unchanged(option: int, value: int) -> None:
    """What stands for mallopt where there is none."""
