"""RMSNorm and rotary embedding in C."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from models.kernels.functions import ELEMENT_TYPES, address, function, together

_POINTER, _I64 = ctypes.c_void_p, ctypes.c_int64


class _RmsNorm(ctypes.Structure):
    """`struct rms_norm` of rowops.c."""

    _fields_ = (
        *((name, _POINTER) for name in ("x", "weight", "out")),
        *((name, _I64) for name in ("rows", "width", "stride", "type", "threads")),
        ("eps", ctypes.c_double),
    )


class _Rotation(ctypes.Structure):
    """`struct rotation` of rowops.c."""

    _fields_ = (
        *((name, _POINTER) for name in ("x", "cos", "sin", "out")),
        *((name, _I64) for name in ("rows", "heads", "head_dim", "stride", "type", "threads")),
    )


def rms_norm(kernels: str, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[R, D] rows, normed in float32, rounded, times the weight [D].

    `kernels` names the variant.
    """
    (rows, width), x = x.shape, together(x)
    out = torch.empty(rows, width, dtype=x.dtype)
    call = _RmsNorm(
        x.data_ptr(),
        address(weight, (width,), x.dtype),
        out.data_ptr(),
        rows,
        width,
        x.stride(0),
        ELEMENT_TYPES[x.dtype],
        torch.get_num_threads(),
        eps,
    )
    function(kernels, "conclave_rms_norm")(ctypes.addressof(call))
    return out


def rotate(kernels: str, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[R, heads, h] by the angles of cos and sin [R, 1, h/2]; `kernels` names the variant."""
    (rows, heads, head_dim), dtype, x = x.shape, x.dtype, together(x)
    out = torch.empty(rows, heads, head_dim, dtype=dtype)
    call = _Rotation(
        x.data_ptr(),
        address(cos, (rows, 1, head_dim // 2), dtype),
        address(sin, (rows, 1, head_dim // 2), dtype),
        out.data_ptr(),
        rows,
        heads,
        head_dim,
        x.stride(0),
        ELEMENT_TYPES[dtype],
        torch.get_num_threads(),
    )
    function(kernels, "conclave_rotate")(ctypes.addressof(call))
    return out
