"""The one thread of a model instance's ingress: what happens to workers, and what is done then."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from router.codec import decode, encode, read_with_rows
from router.step import Admit, EngineLoad, TokenBatch
from router.transport.base import Frame, FrameKind, Header, Lost, PeerLost, Received, Transport
from shards.actions import Action, BeginEpoch, Dial, Discard, GiveUp, Mourn, Spawn, Suspend, Tell
from shards.client import GroupFailed, GroupState, GroupUnavailable, Trouble
from shards.control import Started, WorkerEvent
from shards.journal import JournalEntry
from shards.launcher import Launcher
from shards.live_sequences import LiveSequences, Messages
from shards.load_bound import LoadBound
from shards.patience import Patience
from shards.pulse_watch import PulseWatch
from shards.spec import GroupSpec, Role, WorkerSpec
from shards.start_record import StartRecord
from shards.stream import Outbox
from shards.supervisor import Supervisor
from shards.warm_up import warm_up_entry
from shards.worker import control_frame

log = logging.getLogger("conclave.group")

ENGINE = f"{Role.ENGINE}-0"
_LONGEST_WAIT_S = 3600.0
"""The system calls that wait take no day."""
_MOST_HEARD = 1000
"""Frames in a row, however much is to be done besides."""


class GroupLoop:
    """Carries the supervisor's decisions out. Its thread owns transport, journal and supervisor.

    Public methods and properties may be used from any thread.
    """

    def __init__(self, spec: GroupSpec, launcher: Launcher, transport: Transport) -> None:
        self.spec = spec
        self.supervisor = Supervisor(spec)
        self.pulse = PulseWatch(spec.secret, spec.deadlines, self._condemned)
        self.outbox = Outbox()
        self.record = StartRecord()
        self.load = EngineLoad()
        self.reason = ""
        """Why the group has failed; empty otherwise."""
        self.settled = threading.Event()
        """Set once the group has been ready, or never will be."""
        self._launcher = launcher
        self._transport = transport
        self._sequences = LiveSequences()
        self._patience = Patience(spec.deadlines.recovery_s)
        self._loading = LoadBound(spec.deadlines.load_s)
        self._calls: deque[Callable[[], None]] = deque()
        self._calls_lock = threading.Lock()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="conclave-group", daemon=True)

    def start(self) -> None:
        """Start every worker."""
        self._post(lambda: self._apply(self.supervisor.start()))
        self._thread.start()
        self.pulse.start()

    def stop(self) -> None:
        """Shut every worker down and wait for them; live sequences end with GroupFailed."""
        self.pulse.stop()
        if self._thread.is_alive():
            self._post(lambda: self._apply(self.supervisor.stop()))
            self._thread.join()
        self._launcher.close()
        self._transport.close()

    @property
    def state(self) -> GroupState:
        """Starting, ready, recovering, failed or stopped."""
        return self.supervisor.state

    @property
    def is_over(self) -> bool:
        """Whether it has failed or was stopped: neither is ever undone."""
        return self.state in (GroupState.STOPPED, GroupState.FAILED)

    @property
    def trouble(self) -> Trouble | None:
        """The worker whose death is being healed, if any."""
        return self.supervisor.trouble(time.monotonic(), self._patience.since)

    @property
    def unavailable(self) -> GroupUnavailable | None:
        """Why nobody may wait any more; None while the group works or has not healed for long."""
        return self._patience.refusal(self.trouble)

    def failure(self) -> GroupFailed:
        """What sequences end with once it is over."""
        return GroupFailed(self.reason or "the model instance has stopped")

    def add(self, entry: JournalEntry) -> None:
        """Journal and start a sequence."""
        self._post(lambda: self._tell_engine(self._sequences.add(entry)))

    def drop(self, seq_id: int) -> None:
        """A sequence's client has left."""
        self._post(lambda: self._tell_engine(self._sequences.drop(seq_id)))

    def started(self, spec: WorkerSpec, started: Started) -> None:
        """A launcher reports a worker that listens."""
        self._post(lambda: self._on_started(spec, started))

    def died(self, spec: WorkerSpec, reason: str, fatal: bool) -> None:
        """A launcher reports a worker that ended."""
        now = time.monotonic()
        self._post(lambda: self._apply(self.supervisor.on_died(spec, reason, now, fatal)))

    def _condemned(self, spec: WorkerSpec, reason: str) -> None:
        """The pulse's watch has given a worker up, and killed it if it could."""
        self._post(lambda: self._give_up_on(spec, reason))

    def _post(self, call: Callable[[], None]) -> None:
        """Have the group's thread make a call; once that has ended, make it here and now."""
        with self._calls_lock:
            if not self._ended:
                self._calls.append(call)
                self._transport.wake()
                return
        call()
        self._sequences.fail_all(self.failure())

    # Below everything runs on the loop's own thread.

    def _run(self) -> None:
        try:
            while not self.is_over:
                self._handle(self._transport.recv(self._timeout()))
                if self._calls:
                    self._hear_all()
                while self._calls:
                    self._calls.popleft()()
                if not self.is_over:
                    self._look_around()
                if self.state is not GroupState.STARTING:
                    self.settled.set()
        except Exception as error:
            log.exception("the group's thread failed")
            self._apply([GiveUp(f"internal error: {error!r}")])
        finally:
            with self._calls_lock:
                self._ended = True
            while self._calls:
                self._calls.popleft()()
            self._sequences.fail_all(self.failure())
            self.settled.set()

    def _hear_all(self) -> None:
        """A report of a death must not overtake what was said before it."""
        silences = 0
        for _ in range(_MOST_HEARD):
            event = self._transport.recv(0.0)
            # A wake-up is a silence too, whatever has come.
            silences = silences + 1 if event is None else 0
            if silences == 2:
                return
            self._handle(event)

    def _timeout(self) -> float | None:
        all_due = (self.supervisor.due, self._patience.due, self._loading.due)
        due = [at for at in all_due if at is not None]
        return min(max(0.0, min(due) - time.monotonic()), _LONGEST_WAIT_S) if due else None

    def _look_around(self) -> None:
        """What is due by now: successors, the end of patience, the next trial or the last's end."""
        now = time.monotonic()
        self._apply(self.supervisor.on_time(now))
        for spec in self._loading.overdue(now):
            self._give_up_on(spec, f"hung: not loaded after {self.spec.deadlines.load_s:g} s")
        # While some are tried, all others wait.
        tries = self.state is GroupState.READY and not self._sequences.everyone_may_run
        state = GroupState.RECOVERING if tries else self.state
        if self._patience.look(state, now) and (error := self.unavailable) is not None:
            log.error("%s: %d sequences fail, %s", error, len(self._sequences), self.trouble)
            self._tell_engine(self._sequences.fail_all(error))
        if self._sequences.wants_epoch:
            self._apply(self.supervisor.new_epoch())
        self._tell_engine(self._sequences.let_in())

    def _handle(self, event: Received | Lost | None) -> None:
        if isinstance(event, Lost):
            # A call, so that all is heard before that others said before: what has begun to run.
            self._calls.append(lambda: self._on_connection_lost(event.peer))
        if not isinstance(event, Received):
            return
        match event.frame.header.kind:
            case FrameKind.TOKENS:
                batch = read_with_rows(TokenBatch, event.frame)
                self.load = batch.load
                if batch.steps:
                    self._sequences.note_steps(batch, time.monotonic())
                if self._sequences.take(batch):
                    self.supervisor.on_progress(time.monotonic())
                self.outbox.flush()
            case FrameKind.EVENT:
                self._heed(event.peer, decode(WorkerEvent, event.frame.meta), time.monotonic())
            case kind:
                log.warning("%s sent an unexpected %s frame", event.peer, kind.name)

    def _on_connection_lost(self, peer: str) -> None:
        # It may break because the pulse's watch has just killed the worker, which knows why.
        verdict = self.pulse.verdict(peer)
        if verdict is not None:
            self._give_up_on(*verdict)
        # Seen earlier than the launcher's report: a process may take long to end.
        self._apply(self.supervisor.on_connection_lost(peer, time.monotonic()))

    def _heed(self, peer: str, event: WorkerEvent, now: float) -> None:
        if event.ack is not None:
            self._apply(self.supervisor.on_ack(peer, event.ack))
        if event.lost_epoch is not None:
            self._apply(self.supervisor.on_step_lost(event.lost_epoch, now))
        if event.lost_link is not None:
            self.supervisor.on_link_lost(event.lost_link, now)

    def _on_started(self, spec: WorkerSpec, started: Started) -> None:
        self._loading.end(spec)
        self.record.on_started(spec, started, time.monotonic())
        actions = self.supervisor.on_started(spec, started, time.monotonic())
        if actions:
            self.pulse.watch(spec, started)
        self._apply(actions)

    def _mourn(self, death: Mourn) -> None:
        log.warning("%s", death)
        self._loading.end(death.spec)
        self.pulse.forget(death.spec)
        narrowed, messages = self._sequences.on_death(death)
        if narrowed:
            self.supervisor.forgive()
        self._tell_engine(messages)

    def _apply(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Spawn(spec):
                    self._loading.begin(spec, time.monotonic())
                    self.record.on_spawn(spec, time.monotonic())
                    self._launcher.spawn(spec, self)
                case Discard(spec):
                    self._launcher.discard(spec)
                case Mourn():
                    self._mourn(action)
                case Dial(spec, address):
                    self._dial(spec, address)
                case Tell(peer, control):
                    self._send(peer, control_frame(control))
                case Suspend():
                    self._sequences.suspend()
                case BeginEpoch(epoch):
                    log.info("%s", self.supervisor.caches)
                    log.info("epoch %d begins with %d live sequences", epoch, len(self._sequences))
                    self._tell_engine(self._sequences.begin(epoch))
                    self._begin_warm_up(epoch)
                case GiveUp(reason):
                    log.error("giving up: %s", reason)
                    self.supervisor.state = GroupState.FAILED
                    self.reason = reason

    def _begin_warm_up(self, epoch: int) -> None:
        self.record.on_epoch(time.monotonic())
        warm_up = self.spec.warm_up
        if warm_up is not None and epoch == 1:
            # Done in a call: what delivers its end must be through before the epoch ends.
            entry = warm_up_entry(warm_up, lambda: self._calls.append(self._on_warm))
            self._tell_engine(self._sequences.add(entry))

    def _on_warm(self) -> None:
        self.record.on_token(time.monotonic())
        self._apply(self.supervisor.on_warm())

    def _dial(self, spec: WorkerSpec, address: str) -> None:
        try:
            self._transport.connect(spec.peer, address)
        except PeerLost:
            # Dead, or as good as dead: it can be told nothing.
            self._post(lambda: self._give_up_on(spec, "it cannot be dialled"))

    def _give_up_on(self, spec: WorkerSpec, reason: str) -> None:
        self._apply(self.supervisor.on_hung(spec, reason, time.monotonic()))

    def _send(self, peer: str, frame: Frame) -> None:
        try:
            self._transport.send(peer, frame)
        except PeerLost:
            # The launcher reports its death; the next epoch repeats what mattered.
            log.info("%s is gone, a %s frame is dropped", peer, frame.header.kind.name)

    def _tell_engine(self, messages: Messages) -> None:
        for message in messages:
            kind = FrameKind.ADMIT if isinstance(message, Admit) else FrameKind.ABORT
            self._send(ENGINE, Frame(Header(kind=kind), encode(message)))
