"""PhiMoE (Phi-3.5-MoE, SlimMoE): LayerNorm with bias, LongRoPE, SparseMixer over two experts.

The reference is Microsoft's own code as kept by Transformers 4 for a single full forward.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from models.checkpoint_map import expert_matrices, head_table, whole
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
)
from models.layers.activation import ACTIVATIONS
from models.layers.attention import PagedAttention
from models.layers.moe import expert_rows, routing, sparse_mixer
from models.layers.norm import layer_norm
from models.layers.rope import LongRope, RotaryEmbedding
from models.layers.rowwise import linear
from models.layers.stage import Stage

_DEFAULT_ROPE_THETA = 1_000_000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PhimoeConfig:
    """A validated PhiMoE config.json; implements `models.interface.ModelConfig`."""

    hidden_size: int
    vocab_size: int
    num_layers: int
    max_position_embeddings: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    """Explicit in Phi-tiny-MoE, where it is not hidden_size / num_heads."""
    attention_bias: bool
    sliding_window: int | None
    """Keys a query sees, itself included."""
    rope_theta: float
    long_rope: LongRope | None
    expert_width: int
    num_experts: int
    activation: str
    router_jitter_noise: float
    norm_eps: float
    lm_head_bias: bool
    tied: bool
    router_aux_loss_coef: float
    dtype_name: str

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> PhimoeConfig:
        """Read config.json's object; ConfigError names what cannot be served."""
        fields = Fields(raw)
        hidden = fields.integer("hidden_size", 4096)
        heads = fields.integer("num_attention_heads", 32)
        kv_heads = fields.integer("num_key_value_heads", 8)
        if "num_key_value_heads" in raw and raw["num_key_value_heads"] is None:
            kv_heads = heads
        attention_heads(fields, heads, kv_heads, "num_key_value_heads")
        if fields.has("head_dim"):
            head_dim = fields.integer("head_dim", 128)
        else:
            head_dim = head_width(fields, "hidden_size", hidden, heads)
        if head_dim % 2:
            raise fields.error("head_dim", "even, for RoPE")
        if fields.integer("num_experts_per_tok", 2) != 2:
            raise fields.error("num_experts_per_tok", "2: SparseMixer always picks two experts")
        window = fields.integer("sliding_window", 1) if fields.has("sliding_window") else None
        max_positions = fields.integer("max_position_embeddings", 131072)
        theta, long_rope = _parse_rope(fields, head_dim, max_positions)
        return cls(
            hidden_size=hidden,
            vocab_size=fields.integer("vocab_size", 32064),
            num_layers=fields.integer("num_hidden_layers", 32),
            max_position_embeddings=max_positions,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            attention_bias=fields.flag("attention_bias", False),
            sliding_window=window,
            rope_theta=theta,
            long_rope=long_rope,
            expert_width=fields.integer("intermediate_size", 6400),
            num_experts=fields.integer("num_local_experts", 16, minimum=2),
            activation=fields.choice("hidden_act", "silu", tuple(ACTIVATIONS)),
            router_jitter_noise=fields.number("router_jitter_noise", 0.01),
            norm_eps=fields.number("rms_norm_eps", 1e-5),
            lm_head_bias=fields.flag("lm_head_bias", False),
            tied=fields.flag("tie_word_embeddings", False),
            router_aux_loss_coef=fields.number("router_aux_loss_coef", 0.001),
            dtype_name=fields.dtype_name(),
        )

    @property
    def family(self) -> str:
        """The name of the model family."""
        return "phimoe"

    @property
    def top_k(self) -> int:
        """SparseMixer picks two experts, whatever num_experts_per_tok says."""
        return 2

    @property
    def reprefill_length(self) -> int | None:
        """Beyond this many tokens the long factors apply to the whole sequence."""
        if self.long_rope is None:
            return None
        return self.long_rope.original_max_position_embeddings

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
        return self.router_aux_loss_coef

    def with_tensors(self, names: frozenset[str]) -> PhimoeConfig:
        """The same model."""
        return self

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Every PhiMoE layer is."""
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
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            window=self.sliding_window,
        )
        rope = RotaryEmbedding(self.head_dim, self.rope_theta, dtype, self.long_rope)
        eps, table = self.norm_eps, (self.vocab_size, self.hidden_size)
        return Stage(
            layers=[PhimoeLayer(self, i, attention, rope) for i in range(first, last)],
            embedding=whole("model.embed_tokens.weight", table) if first == 0 else None,
            head=self._head_tensors() if last == self.num_layers else {},
            final_norm=lambda x, w: layer_norm(x, w["norm"], w["norm_bias"], eps),
        )

    def _head_tensors(self) -> dict[str, TensorSlice]:
        tensors = {
            "norm": whole("model.norm.weight", (self.hidden_size,)),
            "norm_bias": whole("model.norm.bias", (self.hidden_size,)),
            "lm_head": head_table((self.vocab_size, self.hidden_size), self.tied),
        }
        if self.lm_head_bias:
            tensors["lm_head_bias"] = whole("lm_head.bias", (self.vocab_size,))
        return tensors

    def expert_tensors(self, layer_idx: int, expert: int) -> dict[str, TensorSlice]:
        """`gate`, `up` and `down` of one routed expert."""
        layer = f"model.layers.{layer_idx}."
        hub = f"{layer}block_sparse_moe.experts.{expert}."
        return expert_matrices(
            expert,
            (self.expert_width, self.hidden_size),
            hub=(f"{hub}w1.weight", f"{hub}w3.weight", f"{hub}w2.weight"),
            fused_prefix=f"{layer}mlp.experts.",
        )

    def expert_forward(self, x: Tensor, weights: ExpertWeights) -> Tensor:
        """One expert over n rows, [n, D] → [n, D]."""
        return expert_rows(x, weights, ACTIVATIONS[self.activation])

    def ignored_tensors(self, names: Iterable[str]) -> set[str]:
        """Rotary buffers that old conversions saved."""
        return {name for name in names if name.endswith(".inv_freq")}


def _parse_rope(fields: Fields, head_dim: int, max_positions: int) -> tuple[float, LongRope | None]:
    """RoPE base and LongRoPE from `rope_scaling`, or Transformers 5's `rope_parameters`."""
    key = "rope_parameters" if fields.has("rope_parameters") else "rope_scaling"
    rope = fields.section(key)
    theta = rope.number("rope_theta", fields.number("rope_theta", _DEFAULT_ROPE_THETA))
    type_key = "rope_type" if rope.has("rope_type") else "type"
    kind = rope.choice(type_key, "default", ("default", "longrope", "su"))
    if kind == "default":
        return theta, None
    for mscale in ("short_mscale", "long_mscale"):
        if not rope.has(mscale):
            raise rope.error(mscale, "a number: PhiMoE's LongRoPE has no default for it")
    original = "original_max_position_embeddings"
    return theta, LongRope(
        short_factor=rope.numbers("short_factor", head_dim // 2),
        long_factor=rope.numbers("long_factor", head_dim // 2),
        short_mscale=rope.number("short_mscale", 1.0),
        long_mscale=rope.number("long_mscale", 1.0),
        original_max_position_embeddings=rope.integer(
            original, fields.integer(original, max_positions)
        ),
    )


def _layer_tensors(config: PhimoeConfig, layer_idx: int) -> dict[str, TensorSlice]:
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
    shapes = {"q": (q_rows, hidden), "k": (kv_rows, hidden), "v": (kv_rows, hidden)}
    for name, shape in {**shapes, "o": (hidden, q_rows)}.items():
        tensors[name] = whole(f"{prefix}self_attn.{name}_proj.weight", shape)
        if config.attention_bias:
            tensors[f"{name}_bias"] = whole(f"{prefix}self_attn.{name}_proj.bias", shape[:1])
    return tensors


class PhimoeLayer:
    """One PhiMoE layer without its experts."""

    is_moe = True

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
        qkv = linear(self._norm("input_layernorm", x), w["qkv"], w.get("qkv_bias"))
        heads = qkv.view(x.shape[0], -1, config.head_dim)
        q, k, v = torch.split_with_sizes(
            heads, [config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1
        )
        q, k = self._rope.rotate(q, meta), self._rope.rotate(k, meta)
        attended = self._attention(q, k, v, meta, cache)
        residual = x + linear(attended, w["o"], w.get("o_bias"))
        return residual, self._norm("post_attention_layernorm", residual)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self._weights[name], self._weights[f"{name}_bias"]
        return layer_norm(x, weight, bias, self._config.norm_eps)

    def gate(self, h: Tensor) -> Routing:
        """SparseMixer, in the logits' dtype."""
        logits = linear(h, self._weights["gate"])
        return routing(logits, *sparse_mixer(logits, self._config.router_jitter_noise))

    def mlp(self, h: Tensor) -> Tensor:
        """PhiMoE has no dense layers: never called."""
        raise AssertionError(f"layer {self.layer_idx} is a mixture of experts")

    def combine(self, residual: Tensor, outputs: Tensor) -> Tensor:
        """residual + expert outputs."""
        return residual + outputs

    def tensors(self) -> dict[str, TensorSlice]:
        """The layer's parameters and where they are read from."""
        return _layer_tensors(self._config, self.layer_idx)

    def load(self, weights: dict[str, Tensor]) -> None:
        """Take the parameters named by `tensors()`; q, k and v become one matrix."""
        parts = dict(weights)
        for suffix in ("", "_bias"):
            if f"q{suffix}" in parts:
                parts[f"qkv{suffix}"] = torch.cat([parts.pop(f"{n}{suffix}") for n in "qkv"])
        self._weights = parts
