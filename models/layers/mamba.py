"""The Mamba-1 recurrence (Gu and Dao 2023) on packed sequences: convolution and selective scan.

Both are chains of elementwise operations in one fixed order per channel, so a token's bits do not
depend on the chunk it is computed in or on its neighbours. Where there are native kernels they do
it, in an order of their own.

Legend: T tokens, I inner width, N state size, K convolution width, B sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.interface import BatchMeta, StateCache
from models.kernels.native import native_kernels
from models.kernels.scan import MAX_STATES, MAX_TAPS, RecurrentBatch, ScanWeights
from models.layers.activation import silu, softplus
from models.layers.batch_memo import BatchMemo

_SCAN_ELEMENTS = 1 << 21
"""Elements of [steps, N, I] computed ahead of the recurrence: bounds memory, cannot change bits."""


@dataclass(frozen=True, slots=True)
class ScanPlan:
    """Index tensors of one batch; sequences are ranked longest first."""

    slots: Tensor
    """[B] state slots, by sequence."""
    history_rows: Tensor
    """[B * (K-1)] rows of the extended input that hold what came before."""
    tap_rows: tuple[Tensor, ...]
    """K tensors [T]: the row of the extended input under each tap; the last one is the token."""
    tail_rows: Tensor
    """[B * (K-1)] rows of the extended input to remember."""
    ranked_slots: Tensor
    """[B] state slots, by rank."""
    step_rows: Tensor
    """[T] tokens in time-major order: all sequences' first tokens, then all second ones, ..."""
    step_counts: tuple[int, ...]
    """Sequences that have a token at each step."""


@dataclass(frozen=True, slots=True)
class Selection:
    """What each token selects by, in the model dtype: Δ before bias and softplus [R, I], B, C."""

    step: Tensor
    b: Tensor
    c: Tensor


