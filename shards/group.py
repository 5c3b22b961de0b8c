"""One model instance: builds its workers, watches them, heals them, and keeps the journal."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from router.codec import CodecError, decode, encode, read_with_rows
from router.step import NOTHING, EngineLoad, SamplingParams, TokenBatch, Want
from router.transport.base import Frame, FrameKind, Header, Lost, PeerLost, Received, Transport
from shards.client import GroupFailed, GroupState, SequenceRefused, WorkerStatus
from shards.control import Started, WorkerEvent
from shards.journal import Journal, JournalEntry
from shards.outputs import Outputs
from shards.spec import GroupSpec, Role, WorkerSpec
from shards.stream import GroupStream, Item, put_all
from shards.supervisor import (
    Action,
    BeginEpoch,
    Dial,
    Discard,
    GiveUp,
    Spawn,
    Supervisor,
    Suspend,
    Tell,
)
from shards.worker import control_frame

log = logging.getLogger("conclave.group")

ENGINE = f"{Role.ENGINE}-0"


class WorkerEvents(Protocol):
    """Where a launcher reports; both may be called from any thread."""

    def started(self, spec: WorkerSpec, started: Started) -> None:
        """The worker listens."""

    def died(self, spec: WorkerSpec, reason: str, fatal: bool) -> None:
        """The worker's process ended; `fatal` when starting it again cannot help."""


class Launcher(Protocol):
    """Starts worker processes: Ray actors, or subprocesses in tests."""

    def spawn(self, spec: WorkerSpec, events: WorkerEvents) -> None:
        """Start a worker without waiting for it."""

    def discard(self, spec: WorkerSpec) -> None:
        """Kill this incarnation if it still runs."""

    def close(self) -> None:
        """Kill what is left of the workers and wait for it."""


