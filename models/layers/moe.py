"""Gates and experts; a row's choice and result never depend on the other rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.gate import Gate
from models.interface import ExpertWeights, Routing
from models.kernels import gates
from models.kernels.native import NativeKernels, native_kernels, native_kernels_together
from models.layers.activation import Activation, silu
from models.layers.rowwise import linear, pad_rows


def feed_forward(x: Tensor, weights: ExpertWeights, activation: Activation) -> Tensor:
    """act(x·gateᵀ) ⊙ (x·upᵀ) ·downᵀ of [R, D] rows, R a multiple of the row tile."""
    native = native_kernels("experts", x.dtype, x.device)
    if native is not None and activation is silu:
        return native.experts(x, [(weights, x.shape[0])])
    gate = linear(x, weights.gate, scale=weights.gate_scale)
    hidden = activation(gate) * linear(x, weights.up, scale=weights.up_scale)
    return linear(hidden, weights.down, scale=weights.down_scale)


def expert_rows(
    x: Tensor, groups: Sequence[tuple[ExpertWeights, int]], activation: Activation
) -> Tensor:
    """`feed_forward` of rows that belong to several experts: [n, D] → [n, D], any n.

    `groups` says whose the rows are: so many of the first expert, then of the second, ...
    """
    native = native_kernels("experts", x.dtype, x.device)
    if native is not None and activation is silu:
        return native.experts(x, groups)
    outputs = torch.empty_like(x)
    start = 0
    for weights, count in groups:
        rows = slice(start, start := start + count)
        if count:
            outputs[rows] = feed_forward(pad_rows(x[rows]), weights, activation)[:count]
    return outputs


def routed_kernels(x: Tensor, activation: Activation) -> NativeKernels | None:
    """Those that take all routed experts of rows like x in one call; None: group by group."""
    return native_kernels("experts", x.dtype, x.device) if activation is silu else None


def softmax_top_k(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """float32 softmax over all experts, then the k largest: ids and probabilities, [T, k] each.

    Equal probabilities go to the lower expert id.
    """
    ordered = torch.sort(torch.softmax(logits.float(), dim=-1), descending=True, stable=True)
    return ordered.indices[:, :top_k].contiguous(), ordered.values[:, :top_k].contiguous()


def divide_by_p_norm(weights: Tensor, p: float) -> Tensor:
    """Divide each row of [T, k] non-negative weights by its p-norm, p >= 0 (0 counts nonzeros).

    The columns are added one by one: a reduction kernel's order is not ours to choose.
    """
    if p == 0.0:
        powers = (weights != 0).to(weights.dtype)
    elif p == 1.0:
        powers = weights
    elif p == 2.0:
        powers = weights * weights
    else:
        powers = torch.exp(p * torch.log(weights))
    total = powers[:, 0]
    for column in range(1, powers.shape[1]):
        total = total + powers[:, column]
    if p == 2.0:
        total = torch.sqrt(total)
    elif p not in (0.0, 1.0):
        total = torch.exp(torch.log(total) / p)
    return weights / total[:, None]


def sparse_mixer(logits: Tensor, jitter_eps: float) -> tuple[Tensor, Tensor]:
    """SparseMixer at inference (Liu et al. 2023, GRIN): two expert ids and weights, [T, 2] each.

    Each slot's weight is its logit's softmax among the logits within a relative band of
    2 * jitter_eps below it; the two weights are not normalised together.
    """
    first, first_weight = _mixer_slot(logits, logits, jitter_eps)
    rest = logits.scatter(-1, first, float("-inf"))
    second, second_weight = _mixer_slot(rest, logits, jitter_eps)
    return torch.cat([first, second], -1), torch.cat([first_weight, second_weight], -1)


def _mixer_slot(candidates: Tensor, logits: Tensor, jitter_eps: float) -> tuple[Tensor, Tensor]:
    """Best candidate and its weight; the band is measured on the original logits."""
    # argmax takes the first of equal values, whatever the number of rows.
    best = candidates.argmax(dim=-1, keepdim=True)
    peak = candidates.gather(-1, best)
    factor = torch.maximum(logits.abs(), peak)
    # 0 / 0 is NaN, which compares false: nothing is dropped among all-zero logits.
    dropped = (peak - logits) / factor > 2 * jitter_eps
    kept = candidates.masked_fill(dropped, float("-inf"))
    return best, torch.softmax(kept, dim=-1).gather(-1, best)


def route(h: Tensor, gate: Gate) -> Routing:
    """What the gate makes of [R, D] rows."""
    logits = linear(h, gate.weight)
    if gate.band is not None:
        return mixer_gate(logits, gate.band / 2)
    return softmax_gate(logits, gate.top_k, gate.p_norm)


def moe_kernels(h: Tensor, gate: Gate, activation: Activation) -> NativeKernels | None:
    """Those that take gate, experts and residual of rows like h in one call; None: one by one."""
    if (
        activation is not silu
        or gate.p_norm not in gates.P_NORMS
        or len(gate.weight) > gates.MAX_EXPERTS
    ):
        return None
    return native_kernels_together(("linear", "gate", "experts"), h)


def softmax_gate(logits: Tensor, top_k: int, p: float | None = None) -> Routing:
    """Softmax of [T, E] logits, the k greatest, divided by their p-norm where there is one."""
    kernels = native_kernels("gate", logits.dtype, logits.device)
    if kernels is not None and p in gates.P_NORMS and logits.shape[1] <= gates.MAX_EXPERTS:
        return Routing(*gates.softmax_top_k(kernels.name, logits, top_k, p), logits)
    ids, weights = softmax_top_k(logits, top_k)
    if p is not None:
        weights = divide_by_p_norm(weights, p)
    return Routing(ids, weights.to(logits.dtype), logits)


def mixer_gate(logits: Tensor, jitter_eps: float) -> Routing:
    """SparseMixer's choice among [T, E] logits, in their dtype."""
    kernels = native_kernels("gate", logits.dtype, logits.device)
    if kernels is not None and logits.shape[1] <= gates.MAX_EXPERTS:
        return Routing(*gates.sparse_mixer(kernels.name, logits, 2 * jitter_eps), logits)
    return Routing(*sparse_mixer(logits, jitter_eps), logits)
