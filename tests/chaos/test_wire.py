"""The proxy that the chaos suite puts between workers: it must harm nothing but what it is told."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from benchmarks.faults.wire import Wire
from router.transport.base import Frame, FrameKind, Header, Lost, Received
from router.transport.sockets import SocketTransport

SECRET = "wire"
LINK = ("stage-0", "dispatcher-0")


class Pair:
    """A stage that has dialled a dispatcher through the proxy."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.near = SocketTransport("stage-0", SECRET)
        self.far = SocketTransport("dispatcher-0", SECRET)
        self.address = wire.front("dispatcher-0", self.far.address)
        self.dial()

    def dial(self) -> None:
        # Both ends shake hands, and this thread is both.
        dialling = threading.Thread(target=self.near.connect, args=("dispatcher-0", self.address))
        dialling.start()
        while dialling.is_alive():
            assert self.far.recv(0.01) is None
        dialling.join()

    def exchange(self, size: int) -> None:
        """A frame there and its bytes back."""
        sent = Frame(Header(kind=FrameKind.MOE_CALL, step=size), b"m", (memoryview(b"x" * size),))
        self.near.send("dispatcher-0", sent)
        got = self.far.recv(5)
        assert isinstance(got, Received)
        assert (got.peer, got.frame.header.step) == ("stage-0", size)
        assert bytes(got.frame.buffers[0]) == b"x" * size
        self.far.send("stage-0", got.frame)
        back = self.near.recv(5)
        assert isinstance(back, Received)
        assert bytes(back.frame.buffers[0]) == b"x" * size

    def close(self) -> None:
        self.near.close()
        self.far.close()


@pytest.fixture(params=["unix", "tcp"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    wire = Wire(request.param)
    pair = Pair(wire)
    yield pair
    pair.close()
    wire.close()


def test_bytes_pass_unchanged(pair: Pair) -> None:
    assert pair.wire.links() == [LINK]
    for size in (1, 1000, 600_000):
        pair.exchange(size)


def test_a_reset_is_seen_by_both_and_can_be_dialled_again(pair: Pair) -> None:
    assert pair.wire.reset(("stage-1", "dispatcher-0")) == 0, "no such link"
    pair.exchange(10)
    assert pair.wire.reset(LINK) == 1
    assert pair.near.recv(5) == Lost("dispatcher-0")
    assert pair.far.recv(5) == Lost("stage-0")
    assert pair.wire.links() == []
    pair.dial()
    pair.exchange(10)


def test_a_cut_lets_half_a_frame_through(pair: Pair) -> None:
    assert pair.wire.cut(LINK) == 1
    frame = Frame(Header(kind=FrameKind.MOE_CALL), b"", (memoryview(b"y" * 5000),))
    pair.near.send("dispatcher-0", frame)
    assert pair.far.recv(5) == Lost("stage-0"), "half a frame is none"
    assert pair.near.recv(5) == Lost("dispatcher-0")


def test_a_slow_link_is_slow_until_it_is_calmed(pair: Pair) -> None:
    begin = time.monotonic()
    assert pair.wire.slow(LINK, delay=0.2) == 1
    pair.exchange(10)
    assert time.monotonic() - begin >= 0.4, "held up on the way there and on the way back"
    begin = time.monotonic()
    assert pair.wire.slow(LINK, rate=100_000.0) == 1
    pair.exchange(10_000)
    assert time.monotonic() - begin >= 0.2
    pair.wire.calm()
    pair.exchange(200_000)
