"""Jamba's Mamba-1 mixer: the Mamba block plus norms of dt, B and C."""

from __future__ import annotations

import torch
from torch import Tensor

from models.interface import BatchMeta, StateCache
from models.kernels.native import native_kernels_together
from models.kernels.scan import MAX_STATES, MAX_TAPS, ScanWeights
from models.kernels.whole import MambaMixer, Norm
from models.layers.mamba import Selection, SelectiveState
from models.layers.norm import add_rms_norm, rms_norm, rms_norm_parts
from models.layers.rowwise import linear

_KERNELS = ("linear", "convolution", "scan", "rms_norm")


class MambaMix:
    """Norm, in_proj, convolution, selective scan, gate, out_proj, residual and norm.

    In one call where kernels compute all of it, else step by step: the bits are the same.
    """

    def __init__(
        self,
        weights: dict[str, Tensor],
        norms: tuple[Tensor, Tensor],
        state: SelectiveState,
        norm_eps: float,
    ) -> None:
        """`weights` as named by `mixer_tensors`, those of the norms before and after [D]."""
        self._weights = weights
        self._norms = norms
        self._state = state
        self._norm_eps = norm_eps
        self._taps = weights["conv1d.weight"].squeeze(1).float().t().contiguous()
        parts = [weights[f"{name}_layernorm.weight"] for name in ("dt", "b", "c")]
        self._part_weights, self._parts = torch.cat(parts), [len(part) for part in parts]
        self._scan = ScanWeights(weights["A_log"], weights["D"], weights["dt_proj.bias"])
        self._whole: MambaMixer | None = None

    def __call__(self, x: Tensor, meta: BatchMeta, cache: StateCache) -> tuple[Tensor, Tensor]:
        """[R, D] → residual and normed; advances the sequences' states in `cache`."""
        kernels = native_kernels_together(_KERNELS, x)
        (num_states, _), num_taps = self._scan.a.shape, len(self._taps)
        if kernels is None or num_states > MAX_STATES or num_taps > MAX_TAPS:
            return self.step_by_step(x, meta, cache)
        if self._whole is None:
            before, after = (Norm.of(w, None, self._norm_eps, is_rms=True) for w in self._norms)
            self._whole = MambaMixer(
                self._weights, (before, after), self._part_weights, self._taps, self._scan
            )
        return self._whole(kernels.name, x, self._state.recurrent(meta), cache, meta.program)

    def step_by_step(self, x: Tensor, meta: BatchMeta, cache: StateCache) -> tuple[Tensor, Tensor]:
        """The same, every operation by itself: kernels and PyTorch in any mixture."""
        meta.settle()
        before, after = self._norms
        mixed = self._mix(rms_norm(x, before, self._norm_eps), meta, cache)
        return add_rms_norm(x, mixed, after, self._norm_eps)

    def _mix(self, x: Tensor, meta: BatchMeta, cache: StateCache) -> Tensor:
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
