"""A worker's pulse: signs of life from a thread and a socket of their own."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from router.codec import encode
from router.transport.base import Frame, FrameKind, Header, Lost, PeerLost, Transport
from router.transport.endpoints import tcp_host_of
from router.transport.sockets import SocketTransport
from shards.control import INGRESS
from shards.pulse import BEATS_PER_DEADLINE, Beat
from shards.spec import WorkerSpec

log = logging.getLogger("conclave.worker")

_NUDGES_PER_DEADLINE = 4


def pulse_name(peer: str) -> str:
    """A peer's name on the transport that carries pulses."""
    return f"{peer}/pulse"


class PulseSender:
    """Sends a data loop's turns and counters to the ingress, whatever that loop is busy with.

    A loop that has not turned for a while is woken: if it only waits for an event, it turns then.
    `data` is the loop's transport; the pulse can be heard wherever that can be dialled.
    """

    def __init__(self, spec: WorkerSpec, data: Transport, beat: Callable[[], Beat]) -> None:
        deadlines = spec.group.deadlines
        self._interval = deadlines.hang_s / BEATS_PER_DEADLINE
        self._nudge_s = deadlines.step_s / _NUDGES_PER_DEADLINE
        self._make_beat = beat
        self._data = data
        self._seen = (-1, 0.0)
        """Turns, and when they were first so many."""
        self._ended = False
        self._transport = SocketTransport(
            pulse_name(spec.peer), spec.group.secret, tcp_host=tcp_host_of(data.address)
        )
        self._thread = threading.Thread(target=self._run, name="conclave-pulse", daemon=True)

    @property
    def address(self) -> str:
        """Where the ingress listens to it."""
        return self._transport.address

    def start(self) -> None:
        """Begin; it goes on until `stop` or until the ingress is gone."""
        self._thread.start()

    def stop(self) -> None:
        """End it. Harmless before the start and after the end."""
        self._ended = True
        if self._thread.ident is None:
            self._transport.close()
        else:
            self._transport.wake()

    def _run(self) -> None:
        try:
            while not self._ended:
                self._listen(self._interval)
                self._beat()
        except Exception:
            # The ingress hears nothing any more and draws its conclusion.
            log.exception("the pulse has ended")
        finally:
            self._transport.close()

    def _listen(self, seconds: float) -> None:
        """Let the ingress connect; nothing else is expected of anybody."""
        until = time.monotonic() + seconds
        while not self._ended and (left := until - time.monotonic()) > 0:
            if isinstance(self._transport.recv(left), Lost):
                log.info("nobody listens to the pulse any more")

    def _beat(self) -> None:
        beat, now = self._make_beat(), time.monotonic()
        if beat.turns != self._seen[0]:
            self._seen = (beat.turns, now)
        elif now - self._seen[1] >= self._nudge_s:
            self._seen = (beat.turns, now)
            self._data.wake()
        frame = Frame(Header(kind=FrameKind.EVENT), encode(beat))
        try:
            self._transport.send(pulse_name(INGRESS), frame)
        except PeerLost:
            return  # not connected yet, or gone: the data loop hears of that too
