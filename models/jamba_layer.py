"""A Jamba layer: a Mamba mixer or attention, a gate or a dense FFN."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from models.gate import Gate
from models.interface import (
    BatchMeta,
    ExpertWeights,
    LayerCache,
    Routing,
    StateCache,
    TensorSlice,
)
from models.jamba_mixer import MambaMix
from models.jamba_tensors import MIXER, NORMS
from models.kernels.whole_moe import WholeDense
from models.layers.activation import silu
from models.layers.attention import PagedAttention
from models.layers.attention_mix import AttentionMix
from models.layers.mamba import SelectiveState
from models.layers.moe import feed_forward, route, routed_kernels
from models.layers.norm import rms_norm
from models.layers.stage import Stage

if TYPE_CHECKING:
    from models.jamba import JambaConfig


def build_stage(config: JambaConfig, first: int, last: int) -> Stage:
    """Layers first..last-1, without weights."""
    attention = PagedAttention(
        num_heads=config.num_heads, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim
    )
    state = SelectiveState(config.mamba_kernel)
    eps = config.norm_eps
    return Stage(
        layers=[JambaLayer(config, i, attention, state) for i in range(first, last)],
        embedding=config.embedding_tensor() if first == 0 else None,
        head=config.head_tensors() if last == config.num_layers else {},
        final_norm=lambda x, weights: rms_norm(x, weights["norm"], eps),
    )


class JambaLayer:
    """One Jamba layer without its routed experts."""

    def __init__(
        self, config: JambaConfig, layer_idx: int, attention: PagedAttention, state: SelectiveState
    ) -> None:
        self.layer_idx = layer_idx
        self.is_moe = config.is_moe_layer(layer_idx)
        self.quantizable = config.quantizable
        self._config = config
        self._attend = AttentionMix(
            attention,
            None,  # no positional encoding
            projection="o",
            norms=NORMS,
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
        return self._config.layer_tensors(self.layer_idx)

    def load(self, weights: dict[str, Tensor]) -> None:
        """Take the parameters named by `tensors()`."""
        parts = dict(weights)
        if "qkv" not in parts:
            names = [name for name in parts if name.startswith(MIXER)]
            mixer = {name.removeprefix(MIXER): parts.pop(name) for name in names}
            norms = parts[NORMS[0]], parts[NORMS[1]]
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
