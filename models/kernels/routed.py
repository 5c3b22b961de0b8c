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
OUT_OF_MEMORY = 1


class RoutedFields(ctypes.Structure):
    """`struct routed` of routed.h."""

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
        call = self.fields(top_k, dtype)
        call.x, call.out = x.data_ptr(), out.data_ptr()
        call.ids = address(ids, (tokens, top_k), torch.int64)
        call.weights = address(weights, (tokens, top_k), dtype)
        call.tokens, call.threads = tokens, torch.get_num_threads()
        failed = function(kernels, "conclave_routed")(ctypes.addressof(call))
        if failed == OUT_OF_MEMORY:
            raise MemoryError(f"no memory for the experts of {tokens} tokens")
        if failed:
            raise ValueError(f"expert ids {ids.tolist()}: allowed 0..{len(self._weights) - 1}")
        return out

    def fields(self, top_k: int, dtype: torch.dtype) -> RoutedFields:
        """A call that still lacks rows and choices; these experts must outlive it."""
        return RoutedFields(
            experts=ctypes.addressof(self._table),
            width=self._width,
            hidden=self._hidden,
            top_k=top_k,
            num_experts=len(self._weights),
            type=ELEMENT_TYPES[dtype],
            w_type=self._type,
        )
