"""DBRX (Databricks 2024): fused, clamped QKV with RoPE, and stacked experts behind a softmax gate.

The reference is Databricks' own code as kept by Transformers 4; Transformers 5 reads the RoPE base
from another place, see `rope_theta` below.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from models.activation_names import ACTIVATION_NAMES
from models.checkpoint_map import whole
from models.common_keys import notes, refuse_other_kinds
from models.config_fields import ConfigError, Fields, check_kv_heads, head_width, rope_kind
from models.interface import (
    CacheShape,
    Classifier,
    TensorSlice,
    TensorSource,
)
from models.quantization_config import stored_quantization

if TYPE_CHECKING:
    import torch

    from models.layers.stage import Stage

# Of training; widths that Transformers keeps twice; a loss weight that it never reads.
_WITHOUT_EFFECT = frozenset(
    {
        "resid_pdrop", "emb_pdrop", "attn_pdrop", "ffn_config.moe_jitter_eps",
        "ffn_config.hidden_size", "num_key_value_heads", "router_aux_loss_coef",
    }
)  # fmt: skip


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
    quantization: str
    notes: tuple[str, ...] = ()

    @classmethod
    def parse(cls, raw: Mapping[str, Any], heads: frozenset[str]) -> DbrxConfig:
        """Read config.json's object; ConfigError names what cannot be served."""
        fields = Fields(raw)
        attn, ffn = fields.section("attn_config"), fields.section("ffn_config")
        refuse_other_kinds(fields)
        fields.only("tie_word_embeddings", False, "DBRX has no tied embeddings")
        hidden_key = fields.spelling("d_model", "hidden_size")
        hidden = fields.integer(hidden_key, 2048)
        heads_key = fields.spelling("n_heads", "num_attention_heads")
        num_heads = fields.integer(heads_key, 16)
        kv_heads = attn.integer("kv_n_heads", 1)
        check_kv_heads(attn, "kv_n_heads", kv_heads, heads_key, num_heads)
        head_dim = head_width(fields, hidden_key, hidden, heads_key, num_heads)
        if head_dim % 2:
            raise fields.error(hidden_key, f"an even multiple of {heads_key}, for RoPE")
        fields.only("head_dim", head_dim, "DBRX's heads share the hidden size")
        experts, top_k = ffn.integer("moe_num_experts", 4), ffn.integer("moe_top_k", 1)
        if top_k > experts:
            raise ffn.error("moe_top_k", f"at most moe_num_experts ({experts})")
        ffn.only("uniform_expert_assignment", False, "the gate decides")
        return cls(
            hidden_size=hidden,
            vocab_size=fields.integer("vocab_size", 32000),
            num_layers=fields.integer(fields.spelling("n_layers", "num_hidden_layers"), 24),
            max_position_embeddings=fields.integer(
                fields.spelling("max_seq_len", "max_position_embeddings"), 2048
            ),
            num_heads=num_heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rope_theta=_rope_theta(fields, attn),
            clip_qkv=attn.optional_number("clip_qkv"),
            expert_width=ffn.integer("ffn_hidden_size", 3584),
            num_experts=experts,
            top_k=top_k,
            expert_weight_norm=_expert_weight_norm(ffn),
            activation=ffn.section("ffn_act_fn").choice("name", "silu", ACTIVATION_NAMES),
            moe_loss_weight=ffn.number("moe_loss_weight", 0.01),
            dtype_name=fields.dtype_name(),
            quantization=stored_quantization(fields),
            # Last: by now every key that means something has been read.
            notes=notes(fields, _WITHOUT_EFFECT),
        )

    @property
    def family(self) -> str:
        """The name of the model family."""
        return "dbrx"

    @property
    def sliding_window(self) -> int | None:
        """DBRX sees every token."""
        return None

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
        """The same model. Raises ConfigError where there is a classification head."""
        if "score.weight" in names:
            raise ConfigError("tensor score.weight: DBRX has no classification head")
        return self

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Every DBRX layer is."""
        return True

    def cache_shape(self, layer_idx: int) -> CacheShape:
        """Keys and values of every layer."""
        return CacheShape(kind="kv", num_kv_heads=self.num_kv_heads, head_dim=self.head_dim)

    @property
    def quantizable(self) -> frozenset[str]:
        """The attention projections."""
        return frozenset({"qkv", "out"})

    def layer_tensors(self, layer_idx: int) -> dict[str, TensorSlice]:
        """One layer's parameters by its own names, without routed experts."""
        hidden = self.hidden_size
        qkv_rows = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        prefix = f"transformer.blocks.{layer_idx}."
        attn = prefix + "norm_attn_norm."
        return {
            "norm_1": whole(attn + "norm_1.weight", (hidden,)),
            "qkv": whole(attn + "attn.Wqkv.weight", (qkv_rows, hidden)),
            "out": whole(attn + "attn.out_proj.weight", (hidden, hidden)),
            "norm_2": whole(attn + "norm_2.weight", (hidden,)),
            "gate": whole(prefix + "ffn.router.layer.weight", (self.num_experts, hidden)),
        }

    def embedding_tensor(self) -> TensorSlice:
        """The token table [V, D]."""
        return whole("transformer.wte.weight", (self.vocab_size, self.hidden_size))

    def head_tensors(self) -> dict[str, TensorSlice]:
        """The final norm and the LM head."""
        return {
            "norm": whole("transformer.norm_f.weight", (self.hidden_size,)),
            "lm_head": whole("lm_head.weight", (self.vocab_size, self.hidden_size)),
        }

    def build_stage(self, first: int, last: int, dtype: torch.dtype) -> Stage:
        """Layers first..last-1, without weights."""
        from models.dbrx_layer import build_stage

        return build_stage(self, first, last, dtype)

    def expert_tensors(self, layer_idx: int, expert: int) -> dict[str, TensorSlice]:
        """Rows of the three stacked matrices, or mlx's three matrices of each expert.

        Stacked, w2 is [F, D] and transposed when read; mlx has transposed it already.
        """
        width, hidden = self.expert_width, self.hidden_size
        experts = f"transformer.blocks.{layer_idx}.ffn.experts."
        start, stop = expert * width, (expert + 1) * width

        def matrix(name: str, shape: tuple[int, int], turned: bool = False) -> TensorSlice:
            stacked = TensorSource(f"{experts}mlp.{name}", start, stop, transpose=turned)
            split = TensorSource(f"{experts}{expert}.{name}.weight")
            return TensorSlice(sources=(stacked, split), shape=shape)

        return {
            "gate": matrix("w1", (width, hidden)),
            "up": matrix("v1", (width, hidden)),
            "down": matrix("w2", (hidden, width), turned=True),
        }

    def ignored_tensors(self, names: Iterable[str]) -> set[str]:
        """Rotary buffers that old conversions saved."""
        return {name for name in names if name.endswith(".inv_freq")}


def _rope_theta(fields: Fields, attn: Fields) -> float:
    """attn_config is where DBRX keeps its base; Transformers 5 writes another one at the top level
    that may contradict it."""
    theta = fields.positive("rope_theta", 10000.0)
    for key in ("rope_scaling", "rope_parameters"):
        rope = fields.section(key)
        rope_kind(fields, rope, ("default",))
        theta = rope.positive("rope_theta", theta)
    return attn.positive("rope_theta", theta)


def _expert_weight_norm(ffn: Fields) -> float | None:
    """Absent means 1; an explicit null switches the normalisation off."""
    key = "moe_normalize_expert_weights"
    return None if ffn.is_null(key) else ffn.number(key, 1.0)
