"""A whole FFN in one C call: the gate where there is one, experts, and what they are added to."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from models.gate import Gate
from models.interface import ExpertWeights
from models.kernels.functions import ELEMENT_TYPES, WEIGHT_TYPES, address
from models.kernels.gates import P_NORMS, GateFields
from models.kernels.native import expert_addresses
from models.kernels.program import Program, call
from models.kernels.routed import RoutedExperts, RoutedFields
from models.kernels.whole import Weight

_POINTER, _I64 = ctypes.c_void_p, ctypes.c_int64


class _Moe(ctypes.Structure):
    """`struct moe` of whole.c."""

    _fields_ = (
        ("scores", Weight),
        ("gate", GateFields),
        ("routed", RoutedFields),
        ("is_softmax", _I64),
        *((name, _POINTER) for name in ("residual", "out")),
    )


class _Dense(ctypes.Structure):
    """`struct dense` of whole.c."""

    _fields_ = (
        ("ffn", _I64 * 7),
        *((name, _I64) for name in ("width", "hidden", "type", "w_type", "threads")),
        *((name, _POINTER) for name in ("x", "residual", "out")),
    )


class WholeMoe:
    """One layer's gate and all its experts."""

    def __init__(self, gate: Gate, experts: RoutedExperts) -> None:
        num_experts, self._width = gate.weight.shape
        self.gate, self._experts = gate, experts
        self._dtype = gate.weight.dtype
        moe = self._moe = _Moe(
            scores=Weight.of(gate.weight, self._dtype),
            gate=GateFields(experts=num_experts, top_k=gate.top_k, norm=P_NORMS[gate.p_norm]),
            routed=experts.fields(gate.top_k, self._dtype),
            is_softmax=gate.band is None,
        )
        moe.gate.band = gate.band or 0.0
        assert moe.routed.num_experts == num_experts, (moe.routed.num_experts, num_experts)
        assert moe.routed.width == self._width, (moe.routed.width, self._width)
        self._at = ctypes.addressof(moe)

    def __call__(
        self, kernels: str, residual: Tensor, h: Tensor, program: Program | None = None
    ) -> Tensor:
        """residual + Σ weight · expert(h) over each token's choice: [T, D]; names the variant."""
        moe, shape, out = self._moe, (len(h), self._width), torch.empty_like(h)
        routed = moe.routed
        routed.x = address(h, shape, self._dtype)
        routed.tokens, routed.threads = len(h), torch.get_num_threads()
        moe.residual = address(residual, shape, self._dtype)
        moe.out = out.data_ptr()
        call(kernels, "conclave_moe", self._at, program, residual, h, out)
        return out


class WholeDense:
    """One layer's dense FFN."""

    def __init__(self, weights: ExpertWeights, dtype: torch.dtype) -> None:
        """`dtype` is that of the rows."""
        self._kept, self._dtype = weights, dtype
        hidden, self._width = weights.gate.shape
        ffn = self._dense = _Dense(
            width=self._width,
            hidden=hidden,
            type=ELEMENT_TYPES[dtype],
            w_type=WEIGHT_TYPES[weights.gate.dtype],
        )
        self._rows = ffn.ffn
        self._rows[:6] = expert_addresses(weights)
        self._at = ctypes.addressof(ffn)

    def __call__(
        self, kernels: str, residual: Tensor, h: Tensor, program: Program | None = None
    ) -> Tensor:
        """residual + FFN(h): [R, D]. `kernels` names the variant."""
        ffn, shape, out = self._dense, (len(h), self._width), torch.empty_like(h)
        self._rows[6] = len(h)
        ffn.threads = torch.get_num_threads()
        ffn.x = address(h, shape, self._dtype)
        ffn.residual = address(residual, shape, self._dtype)
        ffn.out = out.data_ptr()
        call(kernels, "conclave_dense", self._at, program, residual, h, out)
        return out
