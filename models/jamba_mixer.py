"""Jamba's Mamba-1 mixer: the Mamba block plus norms of dt, B and C."""

from __future__ import annotations

import torch
from torch import Tensor

from models.checkpoint_map import whole
from models.interface import BatchMeta, StateCache, TensorSlice
from models.layers.activation import silu, softplus
from models.layers.mamba import SelectiveState
from models.layers.norm import rms_norm
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
        self._conv = weights["conv1d.weight"].squeeze(1)
        # A is float32 whatever the model dtype, and kept as the scan wants it: [N, I].
        self._a = (-torch.exp(weights["A_log"].float())).t().contiguous()

    def __call__(self, x: Tensor, meta: BatchMeta, cache: StateCache) -> Tensor:
        """Advances the sequences' states in `cache`."""
        w, tokens = self._weights, meta.num_tokens
        u, z = linear(x, w["in_proj.weight"], w.get("in_proj.bias")).chunk(2, dim=-1)
        c = u.new_zeros(u.shape)
        convolved = self._state.convolve(u[:tokens], self._conv, w.get("conv1d.bias"), meta, cache)
        c[:tokens] = silu(convolved.to(x.dtype))
        delta, b, out_of = self._selection(c)
        signal = c[:tokens].float()
        y = self._state.scan(
            signal, delta[:tokens], self._a, (b[:tokens], out_of[:tokens]), meta, cache
        )
        y = y + w["D"].float() * signal
        gated = u.new_zeros(u.shape)
        gated[:tokens] = (y * silu(z[:tokens].float())).to(x.dtype)
        return linear(gated, w["out_proj.weight"], w.get("out_proj.bias"))

    def _selection(self, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Δ [R, I], B and C [R, N] from the convolved signal, all float32."""
        w, eps = self._weights, self._norm_eps
        rank, state = w["dt_proj.weight"].shape[1], self._a.shape[0]
        dt, b, out_of = torch.split_with_sizes(
            linear(c, w["x_proj.weight"]), [rank, state, state], dim=-1
        )
        dt = rms_norm(dt, w["dt_layernorm.weight"], eps)
        b = rms_norm(b, w["b_layernorm.weight"], eps)
        out_of = rms_norm(out_of, w["c_layernorm.weight"], eps)
        delta = linear(dt, w["dt_proj.weight"]).float() + w["dt_proj.bias"].float()
        return softplus(delta), b.float(), out_of.float()
