"""A stateless expert worker: rows in, rows out, for the logical experts it holds."""

from __future__ import annotations

from router.expert_call import expert_result, read_expert_call
from router.transport.base import Frame, FrameKind, PeerLost, Transport
from shards.expert_bank import ExpertBank
from shards.load_progress import OnRead
from shards.spec import WorkerSpec
from shards.worker import Worker


class ExpertWorker(Worker):
    """Answers expert calls of any stage or dispatcher; a repeated call gives the same bits."""

    def __init__(self, spec: WorkerSpec, transport: Transport, bank: ExpertBank) -> None:
        super().__init__(spec, transport)
        self._bank = bank

    def on_frame(self, peer: str, frame: Frame) -> None:
        """Compute one EXPERT_CALL and answer its sender."""
        if frame.header.kind is not FrameKind.EXPERT_CALL:
            super().on_frame(peer, frame)
            return
        pairs, rows = read_expert_call(frame)
        outputs = self._bank.forward(frame.header.layer, pairs, rows)
        try:
            self.transport.send(peer, expert_result(frame, outputs))
        except PeerLost:
            # Whoever asked is gone, and with it the need for an answer.
            self.on_lost(peer)


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
