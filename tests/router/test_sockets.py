"""What only sockets can suffer: strangers, garbage, killed processes, peers that do not read."""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import accumulate, count, cycle

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from router.transport import framing, sockets
from router.transport.base import Dtype, Frame, FrameKind, Header, Lost, PeerLost, Received
from router.transport.body_pool import BodyPool
from router.transport.framing import FrameReader, MalformedFrame, frame_parts
from router.transport.handshake import Handshake, HandshakeRefused, Identity
from router.transport.sockets import SocketTransport
from router.transport.tensors import buffer_tensor, tensor_buffer, torch_dtype, wire_dtype


class Listener:
    """A transport that runs in its own thread and keeps what it receives."""

    def __init__(self, name: str = "listener", **options: float) -> None:
        self.transport = SocketTransport(name, "secret", tcp_host="127.0.0.1", **options)
        self.items: list[Received | Lost] = []
        self.stopped = False
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        while not self.stopped:
            item = self.transport.recv(None)
            if item is not None:
                self.items.append(item)
        self.transport.close()

    def wait(self, count: int) -> list[Received | Lost]:
        deadline = time.monotonic() + 5
        while len(self.items) < count:
            assert time.monotonic() < deadline, self.items
            time.sleep(0.002)
        return self.items

    def dial(self, which: str = "unix") -> socket.socket:
        """A raw connection from somebody who does not use our code."""
        unix, tcp = self.transport.address.split(",")
        if which == "unix":
            raw = socket.socket(socket.AF_UNIX)
            raw.connect(unix.replace("unix:@", "\0"))
        else:
            raw = socket.create_connection(("127.0.0.1", int(tcp.rpartition(":")[2])))
        raw.settimeout(5)
        return raw

    def stop(self) -> None:
        self.stopped = True
        self.transport.wake()
        self.thread.join(10)
        assert not self.thread.is_alive()


@pytest.fixture
def listener() -> Iterator[Listener]:
    listener = Listener()
    yield listener
    listener.stop()


@pytest.fixture(scope="module")
def long_lived() -> Iterator[Listener]:
    listener = Listener()
    yield listener
    listener.stop()


def wire(frame: Frame) -> bytes:
    return b"".join(bytes(part) for part in frame_parts(frame)[0])


def hello(payload: bytes) -> bytes:
    return wire(Frame(Header(kind=FrameKind.HELLO), payload))


def receive_frame(raw: socket.socket) -> Frame:
    reader = FrameReader(1 << 16, 1 << 16)
    while (frame := reader.next_frame()) is None:
        count = raw.recv_into(reader.space(), 1)  # nothing of the next frame
        assert count
        reader.advance(count)
    return frame


def shake_hands(raw: socket.socket, name: str, secret: str = "secret") -> None:
    handshake = Handshake(Identity.create(name), secret, expected="listener")
    raw.sendall(hello(handshake.opening))
    while handshake.peer is None:
        reply = handshake.answer(receive_frame(raw).meta)
        if reply is not None:
            raw.sendall(hello(reply))


def assert_hung_up(raw: socket.socket) -> None:
    with suppress(ConnectionError):
        while raw.recv(1 << 16):
            pass
    raw.close()


def write_until_refused(raw: socket.socket, chunks: Iterable[bytes], pause: float = 0) -> bool:
    """Whether the other side hung up before everything was written."""
    try:
        for chunk in chunks:
            raw.sendall(chunk)
            time.sleep(pause)
    except ConnectionError:
        return True
    finally:
        raw.close()
    return False


def assert_serves(listener: Listener) -> None:
    """The process still accepts and exchanges."""
    listener.items.clear()
    friend = SocketTransport("friend", "secret")
    friend.connect("listener", listener.transport.address)
    friend.send("listener", Frame(Header(kind=FrameKind.EVENT), b"hi"))
    friend.close()
    first, second = listener.wait(2)
    assert isinstance(first, Received)
    assert first.frame.meta == b"hi"
    assert second == Lost("friend")


