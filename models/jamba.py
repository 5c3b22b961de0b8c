"""Jamba (AI21 2024): Mamba and attention layers in turn, dense and expert FFNs in turn.

The reference is Transformers' torch path, single full forward.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from models.checkpoint_map import expert_matrices, whole
from models.common_keys import notes, refuse_other_kinds
from models.config_fields import Fields, check_kv_heads, head_width
from models.heads import Heads
from models.interface import (
    CacheShape,
    Classifier,
    TensorSlice,
)
from models.jamba_tensors import layer_tensors
from models.quantization_config import stored_quantization

if TYPE_CHECKING:
    import torch

    from models.layers.stage import Stage

# Of AI21's first code, and Transformers' choices among equal implementations.
_WITHOUT_EFFECT = frozenset(
    {
        "calc_logits_for_entire_prompt", "num_logits_to_keep", "n_ctx", "use_mambapy",
        "use_associative_scan",
    }
)  # fmt: skip


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
    use_mamba_kernels: bool
    """Whether the checkpoint asks for the CUDA kernels of `mamba_ssm`."""
    ending: Heads
    router_aux_loss_coef: float
    dtype_name: str
    quantization: str
    notes: tuple[str, ...] = ()

    @classmethod
    def parse(cls, raw: Mapping[str, Any], heads: frozenset[str]) -> JambaConfig:
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
        # Other activations mean different things in different versions of the reference; so does a
        # window, which only some of its attention code obeys.
        fields.choice("hidden_act", "silu", ("silu", "swish"))
        fields.only("sliding_window", None, "Jamba attends to the whole context")
        fields.only("mamba_inner_layernorms", True, "Jamba's mixers normalise dt, B and C")
        experts_key = fields.spelling("num_experts", "num_local_experts")
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
            num_heads=num_heads,
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
            mamba_rank=_rank(fields, hidden),
            mamba_conv_bias=fields.flag("mamba_conv_bias", True),
            mamba_proj_bias=fields.flag("mamba_proj_bias", False),
            use_mamba_kernels=fields.flag("use_mamba_kernels", True),
            ending=Heads.parse(fields, heads, pad_token_id=0),
            router_aux_loss_coef=fields.number("router_aux_loss_coef", 0.001),
            dtype_name=fields.dtype_name(),
            quantization=stored_quantization(fields),
            # Last: by now every key that means something has been read.
            notes=notes(fields, _WITHOUT_EFFECT),
        )

    @property
    def family(self) -> str:
        """The name of the model family."""
        return "jamba"

    @property
    def sliding_window(self) -> int | None:
        """Jamba sees every token."""
        return None

    @property
    def reprefill_length(self) -> int | None:
        """Jamba has no positional encoding."""
        return None

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

    def with_tensors(self, names: frozenset[str]) -> JambaConfig:
        """The same model with every head that a checkpoint of these tensors holds."""
        added = self.ending.notes(names)
        return replace(self, ending=self.ending.with_tensors(names), notes=(*self.notes, *added))

    @property
    def activation(self) -> str:
        """Of experts and dense FFNs."""
        return "silu"

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

    @property
    def quantizable(self) -> frozenset[str]:
        """Attention projections and dense FFNs; nothing inside the Mamba mixer."""
        return frozenset({"qkv", "o", "gate_proj", "up_proj", "down_proj"})

    def layer_tensors(self, layer_idx: int) -> dict[str, TensorSlice]:
        """One layer's parameters by its own names, without routed experts."""
        return layer_tensors(self, layer_idx)

    def embedding_tensor(self) -> TensorSlice:
        """The token table [V, D]."""
        return whole("model.embed_tokens.weight", (self.vocab_size, self.hidden_size))

    def head_tensors(self) -> dict[str, TensorSlice]:
        """The final norm and the heads."""
        return {
            "norm": whole("model.final_layernorm.weight", (self.hidden_size,)),
            **self.ending.tensors((self.vocab_size, self.hidden_size)),
        }

    def build_stage(self, first: int, last: int, dtype: torch.dtype) -> Stage:
        """Layers first..last-1, without weights."""
        from models.jamba_layer import build_stage

        return build_stage(self, first, last)

    def expert_tensors(self, layer_idx: int, expert: int) -> dict[str, TensorSlice]:
        """`gate`, `up` and `down` of one routed expert."""
        experts = f"model.layers.{layer_idx}.feed_forward.experts."
        gate, up, down = (f"{experts}{expert}.{n}_proj.weight" for n in ("gate", "up", "down"))
        shape = (self.expert_width, self.hidden_size)
        return expert_matrices(expert, shape, hub=(gate, up, down), fused_prefix=experts)

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


def _rank(fields: Fields, hidden: int) -> int:
    """mamba_dt_rank, where "auto" is hidden_size / 16, rounded up."""
    automatic = -(-hidden // 16)
    return (
        automatic if fields.is_auto("mamba_dt_rank") else fields.integer("mamba_dt_rank", automatic)
    )
