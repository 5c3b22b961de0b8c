"""RMSNorm, LayerNorm and rotary embedding in C."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from models.kernels.functions import ELEMENT_TYPES, address, function, together

_POINTER, _I64, _DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class _RmsNorm(ctypes.Structure):
    """`struct rms_norm` of rowops.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("x", "added", "weight", "sum", "out", "parts")),
        *((name, _I64) for name in ("num_parts", "rows", "width", "stride", "type", "threads")),
        ("eps", _DOUBLE),
    )


class _LayerNorm(ctypes.Structure):
    """`struct layer_norm` of rowops.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("x", "weight", "bias", "out")),
        *((name, _I64) for name in ("rows", "width", "stride", "type", "threads")),
        ("eps", _DOUBLE),
    )


class _Rotation(ctypes.Structure):
    """`struct rotation` of rowops.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("x", "cos", "sin", "out")),
        *((name, _I64) for name in ("rows", "heads", "rotated", "head_dim", "stride", "type")),
        ("threads", _I64),
        ("limit", _DOUBLE),
    )


def rms_norm(
    kernels: str,
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    added: Tensor | None = None,
    parts: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """x + added, and its RMSNorm: two [R, D].

    Normed in float32, rounded, times the weight [D]. `parts` are widths that add up to D, each
    normed by itself; none: the whole row. `kernels` names the variant.
    """
    (rows, width), dtype, x = x.shape, x.dtype, together(x)
    out = x.new_empty(rows, width)
    total = x if added is None else x.new_empty(rows, width)
    assert sum(parts) == width or not parts, (parts, width)
    widths = (_I64 * (len(parts) or 1))(*parts or (width,))
    call = _RmsNorm(
        x.data_ptr(),
        None if added is None else address(added, (rows, width), dtype),
        address(weight, (width,), dtype),
        total.data_ptr(),
        out.data_ptr(),
        ctypes.addressof(widths),
        len(widths),
        rows,
        width,
        x.stride(0),
        ELEMENT_TYPES[dtype],
        torch.get_num_threads(),
        eps,
    )
    function(kernels, "conclave_rms_norm")(ctypes.addressof(call))
    return total, out


def layer_norm(kernels: str, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm of [R, D] rows, rounded once; in float32, the bits of PyTorch's operator.

    `kernels` names the variant.
    """
    (rows, width), dtype, x = x.shape, x.dtype, together(x)
    out = x.new_empty(rows, width)
    call = _LayerNorm(
        x.data_ptr(),
        address(weight, (width,), dtype),
        None if bias is None else address(bias, (width,), dtype),
        out.data_ptr(),
        rows,
        width,
        x.stride(0),
        ELEMENT_TYPES[dtype],
        torch.get_num_threads(),
        eps,
    )
    function(kernels, "conclave_layer_norm")(ctypes.addressof(call))
    return out


def rotate(
    kernels: str, x: Tensor, cos: Tensor, sin: Tensor, num_rotated: int, limit: float | None = None
) -> Tensor:
    """[R, heads, h] clamped to ±limit, the first heads rotated by cos and sin [R, 1, h/2].

    The limit is what x's dtype makes of it. `kernels` names the variant.
    """
    (rows, heads, head_dim), dtype, x = x.shape, x.dtype, together(x)
    assert num_rotated <= heads, (num_rotated, heads)
    assert not head_dim % 2, head_dim
    out = x.new_empty(rows, heads, head_dim)
    angles = (rows, 1, head_dim // 2)
    call = _Rotation(
        x.data_ptr(),
        address(cos, angles, dtype),
        address(sin, angles, dtype),
        out.data_ptr(),
        rows,
        heads,
        num_rotated,
        head_dim,
        x.stride(0),
        ELEMENT_TYPES[dtype],
        torch.get_num_threads(),
        math.inf if limit is None else limit,
    )
    function(kernels, "conclave_rotate")(ctypes.addressof(call))
    return out
