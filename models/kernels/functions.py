"""How the C functions that take one structure are found and fed."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from models.kernels.variants import VARIANTS, load

ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The numbers are those of `enum type` in vector.h."""

WEIGHT_TYPES = {**ELEMENT_TYPES, torch.int8: 3}


@cache
def function(variant_name: str, symbol: str) -> Callable[[int], int]:
    """A C function of one pointer, from the library of a variant that works here."""
    variant = next(v for v in VARIANTS if v.name == variant_name)
    found = load(variant)[symbol]
    found.argtypes = [ctypes.c_void_p]
    return found


def together(rows: Tensor) -> Tensor:
    """The same rows [R, n] or [R, heads, h], which may lie apart but not what belongs to one."""
    if rows.is_contiguous():
        return rows
    inner = rows.stride()[1:]
    return rows if inner in ((1,), (rows.shape[-1], 1)) else rows.contiguous()


def address(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Where a contiguous tensor of this shape and dtype lies.

    An address says nothing of what it points to: this is the last place to look.
    """
    assert tensor.dtype == dtype, (tensor.dtype, dtype)
    assert tensor.shape == shape, (tensor.shape, shape)
    assert tensor.is_contiguous(), tensor.stride()
    return tensor.data_ptr()
