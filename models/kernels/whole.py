"""Whole mixers in one C call each, with the bits of their parts.

What a layer decides is written into a structure once; a call only fills in its rows and its batch.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from models.interface import KVCache, StateCache
from models.kernels.attention import PagedBatch
from models.kernels.functions import ELEMENT_TYPES, WEIGHT_TYPES, address
from models.kernels.program import Program, call
from models.kernels.scan import RecurrentBatch, ScanWeights

_POINTER, _I64, _DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class Weight(ctypes.Structure):
    """`struct weight` of linear.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("values", "scale", "bias")),
        *((name, _I64) for name in ("type", "outputs", "width")),
    )

    @classmethod
    def of(
        cls,
        values: Tensor,
        dtype: torch.dtype,
        scale: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Weight:
        """A weight [N, K] for rows of `dtype`; whoever calls keeps the tensors alive."""
        outputs, width = values.shape
        own = (outputs,)
        return cls(
            address(values, (outputs, width), dtype if scale is None else torch.int8),
            None if scale is None else address(scale, own, torch.float32),
            None if bias is None else address(bias, own, dtype),
            WEIGHT_TYPES[values.dtype],
            outputs,
            width,
        )


class Norm(ctypes.Structure):
    """`struct norm` of whole.c: RMSNorm or LayerNorm."""

    _fields_ = (("weight", _POINTER), ("bias", _POINTER), ("is_rms", _I64), ("eps", _DOUBLE))

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, eps: float, *, is_rms: bool) -> Norm:
        """A norm's weight and bias [D]; whoever calls keeps them alive."""
        at = None if bias is None else address(bias, weight.shape, weight.dtype)
        return cls(address(weight, weight.shape, weight.dtype), at, is_rms, eps)


class _Frame(ctypes.Structure):
    _fields_ = (
        *((name, Norm) for name in ("before", "after")),
        *((name, _I64) for name in ("type", "threads")),
        *((name, _POINTER) for name in ("x", "residual", "out")),
    )


class _AttentionMixer(ctypes.Structure):
    _fields_ = (
        ("frame", _Frame),
        *((name, Weight) for name in ("qkv", "projection")),
        *((name, _I64) for name in ("heads", "kv_heads", "head_dim", "window")),
        ("limit", _DOUBLE),
        *((name, _POINTER) for name in ("batch", "cos", "sin", "keys", "values")),
    )


class _MambaMixer(ctypes.Structure):
    _fields_ = (
        ("frame", _Frame),
        *((name, Weight) for name in ("into", "select", "step", "projection")),
        *((name, _POINTER) for name in ("part_norms", "taps", "a", "tap_bias", "step_bias", "d")),
        *((name, _I64) for name in ("channels", "num_taps", "rank", "num_states")),
        *((name, _POINTER) for name in ("batch", "history", "states")),
    )


class _Mixer:
    """What both kinds share: x, the residual and the normed rows."""

    def __init__(self, mixer: _AttentionMixer | _MambaMixer, symbol: str, dtype: torch.dtype):
        self._mixer, self._symbol, self._dtype = mixer, symbol, dtype
        mixer.frame.type = ELEMENT_TYPES[dtype]
        self._width = mixer.projection.outputs
        self._at = ctypes.addressof(mixer)

    def _run(
        self, kernels: str, x: Tensor, num_rows: int, program: Program | None, *kept: object
    ) -> tuple[Tensor, Tensor]:
        frame, shape = self._mixer.frame, (num_rows, self._width)
        x = x.contiguous()
        residual, out = torch.empty_like(x), torch.empty_like(x)
        frame.x = address(x, shape, self._dtype)
        frame.residual, frame.out = residual.data_ptr(), out.data_ptr()
        frame.threads = torch.get_num_threads()
        call(kernels, self._symbol, self._at, program, x, residual, out, *kept)
        return residual, out


