"""Exchanges of a driver with one peer or four: how long, and how much of the processors."""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.exchange_peer import ROW_BYTES, SECRET, WIDTH, read_all, spin, worker_spec
from models.interface import Routing
from router.placement import RoutingTable, ShardAddress
from router.transport.base import FrameKind, Received
from router.transport.sockets import SocketTransport
from shards.control import INGRESS, Control
from shards.expert_backend import ExchangeKey
from shards.moe_wire import MoeShape
from shards.remote_experts import ActorBackend, DirectBackend, ExpertLinks
from shards.spec import Role
from shards.worker import control_frame

Exchange = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds of one exchange; `cpu` is the processor time of all processes together."""

    p50: float
    p99: float
    cpu: float


class Peers:
    """Processes of this benchmark: started, addressed, ended."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[str]] = []

    def start(self, role: str, index: int, fan_out: int, dispatch: str = "") -> str:
        """Start one peer; its address."""
        command = (sys.executable, "-m", "benchmarks.exchange_peer")
        process = subprocess.Popen(
            [*command, role, str(index), str(fan_out), dispatch],
            stdout=subprocess.PIPE,
            text=True,
        )
        self._processes.append(process)
        assert process.stdout is not None
        return process.stdout.readline().strip()

    def close(self) -> None:
        """Kill what was started."""
        for process in self._processes:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def measure(exchange: Exchange, seconds: float) -> Timing:
    """Repeat an exchange for about `seconds`, after a tenth of that to warm up."""
    _repeat(exchange, seconds / 10)
    cpu = cpu_seconds()
    times = _repeat(exchange, seconds)
    cpu = cpu_seconds() - cpu
    cuts = statistics.quantiles(times, n=100)
    return Timing(p50=1e6 * cuts[49], p99=1e6 * cuts[98], cpu=1e6 * cpu / len(times))


def _repeat(exchange: Exchange, seconds: float) -> list[float]:
    times: list[float] = []
    until = time.perf_counter() + seconds
    while (begin := time.perf_counter()) < until or len(times) < 20:
        exchange()
        times.append(time.perf_counter() - begin)
    return times


def cpu_seconds() -> float:
    """Processor time so far of this process and everything it has started."""
    # Linux: the clock of another process, by its id.
    return sum(time.clock_gettime(~pid << 3 | 2) for pid in _family(os.getpid()))


def _family(pid: int) -> Iterator[int]:
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            yield from _family(int(child))


@contextmanager
def bare(fan_out: int, num_bytes: int) -> Iterator[Exchange]:
    """A blocking Unix socket to each peer; a message to each, then an answer of each."""
    peers, sockets = Peers(), []
    for index in range(fan_out):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        connection.connect("\0" + peers.start("bare", index, fan_out))
        connection.sendall(num_bytes.to_bytes(8, "little"))
        sockets.append(connection)
    message = memoryview(bytearray(num_bytes))

    def exchange() -> None:
        for connection in sockets:
            connection.sendall(message)
        for connection in sockets:
            assert read_all(connection, message)

    try:
        yield exchange
    finally:
        peers.close()


@contextmanager
def conclave(dispatch: str, fan_out: int, num_bytes: int) -> Iterator[Exchange]:
    """Rows of tokens through the dispatcher to shards that give them back: `num_bytes` each."""
    peers = Peers()
    transport = SocketTransport(
        f"{Role.STAGE}-0", SECRET, spin_seconds=spin(fan_out, dispatcher=dispatch == "actor")
    )
    placement = worker_spec(Role.STAGE, 0, fan_out).group.placement
    assert placement is not None
    table = RoutingTable(
        version=1,
        placement=placement,
        addresses=tuple(
            ShardAddress(
                shard=i, incarnation=0, address=peers.start("expert", i, fan_out, dispatch)
            )
            for i in range(fan_out)
        ),
    )
    links = ExpertLinks(transport, _lost, patience=30.0)

    def advance() -> None:
        received = transport.recv(None)
        assert isinstance(received, Received)
        if received.frame.header.kind is FrameKind.EXPERT_RESULT:
            links.on_result(*received)
        else:
            actor.on_result(received.frame)

    actor = ActorBackend(transport, MoeShape(WIDTH, fan_out), 0, advance)
    backend: ActorBackend | DirectBackend = DirectBackend(links, 0, advance)
    if dispatch == "direct":
        links.set_table(table)
    else:
        backend = actor
        address = peers.start("dispatcher", 0, fan_out, dispatch)
        owner = SocketTransport(INGRESS, SECRET)
        owner.connect(f"{Role.DISPATCHER}-0", address)
        owner.send(f"{Role.DISPATCHER}-0", control_frame(Control(table=table)))
        transport.connect(f"{Role.DISPATCHER}-0", address)
    exchange = _exchange(backend, fan_out, num_bytes // ROW_BYTES)
    try:
        yield exchange
    finally:
        transport.close()
        peers.close()


def _lost(peer: str) -> None:
    raise ConnectionError(f"{peer} is gone")


def _exchange(backend: ActorBackend | DirectBackend, fan_out: int, num_tokens: int) -> Exchange:
    """Every token goes to every shard."""
    hidden = torch.randn(num_tokens, WIDTH).to(torch.bfloat16)
    expert_ids = torch.arange(fan_out).repeat(num_tokens, 1)
    weights = torch.full((num_tokens, fan_out), 1.0 / fan_out, dtype=torch.bfloat16)
    routing = Routing(expert_ids, weights, weights)
    step = 0

    def exchange() -> None:
        nonlocal step
        step += 1
        out = backend.submit(ExchangeKey(0, step, 0), 0, hidden, routing).result()
        assert out.shape == hidden.shape

    with torch.inference_mode():
        out = backend.submit(ExchangeKey(0, 0, 0), 0, hidden, routing).result()
    assert torch.equal(out, hidden), "equal weights of copies add up to the row"
    return exchange


@contextmanager
def ray_actors(fan_out: int, num_bytes: int) -> Iterator[Exchange]:
    """Plain actor calls with NumPy arrays."""
    import numpy as np
    import ray

    class Echo:
        def echo(self, rows: object) -> object:
            return rows

    actors = [ray.remote(num_cpus=0)(Echo).remote() for _ in range(fan_out)]
    rows = np.zeros(num_bytes, dtype=np.uint8)

    def exchange() -> None:
        ray.get([actor.echo.remote(rows) for actor in actors])

    try:
        yield exchange
    finally:
        for actor in actors:
            ray.kill(actor)
