"""One model instance: builds its workers, watches them, heals them, and keeps the journal."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial

from router.codec import CodecError, decode, encode, read_with_rows
from router.layer_totals import LayerTotals
from router.step import NOTHING, Admit, EngineLoad, SamplingParams, TokenBatch, Want
from router.transport.base import Frame, FrameKind, Header, Lost, PeerLost, Received, Transport
from shards.actions import Action, BeginEpoch, Dial, Discard, GiveUp, Mourn, Spawn, Suspend, Tell
from shards.client import (
    GroupFailed,
    GroupState,
    GroupUnavailable,
    SequenceRefused,
    Trouble,
    WorkerStatus,
)
from shards.control import Started, WorkerEvent
from shards.journal import JournalEntry
from shards.launcher import Launcher
from shards.live_sequences import LiveSequences, Messages
from shards.load_bound import LoadBound
from shards.outputs import Outputs
from shards.patience import Patience
from shards.pulse_watch import PulseWatch
from shards.spec import GroupSpec, Role, WorkerSpec
from shards.stream import GroupStream, Outbox
from shards.supervisor import Supervisor
from shards.worker import control_frame

log = logging.getLogger("conclave.group")

ENGINE = f"{Role.ENGINE}-0"
_LONGEST_WAIT_S = 3600.0
"""The system calls that wait take no day."""
_MOST_HEARD = 1000
"""Frames in a row, however much is to be done besides."""


class ModelGroup:
    """Implements ModelClient. One thread owns transport, journal and supervisor."""

    def __init__(self, spec: GroupSpec, launcher: Launcher, transport: Transport) -> None:
        self.spec = spec
        self._launcher = launcher
        self._transport = transport
        self._supervisor = Supervisor(spec)
        self._sequences = LiveSequences()
        self._patience = Patience(spec.deadlines.recovery_s)
        self._loading = LoadBound(spec.deadlines.load_s)
        self._pulse = PulseWatch(spec.secret, spec.deadlines, self._condemned)
        self._calls: deque[Callable[[], None]] = deque()
        self._calls_lock = threading.Lock()
        self._ended = False
        self._seq_ids = itertools.count(1)
        self._load = EngineLoad()
        self._reason = ""
        self._settled = threading.Event()
        self._thread = threading.Thread(target=self._run, name="conclave-group", daemon=True)
        self._outbox = Outbox()

    def start(self, timeout: float | None = None) -> None:
        """Start every worker and wait until the group is ready. Raises GroupFailed."""
        self._post(lambda: self._apply(self._supervisor.start()))
        self._thread.start()
        self._pulse.start()
        if not self._settled.wait(timeout):
            self.stop()
            raise GroupFailed(f"not ready after {timeout} s")
        if self.state is GroupState.FAILED:
            self.stop()
            raise GroupFailed(self._reason)

    @property
    def state(self) -> GroupState:
        """Starting, ready, recovering, failed or stopped."""
        return self._supervisor.state

    @property
    def failure(self) -> str:
        """Why the group has failed; empty otherwise."""
        return self._reason

    @property
    def trouble(self) -> Trouble | None:
        """The worker whose death is being healed, if any."""
        return self._supervisor.trouble(time.monotonic(), self._patience.since)

    @property
    def unavailable(self) -> GroupUnavailable | None:
        """Why nobody may wait any more; None while the group works or has not healed for long."""
        return self._patience.refusal(self.trouble)

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

    @property
    def layer_totals(self) -> dict[int, LayerTotals]:
        """What dispatching has cost, by layer, as of the workers' last signs of life."""
        return self._pulse.layer_totals

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

        Raises SequenceRefused, GroupUnavailable or GroupFailed.
        """
        if self.state in (GroupState.FAILED, GroupState.STOPPED):
            raise self._failure()
        if (unavailable := self.unavailable) is not None:
            raise unavailable
        seq_id = next(self._seq_ids)
        outputs = Outputs(want, len(prompt))
        stream = GroupStream(lambda: self._post(lambda: self._drop(seq_id)), outputs)
        deliver = partial(self._outbox.put, stream)
        entry = JournalEntry(seq_id, prompt, sampling, priority, deliver, want, cache_salt)
        try:
            encode(entry.admit(epoch=0))
        except CodecError as error:
            # Found here it ends one request; on the group's thread it would end the group.
            raise SequenceRefused(f"the request cannot be sent to the engine: {error}") from error
        self._post(lambda: self._tell_engine(self._sequences.add(entry)))
        return stream

    def stop(self) -> None:
        """Shut every worker down and wait for them; live streams end with GroupFailed."""
        self._pulse.stop()
        if self._thread.is_alive():
            self._post(lambda: self._apply(self._supervisor.stop()))
            self._thread.join()
        self._launcher.close()
        self._transport.close()

    # Below everything runs on the group's own thread, but for `_post` and what only posts.

    def started(self, spec: WorkerSpec, started: Started) -> None:
        """A launcher reports a worker that listens."""
        self._post(lambda: self._on_started(spec, started))

    def died(self, spec: WorkerSpec, reason: str, fatal: bool) -> None:
        """A launcher reports a worker that ended."""
        now = time.monotonic()
        self._post(lambda: self._apply(self._supervisor.on_died(spec, reason, now, fatal)))

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
        self._sequences.fail_all(self._failure())

    def _failure(self) -> GroupFailed:
        return GroupFailed(self._reason or "the model instance has stopped")

    def _run(self) -> None:
        try:
            while self.state not in (GroupState.STOPPED, GroupState.FAILED):
                self._handle(self._transport.recv(self._timeout()))
                if self._calls:
                    self._hear_all()
                while self._calls:
                    self._calls.popleft()()
                if self.state not in (GroupState.STOPPED, GroupState.FAILED):
                    self._look_around()
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
            self._sequences.fail_all(self._failure())
            self._settled.set()

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
        all_due = (self._supervisor.due, self._patience.due, self._loading.due)
        due = [at for at in all_due if at is not None]
        return min(max(0.0, min(due) - time.monotonic()), _LONGEST_WAIT_S) if due else None

    def _look_around(self) -> None:
        """What is due by now: successors, the end of patience, the next trial or the last's end."""
        now = time.monotonic()
        self._apply(self._supervisor.on_time(now))
        for spec in self._loading.overdue(now):
            self._give_up_on(spec, f"hung: not loaded after {self.spec.deadlines.load_s:g} s")
        # While some are tried, all others wait.
        tries = self.state is GroupState.READY and not self._sequences.everyone_may_run
        state = GroupState.RECOVERING if tries else self.state
        if self._patience.look(state, now) and (error := self.unavailable) is not None:
            log.error("%s: %d sequences fail, %s", error, len(self._sequences), self.trouble)
            self._tell_engine(self._sequences.fail_all(error))
        if self._sequences.wants_epoch:
            self._apply(self._supervisor.new_epoch())
        self._tell_engine(self._sequences.let_in())

    def _handle(self, event: Received | Lost | None) -> None:
        if isinstance(event, Lost):
            # Seen earlier than the launcher's report: a process may take long to end.
            self._apply(self._supervisor.on_connection_lost(event.peer, time.monotonic()))
        if not isinstance(event, Received):
            return
        match event.frame.header.kind:
            case FrameKind.TOKENS:
                batch = read_with_rows(TokenBatch, event.frame)
                self._load = batch.load
                if self._sequences.take(batch):
                    self._supervisor.on_progress(time.monotonic())
                self._outbox.flush()
            case FrameKind.EVENT:
                self._heed(event.peer, decode(WorkerEvent, event.frame.meta), time.monotonic())
            case kind:
                log.warning("%s sent an unexpected %s frame", event.peer, kind.name)

    def _heed(self, peer: str, event: WorkerEvent, now: float) -> None:
        if event.ack is not None:
            self._apply(self._supervisor.on_ack(peer, event.ack))
        if event.lost_epoch is not None:
            self._apply(self._supervisor.on_step_lost(event.lost_epoch, now))
        if event.lost_link is not None:
            self._supervisor.on_link_lost(event.lost_link, now)

    def _on_started(self, spec: WorkerSpec, started: Started) -> None:
        self._loading.end(spec)
        actions = self._supervisor.on_started(spec, started, time.monotonic())
        if actions:
            self._pulse.watch(spec, started)
        self._apply(actions)

    def _mourn(self, death: Mourn) -> None:
        log.warning("%s", death)
        self._loading.end(death.spec)
        self._pulse.forget(death.spec)
        narrowed, messages = self._sequences.on_death(death)
        if narrowed:
            self._supervisor.on_progress(time.monotonic())
        self._tell_engine(messages)

    def _apply(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Spawn(spec):
                    self._loading.begin(spec, time.monotonic())
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
                    log.info("%s", self.cache_summary)
                    log.info("epoch %d begins with %d live sequences", epoch, len(self._sequences))
                    self._tell_engine(self._sequences.begin(epoch))
                case GiveUp(reason):
                    log.error("giving up: %s", reason)
                    self._supervisor.state = GroupState.FAILED
                    self._reason = reason

    def _dial(self, spec: WorkerSpec, address: str) -> None:
        try:
            self._transport.connect(spec.peer, address)
        except PeerLost:
            # Dead, or as good as dead: it can be told nothing.
            self._post(lambda: self._give_up_on(spec, "it cannot be dialled"))

    def _give_up_on(self, spec: WorkerSpec, reason: str) -> None:
        self._apply(self._supervisor.on_hung(spec, reason, time.monotonic()))

    def _send(self, peer: str, frame: Frame) -> None:
        try:
            self._transport.send(peer, frame)
        except PeerLost:
            # The launcher reports its death; the next epoch repeats what mattered.
            log.info("%s is gone, a %s frame is dropped", peer, frame.header.kind.name)

    def _drop(self, seq_id: int) -> None:
        self._tell_engine(self._sequences.drop(seq_id))

    def _tell_engine(self, messages: Messages) -> None:
        for message in messages:
            kind = FrameKind.ADMIT if isinstance(message, Admit) else FrameKind.ABORT
            self._send(ENGINE, Frame(Header(kind=kind), encode(message)))
