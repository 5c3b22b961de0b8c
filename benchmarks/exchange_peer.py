"""The other end of an exchange, as a process: one that only echoes, over a bare socket or as the
expert and dispatcher workers that a model instance has.

python -m benchmarks.exchange_peer bare|expert|dispatcher INDEX NUM_EXPERTS actor|direct
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from router.engine import EngineLimits
from router.placement import Placement
from router.transport.sockets import SocketTransport
from shards.cores import available_cores
from shards.dispatcher_worker import DispatcherWorker
from shards.expert_worker import ExpertWorker
from shards.moe_wire import MoeShape
from shards.spec import GroupSpec, Role, WorkerSpec
from shards.threads import use_threads

WIDTH = 4096
ROW_BYTES = 2 * WIDTH
SECRET = "benchmark"


class EchoExperts:
    """Experts that give their rows back."""

    def check(self, layer_idx: int, pairs: Sequence[tuple[int, int]], rows: Tensor) -> None:
        """All are welcome."""

    def forward(self, layer_idx: int, pairs: Sequence[tuple[int, int]], rows: Tensor) -> Tensor:
        """The rows."""
        return rows


def worker_spec(role: Role, index: int, num_experts: int) -> WorkerSpec:
    """A worker of a model instance with one expert per shard."""
    group = GroupSpec(
        model_path="",
        dtype="bfloat16",
        executor="pipeline",
        dispatch="actor",
        stage_layers=((0, 1),),
        placement=Placement(
            num_shards=num_experts, shards=tuple((expert,) for expert in range(num_experts))
        ),
        limits=EngineLimits(
            block_size=16,
            num_blocks=1,
            num_state_slots=0,
            max_num_seqs=1,
            max_num_batched_tokens=16,
            max_model_len=16,
        ),
        threads=1,
        secret=SECRET,
    )
    return WorkerSpec(group=group, role=role, index=index)


def spin(num_experts: int, *, dispatcher: bool) -> float:
    """How long our processes look before they sleep: as in a model instance, only with a core each.

    The dispatcher of direct dispatch does nothing and is not started.
    """
    return 100e-6 if 1 + num_experts + dispatcher <= available_cores() else 0.0


def echo_bare(name: str) -> None:
    """Echo messages of a size that the first eight bytes of a connection tell, blocking."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(f"\0{name}")
        listener.listen()
        print(name, flush=True)
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
                size = int.from_bytes(connection.recv(8, socket.MSG_WAITALL), "little")
                message = memoryview(bytearray(size))
                while read_all(connection, message):
                    connection.sendall(message)


def read_all(connection: socket.socket, message: memoryview) -> bool:
    """Fill `message`; False at the end of the stream."""
    filled = 0
    while filled < len(message):
        count = connection.recv_into(message[filled:])
        if not count:
            return False
        filled += count
    return True


def main() -> None:
    """Print the address, then answer until nobody is there."""
    role, index, num_experts = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    if role == "bare":
        echo_bare(f"conclave-bare-{os.getpid()}")
        return
    use_threads(1)
    spec = worker_spec(Role(role), index, num_experts)
    transport = SocketTransport(
        spec.peer, SECRET, spin_seconds=spin(num_experts, dispatcher=sys.argv[4] == "actor")
    )
    worker: ExpertWorker | DispatcherWorker
    if role == "expert":
        worker = ExpertWorker(spec, transport, EchoExperts())
    else:
        worker = DispatcherWorker(spec, transport, MoeShape(WIDTH, num_experts))
    print(transport.address, flush=True)
    with torch.inference_mode():
        worker.run()


if __name__ == "__main__":
    main()
