"""The data loop that every worker shares: one thread, one transport, control between steps."""

from __future__ import annotations

import logging
import os
import time
from typing import Protocol

from router.codec import decode, encode
from router.layer_totals import LayerTotals
from router.limits import EngineLimits
from router.placement import RoutingTable
from router.transport.base import Frame, FrameKind, Header, Lost, PeerLost, Received, Transport
from shards.control import INGRESS, Control, Started, StartTimes, WorkerEvent
from shards.cores import sleep_while_waiting
from shards.load_progress import LoadProgress, OnRead, Report
from shards.memory import free_bytes
from shards.memory_policy import loading
from shards.process_birth import birth_of
from shards.pulse import Beat
from shards.pulse_sender import PulseSender
from shards.role_modules import import_role
from shards.spec import Role, WorkerSpec
from shards.start_clock import StartClock

log = logging.getLogger("conclave.worker")

_REDIAL_S = 0.25
"""Between a dial that fails and the next: a death that explains it is known by then."""


def control_frame(control: Control) -> Frame:
    """Wrap a control message for the wire."""
    return Frame(Header(kind=FrameKind.CONTROL), encode(control))


class RunsForever(Protocol):
    """What an actor shell or a subprocess hosts."""

    @property
    def bytes_read(self) -> int:
        """Checkpoint bytes this worker has read."""

    @property
    def transport(self) -> Transport: ...

    @property
    def pulse(self) -> PulseSender:
        """What tells the ingress that this worker lives."""

    def run(self) -> None:
        """The data loop; returns after a shutdown or when the ingress is gone."""


class Worker:
    """Receives frames until told to stop; subclasses answer `on_frame`, `on_lost`, `on_table`."""

    def __init__(self, spec: WorkerSpec, transport: Transport) -> None:
        self.spec = spec
        self.transport = transport
        self.stopping = False
        self.bytes_read = 0
        self._turns = 0
        self.pulse = PulseSender(spec, transport, self._beat)

    def run(self) -> None:
        """Handle events until shutdown or until the ingress, which owns this worker, is gone."""
        try:
            while not self.stopping:
                self._turns += 1
                self.advance()
        finally:
            self.pulse.stop()
            self.transport.close()

    def advance(self) -> None:
        """One turn of the data loop: wait for an event and handle it."""
        self.handle(self.transport.recv(None))

    def handle(self, event: Received | Lost | None) -> None:
        """Apply one transport event, or none."""
        self._turns += 1  # in the middle of a step too
        match event:
            case Received():
                self._take(event)
            case Lost(peer=peer) if peer == INGRESS:
                log.info("%s: the ingress is gone, stopping", self.spec.peer)
                self.stopping = True
            case Lost(peer=peer):
                self.on_lost(peer)
            case None:
                return

    def _take(self, received: Received) -> None:
        peer, frame = received
        try:
            if frame.header.kind is FrameKind.CONTROL:
                self._on_control(decode(Control, frame.meta))
            else:
                self.on_frame(peer, frame)
        except ValueError as error:
            self.refuse(peer, error)

    def refuse(self, peer: str, error: ValueError) -> None:
        """A peer has sent what makes no sense: it is as good as dead, this worker is not."""
        log.warning("%s: nonsense from %s", self.spec.peer, peer, exc_info=error)
        self.transport.drop(peer, str(error))

    def _on_control(self, control: Control) -> None:
        self.on_coming_epoch(control.coming_epoch)
        if control.limits is not None:
            self.on_limits(control.limits)
        for target in control.connect:
            try:
                self.transport.connect(target.peer, target.address)
            except PeerLost:
                # Its death, if it is dead, reaches the supervisor by itself, and soon.
                log.info("%s: %s cannot be dialled", self.spec.peer, target.peer)
                time.sleep(_REDIAL_S)
                self.on_lost(target.peer)
            else:
                self.on_connected(target.peer)
        if control.table is not None:
            self.on_table(control.table)
        if control.epoch is not None:
            self.on_epoch(control.epoch, keep_cache=control.keep_cache)
        if control.ack is not None:
            self.report(WorkerEvent(ack=control.ack))
        if control.shutdown:
            self.stopping = True

    def report(self, event: WorkerEvent) -> None:
        """Tell the ingress; its own death ends this worker anyway."""
        try:
            self.transport.send(INGRESS, Frame(Header(kind=FrameKind.EVENT), encode(event)))
        except PeerLost:
            self.stopping = True

    def _beat(self) -> Beat:
        """Called by the pulse's thread, while the data loop counts on."""
        return Beat(turns=self._turns, layers=self.layer_totals)

    @property
    def layer_totals(self) -> dict[int, LayerTotals]:
        """What the MoE exchanges that this worker dispatches have cost, by layer."""
        return {}

    def on_unreachable(self, peer: str) -> None:
        """The connection to an expert worker broke or cannot be made; that worker may live."""
        self.report(WorkerEvent(lost_link=peer))

    def on_frame(self, peer: str, frame: Frame) -> None:
        """Handle a data frame. Raises ValueError when it makes no sense."""
        raise ValueError(f"{self.spec.peer} does not take {frame.header.kind.name} from {peer}")

    def on_lost(self, peer: str) -> None:
        """A peer's connection ended; by default its respawn is all that matters."""

    def on_coming_epoch(self, epoch: int) -> None:
        """Epochs before this one are over; 0 says nothing."""

    def on_limits(self, limits: EngineLimits) -> None:
        """How large caches are, before the first epoch and, unchanged, before every later one."""

    def on_connected(self, peer: str) -> None:
        """A peer has just been dialled."""

    def on_table(self, table: RoutingTable) -> None:
        """A routing table was published to this worker."""

    def on_epoch(self, epoch: int, *, keep_cache: bool) -> None:
        """A new epoch begins; with `keep_cache` every stage has lived through the last one."""


