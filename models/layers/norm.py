"""Norms over the last dimension; all work row by row, whatever the number of rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.kernels import rowops
from models.kernels.native import native_kernels


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Mean-subtracting LayerNorm of [R, D] rows.

    PyTorch's operator keeps every row's bits. On rows whose mean is large beside their spread its
    own rounding is larger than the contract's tolerance, so the kernel is the same algorithm.
    """
    kernels = native_kernels("layer_norm", x.dtype, x.device)
    if kernels is not None:
        return rowops.layer_norm(kernels.name, x, weight, bias, eps)
    return torch.layer_norm(x, weight.shape, weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of [R, D] rows: statistics in float32, weight applied in the model dtype."""
    kernels = native_kernels("rms_norm", x.dtype, x.device)
    if kernels is not None:
        return rowops.rms_norm(kernels.name, x, weight, eps)[1]
    wide = x.float()
    mean_square = (wide * wide).mean(-1, keepdim=True)
    return weight * (wide / torch.sqrt(mean_square + eps)).to(x.dtype)


def add_rms_norm(x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + added, and the RMSNorm of that: two [R, D]."""
    kernels = native_kernels("rms_norm", x.dtype, x.device)
    if kernels is not None:
        return rowops.rms_norm(kernels.name, x, weight, eps, added=added)
    total = x + added
    return total, rms_norm(total, weight, eps)


def rms_norm_parts(x: Tensor, weight: Tensor, parts: Sequence[int], eps: float) -> Tensor:
    """RMSNorm of each part of [R, D] rows by itself; the widths in `parts` add up to D."""
    kernels = native_kernels("rms_norm", x.dtype, x.device)
    if kernels is not None:
        return rowops.rms_norm(kernels.name, x, weight, eps, parts=parts)[1]
    pieces = torch.split_with_sizes(x, list(parts), -1)
    weights = torch.split_with_sizes(weight, list(parts))
    pairs = zip(pieces, weights, strict=True)
    return torch.cat([rms_norm(piece, own, eps) for piece, own in pairs], -1)
