"""A DBRX block: clamped, fused QKV with RoPE, and a softmax gate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from models.checkpoint_map import whole
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
    from models.dbrx import DbrxConfig

# torch's LayerNorm default; DBRX configurations do not carry it.
NORM_EPS = 1e-5


def layer_tensors(config: DbrxConfig, layer_idx: int) -> dict[str, TensorSlice]:
    """One layer's parameters by its own names, without routed experts."""
    hidden = config.hidden_size
    qkv_rows = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    prefix = f"transformer.blocks.{layer_idx}."
    attn = prefix + "norm_attn_norm."
    return {
        "norm_1": whole(attn + "norm_1.weight", (hidden,)),
        "qkv": whole(attn + "attn.Wqkv.weight", (qkv_rows, hidden)),
        "out": whole(attn + "attn.out_proj.weight", (hidden, hidden)),
        "norm_2": whole(attn + "norm_2.weight", (hidden,)),
        "gate": whole(prefix + "ffn.router.layer.weight", (config.num_experts, hidden)),
    }


class DbrxLayer:
    """One DBRX block without its experts."""

    is_moe = True
    quantizable = frozenset({"qkv", "out"})

    def __init__(
        self, config: DbrxConfig, layer_idx: int, attention: PagedAttention, rope: RotaryEmbedding
    ) -> None:
        self.layer_idx = layer_idx
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
        return layer_tensors(self._config, self.layer_idx)

    def load(self, weights: dict[str, Tensor]) -> None:
        """Take the parameters named by `tensors()`."""
        self._mix.load(weights)
        config = self._config
        self.chooser = Gate(
            weight=weights["gate"], top_k=config.top_k, p_norm=config.expert_weight_norm
        )