def make_worker(
    spec: WorkerSpec,
    transport: Transport,
    report: Report | None = None,
    clock: StartClock | None = None,
) -> RunsForever:
    """Build and load the worker a spec describes; `report` is told how far it is."""
    clock = clock or StartClock()
    if spec.group.crowded:
        sleep_while_waiting()
    import_role(spec.group, spec.role)
    clock.imported()
    progress = LoadProgress(spec.peer, report)
    with loading():
        worker = _make_worker(spec, transport, progress.on_read)
    progress.finish()
    clock.read(progress.seconds)
    return worker


def announce(
    worker: RunsForever, spec: WorkerSpec, node_id: str = "", clock: StartClock | None = None
) -> Started:
    """Start a loaded worker's pulse; what it says of itself.

    Raises ValueError if its memory cannot be measured.
    """
    free = None
    if spec.group.cache_costs:
        try:
            free = free_bytes()
        except ValueError as error:
            raise ValueError(
                f"kv_cache_memory=auto: {error}; allowed values are sizes such as 2GiB here"
            ) from error
    worker.pulse.start()
    return Started(
        address=worker.transport.address,
        pid=os.getpid(),
        node_id=node_id,
        pulse=worker.pulse.address,
        birth=birth_of(os.getpid()),
        bytes_read=worker.bytes_read,
        free_bytes=free,
        times=StartTimes() if clock is None else clock.times,
    )


def _make_worker(spec: WorkerSpec, transport: Transport, on_read: OnRead) -> RunsForever:
    # Imports are local to the role: an engine in front of a pipeline never imports torch.
    match spec.role:
        case Role.ENGINE:
            from shards.engine_worker import make_engine_worker

            return make_engine_worker(spec, transport, on_read)
        case Role.STAGE:
            from shards.stage_worker import make_stage_worker

            return make_stage_worker(spec, transport, on_read)
        case Role.DISPATCHER:
            from shards.dispatcher_worker import make_dispatcher_worker

            return make_dispatcher_worker(spec, transport)
        case Role.EXPERT:
            from shards.expert_worker import make_expert_worker

            return make_expert_worker(spec, transport, on_read)
