"""The C functions as functions of tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from models.interface import ExpertWeights
from models.kernels.choice import TORCH, backends, resolve_kernels
from models.kernels.functions import ELEMENT_TYPES, WEIGHT_TYPES
from models.kernels.variants import VARIANTS, Variant, load

_CPU = torch.device("cpu")
_INT, _I64, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p


class NativeKernels:
    """Products on the CPU in one order per output, whatever the rows and threads.

    All tensors are on the CPU; weights are contiguous and of the activations' dtype or int8.
    """

    def __init__(self, variant: Variant) -> None:
        """Raises KernelsUnavailable."""
        self.name = variant.name
        library = load(variant)
        self._linear = library.conclave_linear
        self._linear.argtypes = [_POINTER, _I64, _I64, _INT, _POINTER, _POINTER, _POINTER, _INT]
        self._linear.argtypes += [_I64, _POINTER, _INT]
        self._experts = library.conclave_experts
        self._experts.argtypes = [_POINTER, _I64, _I64, _INT, _INT, _POINTER, _I64, _POINTER, _INT]

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None
    ) -> Tensor:
        """(x·weightᵀ)·scale + bias: [R, K] x [N, K] → [R, N], any R; scale [N] is float32."""
        x = x.contiguous()
        (rows, width), outputs = x.shape, weight.shape[0]
        _check(x, weight, scale)
        assert bias is None or bias.dtype == x.dtype, (bias, x.dtype)
        out = x.new_empty(rows, outputs)
        failed = self._linear(
            x.data_ptr(),
            rows,
            width,
            WEIGHT_TYPES[x.dtype],
            weight.data_ptr(),
            _address(scale),
            _address(bias),
            WEIGHT_TYPES[weight.dtype],
            outputs,
            out.data_ptr(),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"no memory for a product of {rows} rows of {width}")
        return out

    def experts(self, x: Tensor, groups: Sequence[tuple[ExpertWeights, int]]) -> Tensor:
        """silu(x·gateᵀ) ⊙ (x·upᵀ) ·downᵀ: [n, D] → [n, D].

        `groups` says whose the rows are: so many of the first expert, then of the second, ...
        """
        if not groups:
            return torch.empty_like(x)
        x = x.contiguous()
        fields: list[int] = []
        for w, rows in groups:
            _check(x, w.gate, w.gate_scale)
            fields += *expert_addresses(w), rows
        first = groups[0][0].gate
        out = torch.empty_like(x)
        failed = self._experts(
            x.data_ptr(),
            x.shape[1],
            first.shape[0],
            WEIGHT_TYPES[x.dtype],
            WEIGHT_TYPES[first.dtype],
            (_I64 * len(fields))(*fields),
            len(groups),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"no memory for the experts of {len(x)} rows")
        return out


_chosen: dict[str, NativeKernels | None] = {}
"""By the names of `choice.KERNELS`; empty until the first choice."""

_together: dict[tuple[str, ...], NativeKernels | None] = {}
"""What `native_kernels_together` has found since the last choice."""


def use_kernels(choice: str) -> None:
    """Compute with these from now on in this process. Raises ValueError where they are not here."""
    chosen = backends(resolve_kernels(choice))
    loaded: dict[str, NativeKernels | None] = {TORCH: None}
    loaded |= {v.name: NativeKernels(v) for v in VARIANTS if v.name in chosen.values()}
    _chosen.update({kernel: loaded[backend] for kernel, backend in chosen.items()})
    _together.clear()


def native_kernels(kernel: str, dtype: torch.dtype, device: torch.device) -> NativeKernels | None:
    """The native kernels where `kernel` serves activations of this kind; None: PyTorch does.

    `kernel` is one of `choice.KERNELS`.
    """
    if not _chosen:
        use_kernels("auto")
    return _chosen[kernel] if device.type == "cpu" and dtype in ELEMENT_TYPES else None


def native_kernels_together(kernels: tuple[str, ...], x: Tensor) -> NativeKernels | None:
    """The native kernels where all of `kernels` serve x: they may run in one call. Else None."""
    if kernels not in _together:
        found = [native_kernels(kernel, x.dtype, _CPU) for kernel in kernels]
        if None in found and x.dtype not in ELEMENT_TYPES:
            return None
        _together[kernels] = None if None in found else found[0]
    return _together[kernels] if x.device == _CPU and x.dtype in ELEMENT_TYPES else None


def expert_addresses(w: ExpertWeights) -> tuple[int, ...]:
    """What `struct expert` of experts.h holds before its number of rows."""
    for matrix, shape in ((w.up, w.gate.shape), (w.down, w.gate.shape[::-1])):
        assert matrix.shape == shape, (matrix.shape, shape)
        assert matrix.dtype == w.gate.dtype, (matrix.dtype, w.gate.dtype)
        assert matrix.is_contiguous(), matrix.stride()
    scales = (w.gate_scale, w.up_scale, w.down_scale)
    weights = (w.gate.data_ptr(), w.up.data_ptr(), w.down.data_ptr())
    return *weights, *(_address(scale) or 0 for scale in scales)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _check(x: Tensor, weight: Tensor, scale: Tensor | None) -> None:
    """A pointer says nothing of what it points to: the last place to look."""
    assert weight.shape[1] == x.shape[1], (weight.shape, x.shape)
    assert weight.is_contiguous(), weight.stride()
    assert weight.dtype == (x.dtype if scale is None else torch.int8), (weight.dtype, x.dtype)
    assert scale is None or scale.is_contiguous(), "scales lie one after another"