VALID = [
    hello(bytes(60)),
    wire(Frame(Header(kind=FrameKind.STEP), b"x" * 50, (memoryview(bytes(99)),))),
]


@given(
    st.one_of(
        st.binary(max_size=300),
        st.builds(
            lambda base, at, byte: base[: at % len(base)] + byte + base[at % len(base) + 1 :],
            st.sampled_from(VALID),
            st.integers(0, 500),
            st.binary(min_size=1, max_size=9),
        ),
        st.builds(lambda base, size: base * size, st.sampled_from(VALID), st.integers(1, 50)),
    ),
    st.sampled_from(["unix", "tcp"]),
)
@settings(max_examples=150, deadline=None)
def test_raw_bytes_never_kill_the_listener(
    long_lived: Listener, payload: bytes, which: str
) -> None:
    raw = long_lived.dial(which)
    with suppress(OSError):  # it may hang up while we still write
        raw.sendall(payload)
        raw.shutdown(socket.SHUT_WR)
    assert_hung_up(raw)
    assert long_lived.thread.is_alive()
    assert not [item for item in long_lived.items if isinstance(item, Received)]


EXAMPLES = count()
BODIES = st.sampled_from([0, 1, 100, 4_000, 40_000, 140_000])


@given(
    bodies=st.lists(st.tuples(BODIES, BODIES), min_size=1, max_size=4),
    harm=st.sampled_from(["none", "flip", "cut", "huge"]),
    data=st.data(),
    which=st.sampled_from(["unix", "tcp"]),
)
@settings(max_examples=120, deadline=None)
def test_what_a_known_peer_sends_is_right_up_to_the_first_wrong_bit(
    long_lived: Listener,
    bodies: list[tuple[int, int]],
    harm: str,
    data: st.DataObject,
    which: str,
) -> None:
    frames = [
        Frame(
            Header(kind=FrameKind.STEP, step=n),
            bytes([n]) * meta,
            (memoryview(os.urandom(size)), memoryview(b"end")),
        )
        for n, (meta, size) in enumerate(bodies)
    ]
    stream = bytearray().join(map(wire, frames))
    at = data.draw(st.integers(0, len(stream) - 1))
    if harm == "flip":
        stream[at] ^= 1 << data.draw(st.integers(0, 7))
    elif harm == "cut":
        del stream[at:]
    elif harm == "huge":
        at = 56  # the first length of the first frame
        stream[at : at + 8] = data.draw(st.integers(1 << 20, 2**64 - 1)).to_bytes(8, "little")
    ends = list(accumulate(len(wire(frame)) for frame in frames))
    num_whole = len(frames) if harm == "none" else sum(end <= at for end in ends)
    # All draws come first: one that ends the example must not leave a connection behind.
    chunks = data.draw(st.lists(st.sampled_from([1, 57, 5_000, 100_000, 1 << 20]), min_size=1))
    name = f"fuzz-{next(EXAMPLES)}"
    raw = long_lived.dial(which)
    shake_hands(raw, name)
    with suppress(OSError):
        for chunk in cycle(chunks):
            size = max(chunk, len(stream) // 20)  # not for ever
            raw.sendall(stream[:size])
            del stream[:size]
            if not stream:
                break
        raw.shutdown(socket.SHUT_WR)
    assert_hung_up(raw)
    deadline = time.monotonic() + 5
    while Lost(name) not in long_lived.items:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    received = [i.frame for i in long_lived.items if isinstance(i, Received) and i.peer == name]
    assert num_whole <= len(received) <= len(frames) + 1
    for got, sent in zip(received[:num_whole], frames, strict=False):
        assert got == sent
    assert long_lived.thread.is_alive()
    long_lived.items.clear()


def test_an_announced_gigabyte_costs_nothing_until_it_comes(listener: Listener) -> None:
    head = bytearray(wire(Frame(Header(kind=FrameKind.STEP), b"", (memoryview(b"x"),))))
    head[56:64] = ((1 << 30) - 1).to_bytes(8, "little")
    raws = [listener.dial() for _ in range(3)]
    before = resident_bytes()
    for n, raw in enumerate(raws):
        shake_hands(raw, f"liar-{n}")
        raw.sendall(head + bytes(200_000))
    time.sleep(0.3)
    assert resident_bytes() - before < 100 << 20
    for raw in raws:
        raw.close()
    assert set(listener.wait(3)) == {Lost(f"liar-{n}") for n in range(3)}
    listener.items.clear()
    assert_serves(listener)


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_large_bodies_are_used_again_only_when_nobody_holds_them() -> None:
    pool = BodyPool()
    first = pool.take(100_000)
    first[:] = b"a" * 100_000
    part = first[50:60]
    second = pool.take(100_000)
    second[:] = b"b" * 100_000
    assert bytes(part) == b"a" * 10
    address = torch.frombuffer(second, dtype=torch.uint8).data_ptr()
    del second
    tensor = torch.frombuffer(pool.take(90_000), dtype=torch.uint8)
    assert tensor.data_ptr() == address
    for _ in range(9):
        pool.take(90_000)[:] = b"c" * 90_000
        assert (tensor != ord("c")).all()


def test_it_still_serves_after_all_that(long_lived: Listener) -> None:
    assert_serves(long_lived)


def test_a_flood_is_cut_off_before_it_costs_memory(listener: Listener) -> None:
    # A valid head that announces a gigabyte, and a stream that never becomes a frame.
    fixed = bytearray(wire(Frame(Header(kind=FrameKind.HELLO), b"")))
    fixed[12:16] = (1 << 30).to_bytes(4, "little")
    tracemalloc.start()
    for flood in (bytes(fixed) + bytes(4 << 20), bytes(4 << 20)):
        assert write_until_refused(listener.dial(), [flood] * 100)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40 << 20
    assert_serves(listener)


@pytest.mark.parametrize(("field", "width", "value"), [(12, 4, 65 << 20), (56, 8, 2 << 30)])
def test_oversized_frames_are_refused_before_allocation(field: int, width: int, value: int) -> None:
    head = bytearray(wire(Frame(Header(kind=FrameKind.STEP), b"", (memoryview(b"x"),))))
    head[field : field + width] = value.to_bytes(width, "little")
    reader = FrameReader(framing.STAGING_BYTES, framing.MAX_FRAME_BYTES)
    reader.space()[: len(head)] = head
    reader.advance(len(head))
    tracemalloc.start()
    with pytest.raises(MalformedFrame):
        reader.next_frame()
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_frame_that_no_peer_would_accept_is_not_sent(listener: Listener) -> None:
    friend = SocketTransport("friend", "secret")
    friend.connect("listener", listener.transport.address)
    too_many = Frame(Header(kind=FrameKind.STEP), b"", (memoryview(b""),) * 513)
    with pytest.raises(ValueError, match="allowed"):
        friend.send("listener", too_many)
    friend.send("listener", Frame(Header(kind=FrameKind.EVENT), b"fine"))
    listener.wait(1)
    friend.close()


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_frames_survive_any_fragmentation(data: st.DataObject) -> None:
    sizes = st.sampled_from([0, 1, 7, 100, 4_000, 16_384, 16_385, 40_000, 200_000])
    frames = [
        Frame(
            Header(kind=FrameKind.RESULT, step=n, dtype=Dtype.FLOAT16),
            bytes([n]) * data.draw(sizes),
            tuple(memoryview(bytes([n + i]) * data.draw(sizes)) for i in range(n % 3)),
        )
        for n in range(data.draw(st.integers(1, 4)))
    ]
    stream = memoryview(b"".join(map(wire, frames)))
    reader = FrameReader(framing.STAGING_BYTES, framing.MAX_FRAME_BYTES)
    seen = []
    while stream:
        space = reader.space()
        count = min(len(space), len(stream), data.draw(st.sampled_from([1, 60, 5_000, 150_000])))
        assert count
        space[:count] = stream[:count]
        stream = stream[count:]
        reader.advance(count)
        while (frame := reader.next_frame()) is not None:
            seen.append(frame)
    assert [(f.header, f.meta, [bytes(b) for b in f.buffers]) for f in seen] == [
        (f.header, f.meta, [bytes(b) for b in f.buffers]) for f in frames
    ]


def test_a_wrong_secret_is_refused(listener: Listener, caplog: pytest.LogCaptureFixture) -> None:
    stranger = SocketTransport("stranger", "guess", dial_seconds=2)
    with caplog.at_level(logging.WARNING, "conclave.transport"), pytest.raises(PeerLost):
        stranger.connect("listener", listener.transport.address)
    assert "wrong group secret" in caplog.text
    stranger.close()
    assert_serves(listener)


def test_the_acceptor_checks_the_dialer_too(listener: Listener) -> None:
    raw = listener.dial()
    raw.sendall(hello(bytes(48) + b"mallory"))
    receive_frame(raw)  # its proof and challenge
    raw.sendall(hello(bytes(32)))
    assert_hung_up(raw)
    assert_serves(listener)


def test_a_proof_cannot_be_reflected_or_replayed() -> None:
    dialer = Handshake(Identity.create("a"), "secret", expected="b")
    acceptor = Handshake(Identity.create("b"), "secret")
    challenge = acceptor.answer(dialer.opening)
    assert challenge is not None
    with pytest.raises(HandshakeRefused):
        acceptor.answer(challenge[:32])  # its own proof sent back
    proof = dialer.answer(challenge)
    assert proof is not None
    other = Handshake(Identity.create("b"), "secret")
    other.answer(dialer.opening)
    with pytest.raises(HandshakeRefused):
        other.answer(proof)  # recorded from another connection
    for flipped in (0, 40, len(challenge) - 1):
        tampered = bytearray(challenge)
        tampered[flipped] ^= 1
        with pytest.raises(HandshakeRefused):
            Handshake(Identity.create("a"), "secret", expected="b").answer(bytes(tampered))


def test_a_frame_before_the_handshake_is_refused(listener: Listener) -> None:
    raw = listener.dial()
    raw.sendall(wire(Frame(Header(kind=FrameKind.STEP), b"run this")))
    assert_hung_up(raw)
    assert_serves(listener)


def test_a_stranger_that_says_nothing_is_dropped_in_time() -> None:
    listener = Listener(hello_seconds=0.1)
    raw = listener.dial()
    start = time.monotonic()
    assert_hung_up(raw)
    assert time.monotonic() - start < 3
    bytewise = [bytes([byte]) for byte in VALID[0] * 10]
    assert write_until_refused(listener.dial(), bytewise, pause=0.01)
    assert_serves(listener)
    listener.stop()


def test_a_busy_acceptor_does_not_count_its_own_absence() -> None:
    busy = SocketTransport("listener", "secret", hello_seconds=0.1)
    raw = socket.socket(socket.AF_UNIX)
    raw.settimeout(5)
    raw.connect(busy.address.replace("unix:@", "\0"))
    handshake = Handshake(Identity.create("dialer"), "secret", expected="listener")
    assert busy.recv(0) is None  # accepted: the clock runs
    raw.sendall(hello(handshake.opening))
    for _ in range(2):
        time.sleep(0.15)  # computing
        assert busy.recv(0) is None
        reply = handshake.answer(receive_frame(raw).meta)
        if reply is not None:
            raw.sendall(hello(reply))
    assert handshake.peer is not None
    raw.close()
    assert busy.recv(1.0) == Lost("dialer")
    busy.close()


def test_idle_strangers_are_bounded(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "MAX_STRANGERS", 4)
    raws = [listener.dial() for _ in range(8)]
    for raw in raws[:4]:
        assert_hung_up(raw)
    assert_serves(listener)
    for raw in raws[4:]:
        raw.close()


def test_a_truncated_frame_is_a_loss_not_a_frame(listener: Listener) -> None:
    whole = wire(Frame(Header(kind=FrameKind.EVENT, step=1), b"whole"))
    for cut in (1, 30, 57, len(whole) - 1):
        raw = listener.dial()
        shake_hands(raw, "cut")
        raw.sendall(whole + whole[:cut])
        raw.close()
        received, lost = listener.wait(2)
        assert isinstance(received, Received)
        assert lost == Lost("cut")
        listener.items.clear()


def test_garbage_from_a_known_peer_costs_only_its_connection(
    listener: Listener, caplog: pytest.LogCaptureFixture
) -> None:
    friend = SocketTransport("friend", "secret")
    friend.connect("listener", listener.transport.address)
    raw = listener.dial()
    shake_hands(raw, "broken")
    with caplog.at_level(logging.WARNING, "conclave.transport"):
        raw.sendall(b"\xff" * 100)
        assert_hung_up(raw)
        friend.send("listener", Frame(Header(kind=FrameKind.EVENT)))
        items = listener.wait(2)
    assert "dropped connection of broken" in caplog.text
    assert items[0] == Lost("broken")
    assert isinstance(items[1], Received)
    friend.close()


CHILD = """
import sys, time
from router.transport.base import Frame, FrameKind, Header
from router.transport.sockets import SocketTransport
transport = SocketTransport("child", "secret")
transport.connect("listener", sys.argv[1])
transport.send("listener", Frame(Header(kind=FrameKind.EVENT), b"last words"))
assert "torch" not in sys.modules
time.sleep(60)
"""


@pytest.mark.parametrize("which", [0, 1], ids=["unix", "tcp"])
def test_a_killed_process_is_lost_at_once(listener: Listener, which: int) -> None:
    address = listener.transport.address.split(",")[which]
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    child = subprocess.Popen([sys.executable, "-c", CHILD, address], cwd=root)
    try:
        (first,) = listener.wait(1)
        assert isinstance(first, Received)
        assert first.frame.meta == b"last words"
        start = time.monotonic()
        os.kill(child.pid, signal.SIGKILL)
        assert listener.wait(2)[1] == Lost("child")
        assert time.monotonic() - start < 2
    finally:
        child.kill()
        child.wait()


class Deaf:
    """A peer that shakes hands and then reads nothing unless told to."""

    def __init__(self) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind("\0conclave-test-deaf-" + os.urandom(8).hex())
        self.listener.listen()
        self.address = "unix:@" + self.listener.getsockname()[1:].decode()
        self.thread = threading.Thread(target=self.accept, daemon=True)
        self.thread.start()

    def accept(self) -> None:
        self.raw, _ = self.listener.accept()
        handshake = Handshake(Identity.create("deaf"), "secret")
        while handshake.peer is None:
            reply = handshake.answer(receive_frame(self.raw).meta)
            assert reply is not None
            self.raw.sendall(hello(reply))

    def read(self, num_bytes: int) -> None:
        while num_bytes:
            num_bytes -= len(self.raw.recv(min(num_bytes, 1 << 20)))

    def close(self) -> None:
        self.thread.join()
        self.raw.close()
        self.listener.close()


@pytest.fixture
def deaf() -> Iterator[Deaf]:
    deaf = Deaf()
    yield deaf
    deaf.close()


BIG = Frame(Header(kind=FrameKind.EVENT), b"", (memoryview(bytes(16 << 20)),))


def test_a_peer_that_never_reads_is_given_up(listener: Listener, deaf: Deaf) -> None:
    sender = SocketTransport("sender", "secret", stall_seconds=0.2)
    sender.connect("deaf", deaf.address)
    sender.connect("listener", listener.transport.address)
    start = time.monotonic()
    with pytest.raises(PeerLost):
        sender.send("deaf", BIG)
    assert 0.15 < time.monotonic() - start < 5
    assert sender.recv(1.0) == Lost("deaf")
    sender.send("listener", Frame(Header(kind=FrameKind.EVENT)))
    listener.wait(1)
    sender.close()


def test_a_wake_during_a_blocked_send_is_kept_and_does_not_spin(
    deaf: Deaf, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender = SocketTransport("sender", "secret")
    sender.connect("deaf", deaf.address)
    polls: list[float | None] = []
    pump = sender._pump
    monkeypatch.setattr(sender, "_pump", lambda timeout: (polls.append(timeout), pump(timeout)))
    thread = threading.Thread(target=sender.send, args=("deaf", BIG))
    thread.start()
    time.sleep(0.1)
    sender.wake()
    time.sleep(0.2)
    assert len(polls) < 20
    assert thread.is_alive()
    deaf.read(frame_parts(BIG)[1])
    thread.join(5)
    assert not thread.is_alive()
    assert sender.recv(None) is None
    assert sender.recv(0) is None
    sender.close()


def test_frames_are_read_while_a_send_is_blocked(listener: Listener, deaf: Deaf) -> None:
    sender = SocketTransport("sender", "secret")
    sender.connect("deaf", deaf.address)
    sender.connect("listener", listener.transport.address)
    thread = threading.Thread(target=sender.send, args=("deaf", BIG))
    thread.start()
    time.sleep(0.05)
    friend = SocketTransport("friend", "secret")
    friend.connect("sender", sender.address)  # accepted in the middle of the send
    friend.send("sender", BIG)
    assert thread.is_alive()
    deaf.read(frame_parts(BIG)[1])
    thread.join(5)
    item = sender.recv(0)
    assert isinstance(item, Received)
    assert item.peer == "friend"
    friend.close()
    sender.close()


def _send_until_lost(friend: SocketTransport) -> int:
    for num_sent in range(20):
        try:
            friend.send("sender", BIG)
        except PeerLost:
            return num_sent
    return 20


def test_what_comes_during_a_send_is_bounded(deaf: Deaf) -> None:
    sender = SocketTransport("sender", "secret", max_unread_bytes=40 << 20)
    sender.connect("deaf", deaf.address)
    thread = threading.Thread(target=sender.send, args=("deaf", BIG))
    thread.start()
    friend = SocketTransport("friend", "secret")
    friend.connect("sender", sender.address)
    num_sent = _send_until_lost(friend)
    assert 2 <= num_sent <= 4, "two fit, the third is one too many, parts of more are on the way"
    assert thread.is_alive(), "nobody else pays for it"
    deaf.read(frame_parts(BIG)[1])
    thread.join(5)
    items = [sender.recv(1.0) for _ in range(4)]
    assert [type(item) for item in items] == [Received] * 3 + [Lost]

    def send_again() -> None:
        friend.connect("sender", sender.address)
        for _ in range(6):
            friend.send("sender", BIG)

    thread = threading.Thread(target=send_again)
    thread.start()
    for _ in range(6):
        assert isinstance(sender.recv(5.0), Received), "what is taken is not counted for ever"
    thread.join(5)
    friend.close()
    sender.close()


def test_a_peer_that_dies_during_a_send_is_lost(deaf: Deaf) -> None:
    sender = SocketTransport("sender", "secret")
    sender.connect("deaf", deaf.address)
    deaf.thread.join()
    timer = threading.Timer(0.05, deaf.raw.close)
    timer.start()
    with pytest.raises(PeerLost):
        sender.send("deaf", BIG)
    assert sender.recv(1.0) == Lost("deaf")
    assert sender.recv(0) is None
    timer.join()
    sender.close()


def test_unix_is_preferred_and_leaves_no_file(listener: Listener) -> None:
    unix, tcp = listener.transport.address.split(",")
    assert unix.startswith("unix:@conclave-")
    assert tcp.startswith("tcp:127.0.0.1:")
    friend = SocketTransport("friend", "secret")
    friend.connect("listener", f"{tcp},{unix}")
    assert friend._links["listener"][0].sock.family == socket.AF_UNIX
    friend.connect("listener", f"unix:@conclave-on-another-node,{tcp}")
    link = friend._links["listener"][0].sock
    assert link.family == socket.AF_INET
    assert link.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    friend.close()


def test_a_wildcard_host_is_refused() -> None:
    with pytest.raises(ValueError, match="tcp_host"):
        SocketTransport("a", "secret", tcp_host="0.0.0.0")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (3,), (2, 5), (0, 4), (4, 0)])