class SelectiveState:
    """The state updates shared by the Mamba layers of a stage; holds no weights."""

    def __init__(self, kernel_width: int) -> None:
        self._history = kernel_width - 1
        self._plans = BatchMemo(self._plan)
        self._batches = BatchMemo(lambda meta, _: RecurrentBatch(meta))

    def signal(
        self, u: Tensor, taps: Tensor, bias: Tensor | None, meta: BatchMeta, cache: StateCache
    ) -> Tensor:
        """silu of the convolution: [R, I] x [K, I] float32 (+ [I]) → [R, I] in u's dtype."""
        kernels = native_kernels("convolution", u.dtype, u.device)
        if kernels is not None and len(taps) <= MAX_TAPS and cache.conv.dtype == u.dtype:
            return self._batches(meta).convolve(kernels.name, u, taps, bias, cache.conv)
        out, tokens = u.new_zeros(u.shape), meta.num_tokens
        out[:tokens] = silu(self.convolve(u[:tokens], taps, bias, meta, cache).to(u.dtype))
        return out

    def gated_scan(
        self,
        signal: Tensor,
        z: Tensor,
        selection: Selection,
        weights: ScanWeights,
        meta: BatchMeta,
        cache: StateCache,
    ) -> Tensor:
        """(scan + D · signal) · silu(z): three [R, I] → [R, I] in the signal's dtype."""
        s, w = selection, weights
        kernels = native_kernels("scan", signal.dtype, signal.device)
        if kernels is not None and len(w.a) <= MAX_STATES:
            rows = (signal, s.step, z, s.b, s.c)
            return self._batches(meta).scan(kernels.name, rows, w, cache.ssm)
        out, tokens = signal.new_zeros(signal.shape), meta.num_tokens
        wide, step, gate, b, c = (t[:tokens].float() for t in (signal, s.step, z, s.b, s.c))
        delta = softplus(step + w.step_bias.float())
        y = self.scan(wide, delta, w.a, (b, c), meta, cache)
        out[:tokens] = ((y + w.d.float() * wide) * silu(gate)).to(signal.dtype)
        return out

    def recurrent(self, meta: BatchMeta) -> RecurrentBatch:
        """The batch as the kernels read it."""
        return self._batches(meta)

    def convolve(
        self, u: Tensor, taps: Tensor, bias: Tensor | None, meta: BatchMeta, cache: StateCache
    ) -> Tensor:
        """Causal depthwise convolution: [T, I] x [K, I] (+ [I]) → [T, I] float32, no activation.

        The cache keeps the last K-1 inputs, as they were before the convolution.
        """
        plan = self._plans(meta)
        width = u.shape[1]
        extended = u.new_empty(u.shape[0] + plan.history_rows.shape[0], width)
        past = cache.conv[plan.slots].transpose(1, 2).reshape(-1, width)
        extended.index_copy_(0, plan.history_rows, past.to(u.dtype))
        extended.index_copy_(0, plan.tap_rows[-1], u)
        tail = extended.index_select(0, plan.tail_rows)
        tail = tail.view(plan.slots.shape[0], self._history, width)
        cache.conv[plan.slots] = tail.transpose(1, 2).to(cache.conv.dtype)
        extended = extended.float()
        out = extended.index_select(0, plan.tap_rows[0]) * taps[0]
        for rows, tap in zip(plan.tap_rows[1:], taps[1:], strict=True):
            out = out + extended.index_select(0, rows) * tap
        return out if bias is None else out + bias.float()

    def scan(
        self,
        c: Tensor,
        delta: Tensor,
        a: Tensor,
        b_and_c: tuple[Tensor, Tensor],
        meta: BatchMeta,
        cache: StateCache,
    ) -> Tensor:
        """h_t = exp(Δ_t a) h_{t-1} + Δ_t c_t B_t, y_t = Σ_n h_t[n] C_t[n]: → [T, I] float32.

        c and delta [T, I], a [N, I] (negative), B and C [T, N], all float32.
        """
        plan = self._plans(meta)
        state = cache.ssm[plan.ranked_slots].transpose(1, 2).contiguous()
        out = torch.empty_like(c)
        for first_step, steps in self._spans(plan.step_counts, a.numel()):
            first_row = sum(plan.step_counts[:first_step])
            counts = plan.step_counts[first_step : first_step + steps]
            rows = plan.step_rows[first_row : first_row + sum(counts)]
            out[rows] = _scan_span(c[rows], delta[rows], a, b_and_c, rows, counts, state)
        cache.ssm[plan.ranked_slots] = state.transpose(1, 2)
        return out

    @staticmethod
    def _spans(step_counts: tuple[int, ...], elements: int) -> list[tuple[int, int]]:
        """(first step, number of steps) pieces whose intermediate tensors fit in the budget."""
        spans, start, rows = [], 0, 0
        for step, count in enumerate(step_counts):
            if rows and (rows + count) * elements > _SCAN_ELEMENTS:
                spans.append((start, step - start))
                start, rows = step, 0
            rows += count
        if rows:
            spans.append((start, len(step_counts) - start))
        return spans

    def _plan(self, meta: BatchMeta, _: int) -> ScanPlan:
        device = meta.positions.device
        starts = torch.tensor(meta.query_starts)
        first, counts = starts[:-1], starts.diff()
        num_seqs, history = len(meta.state_slots), self._history
        base = first + torch.arange(num_seqs) * history
        past = torch.arange(history)
        owner = torch.repeat_interleave(torch.arange(num_seqs), counts)
        ranked = torch.argsort(counts, descending=True, stable=True)
        # Sorting tokens by (offset in their sequence, rank) gives the time-major order.
        rank = torch.empty_like(ranked)
        rank[ranked] = torch.arange(num_seqs)
        offset = torch.arange(meta.num_tokens) - first[owner]
        step_rows = torch.argsort(offset * num_seqs + rank[owner])
        step_counts = torch.bincount(offset).tolist() if meta.num_tokens else []
        tap_zero = torch.arange(meta.num_tokens) + owner * history
        slots = torch.tensor(meta.state_slots, dtype=torch.int64)
        return ScanPlan(
            slots=slots.to(device),
            history_rows=(base[:, None] + past).flatten().to(device),
            tap_rows=tuple((tap_zero + tap).to(device) for tap in range(history + 1)),
            tail_rows=((base + counts)[:, None] + past).flatten().to(device),
            ranked_slots=slots[ranked].to(device),
            step_rows=step_rows.to(device),
            step_counts=tuple(step_counts),
        )


def _scan_span(
    c: Tensor,
    delta: Tensor,
    a: Tensor,
    b_and_c: tuple[Tensor, Tensor],
    rows: Tensor,
    counts: tuple[int, ...],
    state: Tensor,
) -> Tensor:
    """Some steps of the recurrence: [n, I] → [n, I]; advances `state` [B, N, I] in place."""
    into, out_of = (t[rows] for t in b_and_c)
    decay = torch.exp(delta[:, None, :] * a)
    states = (delta * c)[:, None, :] * into[:, :, None]
    row, previous = 0, state
    for count in counts:
        # Multiply, round, add, round: a fused multiply-add would depend on the vector width.
        states[row : row + count].add_(decay[row : row + count].mul_(previous[:count]))
        previous = states[row : row + count]
        row += count
    _keep_last(states, counts, state)
    return halving_sum(states.mul_(out_of[:, :, None]))


def _keep_last(states: Tensor, counts: tuple[int, ...], state: Tensor) -> None:
    """Copy each sequence's newest row of `states` into `state`."""
    row = sum(counts)
    done = 0
    for count in reversed(counts):
        row -= count
        if count > done:
            state[done:count] = states[row + done : row + count]
            done = count


def halving_sum(x: Tensor) -> Tensor:
    """Sum over dimension 1 as a fixed tree: [n, N, I] → [n, I]."""
    while x.shape[1] > 1:
        half = x.shape[1] // 2
        folded = x[:, :half] + x[:, half : 2 * half]
        x = torch.cat([folded, x[:, 2 * half :]], dim=1) if x.shape[1] % 2 else folded
    return x[:, 0]
