"""Activations built from operations whose vector and scalar code agree to the last bit.

`F.silu`, `torch.sigmoid`, `F.softplus` and `F.gelu` give other bits in the tail of an array (or of
a thread's share of it); exp, log1p, tanh, erf, sqrt and division do not. All of them compute in
float32 and round once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

Activation = Callable[[Tensor], Tensor]

# Above this, log1p(exp(x)) is x to float32's precision and exp may overflow (as in F.softplus).
_SOFTPLUS_LINEAR_ABOVE = 20.0


def silu(x: Tensor) -> Tensor:
    """x · sigmoid(x), any shape and dtype."""
    wide = x.float()
    return (wide / (1.0 + torch.exp(-wide))).to(x.dtype)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)), any shape and dtype."""
    return (1.0 / (1.0 + torch.exp(-x.float()))).to(x.dtype)


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), any shape and dtype."""
    wide = x.float()
    soft = torch.log1p(torch.exp(wide.clamp(max=_SOFTPLUS_LINEAR_ABOVE)))
    return torch.where(wide > _SOFTPLUS_LINEAR_ABOVE, wide, soft).to(x.dtype)


def gelu(x: Tensor) -> Tensor:
    """x · Φ(x) with the exact normal distribution function."""
    wide = x.float()
    return (0.5 * wide * (1.0 + torch.erf(wide * math.sqrt(0.5)))).to(x.dtype)


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation of gelu (Hendrycks and Gimpel)."""
    wide = x.float()
    inner = math.sqrt(2.0 / math.pi) * (wide + 0.044715 * (wide * wide * wide))
    return (0.5 * wide * (1.0 + torch.tanh(inner))).to(x.dtype)


ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        "silu": silu,
        "swish": silu,
        "relu": torch.relu,
        "gelu": gelu,
        "gelu_new": gelu_tanh,
        "gelu_pytorch_tanh": gelu_tanh,
        "sigmoid": sigmoid,
        "tanh": torch.tanh,
    }
)
"""The activation names of Transformers' table that are served."""
