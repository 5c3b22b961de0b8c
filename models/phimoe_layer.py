"""A PhiMoE layer: LayerNorms with bias, attention with RoPE, SparseMixer's gate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from models.checkpoint_map import stacked, whole
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
from models.layers.rope import RotaryEmbedding

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
        return layer_tensors(self._config, self.layer_idx)

    def load(self, weights: dict[str, Tensor]) -> None:
        """Take the parameters named by `tensors()`."""
        self._mix.load(weights)
        band = 2 * self._config.router_jitter_noise
        self.chooser = Gate(weight=weights["gate"], top_k=2, band=band)
