"""Which parameters a Jamba layer has, and how a checkpoint spells them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.checkpoint_map import stacked, whole
from models.interface import TensorSlice

if TYPE_CHECKING:
    from models.jamba import JambaConfig

NORMS = ("input_layernorm", "pre_ff_layernorm")
MIXER = "mamba."
"""What the names of the mixer's parameters begin with."""


def layer_tensors(config: JambaConfig, layer_idx: int) -> dict[str, TensorSlice]:
    """One layer's parameters by its own names, without routed experts."""
    hidden, width = config.hidden_size, config.expert_width
    prefix = f"model.layers.{layer_idx}."
    tensors = {n: whole(f"{prefix}{n}.weight", (hidden,)) for n in NORMS}
    if config.is_attention_layer(layer_idx):
        kv_rows = config.num_kv_heads * config.head_dim
        q_rows = config.num_heads * config.head_dim
        attn, rows = prefix + "self_attn.", {"q": q_rows, "k": kv_rows, "v": kv_rows}
        tensors["qkv"] = stacked(
            *(whole(f"{attn}{name}_proj.weight", (count, hidden)) for name, count in rows.items())
        )
        tensors["o"] = whole(f"{attn}o_proj.weight", (hidden, q_rows))
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
        tensors.update({f"{MIXER}{name}": part for name, part in mixer.items()})
    ffn = f"{prefix}feed_forward."
    if config.is_moe_layer(layer_idx):
        tensors["gate"] = whole(f"{ffn}router.weight", (config.num_experts, hidden))
    else:
        tensors["gate_proj"] = whole(f"{ffn}gate_proj.weight", (width, hidden))
        tensors["up_proj"] = whole(f"{ffn}up_proj.weight", (width, hidden))
        tensors["down_proj"] = whole(f"{ffn}down_proj.weight", (hidden, width))
    return tensors


def mixer_tensors(
    prefix: str,
    *,
    hidden: int,
    inner: int,
    state: int,
    kernel: int,
    rank: int,
    conv_bias: bool,
    proj_bias: bool,
) -> dict[str, TensorSlice]:
    """The mixer's parameters below `prefix`."""
    shapes: dict[str, tuple[int, ...]] = {
        "in_proj.weight": (2 * inner, hidden),
        "conv1d.weight": (inner, 1, kernel),
        "x_proj.weight": (rank + 2 * state, inner),
        "dt_proj.weight": (inner, rank),
        "dt_proj.bias": (inner,),
        "A_log": (inner, state),
        "D": (inner,),
        "out_proj.weight": (hidden, inner),
        "dt_layernorm.weight": (rank,),
        "b_layernorm.weight": (state,),
        "c_layernorm.weight": (state,),
    }
    if conv_bias:
        shapes["conv1d.bias"] = (inner,)
    if proj_bias:
        shapes["in_proj.bias"] = (2 * inner,)
        shapes["out_proj.bias"] = (hidden,)
    return {name: whole(prefix + name, shape) for name, shape in shapes.items()}
