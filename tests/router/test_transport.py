"""Both transports through one suite; what only sockets can suffer is in `test_sockets.py`."""

from __future__ import annotations

import array
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from router.transport.base import (
    Dtype,
    Frame,
    FrameKind,
    Header,
    Lost,
    PeerLost,
    Received,
    Transport,
)
from router.transport.local import LocalNetwork, LocalTransport
from router.transport.sockets import SocketTransport


class World:
    """Makes transports of one flavour; each belongs to the thread that uses it."""

    def __init__(self, flavour: str) -> None:
        self.flavour = flavour
        self.network = LocalNetwork()
        self.made: list[Transport] = []

    def make(self, name: str) -> Transport:
        transport: Transport
        if self.flavour == "local":
            transport = LocalTransport(name, self.network)
        else:
            host = "127.0.0.1" if self.flavour == "tcp" else None
            spin = 0.003 if self.flavour == "spinning" else 0.0
            transport = SocketTransport(
                name, "secret", tcp_host=host, dial_seconds=5, spin_seconds=spin
            )
        self.made.append(transport)
        return transport

    def address(self, transport: Transport) -> str:
        """Of this flavour only: with both, a socket on the same node prefers Unix."""
        return transport.address.split(",")[-1]

    def pair(self) -> tuple[Transport, Transport]:
        a, b = self.make("a"), self.make("b")
        self.connect(a, "b", b)
        return a, b

    def connect(self, dialer: Transport, peer: str, acceptor: Transport) -> None:
        with Serving(acceptor):
            dialer.connect(peer, self.address(acceptor))


