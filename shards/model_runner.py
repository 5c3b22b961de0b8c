"""Runs the scheduled steps of one stage: packs, drives layers and experts, samples at the end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from models.interface import BatchMeta, DecoderLayer, LayerCache, ModelConfig, Routing, StageModel
from models.kernels.program import FEW_ROWS, Program
from models.layers.rowwise import pad_rows
from router.step import (
    LAST_SAMPLED,
    NOTHING,
    ScheduledSequence,
    StepPlan,
    StepResult,
    WantedRows,
)
from shards.expert_backend import ExchangeKey, ExpertBackend, Handle, LocalExpertBackend
from shards.kv_cache import apply_state_ops
from shards.logits_processors import IdRanges
from shards.micro_batches import pack, split_sequences
from shards.running_sequence import RunningSequence
from shards.sampler import SampleRequest, sample
from shards.wanted import head_rows, rows_of


@dataclass(frozen=True, slots=True)
class StageOutput:
    """What a stage makes of a step: [T, D] for the next one, or the result on the last one.

    `wanted` are the arrays of this stage's own layers.
    """

    output: Tensor | StepResult
    wanted: tuple[WantedRows, ...] = ()


@dataclass(slots=True)
class _MicroBatch:
    """Whole sequences that go through the layers together; `x` is [R, D]."""

    scheduled: Sequence[ScheduledSequence]
    meta: BatchMeta
    x: Tensor
    key: ExchangeKey
    wanted: bool
    """Whether any sequence wants arrays."""
    pending: tuple[DecoderLayer, Tensor, Handle] | None = None
    """A MoE layer that waits for its experts: layer, residual, answer to come."""


class ModelRunner:
    """Layers first..last-1 of a model and what they remember of each sequence.

    `caches` has one entry per layer. Of a step with more than `few_tokens` one half mixes while the
    experts work on the other; the bits are the same. None: never.
    """

    def __init__(
        self,
        config: ModelConfig,
        stage: StageModel,
        first: int,
        last: int,
        caches: Sequence[LayerCache],
        backend: ExpertBackend,
        *,
        block_size: int,
        dtype: torch.dtype,
        few_tokens: int | None = None,
        device: torch.device | str = "cpu",
        unused_ids: IdRanges = (),
    ) -> None:
        assert len(caches) == len(stage.layers) == last - first, (len(caches), first, last)
        self._config = config
        self._stage = stage
        self._is_first = first == 0
        self._is_last = last == config.num_layers
        self._caches = caches
        self._backend = backend
        self._local = backend if isinstance(backend, LocalExpertBackend) else None
        self._block_size = block_size
        self._few_tokens = few_tokens
        self._dtype = dtype
        self._device = device
        self._unused_ids = unused_ids
        self._sequences: dict[int, RunningSequence] = {}
        self._wanted: list[WantedRows] = []

    def reset(self) -> None:
        """Forget every sequence (a new epoch); cache contents are stale but harmless."""
        self._sequences.clear()

    @torch.inference_mode()
    def execute(self, plan: StepPlan, hidden: Tensor | None = None) -> StageOutput:
        """Run one step. The first stage takes no `hidden`, the others [T, D] of the one before."""
        assert (hidden is None) == self._is_first, "hidden states go to every stage but the first"
        self._apply_deltas(plan)
        self._wanted = []
        batches = self._micro_batches(plan, hidden)
        for layer, cache in zip(self._stage.layers, self._caches, strict=True):
            for batch in batches:
                self._finish_layer(batch)
                self._begin_layer(batch, layer, cache)
        for batch in batches:
            self._finish_layer(batch)
            batch.meta.settle()
        if not self._is_last:
            return StageOutput(self._real_rows(batches), tuple(self._wanted))
        for batch in batches:  # before sampling, which counts the emitted tokens on
            self._keep_heads(batch)
        return StageOutput(self._sample(plan, batches), tuple(self._wanted))

    def _apply_deltas(self, plan: StepPlan) -> None:
        for seq_id in plan.released:
            assert seq_id in self._sequences, f"released sequence {seq_id} is unknown"
            del self._sequences[seq_id]
        for new in plan.new:
            assert new.seq_id not in self._sequences, f"new sequence {new.seq_id} is known already"
            self._sequences[new.seq_id] = RunningSequence.begin(new)
        apply_state_ops(self._caches, plan.state_ops)
        for scheduled in plan.scheduled:
            assert scheduled.seq_id in self._sequences, f"sequence {scheduled.seq_id} is unknown"
            self._sequences[scheduled.seq_id].blocks += scheduled.new_blocks

    def _micro_batches(self, plan: StepPlan, hidden: Tensor | None) -> list[_MicroBatch]:
        counts = [scheduled.num_tokens for scheduled in plan.scheduled]
        batches: list[_MicroBatch] = []
        row = 0
        ranges = split_sequences(counts, self._few_tokens)
        for begin, end in ranges:
            scheduled = plan.scheduled[begin:end]
            wanted = any(self._sequences[s.seq_id].wanted != NOTHING for s in scheduled)
            # Two micro-batches would write into the same structures.
            is_short = len(ranges) == 1 and sum(counts) <= FEW_ROWS
            program = Program() if self._local and is_short and not wanted else None
            meta = self._pack(scheduled, program)
            if hidden is None:
                x = self._embed(scheduled, meta.num_rows)
            else:
                x = pad_rows(hidden[row : row + meta.num_tokens].to(self._device))
            row += meta.num_tokens
            key = ExchangeKey(plan.epoch, plan.step_id, len(batches))
            batches.append(_MicroBatch(scheduled, meta, x, key, wanted))
        assert hidden is None or row == len(hidden), (row, hidden.shape)
        return batches

    def _pack(self, scheduled: Sequence[ScheduledSequence], program: Program | None) -> BatchMeta:
        sequences = [self._sequences[s.seq_id] for s in scheduled]
        return pack(
            scheduled,
            [sequence.blocks for sequence in sequences],
            [sequence.state_slot for sequence in sequences],
            block_size=self._block_size,
            dtype=self._dtype,
            device=self._device,
            program=program,
        )

    def _embed(self, scheduled: Iterable[ScheduledSequence], num_rows: int) -> Tensor:
        token_ids = [
            token_id if token_id != LAST_SAMPLED else self._last_sampled(s.seq_id)
            for s in scheduled
            for token_id in s.token_ids
        ]
        token_ids += [0] * (num_rows - len(token_ids))
        return self._stage.embed(torch.tensor(token_ids, dtype=torch.int64, device=self._device))

    def _last_sampled(self, seq_id: int) -> int:
        if not self._is_last:
            raise ValueError(
                f"sequence {seq_id}: token id LAST_SAMPLED is allowed only where the first stage "
                "is also the last; here the plan must name the token"
            )
        token_id = self._sequences[seq_id].history.last
        assert token_id is not None, f"sequence {seq_id} has sampled nothing yet"
        # Without a token the sequence has ended, and nobody reads this row.
        return max(token_id, 0)

    def _begin_layer(self, batch: _MicroBatch, layer: DecoderLayer, cache: LayerCache) -> None:
        self._keep(batch, "hidden_states", layer.layer_idx, batch.x)
        residual, h = layer.mix(batch.x, batch.meta, cache)
        if not layer.is_moe:
            batch.x = layer.dense(residual, h, batch.meta)
            return
        if self._local and not batch.wanted and batch.meta.num_rows == batch.meta.num_tokens:
            finished = self._local.finish(layer, residual, h, batch.meta.program)
            if finished is not None:
                batch.x = finished
                return
        batch.meta.settle()
        routing = layer.gate(h)
        if batch.meta.num_rows > batch.meta.num_tokens:
            real = slice(batch.meta.num_tokens)
            routing = Routing(routing.expert_ids[real], routing.weights[real], routing.logits[real])
            h = h[real]
        self._keep(batch, "router_logits", layer.layer_idx, routing.logits)
        handle = self._backend.submit(batch.key, layer.layer_idx, h, routing)
        batch.pending = (layer, residual, handle)

    def _finish_layer(self, batch: _MicroBatch) -> None:
        if batch.pending is None:
            return
        layer, residual, handle = batch.pending
        batch.pending = None
        outputs = handle.result()
        if batch.meta.num_rows > batch.meta.num_tokens:
            outputs = pad_rows(outputs)
        batch.x = layer.combine(residual, outputs)

    def _real_rows(self, batches: Iterable[_MicroBatch]) -> Tensor:
        rows = [batch.x[: batch.meta.num_tokens] for batch in batches]
        if not rows:
            return torch.empty((0, self._config.hidden_size), dtype=self._dtype)
        return torch.cat(rows)

    def _keep(self, batch: _MicroBatch, name: str, index: int, values: Tensor) -> None:
        """Keep the rows [R, ...] of sequences that want every row of the array `name`."""
        if not batch.wanted:
            return
        for sequence, scheduled, rows in self._rows(batch):
            if getattr(sequence.wanted, name):
                label = f"{name}.{index}"
                self._wanted.append(rows_of(scheduled.seq_id, label, scheduled.start, values[rows]))

    def _rows(
        self, batch: _MicroBatch
    ) -> Iterator[tuple[RunningSequence, ScheduledSequence, slice]]:
        for scheduled, (begin, end) in zip(
            batch.scheduled, pairwise(batch.meta.query_starts), strict=True
        ):
            yield self._sequences[scheduled.seq_id], scheduled, slice(begin, end)

    def _keep_heads(self, batch: _MicroBatch) -> None:
        """Keep what the heads make of the rows of sequences that want it."""
        if not batch.wanted:
            return
        normed = self._stage.norm(batch.x)
        self._keep(batch, "hidden_states", self._config.num_layers, normed)
        for sequence, scheduled, rows in self._rows(batch):
            self._wanted += head_rows(
                self._stage, sequence.wanted, sequence.history.prompt, scheduled, normed[rows]
            )

    def _sample(self, plan: StepPlan, batches: Iterable[_MicroBatch]) -> StepResult:
        parts = []
        requests = []
        for batch in batches:
            ends = batch.meta.query_starts[1:]
            rows = []
            for scheduled, end in zip(batch.scheduled, ends, strict=True):
                if scheduled.samples:
                    sequence = self._sequences[scheduled.seq_id]
                    rows.append(end - 1)
                    requests.append(
                        SampleRequest(
                            seq_id=scheduled.seq_id,
                            history=sequence.history,
                            sampling=sequence.sampling,
                        )
                    )
            # A batch that only decodes is what the head wants, row for row.
            only_these = rows == list(range(batch.meta.num_rows))
            parts.append(batch.x if only_these else batch.x[rows])
        if not requests:
            return StepResult(epoch=plan.epoch, step_id=plan.step_id)
        ends_of_all = parts[0] if len(parts) == 1 else torch.cat(parts)
        logits = self._stage.logits(self._stage.norm(pad_rows(ends_of_all)))
        sampled = sample(logits[: len(requests)], requests, self._unused_ids)
        for choice in sampled:
            self._sequences[choice.seq_id].history.append(choice.token_id)
        return StepResult(epoch=plan.epoch, step_id=plan.step_id, sampled=tuple(sampled))
