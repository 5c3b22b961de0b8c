"""Greedy choice in C."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from models.kernels.functions import ELEMENT_TYPES, address, function

_POINTER, _I64 = ctypes.c_void_p, ctypes.c_int64


class _Greedy(ctypes.Structure):
    """`struct greedy` of greedy.c."""

    _fields_ = (
        *((name, _POINTER) for name in ("logits", "ids")),
        *((name, _I64) for name in ("rows", "width", "type", "threads")),
    )


def greatest_or_none(kernels: str, logits: Tensor) -> list[int | None]:
    """Of each row of [n, V]: the id of its greatest value, the lowest of equals.

    None where a value is not finite. `kernels` names the variant.
    """
    rows, width = logits.shape
    ids = (_I64 * rows)()
    call = _Greedy(
        address(logits, (rows, width), logits.dtype),
        ctypes.addressof(ids),
        rows,
        width,
        ELEMENT_TYPES[logits.dtype],
        torch.get_num_threads(),
    )
    function(kernels, "conclave_greedy")(ctypes.addressof(call))
    return [token_id if token_id >= 0 else None for token_id in ids]
