"""Expert workers: calls that wait together are answered one by one, with the bits of each alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.exchange_peer import worker_spec
from router.expert_call import call_sequence, expert_call, read_expert_call
from router.transport.base import Dtype, Frame, FrameKind, Header, Lost, Received
from router.transport.local import LocalNetwork, LocalTransport
from router.transport.tensors import buffer_tensor, tensor_buffer
from shards.expert_worker import ExpertWorker
from shards.spec import Role

WIDTH = 6


class Experts:
    """Expert e of layer l: rows · (e + 2) + l. Remembers its passes."""

    def __init__(self) -> None:
        self.passes: list[tuple[int, list[tuple[int, int]]]] = []

    def check(self, layer_idx: int, pairs: Sequence[tuple[int, int]], rows: Tensor) -> None:
        assert rows.shape[1] == WIDTH

    def forward(self, layer_idx: int, pairs: Sequence[tuple[int, int]], rows: Tensor) -> Tensor:
        self.passes.append((layer_idx, list(pairs)))
        outputs, start = [], 0
        for expert, count in pairs:
            outputs.append(rows[start : start + count] * (expert + 2) + layer_idx)
            start += count
        assert start == len(rows)
        return torch.cat(outputs)


class Waiting(LocalTransport):
    """A transport in whose inbox everything is there at once."""

    def __init__(self) -> None:
        super().__init__("expert-0", LocalNetwork())
        self.events: deque[Received | Lost] = deque()
        self.sent: list[tuple[str, Frame]] = []

    def recv(self, timeout: float | None) -> Received | Lost | None:
        return self.events.popleft() if self.events else None

    def send(self, peer: str, frame: Frame) -> None:
        self.sent.append((peer, frame))


def call(peer: str, sequence: int, layer: int, pairs: list[tuple[int, int]]) -> Received:
    count = sum(number for _, number in pairs)
    rows = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(sequence))
    header = Header(kind=FrameKind.MOE_CALL, step=sequence, layer=layer)
    frame = expert_call(header, 1, sequence, pairs, tensor_buffer(rows), Dtype.FLOAT32)
    return Received(peer, frame)


def test_calls_of_a_layer_that_wait_share_a_pass() -> None:
    transport, experts = Waiting(), Experts()
    worker = ExpertWorker(worker_spec(Role.EXPERT, 0, 4), transport, experts)
    calls = [
        call("stage-0", 1, 3, [(0, 2), (2, 1)]),
        call("stage-1", 2, 5, [(2, 1)]),
        call("stage-0", 3, 3, [(2, 3), (3, 1)]),
        call("stage-1", 4, 3, [(1, 1), (0, 2)]),  # in an order of its own
    ]
    transport.events.extend([*calls, Lost("stage-1")])
    for _ in range(3):
        worker.advance()
    assert experts.passes == [(3, [(0, 4), (1, 1), (2, 4), (3, 1)]), (5, [(2, 1)])]
    answers = {call_sequence(frame): (peer, frame) for peer, frame in transport.sent}
    for one in calls:
        pairs, rows = read_expert_call(one.frame)
        peer, frame = answers.pop(call_sequence(one.frame))
        assert peer == one.peer
        assert frame.header.key == one.frame.header.key
        alone = Experts().forward(frame.header.layer, pairs, rows)
        got = buffer_tensor(frame.buffers[0], torch.float32, (len(rows), WIDTH))
        assert torch.equal(got, alone)
    assert not answers
    assert not transport.events
