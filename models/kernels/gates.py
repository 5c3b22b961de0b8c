"""Gates in C: softmax with top-k, and SparseMixer."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from models.kernels.functions import ELEMENT_TYPES, function

MAX_EXPERTS = 1024

P_NORMS = {None: 0, 1.0: 1, 2.0: 2}
"""What the chosen weights may be divided by, and its number in gates.c."""

_POINTER, _I64 = ctypes.c_void_p, ctypes.c_int64


class GateFields(ctypes.Structure):
    """`struct gate` of routed.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("logits", "ids", "weights")),
        *((name, _I64) for name in ("tokens", "experts", "top_k", "type", "threads", "norm")),
        ("band", ctypes.c_double),
    )


def softmax_top_k(
    kernels: str, logits: Tensor, top_k: int, p: float | None
) -> tuple[Tensor, Tensor]:
    """Softmax of [T, E] logits, the k greatest over their p-norm: ids and weights, [T, k] each.

    Computed in float32, weights rounded to the logits' dtype; `p` is one of P_NORMS. `kernels`
    names the variant.
    """
    return _choose(kernels, "conclave_softmax_gate", logits, top_k, P_NORMS[p], 0.0)


def sparse_mixer(kernels: str, logits: Tensor, band: float) -> tuple[Tensor, Tensor]:
    """SparseMixer's two ids and weights of [T, E] logits, [T, 2] each, in the logits' dtype.

    `band` is twice the jitter; that dtype rounds it, as every operation. `kernels` names the
    variant.
    """
    return _choose(kernels, "conclave_mixer_gate", logits, 2, 0, band)


def _choose(
    kernels: str, symbol: str, logits: Tensor, top_k: int, norm: int, band: float
) -> tuple[Tensor, Tensor]:
    (tokens, experts), dtype = logits.shape, logits.dtype
    assert top_k <= experts <= MAX_EXPERTS, (top_k, experts)
    assert logits.is_contiguous(), logits.stride()
    ids = torch.empty(tokens, top_k, dtype=torch.int64)
    weights = logits.new_empty(tokens, top_k)
    call = GateFields(
        logits.data_ptr(),
        ids.data_ptr(),
        weights.data_ptr(),
        tokens,
        experts,
        top_k,
        ELEMENT_TYPES[dtype],
        torch.get_num_threads(),
        norm,
        band,
    )
    function(kernels, symbol)(ctypes.addressof(call))
    return ids, weights
