"""Norms over the last dimension; both work row by row, whatever the number of rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels import rowops
from models.kernels.native import native_kernels


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Mean-subtracting LayerNorm of [R, D] rows."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of [R, D] rows: statistics in float32, weight applied in the model dtype."""
    kernels = native_kernels("rms_norm", x.dtype, x.device)
    if kernels is not None:
        return rowops.rms_norm(kernels.name, x, weight, eps)
    wide = x.float()
    mean_square = (wide * wide).mean(-1, keepdim=True)
    return weight * (wide / torch.sqrt(mean_square + eps)).to(x.dtype)
