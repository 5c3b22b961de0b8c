"""A Jamba layer: a Mamba mixer or attention, a gate or a dense FFN."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from models.checkpoint_map import stacked, whole
from models.gate import Gate
from models.interface import (
    BatchMeta,
    ExpertWeights,
    LayerCache,
    Routing,
    StateCache,
    TensorSlice,
)
from models.jamba_mixer import MambaMix, mixer_tensors
from models.kernels.whole_moe import WholeDense
from models.layers.activation import silu
from models.layers.attention import PagedAttention
from models.layers.attention_mix import AttentionMix
from models.layers.mamba import SelectiveState
from models.layers.moe import feed_forward, route, routed_kernels

if TYPE_CHECKING:
    from models.jamba import JambaConfig

_NORMS = ("input_layernorm", "pre_ff_layernorm")
_MIXER = "mamba."


def layer_tensors(config: JambaConfig, layer_idx: int) -> dict[str, TensorSlice]:
    """One layer's parameters by its own names, without routed experts."""
    hidden, width = config.hidden_size, config.expert_width
    prefix = f"model.layers.{layer_idx}."
    tensors = {n: whole(f"{prefix}{n}.weight", (hidden,)) for n in _NORMS}
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

    quantizable = frozenset({"qkv", "o", "gate_proj", "up_proj", "down_proj"})
    """Nothing inside the Mamba mixer."""

    def __init__(
        self, config: JambaConfig, layer_idx: int, attention: PagedAttention, state: SelectiveState
    ) -> None:
        self.layer_idx = layer_idx
        self.is_moe = config.is_moe_layer(layer_idx)
        self._config = config
        self._attend = AttentionMix(
            attention,
            None,  # no positional encoding
            projection="o",
            norms=_NORMS,
            norm_eps=config.norm_eps,
            is_rms=True,
        )
        self._state = state
        self.chooser: Gate | None = None
        self._mixer: MambaMix | None = None
        self._dense: ExpertWeights | None = None
        self._whole_dense: WholeDense | None = None

    def mix(self, x: Tensor, meta: BatchMeta, cache: LayerCache) -> tuple[Tensor, Tensor]:
        """Norm, Mamba or attention, residual, norm."""
        if isinstance(cache, StateCache):
            assert self._mixer is not None, f"layer {self.layer_idx} is an attention layer"
            return self._mixer(x, meta, cache)
        return self._attend(x, meta, cache)

    def gate(self, h: Tensor) -> Routing:
        """float32 softmax over all experts; the top-k weights are not renormalised."""
        assert self.chooser is not None, f"layer {self.layer_idx} has no gate"
        return route(h, self.chooser)

    def dense(self, residual: Tensor, h: Tensor, meta: BatchMeta) -> Tensor:
        """residual + the FFN of a dense layer, in one call where there is a kernel."""
        assert self._dense is not None, f"layer {self.layer_idx} is a mixture of experts"
        kernels = routed_kernels(h, silu)
        if kernels is None:
            meta.settle()
            return residual + feed_forward(h, self._dense, silu)
        if self._whole_dense is None:
            self._whole_dense = WholeDense(self._dense, h.dtype)
        return self._whole_dense(kernels.name, residual, h, meta.program)

    def combine(self, residual: Tensor, outputs: Tensor) -> Tensor:
        """residual + expert outputs."""
        return residual + outputs

    def tensors(self) -> dict[str, TensorSlice]:
        """The layer's parameters and where they are read from."""
        return layer_tensors(self._config, self.layer_idx)

    def load(self, weights: dict[str, Tensor]) -> None:
        """Take the parameters named by `tensors()`."""
        parts = dict(weights)
        if "qkv" not in parts:
            names = [name for name in parts if name.startswith(_MIXER)]
            mixer = {name.removeprefix(_MIXER): parts.pop(name) for name in names}
            norms = parts[_NORMS[0]], parts[_NORMS[1]]
            self._mixer = MambaMix(mixer, norms, self._state, self._config.norm_eps)
        if not self.is_moe:
            self._whole_dense = None
            matrices = ("gate_proj", "up_proj", "down_proj")
            self._dense = ExpertWeights(
                *(parts.pop(name) for name in matrices),
                *(parts.pop(f"{name}_scale", None) for name in matrices),
            )
        if self.is_moe:
            self.chooser = Gate(weight=parts["gate"], top_k=self._config.top_k)
        self._attend.load(parts)
