"""A DBRX block: clamped, fused QKV with RoPE, and a softmax gate."""

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
    from models.dbrx import DbrxConfig

# torch's LayerNorm default; DBRX configurations do not carry it.
NORM_EPS = 1e-5


def build_stage(config: DbrxConfig, first: int, last: int, dtype: torch.dtype) -> Stage:
    """Layers first..last-1, without weights."""
    attention = PagedAttention(
        num_heads=config.num_heads, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim
    )
    rope = RotaryEmbedding(config.head_dim, config.rope_theta, dtype)
    return Stage(
        layers=[DbrxLayer(config, i, attention, rope) for i in range(first, last)],
        embedding=config.embedding_tensor() if first == 0 else None,
        head=config.head_tensors() if last == config.num_layers else {},
        final_norm=lambda x, weights: layer_norm(x, weights["norm"], None, NORM_EPS),
    )


class DbrxLayer:
    """One DBRX block without its experts."""

    is_moe = True

    def __init__(
        self, config: DbrxConfig, layer_idx: int, attention: PagedAttention, rope: RotaryEmbedding
    ) -> None:
        self.layer_idx = layer_idx
        self.quantizable = config.quantizable
        self._config = config
        self._mix = AttentionMix(
            attention,
            rope,
            projection="out",
            norms=("norm_1", "norm_2"),
            norm_eps=NORM_EPS,
            is_rms=False,
            limit=config.clip_qkv,
        )
        self.chooser: Gate | None = None

    def mix(self, x: Tensor, meta: BatchMeta, cache: LayerCache) -> tuple[Tensor, Tensor]:
        """norm_1, attention, residual, norm_2: the second norm reads the new residual."""
        assert isinstance(cache, KVCache)
        return self._mix(x, meta, cache)

    def gate(self, h: Tensor) -> Routing:
        """Softmax over all experts, top-k, then the p-norm."""
        assert self.chooser is not None, f"layer {self.layer_idx} is not loaded"
        return route(h, self.chooser)

    def dense(self, residual: Tensor, h: Tensor, meta: BatchMeta) -> Tensor:
        """DBRX has no dense layers: never called."""
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
        config = self._config
        self.chooser = Gate(
            weight=weights["gate"], top_k=config.top_k, p_norm=config.expert_weight_norm
        )
