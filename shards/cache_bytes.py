"""How much memory what a stage remembers takes, per KV block and per recurrent state."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from models.interface import ModelConfig

_SSM_ITEMSIZE = 4
"""Recurrent SSM state is float32 whatever the model's dtype (Mamba reference)."""


def block_bytes(config: ModelConfig, layers: Iterable[int], block_size: int, itemsize: int) -> int:
    """Bytes that one KV block takes over `layers`; 0 when none of them has attention."""
    shapes = (config.cache_shape(layer) for layer in layers)
    return sum(2 * block_size * s.num_kv_heads * s.head_dim * itemsize for s in shapes)


def slot_bytes(config: ModelConfig, layers: Iterable[int], itemsize: int) -> int:
    """Bytes that one recurrent-state slot takes over `layers`; 0 when none is recurrent."""
    shapes = (config.cache_shape(layer) for layer in layers)
    return sum(prod(s.conv_shape) * itemsize + prod(s.ssm_shape) * _SSM_ITEMSIZE for s in shapes)