class ModelGroup:
    """Implements ModelClient. One thread owns transport, journal and supervisor."""

    def __init__(
        self,
        spec: GroupSpec,
        launcher: Launcher,
        transport: Transport,
    ) -> None:
        self.spec = spec
        self._launcher = launcher
        self._transport = transport
        self._supervisor = Supervisor(spec)
        self._journal = Journal()
        self._calls: deque[Callable[[], None]] = deque()
        self._calls_lock = threading.Lock()
        self._ended = False
        self._seq_ids = itertools.count(1)
        self._load = EngineLoad()
        self._reason = ""
        self._settled = threading.Event()
        self._thread = threading.Thread(target=self._run, name="conclave-group", daemon=True)
        self._outbox: dict[asyncio.AbstractEventLoop, list[tuple[GroupStream, Item]]] = {}

    def start(self, timeout: float | None = None) -> None:
        """Start every worker and wait until the group is ready. Raises GroupFailed."""
        self._post(lambda: self._apply(self._supervisor.start()))
        self._thread.start()
        if not self._settled.wait(timeout):
            self.stop()
            raise GroupFailed(f"not ready after {timeout} s")
        if self.state is GroupState.FAILED:
            reason = self._reason
            self.stop()
            raise GroupFailed(reason)

    @property
    def state(self) -> GroupState:
        """Starting, ready, recovering, failed or stopped."""
        return self._supervisor.state

    @property
    def failure(self) -> str:
        """Why the group has failed; empty otherwise."""
        return self._reason

    @property
    def load(self) -> EngineLoad:
        """What the engine last said it holds."""
        return self._load

    @property
    def routing_table_version(self) -> int:
        """Version of the routing table last published."""
        return self._supervisor.table_version

    @property
    def cache_summary(self) -> str:
        """How much the caches hold, and what decided it; empty before that is known."""
        return str(self._supervisor.caches or "")

    def workers(self) -> tuple[WorkerStatus, ...]:
        """The actor map."""
        return self._supervisor.workers()

    def generate(
        self,
        prompt: tuple[int, ...],
        sampling: SamplingParams,
        *,
        priority: int = 0,
        want: Want = NOTHING,
        cache_salt: str = "",
    ) -> GroupStream:
        """Journal and start one sequence; call on an event loop.

        Raises SequenceRefused or GroupFailed.
        """
        if self.state in (GroupState.FAILED, GroupState.STOPPED):
            raise self._failure()
        seq_id = next(self._seq_ids)
        outputs = Outputs(want, len(prompt))
        stream = GroupStream(lambda: self._post(lambda: self._drop(seq_id)), outputs)

        def deliver(item: Item | Exception) -> None:
            if isinstance(item, Exception):
                stream.loop.call_soon_threadsafe(stream.put, item)
            else:
                self._outbox.setdefault(stream.loop, []).append((stream, item))

        entry = JournalEntry(seq_id, prompt, sampling, priority, deliver, want, cache_salt)
        try:
            encode(entry.admit(epoch=0))
        except CodecError as error:
            # Found here it ends one request; on the group's thread it would end the group.
            raise SequenceRefused(f"the request cannot be sent to the engine: {error}") from error
        self._post(lambda: self._admit(entry))
        return stream

    def stop(self) -> None:
        """Shut every worker down and wait for them; live streams end with GroupFailed."""
        if self._thread.is_alive():
            self._post(lambda: self._apply(self._supervisor.stop()))
            self._thread.join()
        self._launcher.close()
        self._transport.close()

    # Everything below runs on the group's own thread, except `_post`, `started` and `died`.

    def started(self, spec: WorkerSpec, started: Started) -> None:
        """A launcher reports a worker that listens."""
        self._post(lambda: self._apply(self._supervisor.on_started(spec, started)))

    def died(self, spec: WorkerSpec, reason: str, fatal: bool) -> None:
        """A launcher reports a worker that ended."""
        self._post(lambda: self._on_died(spec, reason, fatal))

    def _post(self, call: Callable[[], None]) -> None:
        """Have the group's thread make a call; once it has ended, make it here and now."""
        with self._calls_lock:
            if not self._ended:
                self._calls.append(call)
                self._transport.wake()
                return
        call()
        self._journal.fail(self._failure())

    def _failure(self) -> GroupFailed:
        return GroupFailed(self._reason or "the model instance has stopped")

    def _run(self) -> None:
        try:
            while self.state not in (GroupState.STOPPED, GroupState.FAILED):
                self._handle(self._transport.recv(None))
                while self._calls:
                    self._calls.popleft()()
                if self.state is not GroupState.STARTING:
                    self._settled.set()
        except Exception as error:
            log.exception("the group's thread failed")
            self._apply([GiveUp(f"internal error: {error!r}")])
        finally:
            with self._calls_lock:
                self._ended = True
            while self._calls:
                self._calls.popleft()()
            self._journal.fail(self._failure())
            self._settled.set()

    def _handle(self, event: Received | Lost | None) -> None:
        if isinstance(event, Lost):
            # Seen earlier than the launcher's report: a process may take long to end.
            now = time.monotonic()
            self._apply(self._supervisor.on_connection_lost(event.peer, now))
        if not isinstance(event, Received):
            return
        match event.frame.header.kind:
            case FrameKind.TOKENS:
                batch = read_with_rows(TokenBatch, event.frame)
                self._load = batch.load
                if self._journal.accept(batch, SequenceRefused):
                    self._supervisor.on_progress()
                self._flush()
            case FrameKind.EVENT:
                message = decode(WorkerEvent, event.frame.meta)
                if message.ack is not None:
                    self._apply(self._supervisor.on_ack(event.peer, message.ack))
                if message.lost_epoch is not None:
                    now = time.monotonic()
                    self._apply(self._supervisor.on_step_lost(message.lost_epoch, now))
            case kind:
                log.warning("%s sent an unexpected %s frame", event.peer, kind.name)

    def _flush(self) -> None:
        """One wake-up per event loop and step, however many streams it feeds."""
        outbox, self._outbox = self._outbox, {}
        for loop, items in outbox.items():
            try:
                loop.call_soon_threadsafe(put_all, items)
            except RuntimeError:
                log.warning("an event loop closed with %d streams open", len(items))

    def _on_died(self, spec: WorkerSpec, reason: str, fatal: bool) -> None:
        if self.state is not GroupState.STOPPED:
            log.warning("%s (incarnation %d) died: %s", spec.peer, spec.incarnation, reason)
        self._apply(self._supervisor.on_died(spec, reason, time.monotonic(), fatal))

    def _apply(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Spawn(spec):
                    self._launcher.spawn(spec, self)
                case Discard(spec):
                    log.warning("%s (incarnation %d) is lost", spec.peer, spec.incarnation)
                    self._launcher.discard(spec)
                case Dial(target):
                    self._dial(target.peer, target.address)
                case Tell(peer, control):
                    self._send(peer, control_frame(control))
                case Suspend():
                    self._journal.suspend()
                case BeginEpoch(epoch):
                    log.info("%s", self.cache_summary)
                    log.info("epoch %d begins with %d live sequences", epoch, len(self._journal))
                    for admit in self._journal.begin(epoch):
                        self._send(ENGINE, Frame(Header(kind=FrameKind.ADMIT), encode(admit)))
                case GiveUp(reason):
                    log.error("giving up: %s", reason)
                    self._supervisor.state = GroupState.FAILED
                    self._reason = reason

    def _dial(self, peer: str, address: str) -> None:
        try:
            self._transport.connect(peer, address)
        except PeerLost:
            log.info("%s died before it could be dialled", peer)

    def _send(self, peer: str, frame: Frame) -> None:
        try:
            self._transport.send(peer, frame)
        except PeerLost:
            # The launcher reports its death; the next epoch repeats what mattered.
            log.info("%s is gone, a %s frame is dropped", peer, frame.header.kind.name)

    def _admit(self, entry: JournalEntry) -> None:
        admit = self._journal.add(entry)
        if admit is not None:
            self._send(ENGINE, Frame(Header(kind=FrameKind.ADMIT), encode(admit)))

    def _drop(self, seq_id: int) -> None:
        abort = self._journal.drop(seq_id)
        if abort is not None:
            self._send(ENGINE, Frame(Header(kind=FrameKind.ABORT), encode(abort)))
