"""Tokens to rows grouped by expert and back, where the experts are in other processes."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from models.kernels.functions import ELEMENT_TYPES, address, function
from models.kernels.routed import RoutedFields

_POINTER, _I64 = ctypes.c_void_p, ctypes.c_int64

Places = ctypes.Array[ctypes.c_int64]
"""The row of each (token, slot) pair."""


class _Fields(ctypes.Structure):
    """`struct apart` of routed.c."""

    _fields_ = (
        ("routed", RoutedFields),
        *((name, _POINTER) for name in ("rows", "places", "order", "counts", "starts")),
    )


class TokenRows:
    """The passes around remote experts on the CPU, one C call each. Owned by one thread.

    T tokens, k experts per token, width D, N = T·k rows, E experts.
    """

    def __init__(self, variant_name: str) -> None:
        """Raises KernelsUnavailable."""
        self._spread = function(variant_name, "conclave_spread_rows")
        self._combine = function(variant_name, "conclave_combine_rows")
        self._call = _Fields()
        self._routed = self._call.routed
        self._address = ctypes.addressof(self._call)
        self._order: tuple[int, ...] | None = None

    def spread(
        self, hidden: Tensor, expert_ids: Tensor, order: tuple[int, ...], rows: Tensor
    ) -> tuple[list[int], list[int], Places]:
        """Copy tokens `hidden` [T, D] to `rows` [N, D], expert after expert in their `order`.

        An expert's rows lie in token order. Gives the rows of each expert, the first of them, and
        where each pair of `expert_ids` [T, k] went. Raises ValueError for an unknown id.
        """
        call, routed = self._call, self._routed
        tokens, top_k = shape = expert_ids.shape
        places = (_I64 * (tokens * top_k))()
        if order is not self._order:
            self._take_order(order)
        self._take_rows(rows)
        assert len(rows) == len(places), (rows.shape, shape)
        routed.x = address(hidden, (tokens, routed.width), rows.dtype)
        routed.ids = address(expert_ids, shape, torch.int64)
        routed.tokens, routed.top_k = tokens, top_k
        call.places = ctypes.addressof(places)
        if self._spread(self._address):
            raise ValueError(f"expert ids {expert_ids.tolist()}: allowed 0..{len(order) - 1}")
        return self._counts[:], self._starts[:], places

    def combine(self, rows: Tensor, places: Places, weights: Tensor) -> Tensor:
        """Σ weight · row over each token's slots, in their order: [T, D] of `rows` [N, D]."""
        call, routed = self._call, self._routed
        tokens, top_k = weights.shape
        assert len(rows) == len(places) == tokens * top_k, (rows.shape, weights.shape)
        out = torch.empty((tokens, rows.shape[1]), dtype=rows.dtype)
        self._take_rows(rows)
        routed.weights = address(weights, weights.shape, rows.dtype)
        routed.out = out.data_ptr()
        routed.tokens, routed.top_k = tokens, top_k
        call.places = ctypes.addressof(places)
        self._combine(self._address)
        return out

    def _take_order(self, order: tuple[int, ...]) -> None:
        """Prepare what depends on the experts only; they change with the routing table."""
        some = _I64 * len(order)
        self._experts, self._counts, self._starts = some(*order), some(), some()
        call = self._call
        call.order = ctypes.addressof(self._experts)
        call.counts = ctypes.addressof(self._counts)
        call.starts = ctypes.addressof(self._starts)
        self._routed.num_experts = len(order)
        self._order = order

    def _take_rows(self, rows: Tensor) -> None:
        routed = self._routed
        assert rows.is_contiguous(), rows.stride()
        self._call.rows = rows.data_ptr()
        routed.width, routed.type = rows.shape[1], ELEMENT_TYPES[rows.dtype]
        routed.threads = torch.get_num_threads()