class AttentionMixer(_Mixer):
    """Norm, product, rotary embedding, attention, product, residual and norm of one layer."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        names: tuple[str, str],
        norms: tuple[Norm, Norm],
        *,
        dtype: torch.dtype,
        heads: tuple[int, int, int],
        window: int | None = None,
        limit: float | None = None,
    ) -> None:
        """`names` of the two products' weights; `heads`: queries', keys', and their width."""
        self._kept = weights
        qkv, projection = (
            Weight.of(weights[n], dtype, weights.get(f"{n}_scale"), weights.get(f"{n}_bias"))
            for n in names
        )
        num_heads, kv_heads, head_dim = heads
        assert qkv.outputs == (num_heads + 2 * kv_heads) * head_dim, (qkv.outputs, heads)
        assert projection.width == num_heads * head_dim, (projection.width, heads)
        assert qkv.width == projection.outputs, (qkv.width, projection.outputs)
        self._cache_row = kv_heads, head_dim
        mixer = _AttentionMixer(
            frame=_Frame(*norms),
            qkv=qkv,
            projection=projection,
            heads=num_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            window=window or 0,
            limit=math.inf if limit is None else limit,
        )
        super().__init__(mixer, "conclave_attention_mixer", dtype)

    def __call__(
        self,
        kernels: str,
        x: Tensor,
        batch: PagedBatch,
        cache: KVCache,
        angles: tuple[Tensor, Tensor] | None,
        program: Program | None = None,
    ) -> tuple[Tensor, Tensor]:
        """[R, D] → residual and normed, both [R, D]; `angles`: cos and sin [R, 1, h/2].

        Without angles nothing is rotated. `kernels` names the variant.
        """
        mixer, dtype = self._mixer, self._dtype
        kv_heads, head_dim = self._cache_row
        cached = (len(cache.key), kv_heads, batch.block_size, head_dim)
        mixer.batch = batch.address
        mixer.keys = address(cache.key, cached, dtype)
        mixer.values = address(cache.value, cached, dtype)
        if angles is not None:
            shape = (batch.num_rows, 1, head_dim // 2)
            mixer.cos, mixer.sin = (address(angle, shape, dtype) for angle in angles)
        return self._run(kernels, x, batch.num_rows, program, batch, angles)


class MambaMixer(_Mixer):
    """Norm, Jamba's Mamba mixer, residual and norm of one layer."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        norms: tuple[Norm, Norm],
        part_norms: Tensor,
        taps: Tensor,
        scan: ScanWeights,
    ) -> None:
        """`weights` as in a checkpoint; weights of the norms of Δ, B and C; taps [K, I] float32."""
        num_states, channels = scan.a.shape
        tap_bias = weights.get("conv1d.bias")
        self._kept = (weights, part_norms, taps, scan)
        step_bias, d, a = scan.addresses
        dtype = part_norms.dtype
        into, select, step, projection = (
            Weight.of(weights[f"{n}.weight"], dtype, None, bias)
            for n, bias in (
                ("in_proj", weights.get("in_proj.bias")),
                ("x_proj", None),
                ("dt_proj", None),  # its bias is added by the scan
                ("out_proj", weights.get("out_proj.bias")),
            )
        )
        assert into.outputs == 2 * channels, (into.outputs, channels)
        assert step.outputs == select.width == projection.width == channels, channels
        assert select.outputs == step.width + 2 * num_states, (select.outputs, num_states)
        assert into.width == projection.outputs, (into.width, projection.outputs)
        mixer = _MambaMixer(
            frame=_Frame(*norms),
            into=into,
            select=select,
            step=step,
            projection=projection,
            part_norms=address(part_norms, (select.outputs,), dtype),
            taps=address(taps, (len(taps), channels), torch.float32),
            a=a,
            tap_bias=None if tap_bias is None else address(tap_bias, (channels,), dtype),
            step_bias=step_bias,
            d=d,
            channels=channels,
            num_taps=len(taps),
            rank=step.width,
            num_states=num_states,
        )
        self._state_shapes = (channels, len(taps) - 1), (channels, num_states)
        super().__init__(mixer, "conclave_mamba_mixer", dtype)

    def __call__(
        self,
        kernels: str,
        x: Tensor,
        batch: RecurrentBatch,
        cache: StateCache,
        program: Program | None = None,
    ) -> tuple[Tensor, Tensor]:
        """[R, D] → residual and normed, both [R, D]. `kernels` names the variant."""
        mixer, (history, states) = self._mixer, self._state_shapes
        mixer.batch = batch.address
        mixer.history = address(cache.conv, (len(cache.conv), *history), self._dtype)
        mixer.states = address(cache.ssm, (len(cache.ssm), *states), torch.float32)
        return self._run(kernels, x, batch.num_rows, program, batch)
