"""All routed experts of a layer in one C call: grouped, computed and combined."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from models.interface import ExpertWeights
from models.kernels.functions import ELEMENT_TYPES, WEIGHT_TYPES, address, function
from models.kernels.native import expert_addresses

_POINTER, _I64 = ctypes.c_void_p, ctypes.c_int64
_OUT_OF_MEMORY = 1


class _Routed(ctypes.Structure):
    """`struct routed` of routed.c."""

    _fields_ = (
        *((name, _POINTER) for name in ("x", "ids", "weights", "experts", "out")),
        *((name, _I64) for name in ("tokens", "width", "hidden", "top_k", "num_experts")),
        *((name, _I64) for name in ("type", "w_type", "threads")),
    )


class RoutedExperts:
    """The experts of one layer, by id, where the kernel finds them; keeps their weights alive."""

    def __init__(self, weights: Sequence[ExpertWeights]) -> None:
        self._weights = tuple(weights)
        first = weights[0].gate
        self._hidden, self._width = first.shape
        self._type = WEIGHT_TYPES[first.dtype]
        fields: list[int] = []
        for w in weights:
            assert w.gate.shape == first.shape, (w.gate.shape, first.shape)
            assert w.gate.dtype == first.dtype, (w.gate.dtype, first.dtype)
            fields += *expert_addresses(w), 0
        self._table = (_I64 * len(fields))(*fields)

    def __call__(self, kernels: str, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Σ weight · expert(x) over each token's slots, in their order: [T, D] → [T, D].

        `ids` [T, k] int64, `weights` [T, k] of x's dtype; `kernels` names the variant. Raises
        ValueError for an unknown id.
        """
        (tokens, width), top_k, dtype = x.shape, ids.shape[1], x.dtype
        assert width == self._width, (width, self._width)
        x, out = x.contiguous(), torch.empty_like(x)
        call = _Routed(
            x.data_ptr(),
            address(ids, (tokens, top_k), torch.int64),
            address(weights, (tokens, top_k), dtype),
            ctypes.addressof(self._table),
            out.data_ptr(),
            tokens,
            width,
            self._hidden,
            top_k,
            len(self._weights),
            ELEMENT_TYPES[dtype],
            self._type,
            torch.get_num_threads(),
        )
        failed = function(kernels, "conclave_routed")(ctypes.addressof(call))
        if failed == _OUT_OF_MEMORY:
            raise MemoryError(f"no memory for the experts of {tokens} tokens")
        if failed:
            raise ValueError(f"expert ids {ids.tolist()}: allowed 0..{len(self._weights) - 1}")
        return out
