"""A stateless expert worker: rows in, rows out, for the logical experts it holds."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from router.expert_call import expert_result, read_expert_call
from router.transport.base import FrameKind, Lost, PeerLost, Received, Transport
from shards.load_progress import OnRead
from shards.spec import WorkerSpec
from shards.worker import Worker

log = logging.getLogger("conclave.expert")

MOST_TOGETHER = 16
"""Calls that are computed in one pass at most."""


class ComputesRows(Protocol):
    """Experts of several layers; a row's bits are its own, whatever is computed with it."""

    def check(self, layer_idx: int, pairs: Sequence[tuple[int, int]], rows: Tensor) -> None:
        """Raises ValueError for experts or rows that this bank cannot compute."""

    def forward(self, layer_idx: int, pairs: Sequence[tuple[int, int]], rows: Tensor) -> Tensor:
        """Outputs [n, D] of `rows` [n, D], which belong to the experts of `pairs` in turn."""


class ExpertWorker(Worker):
    """Answers expert calls of any stage or dispatcher; a repeated call gives the same bits.

    Calls of one layer that wait at the same time share a pass over the weights.
    """

    def __init__(self, spec: WorkerSpec, transport: Transport, bank: ComputesRows) -> None:
        super().__init__(spec, transport)
        self._bank = bank
        self._waiting: deque[Received | Lost] = deque()

    def advance(self) -> None:
        """Answer the oldest call and what can be computed with it, or handle another event."""
        event = self._waiting.popleft() if self._waiting else self.transport.recv(None)
        if _work(event) is None:
            self.handle(event)
            return
        while len(self._waiting) < MOST_TOGETHER - 1:
            later = self.transport.recv(0)
            if later is None:
                break
            self._waiting.append(later)
        together = [event, *(later for later in self._waiting if _work(later) == _work(event))]
        self._waiting = deque(later for later in self._waiting if _work(later) != _work(event))
        self._answer([call for call in together if isinstance(call, Received)])

    def _answer(self, calls: Sequence[Received]) -> None:
        layer_idx = calls[0].frame.header.layer
        sound: list[Received] = []
        work: list[tuple[list[tuple[int, int]], Tensor]] = []
        for call in calls:
            try:
                pairs, rows = read_expert_call(call.frame)
                self._bank.check(layer_idx, pairs, rows)
            except ValueError as error:
                self.refuse(call.peer, error)
            else:
                sound.append(call)
                work.append((pairs, rows))
        if not sound:
            return
        for call, outputs in zip(sound, compute_together(self._bank, layer_idx, work), strict=True):
            try:
                self.transport.send(call.peer, expert_result(call.frame, outputs))
            except PeerLost:
                # Whoever asked is gone, and with it the need for an answer.
                log.info("%s: %s does not wait any more", self.spec.peer, call.peer)


def _work(event: Received | Lost | None) -> tuple[int, int] | None:
    """What calls that are computed together have in common; None: not a call."""
    if not isinstance(event, Received) or event.frame.header.kind is not FrameKind.EXPERT_CALL:
        return None
    return event.frame.header.layer, event.frame.header.dtype


def compute_together(
    bank: ComputesRows, layer_idx: int, calls: Sequence[tuple[Sequence[tuple[int, int]], Tensor]]
) -> list[Tensor]:
    """The outputs of each of `calls`, its (pairs, rows), in one pass over the experts' weights."""
    if len(calls) == 1:
        return [bank.forward(layer_idx, *calls[0])]
    pieces = [
        (expert, idx, rows)
        for idx, (pairs, all_rows) in enumerate(calls)
        for (expert, _), rows in zip(
            pairs, all_rows.split_with_sizes([count for _, count in pairs]), strict=True
        )
    ]
    by_expert = sorted(range(len(pieces)), key=lambda at: pieces[at][0])
    merged: dict[int, int] = {}
    for at in by_expert:
        merged[pieces[at][0]] = merged.get(pieces[at][0], 0) + len(pieces[at][2])
    parts = [pieces[at][2] for at in by_expert]
    outputs = bank.forward(layer_idx, list(merged.items()), torch.cat(parts))
    outputs_of = outputs.split_with_sizes([len(part) for part in parts])
    answers = dict(zip(by_expert, outputs_of, strict=True))
    return [
        torch.cat([answers[at] for at, piece in enumerate(pieces) if piece[1] == idx])
        for idx in range(len(calls))
    ]


def make_expert_worker(spec: WorkerSpec, transport: Transport, on_read: OnRead) -> ExpertWorker:
    """Load the experts that the placement gives to this index, and only those."""
    from models.kernels.native import use_kernels
    from shards.checkpoint import open_model
    from shards.loading import load_experts
    from shards.threads import dtype_of, use_threads

    group = spec.group
    use_threads(group.threads)
    use_kernels(group.kernels)
    config, checkpoint = open_model(group.model_path, on_read)
    assert group.placement is not None, "a group without expert workers has none to start"
    held = group.placement.held_by(spec.index)
    bank = load_experts(
        config, checkpoint, held, dtype_of(group.dtype), quantization=group.quantization
    )
    worker = ExpertWorker(spec, transport, bank)
    worker.bytes_read = checkpoint.bytes_read
    return worker
