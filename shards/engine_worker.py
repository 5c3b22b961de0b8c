"""The engine: admits, schedules and applies steps; knows neither HTTP nor text."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable

from router.codec import decode, encode, frame_with_rows, read_with_rows
from router.engine import EngineCore, Executor
from router.limits import EngineLimits
from router.step import (
    Abort,
    Admit,
    EngineLoad,
    Refusal,
    StepPlan,
    StepResult,
    Token,
    TokenBatch,
    WantedRows,
)
from router.step_trace import StepTrace
from router.transport.base import Frame, FrameKind, Header, PeerLost, Transport
from shards.control import INGRESS, WorkerEvent
from shards.load_progress import OnRead
from shards.spec import WorkerSpec
from shards.traced_steps import TracedSteps
from shards.worker import Worker

log = logging.getLogger("conclave.engine")


class PipelineExecutor:
    """Runs steps on stage workers: plans go to stage 0, results come from the last stage."""

    def __init__(self, transport: Transport, max_in_flight: int) -> None:
        self.max_in_flight = max_in_flight
        self._transport = transport
        self._results: deque[StepResult] = deque()

    def submit(self, plan: StepPlan) -> None:
        """Send a plan down the pipeline. Raises PeerLost when stage 0 is gone."""
        header = Header(kind=FrameKind.STEP, epoch=plan.epoch, step=plan.step_id)
        self._transport.send("stage-0", Frame(header, encode(plan)))

    def deliver(self, result: StepResult) -> None:
        """A result frame has arrived."""
        self._results.append(result)

    def poll(self, timeout: float | None) -> StepResult | None:
        """The next result that has arrived; never waits, frames arrive in the data loop."""
        return self._results.popleft() if self._results else None


class EngineWorker(Worker):
    """Owns the EngineCore of one model instance and reports one TokenBatch per turn."""

    def __init__(
        self,
        spec: WorkerSpec,
        transport: Transport,
        make_core: Callable[[EngineLimits], EngineCore],
        executor: Executor,
    ) -> None:
        super().__init__(spec, transport)
        self._make_core = make_core
        self._made: EngineCore | None = None
        self._executor = executor
        self._epoch = 0
        self._refusals: list[Refusal] = []
        self._started: list[int] = []
        self._traced = TracedSteps()
        self._told = EngineLoad()
        # Every stage may take a whole deadline; its own loop is watched by its pulse.
        self._patience_s = spec.group.deadlines.step_s * (len(spec.group.stage_layers) + 1)
        self._moved_at = 0.0
        """When a step last came back, or went into an empty pipeline."""

    @property
    def _core(self) -> EngineCore:
        assert self._made is not None, "an epoch begins only after the limits have come"
        return self._made

    def on_limits(self, limits: EngineLimits) -> None:
        """Plan for caches of this size."""
        if self._made is None:
            self._made = self._make_core(limits)

    def advance(self) -> None:
        """Drain what has arrived, apply results, keep the pipeline full, report."""
        if self._made is None:
            super().advance()
            return
        runs_here = not isinstance(self._executor, PipelineExecutor)
        event = self.transport.recv(0.0 if runs_here and self._core.num_in_flight else None)
        while event is not None:
            self.handle(event)
            event = self.transport.recv(0.0)
        tokens: list[Token] = []
        wanted: list[WantedRows] = []
        while (result := self._executor.poll(0.0)) is not None:
            if result.epoch == self._epoch:
                self._moved_at = time.monotonic()
                self._traced.come_back(result, self._moved_at)
                tokens.extend(self._core.apply(result))
                wanted.extend(result.wanted)
        self._fill_pipeline()
        self._send(tuple(tokens), tuple(wanted))
        self._look_for_stall()

    def on_frame(self, peer: str, frame: Frame) -> None:
        """Journal messages from the ingress, results from the last stage."""
        match frame.header.kind:
            case FrameKind.ADMIT:
                admit = decode(Admit, frame.meta)
                if admit.epoch == self._epoch:
                    refusal = self._core.admit(admit)
                    if refusal is not None:
                        self._refusals.append(refusal)
                    else:
                        self._traced.admit(admit)
            case FrameKind.ABORT:
                abort = decode(Abort, frame.meta)
                if abort.epoch == self._epoch:
                    self._core.abort(abort.seq_id)
                    self._traced.end(abort.seq_id)
            case FrameKind.RESULT:
                assert isinstance(self._executor, PipelineExecutor)
                self._executor.deliver(read_with_rows(StepResult, frame))
            case _:
                super().on_frame(peer, frame)

    def on_lost(self, peer: str) -> None:
        """A stage's connection broke: what it carried may have been a result."""
        if self._made is not None and self._core.num_in_flight:
            self.report(WorkerEvent(lost_epoch=self._epoch))

    def on_epoch(self, epoch: int, *, keep_cache: bool) -> None:
        """Forget every sequence: the ingress admits the live ones again."""
        self._epoch = epoch
        self._core.reset(epoch, keep_cache=keep_cache)
        self._refusals.clear()
        self._started.clear()
        self._traced.reset()

    def _fill_pipeline(self) -> None:
        while self._core.num_in_flight < self._executor.max_in_flight:
            plan = self._core.schedule()
            if plan is None:
                return
            if self._core.num_in_flight == 1:
                self._moved_at = time.monotonic()
            if plan.new:
                # Said before it is computed: if a worker dies of it, it is known of what.
                self._started.extend(new.seq_id for new in plan.new)
                self._send((), ())
            if self._traced:
                plan = self._traced.begin(plan, time.monotonic())
            try:
                self._executor.submit(plan)
            except PeerLost as error:
                log.warning("a step of epoch %d is lost: %s", self._epoch, error)
                self.report(WorkerEvent(lost_epoch=self._epoch))
                return

    def _look_for_stall(self) -> None:
        """Everybody lives and waits, and the step comes back no more: give it up.

        A loop that only waits is turned by its own pulse, so that this is looked at.
        """
        waited = time.monotonic() - self._moved_at
        if self._core.num_in_flight and waited > self._patience_s:
            log.error("a step of epoch %d has not come back for %.1f s", self._epoch, waited)
            self._moved_at = time.monotonic()
            self.report(WorkerEvent(lost_epoch=self._epoch))

    def _send(self, tokens: tuple[Token, ...], wanted: tuple[WantedRows, ...]) -> None:
        load = self._core.load()
        steps = self._steps_of(tokens) if self._traced else ()
        news = tokens or wanted or self._refusals or self._started or steps
        if not news and load == self._told:
            return
        self._told = load
        batch = TokenBatch(
            epoch=self._epoch,
            tokens=tokens,
            wanted=wanted,
            refusals=tuple(self._refusals),
            started=tuple(self._started),
            load=load,
            steps=steps,
        )
        self._refusals.clear()
        self._started.clear()
        header = Header(kind=FrameKind.TOKENS, epoch=self._epoch)
        try:
            self.transport.send(INGRESS, frame_with_rows(header, batch))
        except PeerLost:
            self.stopping = True

    def _steps_of(self, tokens: tuple[Token, ...]) -> tuple[StepTrace, ...]:
        """What is told of traced steps; sequences that end with these tokens have no more."""
        for token in tokens:
            if token.finish is not None:
                self._traced.end(token.seq_id)
        return self._traced.take(time.monotonic())


def make_engine_worker(spec: WorkerSpec, transport: Transport, on_read: OnRead) -> EngineWorker:
    """The engine of a group, with the whole model inside when the executor is local."""
    if spec.group.executor == "pipeline":
        executor: Executor = PipelineExecutor(transport, spec.group.limits.num_steps)
        return EngineWorker(spec, transport, EngineCore, executor)
    from shards.local_executor import load_local_executor

    local = load_local_executor(spec.group, on_read)

    def make_core(limits: EngineLimits) -> EngineCore:
        local.allocate(limits)
        return EngineCore(limits)

    worker = EngineWorker(spec, transport, make_core, local)
    worker.bytes_read = local.bytes_read
    return worker