def test_tensors_are_shared_not_copied(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape).to(dtype)
    buffer = tensor_buffer(tensor)
    assert buffer.nbytes == tensor.numel() * dtype.itemsize
    back = buffer_tensor(buffer, dtype, shape)
    assert torch.equal(back, tensor)
    assert back.dtype == dtype
    assert torch_dtype(wire_dtype(dtype)) == dtype
    if tensor.numel():
        tensor.fill_(3)
        assert torch.equal(back, tensor)


def test_unfit_tensors_and_buffers_are_refused() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        tensor_buffer(torch.zeros(3, 4).T)
    with pytest.raises(ValueError, match="24 bytes"):
        buffer_tensor(memoryview(bytearray(24)), torch.float32, (7,))
    with pytest.raises(ValueError, match="allowed"):
        wire_dtype(torch.int64)
    with pytest.raises(ValueError, match="allowed"):
        torch_dtype(Dtype.NONE)


def test_a_dial_during_a_blocked_send_survives_it(listener: Listener) -> None:
    """The frame is lost with the connection it was written to; what was dialled since is not."""
    deaf, successor = listener.dial(), listener.dial()
    shake_hands(deaf, "other")
    deaf.sendall(wire(Frame(Header(kind=FrameKind.STEP, step=1))))
    listener.wait(1)
    huge = Frame(Header(kind=FrameKind.STEP), b"", (memoryview(bytearray(64 << 20)),))
    results: list[PeerLost | None] = []
    begun, take = threading.Event(), listener.transport.recv

    def send_first(timeout: float | None) -> Received | Lost | None:
        if not begun.is_set():
            begun.set()
            try:
                listener.transport.send("other", huge)
                results.append(None)
            except PeerLost as error:
                results.append(error)
        return take(timeout)

    listener.transport.recv = send_first  # type: ignore[method-assign]
    listener.transport.wake()
    assert begun.wait(5)
    shake_hands(successor, "other")
    successor.sendall(wire(Frame(Header(kind=FrameKind.STEP, step=9))))
    received = listener.wait(2)[1]
    assert isinstance(received, Received), "the new connection was dropped with the old one"
    assert received.frame.header.step == 9
    assert isinstance(results[0], PeerLost)
    assert len(listener.items) == 2
    deaf.close()
    successor.close()


def test_a_send_that_fails_here_ends_the_connection(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise nobody would ever hear that frames to this peer are lost."""

    class Full:
        def __init__(self, sock: socket.socket) -> None:
            self._sock = sock

        def __getattr__(self, name: str) -> object:
            return getattr(self._sock, name)

        def sendmsg(self, parts: object) -> int:
            raise OSError(errno.ENOBUFS, "no buffer space")

    sender = SocketTransport("sender", "secret")
    sender.connect("listener", listener.transport.address)
    (connection,) = sender._links["listener"]
    monkeypatch.setattr(connection, "sock", Full(connection.sock))
    with pytest.raises(PeerLost):
        sender.send("listener", Frame(Header(kind=FrameKind.STEP)))
    assert sender.recv(1.0) == Lost("listener")
    assert listener.wait(1) == [Lost("sender")]
    sender.close()
