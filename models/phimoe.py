"""PhiMoE (Phi-3.5-MoE, SlimMoE): LayerNorm with bias, LongRoPE, SparseMixer over two experts.

The reference is Microsoft's own code as kept by Transformers 4 for a single full forward.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from models.activation_names import ACTIVATION_NAMES
from models.checkpoint_map import expert_matrices, stacked, whole
from models.common_keys import notes, refuse_other_kinds
from models.config_fields import Fields, check_kv_heads, head_width, rope_kind
from models.heads import Heads
from models.interface import (
    CacheShape,
    Classifier,
    TensorSlice,
)
from models.long_rope import LongRope
from models.quantization_config import stored_quantization

if TYPE_CHECKING:
    import torch

    from models.layers.stage import Stage

_DEFAULT_ROPE_THETA = 1_000_000.0

# Of training; factors of LongRoPE that PhiMoE's own multipliers replace; where there is no
# LongRoPE, its original context.
_WITHOUT_EFFECT = frozenset(
    {
        "hidden_dropout", "expert_dropout", "resid_pdrop", "embd_pdrop", "input_jitter_noise",
        "rope_scaling.factor", "rope_scaling.attention_factor",
        "rope_parameters.factor", "rope_parameters.attention_factor",
        "original_max_position_embeddings",
    }
)  # fmt: skip


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
    ending: Heads
    router_aux_loss_coef: float
    dtype_name: str
    quantization: str
    notes: tuple[str, ...] = ()

    @classmethod
    def parse(cls, raw: Mapping[str, Any], heads: frozenset[str]) -> PhimoeConfig:
        """Read config.json's object; ConfigError names what cannot be served."""
        fields = Fields(raw)
        refuse_other_kinds(fields)
        hidden = fields.integer("hidden_size", 4096)
        heads_key = "num_attention_heads"
        num_heads = fields.integer(heads_key, 32)
        kv_heads = fields.integer("num_key_value_heads", 8)
        if fields.is_null("num_key_value_heads"):
            kv_heads = num_heads
        check_kv_heads(fields, "num_key_value_heads", kv_heads, heads_key, num_heads)
        if fields.has("head_dim"):
            head_dim = fields.integer("head_dim", 128)
        else:
            head_dim = head_width(fields, "hidden_size", hidden, heads_key, num_heads)
        if head_dim % 2:
            raise fields.error("head_dim", "even, for RoPE")
        fields.only("num_experts_per_tok", 2, "SparseMixer always picks two experts")
        max_positions = fields.integer("max_position_embeddings", 131072)
        theta, long_rope = _parse_rope(fields, head_dim, max_positions)
        experts_key = fields.spelling("num_local_experts", "num_experts")
        return cls(
            hidden_size=hidden,
            vocab_size=fields.integer("vocab_size", 32064),
            num_layers=fields.integer("num_hidden_layers", 32),
            max_position_embeddings=max_positions,
            num_heads=num_heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            attention_bias=fields.flag("attention_bias", False),
            sliding_window=fields.optional_integer("sliding_window"),
            rope_theta=theta,
            long_rope=long_rope,
            expert_width=fields.integer("intermediate_size", 6400),
            # The second of SparseMixer's two picks has no meaning among one expert.
            num_experts=fields.integer(experts_key, 16, minimum=2),
            activation=fields.choice("hidden_act", "silu", ACTIVATION_NAMES),
            router_jitter_noise=fields.number("router_jitter_noise", 0.01),
            norm_eps=fields.number("rms_norm_eps", 1e-5),
            ending=Heads.parse(
                fields,
                heads,
                pad_token_id=None,
                lm_head_bias=fields.flag("lm_head_bias", False),
            ),
            router_aux_loss_coef=fields.number("router_aux_loss_coef", 0.001),
            dtype_name=fields.dtype_name(),
            quantization=stored_quantization(fields),
            # Last: by now every key that means something has been read.
            notes=notes(fields, _WITHOUT_EFFECT),
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
        """Next-token logits, classification scores, or both."""
        return self.ending.names

    @property
    def classifier(self) -> Classifier | None:
        """The classification head, if there is one."""
        return self.ending.classifier

    @property
    def aux_loss_coef(self) -> float:
        """Weight of the load-balancing loss."""
        return self.router_aux_loss_coef

    def with_tensors(self, names: frozenset[str]) -> PhimoeConfig:
        """The same model with every head that a checkpoint of these tensors holds."""
        added = self.ending.notes(names)
        return replace(self, ending=self.ending.with_tensors(names), notes=(*self.notes, *added))

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Every PhiMoE layer is."""
        return True

    def cache_shape(self, layer_idx: int) -> CacheShape:
        """Keys and values of every layer."""
        return CacheShape(kind="kv", num_kv_heads=self.num_kv_heads, head_dim=self.head_dim)

    @property
    def quantizable(self) -> frozenset[str]:
        """The attention projections."""
        return frozenset({"qkv", "o"})

    def layer_tensors(self, layer_idx: int) -> dict[str, TensorSlice]:
        """One layer's parameters by its own names, without routed experts."""
        hidden = self.hidden_size
        q_rows, kv_rows = (n * self.head_dim for n in (self.num_heads, self.num_kv_heads))
        prefix = f"model.layers.{layer_idx}."
        tensors = {
            "gate": whole(
                f"{prefix}block_sparse_moe.gate.weight",
                (self.num_experts, hidden),
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
        if self.attention_bias:
            tensors["qkv_bias"] = stacked(
                *(whole(f"{attn}{name}_proj.bias", (count,)) for name, count in rows.items())
            )
            tensors["o_bias"] = whole(f"{attn}o_proj.bias", (hidden,))
        return tensors

    def embedding_tensor(self) -> TensorSlice:
        """The token table [V, D]."""
        return whole("model.embed_tokens.weight", (self.vocab_size, self.hidden_size))

    def head_tensors(self) -> dict[str, TensorSlice]:
        """The final norm and the heads."""
        return {
            "norm": whole("model.norm.weight", (self.hidden_size,)),
            "norm_bias": whole("model.norm.bias", (self.hidden_size,)),
            **self.ending.tensors((self.vocab_size, self.hidden_size)),
        }

    def build_stage(self, first: int, last: int, dtype: torch.dtype) -> Stage:
        """Layers first..last-1, without weights."""
        from models.phimoe_layer import build_stage

        return build_stage(self, first, last, dtype)

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

    def ignored_tensors(self, names: Iterable[str]) -> set[str]:
        """Rotary buffers that old conversions saved."""
        return {name for name in names if name.endswith(".inv_freq")}


def _parse_rope(fields: Fields, head_dim: int, max_positions: int) -> tuple[float, LongRope | None]:
    """RoPE base and LongRoPE from `rope_scaling`, or else Transformers 5's `rope_parameters`."""
    rope = fields.section("rope_scaling")
    if rope.is_empty:
        rope = fields.section("rope_parameters")
    theta = rope.positive("rope_theta", fields.positive("rope_theta", _DEFAULT_ROPE_THETA))
    # `su` is LongRoPE's name in the first Phi-3 models.
    if rope_kind(fields, rope, ("default", "longrope", "su")) == "default":
        return theta, None
    for mscale in ("short_mscale", "long_mscale"):
        if not rope.has(mscale):
            raise rope.error(mscale, "a number: PhiMoE's LongRoPE has no default for it")
    original, half = "original_max_position_embeddings", "half of head_dim"
    return theta, LongRope(
        short_factor=rope.positives("short_factor", head_dim // 2, half),
        long_factor=rope.positives("long_factor", head_dim // 2, half),
        short_mscale=rope.number("short_mscale", 1.0),
        long_mscale=rope.number("long_mscale", 1.0),
        # Its own place wins over the top level, as in every version of the reference.
        original_max_position_embeddings=rope.integer(
            original, fields.integer(original, max_positions)
        ),
    )
