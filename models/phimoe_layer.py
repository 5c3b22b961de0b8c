"""A PhiMoE layer: LayerNorms with bias, attention with RoPE, SparseMixer's gate."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.gate import Gate
from models.interface import (
    BatchMeta,
    KVCache,
    LayerCache,
    Routing,
    TensorSlice,
)
from models.layers.attention import PagedAttention
from models.layers.attention_mix import AttentionMix
from models.layers.moe import route
from models.layers.norm import layer_norm
from models.layers.rope import RotaryEmbedding
from models.layers.stage import Stage

if TYPE_CHECKING:
    from models.phimoe import PhimoeConfig


def build_stage(config: PhimoeConfig, first: int, last: int, dtype: torch.dtype) -> Stage:
    """Layers first..last-1, without weights."""
    attention = PagedAttention(
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        window=config.sliding_window,
    )
    rope = RotaryEmbedding(config.head_dim, config.rope_theta, dtype, config.long_rope)
    eps = config.norm_eps
    return Stage(
        layers=[PhimoeLayer(config, i, attention, rope) for i in range(first, last)],
        embedding=config.embedding_tensor() if first == 0 else None,
        head=config.head_tensors() if last == config.num_layers else {},
        final_norm=lambda x, w: layer_norm(x, w["norm"], w["norm_bias"], eps),
    )


class PhimoeLayer:
    """One PhiMoE layer without its experts."""

    is_moe = True

    def __init__(
        self, config: PhimoeConfig, layer_idx: int, attention: PagedAttention, rope: RotaryEmbedding
    ) -> None:
        self.layer_idx = layer_idx
        self.quantizable = config.quantizable
        self._config = config
        self._mix = AttentionMix(
            attention,
            rope,
            projection="o",
            norms=("input_layernorm", "post_attention_layernorm"),
            norm_eps=config.norm_eps,
            is_rms=False,
        )
        self.chooser: Gate | None = None

    def mix(self, x: Tensor, meta: BatchMeta, cache: LayerCache) -> tuple[Tensor, Tensor]:
        """Norm, attention with RoPE, residual, norm."""
        assert isinstance(cache, KVCache)
        return self._mix(x, meta, cache)

    def gate(self, h: Tensor) -> Routing:
        """SparseMixer, in the logits' dtype."""
        assert self.chooser is not None, f"layer {self.layer_idx} is not loaded"
        return route(h, self.chooser)

    def dense(self, residual: Tensor, h: Tensor, meta: BatchMeta) -> Tensor:
        """PhiMoE has no dense layers: never called."""
        raise AssertionError(f"layer {self.layer_idx} is a mixture of experts")

    def combine(self, residual: Tensor, outputs: Tensor) -> Tensor:
        """residual + expert outputs."""
        return residual + outputs

    def tensors(self) -> dict[str, TensorSlice]:
        """The layer's parameters and where they are read from."""
        return self._config.layer_tensors(self.layer_idx)

    def load(self, weights: dict[str, Tensor]) -> None:
        """Take the parameters named by `tensors()`."""
        self._mix.load(weights)
        band = 2 * self._config.router_jitter_noise
        self.chooser = Gate(weight=weights["gate"], top_k=2, band=band)