class Serving:
    """Runs a transport that only accepts connections meanwhile."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.stopped = False
        self.thread = threading.Thread(target=self.run)

    def run(self) -> None:
        while not self.stopped:
            assert self.transport.recv(0.01) is None

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.stopped = True
        self.thread.join()


@pytest.fixture(params=["local", "unix", "tcp", "spinning"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    world = World(request.param)
    yield world
    for transport in world.made:
        transport.close()


def frame(number: int = 0, *buffers: bytes | bytearray, meta: bytes = b"") -> Frame:
    header = Header(kind=FrameKind.CONTROL, step=number)
    return Frame(header, meta, tuple(memoryview(b) for b in buffers))


def content(frame: Frame) -> tuple[Header, bytes, list[bytes]]:
    return frame.header, frame.meta, [bytes(b) for b in frame.buffers]


def receive(transport: Transport) -> Frame:
    item = transport.recv(5.0)
    assert isinstance(item, Received), item
    return item.frame


def in_threads(*functions: Callable[[], None]) -> None:
    failures: list[BaseException] = []

    def run(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(f,), daemon=True) for f in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "deadlock"
    assert not failures, failures


def test_every_field_arrives(world: World) -> None:
    a, b = world.pair()
    header = Header(
        kind=FrameKind.EXPERT_CALL,
        epoch=2**40,
        step=2**41,
        layer=31,
        micro_batch=1,
        source=-1,
        table_version=2**42,
        dtype=Dtype.BFLOAT16,
    )
    floats = memoryview(array.array("f", [1.0, 2.0]))
    a.send("b", Frame(header, b"meta", (memoryview(b"xyz"), memoryview(b""), floats)))
    item = b.recv(5.0)
    assert isinstance(item, Received)
    assert item.peer == "a"
    assert content(item.frame) == (header, b"meta", [b"xyz", b"", floats.tobytes()])
    assert all(not buffer.readonly for buffer in item.frame.buffers)
    b.send("a", frame())
    assert content(receive(a)) == content(frame())


def test_order_is_kept_across_sizes(world: World) -> None:
    a, b = world.pair()
    sent = [
        frame(n, bytes([n % 251]) * size, b"tail" * (n % 3), meta=bytes(n % 7 * 999))
        for n, size in enumerate([0, 1, 100, 8_192, 16_385, 131_072, 70_000, 3, 400_000] * 4)
    ]

    def write() -> None:
        for one in sent:
            a.send("b", one)

    def read() -> None:
        for one in sent:
            assert content(receive(b)) == content(one)

    in_threads(write, read)


def test_the_sender_may_reuse_its_buffer_at_once(world: World) -> None:
    a, b = world.pair()
    buffer = bytearray(b"before")
    a.send("b", frame(0, buffer))
    buffer[:] = b"after!"
    assert content(receive(b))[2] == [b"before"]


def test_big_sends_in_both_directions_at_once(world: World) -> None:
    a, b = world.pair()
    big = [frame(n, bytes([n]) * (6 << 20), meta=b"m" * 100_000) for n in range(3)]

    def talk(transport: Transport, peer: str) -> Callable[[], None]:
        def run() -> None:
            for one in big:
                transport.send(peer, one)
            for one in big:
                assert content(receive(transport)) == content(one)

        return run

    in_threads(talk(a, "b"), talk(b, "a"))


def test_a_ring_of_big_sends_does_not_deadlock(world: World) -> None:
    names = ["a", "b", "c"]
    ring = [world.make(name) for name in names]
    for n in range(3):
        world.connect(ring[n], names[n - 1], ring[n - 1])
    big = frame(0, bytes(6 << 20))

    def talk(n: int) -> Callable[[], None]:
        def run() -> None:
            ring[n].send(names[n - 1], big)
            item = ring[n].recv(10.0)
            assert isinstance(item, Received)
            assert item.peer == names[(n + 1) % 3]
            assert content(item.frame) == content(big)

        return run

    in_threads(*map(talk, range(3)))


def test_recv_times_out(world: World) -> None:
    a, b = world.pair()
    start = time.monotonic()
    assert a.recv(0) is None
    assert time.monotonic() - start < 0.5
    assert a.recv(0.1) is None
    assert 0.09 < time.monotonic() - start < 2.0
    b.send("a", frame())
    deadline = time.monotonic() + 5
    while (item := a.recv(0)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert isinstance(item, Received)


def test_wake_ends_a_blocked_recv(world: World) -> None:
    a, b = world.pair()
    timer = threading.Timer(0.05, a.wake)
    timer.start()
    assert a.recv(None) is None
    timer.join()
    assert a.recv(0.05) is None  # once only
    b.send("a", frame(1))
    a.wake()
    a.wake()
    assert a.recv(5.0) is None
    assert receive(a).header.step == 1  # nothing is lost
    assert a.recv(0) is None


def test_wake_under_fire(world: World) -> None:
    a, b = world.pair()

    def hammer() -> None:
        for _ in range(500):
            a.wake()

    def write() -> None:
        for n in range(200):
            b.send("a", frame(n))

    def read() -> None:
        numbers: list[int] = []
        while len(numbers) < 200:
            item = a.recv(5.0)
            if isinstance(item, Received):
                numbers.append(item.frame.header.step)
        assert numbers == list(range(200))

    in_threads(hammer, hammer, write, read)


def test_loss_is_reported_once_after_all_frames(world: World) -> None:
    a, b = world.pair()
    b.send("a", frame(1, bytes(50_000)))
    b.send("a", frame(2))
    b.close()
    assert [receive(a).header.step for _ in range(2)] == [1, 2]
    assert a.recv(5.0) == Lost("b")
    assert a.recv(0.05) is None
    with pytest.raises(PeerLost) as caught:
        a.send("b", frame())
    assert caught.value.peer == "b"


def test_unknown_peers_and_addresses(world: World) -> None:
    a, b = world.make("a"), world.make("b")
    with pytest.raises(PeerLost):
        a.send("b", frame())
    for address in ("", "unix:@conclave-nobody", "tcp:127.0.0.1:1", "local:b#99", "carrier-pigeon"):
        with pytest.raises(PeerLost):
            a.connect("b", address)
    with Serving(b), pytest.raises(PeerLost):
        a.connect("c", world.address(b))
    gone = world.address(b)
    b.close()
    b.close()
    with pytest.raises(PeerLost):
        a.connect("b", gone)
    with pytest.raises(ConnectionError):
        b.recv(0)
    b.wake()


def test_a_respawned_peer_replaces_the_old_one(world: World) -> None:
    a, old = world.pair()
    new = world.make("b")
    with Serving(a):
        new.connect("a", world.address(a))
    a.send("b", frame(7))
    assert receive(new).header.step == 7
    assert old.recv(5.0) == Lost("a")
    old.close()
    assert a.recv(0.1) is None
    new.close()
    assert a.recv(5.0) == Lost("b")


def test_an_unread_loss_does_not_outlive_the_replacement(world: World) -> None:
    a, old = world.pair()
    old.send("a", frame(1))
    old.close()
    new = world.make("b")
    world.connect(a, "b", new)  # while a still has the frame and the loss of the old one unread
    assert receive(a).header.step == 1
    assert a.recv(0.05) is None
    new.send("a", frame(2))
    assert receive(a).header.step == 2


def test_dialing_again_replaces(world: World) -> None:
    a, b = world.pair()
    world.connect(a, "b", b)
    a.send("b", frame(1))
    b.send("a", frame(2))
    assert receive(b).header.step == 1
    assert receive(a).header.step == 2
    assert a.recv(0.05) is None
    assert b.recv(0.05) is None


def test_two_peers_dial_each_other_at_once(world: World) -> None:
    for _ in range(5):
        a, b = world.make("a"), world.make("b")
        start = threading.Barrier(2)

        def talk(
            me: Transport, peer: str, other: Transport, start: threading.Barrier
        ) -> Callable[[], None]:
            def run() -> None:
                start.wait()
                me.connect(peer, world.address(other))
                for n in range(50):
                    me.send(peer, frame(n))
                for n in range(50):
                    assert receive(me).header.step == n
                start.wait()

            return run

        in_threads(talk(a, "b", b, start), talk(b, "a", a, start))
        assert a.recv(0.02) is None
        a.close()
        assert b.recv(5.0) == Lost("a")
        assert b.recv(0.02) is None


def test_a_peer_may_be_its_own(world: World) -> None:
    a = world.make("a")
    a.connect("a", world.address(a))
    for n in range(3):
        a.send("a", frame(n))
    assert [receive(a).header.step for _ in range(3)] == [0, 1, 2]
