"""Mamba's convolution and selective scan in C: what a batch and a layer tell them."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from models.interface import BatchMeta
from models.kernels.functions import ELEMENT_TYPES, address, function, together

MAX_STATES = 128
MAX_TAPS = 16

_POINTER, _I64 = ctypes.c_void_p, ctypes.c_int64


class _Batch(ctypes.Structure):
    """`struct batch` of scan.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("query_starts", "slots")),
        *((name, _I64) for name in ("num_seqs", "num_tokens", "num_rows")),
        *((name, _I64) for name in ("channels", "type", "threads")),
    )


class _Convolution(ctypes.Structure):
    _fields_ = (
        ("batch", _Batch),
        *((name, _POINTER) for name in ("u", "taps", "bias", "history", "out")),
        *((name, _I64) for name in ("u_stride", "num_taps")),
    )


class _Scan(ctypes.Structure):
    _fields_ = (
        ("batch", _Batch),
        *((name, _POINTER) for name in ("signal", "step", "z", "b", "c", "step_bias", "d", "a")),
        *((name, _POINTER) for name in ("states", "out")),
        *((name, _I64) for name in ("signal_stride", "step_stride", "z_stride")),
        *((name, _I64) for name in ("b_stride", "c_stride", "num_states")),
    )


class ScanWeights:
    """A layer's constants of the scan: A [N, I] float32, D and the bias of Δ [I]."""

    def __init__(self, a_log: Tensor, d: Tensor, step_bias: Tensor) -> None:
        """A_log [I, N], D and the bias as a checkpoint has them."""
        self.d, self.step_bias = d.contiguous(), step_bias.contiguous()
        # A is float32 whatever the model dtype, and kept as the scan wants it.
        self.a = (-torch.exp(a_log.float())).t().contiguous()
        self._a_log2_e = (self.a.double() * math.log2(math.e)).float()
        width = a_log.shape[:1]
        self.addresses = (
            address(self.step_bias, width, d.dtype),
            address(self.d, width, d.dtype),
            address(self._a_log2_e, a_log.shape[::-1], torch.float32),
        )
        """Of the bias, D and A · log2(e), for the kernel."""


class RecurrentBatch:
    """A batch in the form that the kernels read: the same for all layers of a stage.

    Legend: R rows, I channels, N states, K taps.
    """

    def __init__(self, meta: BatchMeta) -> None:
        self._query_starts = torch.tensor(meta.query_starts, dtype=torch.int64)
        self._slots = torch.tensor(meta.state_slots, dtype=torch.int64)
        self.num_rows = meta.num_rows
        self._batch = _Batch(
            query_starts=self._query_starts.data_ptr(),
            slots=self._slots.data_ptr(),
            num_seqs=len(self._slots),
            num_tokens=meta.num_tokens,
            num_rows=meta.num_rows,
        )
        self.address = ctypes.addressof(self._batch)
        """Of what a batch decides, for `conclave_mamba_mixer`."""

    def convolve(
        self, kernels: str, u: Tensor, taps: Tensor, bias: Tensor | None, history: Tensor
    ) -> Tensor:
        """silu(causal convolution): [R, I] x [K, I] float32 (+ [I]) → [R, I], in u's dtype.

        `history` [slots, I, K-1] of u's dtype moves on. `kernels` names the variant.
        """
        (rows, channels), num_taps, dtype = u.shape, len(taps), u.dtype
        assert rows == self.num_rows, (rows, self.num_rows)
        u, out = together(u), torch.empty(rows, channels, dtype=dtype)
        call = _Convolution(
            self._of(channels, dtype),
            u.data_ptr(),
            address(taps, (num_taps, channels), torch.float32),
            None if bias is None else address(bias, (channels,), dtype),
            address(history, (len(history), channels, num_taps - 1), dtype),
            out.data_ptr(),
            u.stride(0),
            num_taps,
        )
        function(kernels, "conclave_convolve")(ctypes.addressof(call))
        return out

    def scan(
        self, kernels: str, rows: tuple[Tensor, ...], weights: ScanWeights, states: Tensor
    ) -> Tensor:
        """(scan + D · signal) · silu(z): → [R, I] in the dtype of the rows.

        `rows` are signal, Δ before bias and softplus, z (all [R, I]), B and C (both [R, N]);
        `states` [slots, I, N] float32 move on.
        """
        (num_states, channels), dtype = weights.a.shape, weights.d.dtype
        rows = tuple(map(together, rows))
        for tensor in rows:
            assert tensor.dtype == dtype, (tensor.dtype, dtype)
        wide, narrow = (self.num_rows, channels), (self.num_rows, num_states)
        shapes = [tensor.shape for tensor in rows]
        assert shapes == [wide, wide, wide, narrow, narrow], shapes
        out = torch.empty(wide, dtype=dtype)
        call = _Scan(
            self._of(channels, dtype),
            *[tensor.data_ptr() for tensor in rows],
            *weights.addresses,
            address(states, (len(states), channels, num_states), torch.float32),
            out.data_ptr(),
            *[tensor.stride(0) for tensor in rows],
            num_states,
        )
        function(kernels, "conclave_scan")(ctypes.addressof(call))
        return out

    def _of(self, channels: int, dtype: torch.dtype) -> _Batch:
        batch = self._batch
        batch.channels, batch.type = channels, ELEMENT_TYPES[dtype]
        batch.threads = torch.get_num_threads()
        return batch
