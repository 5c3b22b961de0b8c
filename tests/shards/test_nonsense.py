"""What a worker makes of frames that no sane peer sends, and of peers that cannot be dialled."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.exchange_peer import worker_spec
from router.codec import decode
from router.expert_call import expert_call
from router.placement import Placement, RoutingTable, ShardAddress
from router.transport.base import Dtype, Frame, FrameKind, Header, Lost, Received
from router.transport.local import LocalNetwork, LocalTransport
from router.transport.tensors import tensor_buffer
from shards.control import INGRESS, Control, PeerAddress, WorkerEvent
from shards.dispatcher_worker import DispatcherWorker
from shards.expert_worker import ExpertWorker
from shards.moe_wire import MoeShape
from shards.spec import Role, WorkerSpec
from shards.stage_worker import StageWorker
from shards.worker import Worker, control_frame

WIDTH, TOP_K = 4, 1
SHAPE = MoeShape(WIDTH, TOP_K)
TABLE = RoutingTable(version=1, placement=Placement(num_shards=1, shards=((0,),)), addresses=())


class Bank:
    """One expert, which gives its rows back."""

    def check(self, layer_idx: int, pairs: Sequence[tuple[int, int]], rows: Tensor) -> None:
        if pairs[0][0] or rows.shape[1] != WIDTH:
            raise ValueError("not mine")

    def forward(self, layer_idx: int, pairs: Sequence[tuple[int, int]], rows: Tensor) -> Tensor:
        return rows


def buffer(data: bytes) -> memoryview:
    return memoryview(bytearray(data))


def header(kind: FrameKind, dtype: Dtype = Dtype.FLOAT32, **fields: int) -> Header:
    return Header(kind=kind, epoch=1, step=1, dtype=dtype, **fields)


def call(
    pairs: bytes, width: int = WIDTH, dtype: Dtype = Dtype.FLOAT32, sequence: int = 1
) -> Frame:
    rows = buffer(bytes(4 * width))
    meta = struct.pack("<Q", sequence)
    return Frame(header(FrameKind.EXPERT_CALL, dtype), meta, (buffer(pairs), rows))


RIGHT = struct.pack("<ii", 0, 1)
TO_ANYBODY = {
    "garbage": Frame(header(FrameKind.CONTROL), b"\xff\xff"),
    "a second hello": Frame(header(FrameKind.HELLO)),
    "a kind of others": Frame(header(FrameKind.TOKENS)),
}
TO_EXPERTS = {
    "one buffer": call(RIGHT)._replace(buffers=(buffer(RIGHT),)),
    "half a pair": call(b"123"),
    "no dtype": call(RIGHT, dtype=Dtype.NONE),
    "a negative count": call(struct.pack("<ii", 0, -1)),
    "an expert of others": call(struct.pack("<ii", 7, 1)),
    "another width": call(RIGHT, width=2 * WIDTH),
}
TO_DISPATCHERS = {
    "no buffers": Frame(header(FrameKind.MOE_CALL)),
    "no sequence number": Frame(header(FrameKind.EXPERT_RESULT), b"1", (buffer(b""),)),
    "an unknown expert": Frame(
        header(FrameKind.MOE_CALL),
        b"",
        (buffer(struct.pack("<q", 9)), buffer(bytes(4 * WIDTH)), buffer(bytes(4))),
    ),
    "an expert below zero": Frame(
        header(FrameKind.MOE_CALL),
        b"",
        (buffer(struct.pack("<q", -1)), buffer(bytes(4 * WIDTH)), buffer(bytes(4))),
    ),
}
TO_STAGES = {
    "no table": Frame(header(FrameKind.TABLE), b"\xff"),
    "no sequence number": Frame(header(FrameKind.EXPERT_RESULT), b"1", (buffer(b""),)),
}


def dispatching(spec: WorkerSpec, dispatch: str) -> WorkerSpec:
    return replace(
        spec, group=replace(spec.group, dispatch=dispatch, stage_layers=((0, 1), (1, 2)))
    )


def expert(transport: LocalTransport) -> Worker:
    return ExpertWorker(worker_spec(Role.EXPERT, 0, 1), transport, Bank())


def dispatcher(transport: LocalTransport) -> Worker:
    worker = DispatcherWorker(worker_spec(Role.DISPATCHER, 0, 1), transport, SHAPE)
    worker.on_table(TABLE)
    return worker


def stage(transport: LocalTransport) -> Worker:
    def no_runner(*_: object) -> None:
        raise AssertionError("no step is run here")

    spec = dispatching(worker_spec(Role.STAGE, 1, 1), "direct")
    return StageWorker(spec, transport, SHAPE, no_runner)  # type: ignore[arg-type]


MAKERS = {"expert": expert, "dispatcher": dispatcher, "stage": stage}
CASES = [
    *(("expert", what, frame) for what, frame in (TO_ANYBODY | TO_EXPERTS).items()),
    *(("dispatcher", what, frame) for what, frame in (TO_ANYBODY | TO_DISPATCHERS).items()),
    *(("stage", what, frame) for what, frame in (TO_ANYBODY | TO_STAGES).items()),
]


class World:
    """A worker and peers of it on one network."""

    def __init__(self, role: str) -> None:
        self.network = LocalNetwork()
        self.transport = LocalTransport(f"{role}-0", self.network)
        self.worker = MAKERS[role](self.transport)

    def peer(self, name: str) -> LocalTransport:
        peer = LocalTransport(name, self.network)
        peer.connect(self.transport.name, self.transport.address)
        return peer


@pytest.mark.parametrize(("role", "what", "frame"), CASES, ids=lambda case: str(case)[:40])
def test_nonsense_costs_its_sender_the_connection(role: str, what: str, frame: Frame) -> None:
    world = World(role)
    mad, sane = world.peer("mad-0"), world.peer("sane-0")
    mad.send(world.transport.name, frame)
    world.worker.advance()
    assert mad.recv(1.0) == Lost(world.transport.name)
    assert world.transport.recv(1.0) == Lost("mad-0")
    assert not world.worker.stopping
    assert sane.recv(0) is None


def test_a_sane_call_beside_a_mad_one_is_answered() -> None:
    world = World("expert")
    mad, sane = world.peer("mad-0"), world.peer("sane-0")
    rows = torch.arange(2.0 * WIDTH).view(2, WIDTH)
    right = expert_call(
        header(FrameKind.MOE_CALL), 1, 5, [(0, 2)], tensor_buffer(rows), Dtype.FLOAT32
    )
    for peer, frame in ((mad, call(RIGHT, width=2)), (sane, right), (mad, call(b"123"))):
        peer.send("expert-0", frame)
    world.worker.advance()
    answer = sane.recv(1.0)
    assert isinstance(answer, Received)
    assert bytes(answer.frame.buffers[0]) == rows.numpy().tobytes()
    assert mad.recv(1.0) == Lost("expert-0")


def test_a_table_of_the_coming_epoch_ends_the_calls_of_the_last() -> None:
    """A successor must not be asked what may have killed its predecessor."""
    network = LocalNetwork()
    to_stage, to_expert = LocalTransport("stage-1", network), LocalTransport("expert-0", network)
    publisher, ingress = LocalTransport("dispatcher-0", network), LocalTransport(INGRESS, network)
    worker = stage(to_stage)
    assert isinstance(worker, StageWorker)
    spec = dispatching(worker_spec(Role.DISPATCHER, 0, 1), "direct")
    dispatcher = DispatcherWorker(spec, publisher, SHAPE)
    publisher.connect("stage-1", to_stage.address)
    ingress.connect("dispatcher-0", publisher.address)

    links = worker._links
    links.set_table(TABLE)
    hidden, ids = torch.ones(1, WIDTH), torch.zeros(1, 1, dtype=torch.int64)
    held = links.dispatcher.submit(header(FrameKind.MOE_CALL), hidden, ids, torch.ones(1, 1))
    assert held.held == (0,)
    there = ShardAddress(shard=0, incarnation=1, address=to_expert.address)
    table = replace(TABLE, version=2, addresses=(there,))
    ingress.send("dispatcher-0", control_frame(Control(coming_epoch=2, table=table)))
    dispatcher.advance()
    worker.advance()
    assert to_expert.recv(0) is None
    held = links.dispatcher.submit(
        header(FrameKind.MOE_CALL)._replace(epoch=2), hidden, ids, torch.ones(1, 1)
    )
    question = to_expert.recv(1.0)
    assert isinstance(question, Received)
    assert question.frame.header.epoch == 2


def test_a_stage_that_cannot_dial_its_dispatcher_says_so() -> None:
    """Tables come from there: without it the stage would wait for ever for the next."""
    network = LocalNetwork()
    to_stage, ingress = LocalTransport("stage-1", network), LocalTransport(INGRESS, network)
    worker = stage(to_stage)
    ingress.connect("stage-1", to_stage.address)
    nobody = PeerAddress(peer="dispatcher-0", address="local:nobody")
    ingress.send("stage-1", control_frame(Control(coming_epoch=2, connect=(nobody,), ack=7)))
    worker.advance()
    told = [ingress.recv(1.0), ingress.recv(1.0)]
    events = [decode(WorkerEvent, t.frame.meta) for t in told if isinstance(t, Received)]
    assert events == [WorkerEvent(lost_epoch=2), WorkerEvent(ack=7)]
