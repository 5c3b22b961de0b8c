"""Settings of the calling thread that decide bits and speed: thread count and dtype names."""

from __future__ import annotations

import torch

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def use_threads(num_threads: int) -> None:
    """Fix the intra-op thread count; OpenMP keeps it per calling thread, so call it there."""
    torch.set_num_threads(num_threads)
    torch.set_grad_enabled(False)


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype of a validated name."""
    return _DTYPES[name]
