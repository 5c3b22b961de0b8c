"""The ingress's ear: hears every worker's pulse, kills who hangs, and says so."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from router.codec import CodecError, decode
from router.layer_totals import LayerTotals, sum_by_layer
from router.transport.base import Lost, PeerLost, Received
from router.transport.sockets import SocketTransport
from shards.control import INGRESS, Started
from shards.process_birth import is_at_work, kill
from shards.pulse import BEATS_PER_DEADLINE, Beat, PulseJudge
from shards.pulse_sender import pulse_name
from shards.spec import Deadlines, WorkerSpec

log = logging.getLogger("conclave.group")

_LOOKS_PER_DEADLINE = 25

Condemned = Callable[[WorkerSpec, str], None]
"""Told of a worker that was given up and why; called on the watch's own thread."""


@dataclass(frozen=True, slots=True)
class _Watched:
    spec: WorkerSpec
    started: Started


class PulseWatch:
    """A thread of its own, so that neither tokens nor a slow dial delay a verdict.

    It looks at fixed times and reads all that has come since: far fewer turns than beats.
    """

    def __init__(self, secret: str, deadlines: Deadlines, condemned: Condemned) -> None:
        self._look_s = deadlines.hang_s / _LOOKS_PER_DEADLINE
        self._beat_s = deadlines.hang_s / BEATS_PER_DEADLINE
        self._condemned = condemned
        self._judge = PulseJudge(deadlines)
        # A dial may hit a process that has just stopped: it must not outlast a few looks.
        self._transport = SocketTransport(
            pulse_name(INGRESS), secret, dial_seconds=4 * self._look_s
        )
        self._watched: dict[str, _Watched] = {}
        self._to_dial: dict[str, float] = {}
        """Workers that are not connected, and when to dial next."""
        self._counted: dict[str, dict[int, LayerTotals]] = {}
        """What each worker's present incarnation said last."""
        self._verdicts: dict[str, tuple[WorkerSpec, str]] = {}
        """The last one on each worker."""
        self._orders: list[Callable[[], None]] = []
        self._orders_lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="conclave-pulse", daemon=True)

    def start(self) -> None:
        """Begin to listen."""
        self._thread.start()

    def stop(self) -> None:
        """Stop listening and judging, and wait for it."""
        self._ended.set()
        if self._thread.ident is None:
            self._transport.close()
        else:
            self._thread.join()

    def watch(self, spec: WorkerSpec, started: Started) -> None:
        """Judge this worker, which has loaded. Thread-safe."""
        self._order(lambda: self._watch(_Watched(spec, started)))

    def forget(self, spec: WorkerSpec) -> None:
        """It is dead already. Thread-safe."""
        self._order(lambda: self._forget(spec))

    @property
    def layer_totals(self) -> dict[int, LayerTotals]:
        """What the MoE exchanges of all workers have cost since these started. Thread-safe."""
        return sum_by_layer(list(self._counted.values()))

    def verdict(self, peer: str) -> tuple[WorkerSpec, str] | None:
        """Which incarnation was given up last, and why: known before it is killed. Thread-safe."""
        return self._verdicts.get(peer)

    def _order(self, order: Callable[[], None]) -> None:
        with self._orders_lock:
            self._orders.append(order)

    def _watch(self, watched: _Watched) -> None:
        peer = watched.spec.peer
        self._watched[peer] = watched
        self._judge.watch(peer, time.monotonic())
        self._to_dial[peer] = 0.0

    def _forget(self, spec: WorkerSpec) -> None:
        watched = self._watched.get(spec.peer)
        if watched is not None and watched.spec == spec:
            self._drop(spec.peer)

    def _drop(self, peer: str) -> None:
        del self._watched[peer]
        self._counted.pop(peer, None)
        self._to_dial.pop(peer, None)
        self._judge.forget(peer)

    def _run(self) -> None:
        try:
            while not self._ended.wait(self._look_s):
                self._look()
        except Exception:
            log.exception("hung workers are no longer found")
        finally:
            self._transport.close()

    def _look(self) -> None:
        with self._orders_lock:
            orders, self._orders = self._orders, []
        for order in orders:
            order()
        for peer, due in list(self._to_dial.items()):
            if time.monotonic() >= due:
                self._dial(peer)
        while (event := self._transport.recv(0.0)) is not None:
            self._hear(event)
        for peer, reason in self._judge.verdicts(time.monotonic(), self._is_at_work).items():
            self._condemn(peer, reason)

    def _dial(self, peer: str) -> None:
        address = self._watched[peer].started.pulse
        try:
            self._transport.connect(pulse_name(peer), address)
        except PeerLost:
            # Dead, or slow: the deadline runs.
            self._to_dial[peer] = time.monotonic() + self._beat_s
        else:
            del self._to_dial[peer]

    def _hear(self, event: Received | Lost) -> None:
        peer = event.peer.removesuffix(pulse_name(""))
        if isinstance(event, Received):
            try:
                beat = decode(Beat, event.frame.meta)
            except CodecError as error:
                log.warning("%s sent no pulse: %s", event.peer, error)
                return
            self._judge.on_beat(peer, beat, time.monotonic())
            if peer in self._watched:
                self._counted[peer] = beat.layers
        elif peer in self._watched:
            self._to_dial[peer] = time.monotonic() + self._look_s

    def _is_at_work(self, peer: str) -> bool:
        started = self._watched[peer].started
        return is_at_work(started.pid, started.birth)

    def _condemn(self, peer: str, reason: str) -> None:
        """Kill it here and now where that is possible; elsewhere the launcher must."""
        watched = self._watched[peer]
        self._drop(peer)
        self._verdicts[peer] = watched.spec, reason
        kill(watched.started.pid, watched.started.birth)
        self._condemned(watched.spec, reason)
