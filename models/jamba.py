"""Jamba (AI21 2024): Mamba and attention layers in turn, dense and expert FFNs in turn.

The reference is Transformers' torch path, single full forward.
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
    StateCache,
    TensorSlice,
)
from models.jamba_mixer import MambaMixer, mixer_tensors
from models.layers.activation import silu
from models.layers.attention import PagedAttention
from models.layers.mamba import SelectiveState
from models.layers.moe import expert_rows, feed_forward, routing, softmax_top_k
from models.layers.norm import rms_norm
from models.layers.rowwise import linear
from models.layers.stage import Stage

_NORMS = ("input_layernorm", "pre_ff_layernorm")
_MIXER = "mamba."


@dataclass(frozen=True, slots=True, kw_only=True)
class JambaConfig:
    """A validated Jamba config.json; implements `models.interface.ModelConfig`."""

    hidden_size: int
    vocab_size: int
    num_layers: int
    max_position_embeddings: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    attn_layer_period: int
    attn_layer_offset: int
    expert_layer_period: int
    expert_layer_offset: int
    expert_width: int
    """Inner width of experts and of dense FFNs alike (not of the Mamba mixer)."""
    num_experts: int
    top_k: int
    norm_eps: float
    mamba_width: int
    mamba_state: int
    mamba_kernel: int
    mamba_rank: int
    mamba_conv_bias: bool
    mamba_proj_bias: bool
    tied: bool
    router_aux_loss_coef: float
    dtype_name: str

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> JambaConfig:
        """Read config.json's object; ConfigError names what cannot be served."""
        fields = Fields(raw)
        hidden = fields.integer("hidden_size", 4096)
        heads = fields.integer("num_attention_heads", 32)
        kv_heads = fields.integer("num_key_value_heads", 8)
        if "num_key_value_heads" in raw and raw["num_key_value_heads"] is None:
            kv_heads = heads
        attention_heads(fields, heads, kv_heads, "num_key_value_heads")
        head_dim = head_width(fields, "hidden_size", hidden, heads)
        # Other activations mean different things in different versions of the reference.
        fields.choice("hidden_act", "silu", ("silu", "swish"))
        experts_key = "num_experts" if fields.has("num_experts") else "num_local_experts"
        experts = fields.integer(experts_key, 16)
        top_k = fields.integer("num_experts_per_tok", 2)
        if experts > 1 and top_k > experts:
            raise fields.error("num_experts_per_tok", f"at most {experts_key} ({experts})")
        attn_period, attn_offset = _schedule(fields, "attn", 8, 4)
        expert_period, expert_offset = _schedule(fields, "expert", 2, 1)
        return cls(
            hidden_size=hidden,
            vocab_size=fields.integer("vocab_size", 65536),
            num_layers=fields.integer("num_hidden_layers", 32),
            max_position_embeddings=fields.integer("max_position_embeddings", 262144),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            attn_layer_period=attn_period,
            attn_layer_offset=attn_offset,
            expert_layer_period=expert_period,
            expert_layer_offset=expert_offset,
            expert_width=fields.integer("intermediate_size", 14336),
            num_experts=experts,
            top_k=min(top_k, experts),
            norm_eps=fields.number("rms_norm_eps", 1e-6),
            mamba_width=fields.integer("mamba_expand", 2) * hidden,
            mamba_state=fields.integer("mamba_d_state", 16),
            mamba_kernel=fields.integer("mamba_d_conv", 4),
            mamba_rank=_rank(raw, fields, hidden),
            mamba_conv_bias=fields.flag("mamba_conv_bias", True),
            mamba_proj_bias=fields.flag("mamba_proj_bias", False),
            tied=fields.flag("tie_word_embeddings", False),
            router_aux_loss_coef=fields.number("router_aux_loss_coef", 0.001),
            dtype_name=fields.dtype_name(),
        )

    @property
    def family(self) -> str:
        """The name of the model family."""
        return "jamba"

    @property
    def reprefill_length(self) -> int | None:
        """Jamba has no positional encoding."""
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
        return self.router_aux_loss_coef

    def with_tensors(self, names: frozenset[str]) -> JambaConfig:
        """The same model."""
        return self

    def is_attention_layer(self, layer_idx: int) -> bool:
        """Attention layers; all others are Mamba."""
        return layer_idx % self.attn_layer_period == self.attn_layer_offset

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Layers with a gate; all others have a dense FFN."""
        scheduled = layer_idx % self.expert_layer_period == self.expert_layer_offset
        return scheduled and self.num_experts > 1

    def cache_shape(self, layer_idx: int) -> CacheShape:
        """Keys and values of attention layers, conv and SSM state of Mamba layers."""
        if self.is_attention_layer(layer_idx):
            return CacheShape(kind="kv", num_kv_heads=self.num_kv_heads, head_dim=self.head_dim)
        return CacheShape(
            kind="state",
            conv_shape=(self.mamba_width, self.mamba_kernel - 1),
            ssm_shape=(self.mamba_width, self.mamba_state),
        )

    def layer_bytes(self, layer_idx: int, itemsize: int) -> int:
        """Bytes of one layer without its routed experts."""
        return itemsize * sum(prod(s.shape) for s in _layer_tensors(self, layer_idx).values())

    def build_stage(self, first: int, last: int, dtype: torch.dtype) -> Stage:
        """Layers first..last-1, without weights."""
        attention = PagedAttention(
            num_heads=self.num_heads, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim
        )
        state = SelectiveState(self.mamba_kernel)
        eps = self.norm_eps
        table = (self.vocab_size, self.hidden_size)
        head = {
            "norm": whole("model.final_layernorm.weight", (self.hidden_size,)),
            "lm_head": head_table(table, self.tied),
        }
        return Stage(
            layers=[JambaLayer(self, i, attention, state) for i in range(first, last)],
            embedding=whole("model.embed_tokens.weight", table) if first == 0 else None,
            head=head if last == self.num_layers else {},
            final_norm=lambda x, weights: rms_norm(x, weights["norm"], eps),
        )

    def expert_tensors(self, layer_idx: int, expert: int) -> dict[str, TensorSlice]:
        """`gate`, `up` and `down` of one routed expert."""
        experts = f"model.layers.{layer_idx}.feed_forward.experts."
        gate, up, down = (f"{experts}{expert}.{n}_proj.weight" for n in ("gate", "up", "down"))
        shape = (self.expert_width, self.hidden_size)
        return expert_matrices(expert, shape, hub=(gate, up, down), fused_prefix=experts)

    def expert_forward(self, x: Tensor, weights: ExpertWeights) -> Tensor:
        """One expert over n rows, [n, D] → [n, D]."""
        return expert_rows(x, weights, silu)

    def ignored_tensors(self, names: Iterable[str]) -> set[str]:
        """Jamba files hold nothing redundant."""
        return set()


def _schedule(fields: Fields, kind: str, period: int, offset: int) -> tuple[int, int]:
    """Period and offset of one kind of layer; the offset must be below the period."""
    period = fields.integer(f"{kind}_layer_period", period)
    offset = fields.integer(f"{kind}_layer_offset", offset, minimum=0)
    if offset >= period:
        raise fields.error(f"{kind}_layer_offset", f"below {kind}_layer_period ({period})")
    return period, offset


def _rank(raw: Mapping[str, Any], fields: Fields, hidden: int) -> int:
    """mamba_dt_rank, where "auto" is hidden_size / 16, rounded up."""
    automatic = -(-hidden // 16)
    if raw.get("mamba_dt_rank") == "auto":
        return automatic
    return fields.integer("mamba_dt_rank", automatic)


def _layer_tensors(config: JambaConfig, layer_idx: int) -> dict[str, TensorSlice]:
    hidden, width = config.hidden_size, config.expert_width
    prefix = f"model.layers.{layer_idx}."
    tensors = {n: whole(f"{prefix}{n}.weight", (hidden,)) for n in _NORMS}
    if config.is_attention_layer(layer_idx):
        kv_rows = config.num_kv_heads * config.head_dim
        rows = {"q": hidden, "k": kv_rows, "v": kv_rows, "o": hidden}
        for name, count in rows.items():
            tensors[name] = whole(f"{prefix}self_attn.{name}_proj.weight", (count, hidden))
    else:
        mixer = mixer_tensors(
            f"{prefix}mamba.",
            hidden=hidden,
            inner=config.mamba_width,
            state=config.mamba_state,
            kernel=config.mamba_kernel,
            rank=config.mamba_rank,
            conv_bias=config.mamba_conv_bias,
            proj_bias=config.mamba_proj_bias,
        )
        tensors.update({f"{_MIXER}{name}": part for name, part in mixer.items()})
    ffn = f"{prefix}feed_forward."
    if config.is_moe_layer(layer_idx):
        tensors["gate"] = whole(f"{ffn}router.weight", (config.num_experts, hidden))
    else:
        tensors["gate_proj"] = whole(f"{ffn}gate_proj.weight", (width, hidden))
        tensors["up_proj"] = whole(f"{ffn}up_proj.weight", (width, hidden))
        tensors["down_proj"] = whole(f"{ffn}down_proj.weight", (hidden, width))
    return tensors


class JambaLayer:
    """One Jamba layer without its routed experts."""

    def __init__(
        self, config: JambaConfig, layer_idx: int, attention: PagedAttention, state: SelectiveState
    ) -> None:
        self.layer_idx = layer_idx
        self.is_moe = config.is_moe_layer(layer_idx)
        self._config = config
        self._attention = attention
        self._state = state
        self._weights: dict[str, Tensor] = {}
        self._mixer: MambaMixer | None = None
        self._dense: ExpertWeights | None = None

    def mix(self, x: Tensor, meta: BatchMeta, cache: LayerCache) -> tuple[Tensor, Tensor]:
        """Norm, Mamba or attention, residual, norm."""
        w, eps = self._weights, self._config.norm_eps
        h = rms_norm(x, w["input_layernorm"], eps)
        if isinstance(cache, StateCache):
            assert self._mixer is not None, f"layer {self.layer_idx} is an attention layer"
            residual = x + self._mixer(h, meta, cache)
        else:
            residual = x + self._attend(h, meta, cache)
        return residual, rms_norm(residual, w["pre_ff_layernorm"], eps)

    def _attend(self, h: Tensor, meta: BatchMeta, cache: KVCache) -> Tensor:
        """Causal attention without any positional encoding."""
        config = self._config
        heads = linear(h, self._weights["qkv"]).view(h.shape[0], -1, config.head_dim)
        q, k, v = torch.split_with_sizes(
            heads, [config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1
        )
        return linear(self._attention(q, k, v, meta, cache), self._weights["o"])

    def gate(self, h: Tensor) -> Routing:
        """float32 softmax over all experts; the top-k weights are not renormalised."""
        logits = linear(h, self._weights["gate"])
        return routing(logits, *softmax_top_k(logits, self._config.top_k))

    def mlp(self, h: Tensor) -> Tensor:
        """The FFN of a dense layer."""
        assert self._dense is not None, f"layer {self.layer_idx} is a mixture of experts"
        return feed_forward(h, self._dense, silu)

    def combine(self, residual: Tensor, outputs: Tensor) -> Tensor:
        """residual + FFN output."""
        return residual + outputs

    def tensors(self) -> dict[str, TensorSlice]:
        """The layer's parameters and where they are read from."""
        return _layer_tensors(self._config, self.layer_idx)

    def load(self, weights: dict[str, Tensor]) -> None:
        """Take the parameters named by `tensors()`; q, k and v become one matrix."""
        parts = dict(weights)
        if "q" in parts:
            parts["qkv"] = torch.cat([parts.pop(name) for name in "qkv"])
        else:
            names = [name for name in parts if name.startswith(_MIXER)]
            mixer = {name.removeprefix(_MIXER): parts.pop(name) for name in names}
            self._mixer = MambaMixer(mixer, self._state, self._config.norm_eps)
        if not self.is_moe:
            dense = (parts.pop(f"{name}_proj") for name in ("gate", "up", "down"))
            self._dense = ExpertWeights(*dense)
        self._weights = parts
