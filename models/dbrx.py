"""DBRX (Databricks 2024): fused, clamped QKV with RoPE, and stacked experts behind a softmax gate.

The reference is Databricks' own code as kept by Transformers 4; Transformers 5 reads the RoPE base
from another place, see `rope_theta` below.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from models.checkpoint_map import whole
from models.config_fields import Fields, attention_heads, head_width
from models.interface import (
    BatchMeta,
    CacheShape,
    Classifier,
    ExpertWeights,
    KVCache,
    LayerCache,
    Routing,
    TensorSlice,
    TensorSource,
)
from models.layers.activation import ACTIVATIONS
from models.layers.attention import PagedAttention
from models.layers.moe import divide_by_p_norm, expert_rows, routing, softmax_top_k
from models.layers.norm import layer_norm
from models.layers.rope import RotaryEmbedding
from models.layers.rowwise import linear
from models.layers.stage import Stage

# torch's LayerNorm default; DBRX configurations do not carry it.
_NORM_EPS = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class DbrxConfig:
    """A validated DBRX config.json; implements `models.interface.ModelConfig`."""

    hidden_size: int
    vocab_size: int
    num_layers: int
    max_position_embeddings: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    clip_qkv: float | None
    """Clamp of q, k and v before RoPE; None: no clamp, 0: everything becomes 0."""
    expert_width: int
    num_experts: int
    top_k: int
    expert_weight_norm: float | None
    """p of the norm that the selected gate weights are divided by; None: left alone."""
    activation: str
    moe_loss_weight: float
    dtype_name: str

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> DbrxConfig:
        """Read config.json's object; ConfigError names what cannot be served."""
        fields = Fields(raw)
        attn, ffn = fields.section("attn_config"), fields.section("ffn_config")
        if fields.flag("tie_word_embeddings", False):
            raise fields.error("tie_word_embeddings", "false: DBRX has no tied embeddings")
        hidden, heads = fields.integer("d_model", 2048), fields.integer("n_heads", 16)
        kv_heads = attn.integer("kv_n_heads", 1)
        attention_heads(attn, heads, kv_heads, "kv_n_heads")
        head_dim = head_width(fields, "d_model", hidden, heads)
        if head_dim % 2:
            raise fields.error("d_model", "an even multiple of n_heads, for RoPE")
        experts, top_k = ffn.integer("moe_num_experts", 4), ffn.integer("moe_top_k", 1)
        if top_k > experts:
            raise ffn.error("moe_top_k", f"at most moe_num_experts ({experts})")
        # Transformers 5 writes a top-level base that may contradict the model's own: attn_config
        # is where DBRX keeps it.
        fallback = fields.section("rope_parameters").number("rope_theta", 10000.0)
        return cls(
            hidden_size=hidden,
            vocab_size=fields.integer("vocab_size", 32000),
            num_layers=fields.integer("n_layers", 24),
            max_position_embeddings=fields.integer("max_seq_len", 2048),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rope_theta=attn.number("rope_theta", fallback),
            clip_qkv=attn.optional_number("clip_qkv"),
            expert_width=ffn.integer("ffn_hidden_size", 3584),
            num_experts=experts,
            top_k=top_k,
            expert_weight_norm=_expert_weight_norm(raw, ffn),
            activation=ffn.section("ffn_act_fn").choice("name", "silu", tuple(ACTIVATIONS)),
            moe_loss_weight=ffn.number("moe_loss_weight", 0.01),
            dtype_name=fields.dtype_name(),
        )

    @property
    def family(self) -> str:
        """The name of the model family."""
        return "dbrx"

    @property
    def reprefill_length(self) -> int | None:
        """DBRX has no LongRoPE."""
        return None

    @property
    def heads(self) -> frozenset[str]:
        """Next-token logits."""
        return frozenset({"lm"})

    @property
    def classifier(self) -> Classifier | None:
        """No classification head."""
        return None

    @property
    def aux_loss_coef(self) -> float:
        """Weight of the load-balancing loss."""
        return self.moe_loss_weight

    def with_tensors(self, names: frozenset[str]) -> DbrxConfig:
        """The same model."""
        return self

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Every DBRX layer is."""
        return True

    def cache_shape(self, layer_idx: int) -> CacheShape:
        """Keys and values of every layer."""
        return CacheShape(kind="kv", num_kv_heads=self.num_kv_heads, head_dim=self.head_dim)

    def layer_bytes(self, layer_idx: int, itemsize: int) -> int:
        """Bytes of one layer without its experts."""
        return itemsize * sum(prod(s.shape) for s in _layer_tensors(self, layer_idx).values())

    def build_stage(self, first: int, last: int, dtype: torch.dtype) -> Stage:
        """Layers first..last-1, without weights."""
        attention = PagedAttention(
            num_heads=self.num_heads, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim
        )
        rope = RotaryEmbedding(self.head_dim, self.rope_theta, dtype)
        table = (self.vocab_size, self.hidden_size)
        head = {
            "norm": whole("transformer.norm_f.weight", (self.hidden_size,)),
            "lm_head": whole("lm_head.weight", table),
        }
        return Stage(
            layers=[DbrxLayer(self, i, attention, rope) for i in range(first, last)],
            embedding=whole("transformer.wte.weight", table) if first == 0 else None,
            head=head if last == self.num_layers else {},
            final_norm=lambda x, weights: layer_norm(x, weights["norm"], None, _NORM_EPS),
        )

    def expert_tensors(self, layer_idx: int, expert: int) -> dict[str, TensorSlice]:
        """Rows of the three stacked matrices; w2 is stored [F, D] and transposed when read."""
        width, hidden = self.expert_width, self.hidden_size
        prefix = f"transformer.blocks.{layer_idx}.ffn.experts.mlp."

        def rows(name: str) -> tuple[TensorSource, ...]:
            return (TensorSource(prefix + name, start=expert * width, stop=(expert + 1) * width),)

        return {
            "gate": TensorSlice(sources=rows("w1"), shape=(width, hidden)),
            "up": TensorSlice(sources=rows("v1"), shape=(width, hidden)),
            "down": TensorSlice(sources=rows("w2"), shape=(hidden, width), transpose=True),
        }

    def expert_forward(self, x: Tensor, weights: ExpertWeights) -> Tensor:
        """One expert over n rows, [n, D] → [n, D]."""
        return expert_rows(x, weights, ACTIVATIONS[self.activation])

    def ignored_tensors(self, names: Iterable[str]) -> set[str]:
        """Rotary buffers that old conversions saved."""
        return {name for name in names if name.endswith(".inv_freq")}


def _expert_weight_norm(raw: Mapping[str, Any], ffn: Fields) -> float | None:
    """Absent means 1; an explicit null switches the normalisation off."""
    key = "moe_normalize_expert_weights"
    if key not in (raw.get("ffn_config") or {}):
        return 1.0
    p = ffn.optional_number(key)
    if p is not None and p < 0:
        raise ffn.error(key, "null or a number of at least 0")
    return p


def _layer_tensors(config: DbrxConfig, layer_idx: int) -> dict[str, TensorSlice]:
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

    def __init__(
        self, config: DbrxConfig, layer_idx: int, attention: PagedAttention, rope: RotaryEmbedding
    ) -> None:
        self.layer_idx = layer_idx
        self._config = config
        self._attention = attention
        self._rope = rope
        self._weights: dict[str, Tensor] = {}

    def mix(self, x: Tensor, meta: BatchMeta, cache: LayerCache) -> tuple[Tensor, Tensor]:
        """norm_1, attention, residual, norm_2: the second norm reads the new residual."""
        assert isinstance(cache, KVCache)
        w, config = self._weights, self._config
        qkv = linear(layer_norm(x, w["norm_1"], None, _NORM_EPS), w["qkv"])
        if config.clip_qkv is not None:
            qkv = qkv.clamp(-config.clip_qkv, config.clip_qkv)
        heads = qkv.view(x.shape[0], -1, config.head_dim)
        q, k, v = torch.split_with_sizes(
            heads, [config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1
        )
        q, k = self._rope.rotate(q, meta), self._rope.rotate(k, meta)
        residual = x + linear(self._attention(q, k, v, meta, cache), w["out"])
        return residual, layer_norm(residual, w["norm_2"], None, _NORM_EPS)

    def gate(self, h: Tensor) -> Routing:
        """Softmax over all experts, top-k, then the p-norm."""
        logits = linear(h, self._weights["gate"])
        ids, weights = softmax_top_k(logits, self._config.top_k)
        if self._config.expert_weight_norm is not None:
            weights = divide_by_p_norm(weights, self._config.expert_weight_norm)
        return routing(logits, ids, weights)

    def mlp(self, h: Tensor) -> Tensor:
        """DBRX has no dense layers: never called."""
        raise AssertionError(f"layer {self.layer_idx} is a mixture of experts")

    def combine(self, residual: Tensor, outputs: Tensor) -> Tensor:
        """residual + expert outputs."""
        return residual + outputs

    def tensors(self) -> dict[str, TensorSlice]:
        """The layer's parameters and where they are read from."""
        return _layer_tensors(self._config, self.layer_idx)

    def load(self, weights: dict[str, Tensor]) -> None:
        """Take the parameters named by `tensors()`."""
        self._weights = weights
