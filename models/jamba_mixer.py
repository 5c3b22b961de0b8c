"""Jamba's Mamba-1 mixer: the Mamba block plus norms of dt, B and C."""

from __future__ import annotations

import torch
from torch import Tensor

from models.checkpoint_map import whole
from models.interface import BatchMeta, StateCache, TensorSlice
from models.kernels.scan import ScanWeights
from models.layers.mamba import Selection, SelectiveState
from models.layers.norm import rms_norm_parts
from models.layers.rowwise import linear


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


class MambaMixer:
    """in_proj, convolution, selective scan, gate, out_proj: [R, D] → [R, D]."""

    def __init__(self, weights: dict[str, Tensor], state: SelectiveState, norm_eps: float) -> None:
        """`weights` as named by `mixer_tensors`."""
        self._weights = weights
        self._state = state
        self._norm_eps = norm_eps
        self._taps = weights["conv1d.weight"].squeeze(1).float().t().contiguous()
        norms = [weights[f"{name}_layernorm.weight"] for name in ("dt", "b", "c")]
        self._part_weights, self._parts = torch.cat(norms), [len(norm) for norm in norms]
        self._scan = ScanWeights(weights["A_log"], weights["D"], weights["dt_proj.bias"])

    def __call__(self, x: Tensor, meta: BatchMeta, cache: StateCache) -> Tensor:
        """Advances the sequences' states in `cache`."""
        w, state = self._weights, self._state
        u, z = linear(x, w["in_proj.weight"], w.get("in_proj.bias")).chunk(2, dim=-1)
        signal = state.signal(u, self._taps, w.get("conv1d.bias"), meta, cache)
        gated = state.gated_scan(signal, z, self._selection(signal), self._scan, meta, cache)
        return linear(gated, w["out_proj.weight"], w.get("out_proj.bias"))

    def _selection(self, signal: Tensor) -> Selection:
        """What the tokens select by, from the convolved signal."""
        w, eps = self._weights, self._norm_eps
        parts = linear(signal, w["x_proj.weight"])
        parts = rms_norm_parts(parts, self._part_weights, self._parts, eps)
        step, b, c = torch.split_with_sizes(parts, self._parts, dim=-1)
        return Selection(linear(step, w["dt_proj.weight"]), b, c)
