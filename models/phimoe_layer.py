"""A PhiMoE layer: LayerNorms with bias, attention with RoPE, SparseMixer's gate."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.checkpoint_map import stacked, whole
from models.interface import (
    BatchMeta,
    KVCache,
    LayerCache,
    Routing,
    TensorSlice,
)
from models.layers.attention import PagedAttention
from models.layers.moe import mixer_gate
from models.layers.norm import layer_norm
from models.layers.rope import RotaryEmbedding
from models.layers.rowwise import linear, project

if TYPE_CHECKING:
    from models.phimoe import PhimoeConfig


def layer_tensors(config: PhimoeConfig, layer_idx: int) -> dict[str, TensorSlice]:
    """One layer's parameters by its own names, without routed experts."""
    hidden = config.hidden_size
    q_rows, kv_rows = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
    prefix = f"model.layers.{layer_idx}."
    tensors = {
        "gate": whole(
            f"{prefix}block_sparse_moe.gate.weight",
            (config.num_experts, hidden),
            f"{prefix}mlp.router.weight",
        )
    }
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors[norm] = whole(f"{prefix}{norm}.weight", (hidden,))
        tensors[f"{norm}_bias"] = whole(f"{prefix}{norm}.bias", (hidden,))
    rows = {"q": q_rows, "k": kv_rows, "v": kv_rows}
    attn = prefix + "self_attn."
    tensors["qkv"] = stacked(
        *(whole(f"{attn}{name}_proj.weight", (count, hidden)) for name, count in rows.items())
    )
    tensors["o"] = whole(f"{attn}o_proj.weight", (hidden, q_rows))
    if config.attention_bias:
        tensors["qkv_bias"] = stacked(
            *(whole(f"{attn}{name}_proj.bias", (count,)) for name, count in rows.items())
        )
        tensors["o_bias"] = whole(f"{attn}o_proj.bias", (hidden,))
    return tensors


class PhimoeLayer:
    """One PhiMoE layer without its experts."""

    is_moe = True
    quantizable = frozenset({"qkv", "o"})

    def __init__(
        self, config: PhimoeConfig, layer_idx: int, attention: PagedAttention, rope: RotaryEmbedding
    ) -> None:
        self.layer_idx = layer_idx
        self._config = config
        self._attention = attention
        self._rope = rope
        self._weights: dict[str, Tensor] = {}

    def mix(self, x: Tensor, meta: BatchMeta, cache: LayerCache) -> tuple[Tensor, Tensor]:
        """Norm, attention with RoPE, residual, norm."""
        assert isinstance(cache, KVCache)
        w, config = self._weights, self._config
        qkv = project(self._norm("input_layernorm", x), w, "qkv")
        heads = qkv.view(x.shape[0], -1, config.head_dim)
        counts = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        heads = self._rope.rotate(heads, meta, counts[0] + counts[1])
        q, k, v = torch.split_with_sizes(heads, counts, dim=1)
        residual = x + project(self._attention(q, k, v, meta, cache), w, "o")
        return residual, self._norm("post_attention_layernorm", residual)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self._weights[name], self._weights[f"{name}_bias"]
        return layer_norm(x, weight, bias, self._config.norm_eps)

    def gate(self, h: Tensor) -> Routing:
        """SparseMixer, in the logits' dtype."""
        logits = linear(h, self._weights["gate"])
        return mixer_gate(logits, self._config.router_jitter_noise)

    def mlp(self, h: Tensor) -> Tensor:
        """PhiMoE has no dense layers: never called."""
        raise AssertionError(f"layer {self.layer_idx} is a mixture of experts")

    def combine(self, residual: Tensor, outputs: Tensor) -> Tensor:
        """residual + expert outputs."""
        return residual + outputs

    def tensors(self) -> dict[str, TensorSlice]:
        """The layer's parameters and where they are read from."""
        return layer_tensors(self._config, self.layer_idx)

    def load(self, weights: dict[str, Tensor]) -> None:
        """Take the parameters named by `tensors()`."""
        self._weights = weights
