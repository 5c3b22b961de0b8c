"""A pipeline stage: a contiguous range of layers, its KV cache and its recurrent state."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from router.codec import decode, encode, frame_with_rows, read_rows_buffer, rows_buffer
from router.layer_totals import LayerTotals
from router.limits import EngineLimits
from router.placement import RoutingTable
from router.step import StepPlan, StepResult
from router.transport.base import Frame, FrameKind, Header, PeerLost, Transport
from router.transport.tensors import tensor_buffer, torch_dtype, wire_dtype
from shards.control import WorkerEvent
from shards.exchange_meter import MeteredBackend, StepMeter
from shards.expert_backend import ExpertBackend
from shards.load_progress import OnRead
from shards.model_runner import ModelRunner, StageOutput
from shards.moe_wire import MoeShape, read_rows
from shards.remote_experts import ActorBackend, DirectBackend, ExpertLinks, StepLost
from shards.spec import Role, WorkerSpec
from shards.worker import Worker

log = logging.getLogger("conclave.stage")


class StageWorker(Worker):
    """Runs plans in the order they arrive; a broken exchange ends the epoch, never the process."""

    def __init__(
        self,
        spec: WorkerSpec,
        transport: Transport,
        shape: MoeShape,
        make_runner: Callable[[EngineLimits, ExpertBackend], ModelRunner],
    ) -> None:
        super().__init__(spec, transport)
        self._make_runner = make_runner
        self._runner: ModelRunner | None = None
        self._backlog: deque[Frame] = deque()
        self._epoch = 0
        self._newest_epoch = 0
        self._lost_epoch = 0
        self._shape = shape
        self._links = ExpertLinks(
            transport,
            self.on_unreachable,
            patience=spec.group.deadlines.hang_s,
            first_epoch=spec.group.first_epoch,
        )
        self._actor = ActorBackend(transport, shape, spec.index, self._advance_step)
        self._exchanges = MeteredBackend(self.backend)
        is_last = spec.index == len(spec.group.stage_layers) - 1
        self._previous = f"{Role.STAGE}-{spec.index - 1}" if spec.index else f"{Role.ENGINE}-0"
        self._next = f"{Role.ENGINE}-0" if is_last else f"{Role.STAGE}-{spec.index + 1}"

    @property
    def backend(self) -> ActorBackend | DirectBackend:
        """How this stage reaches its experts, by `--dispatch`."""
        if self.spec.group.dispatch == "direct":
            return DirectBackend(self._links, self.spec.index, self._advance_step)
        return self._actor

    @property
    def layer_totals(self) -> dict[int, LayerTotals]:
        """Of its own dispatcher, which has nothing to do with `--dispatch actor`."""
        return self._links.dispatcher.layers

    def advance(self) -> None:
        """Run the oldest waiting plan, or wait for an event."""
        if self._backlog:
            self._run_step(self._backlog.popleft())
        else:
            super().advance()

    def on_frame(self, peer: str, frame: Frame) -> None:
        """Plans queue up; answers of experts and dispatcher are taken at once."""
        match frame.header.kind:
            case FrameKind.STEP:
                self._backlog.append(frame)
                self._newest_epoch = max(self._newest_epoch, frame.header.epoch)
            case FrameKind.MOE_RESULT:
                self._actor.on_result(frame)
            case FrameKind.EXPERT_RESULT:
                self._links.on_result(peer, frame)
            case FrameKind.TABLE:
                table = decode(RoutingTable, frame.meta)
                self.on_coming_epoch(frame.header.epoch)
                self._links.dispatcher.drop_before(self._newest_epoch)
                self._links.set_table(table)
            case _:
                super().on_frame(peer, frame)

    def on_limits(self, limits: EngineLimits) -> None:
        """Allocate the caches; those that are there already have this size."""
        if self._runner is None:
            self._runner = self._make_runner(limits, self._exchanges)

    def on_coming_epoch(self, epoch: int) -> None:
        """Steps in hand or in the backlog of earlier epochs are stale from here on."""
        self._newest_epoch = max(self._newest_epoch, epoch)

    def on_connected(self, peer: str) -> None:
        """A dispatcher that publishes tables is asked for the current one."""
        if peer == f"{Role.DISPATCHER}-0" and self.spec.group.dispatch == "direct":
            try:
                self.transport.send(peer, Frame(Header(kind=FrameKind.TABLE)))
            except PeerLost:
                self.on_lost(peer)

    def on_lost(self, peer: str) -> None:
        """Losing the dispatcher loses the step in hand; losing an expert does not.

        The connection on which plans, tables or experts' answers come may have carried one.
        """
        self._links.on_lost(peer)
        if peer == f"{Role.DISPATCHER}-0" and self.spec.group.dispatch == "actor":
            self._lost_epoch = self._epoch
        if peer in (self._previous, f"{Role.DISPATCHER}-0") and self._newest_epoch:
            self.report(WorkerEvent(lost_epoch=self._newest_epoch))

    def _advance_step(self) -> None:
        """One turn of the data loop in the middle of a step."""
        self._check_step()
        self.handle(self.transport.recv(None))

    def _check_step(self) -> None:
        """Raise StepLost when nobody waits for the step in hand any more.

        Once a newer epoch is known the dispatcher may have forgotten this step's exchange, and
        the next stage may be a successor that knows none of its sequences.
        """
        over = self._newest_epoch > self._epoch
        if self.stopping or over or self._lost_epoch >= self._epoch:
            raise StepLost(f"{self.spec.peer}: step of epoch {self._epoch} cannot finish")

    def _run_step(self, frame: Frame) -> None:
        epoch = frame.header.epoch
        if epoch < self._newest_epoch or epoch <= self._lost_epoch:
            return
        assert self._runner is not None
        if epoch > self._epoch:
            self._epoch = epoch
            self._runner.reset()
            self._forget_exchanges(before=epoch)
        try:
            plan = decode(StepPlan, frame.meta)
            traced = plan.trace is not None
            meter = StepMeter(self.spec.index, time.perf_counter()) if traced else None
            self._exchanges.meter = meter
            done = self._runner.execute(plan, self._hidden(frame))
            self._check_step()
            self._pass_on(frame, done, plan, meter)
        except (StepLost, PeerLost) as error:
            log.warning("%s: a step of epoch %d is lost: %s", self.spec.peer, epoch, error)
            self._lost_epoch = epoch
            # What experts still answer is nobody's, and its tensors belong to the step that ended.
            self._forget_exchanges(before=epoch + 1)
            self.report(WorkerEvent(lost_epoch=epoch))

    def _forget_exchanges(self, before: int) -> None:
        self._actor.forget()
        self._links.dispatcher.drop_before(before)

    def _hidden(self, frame: Frame) -> Tensor | None:
        """The [T, D] rows that came with a plan; stage 0 gets none."""
        if not frame.buffers:
            return None
        dtype = torch_dtype(frame.header.dtype)
        return read_rows(frame.buffers[0], dtype, self._shape.hidden_size)

    def _pass_on(
        self, frame: Frame, done: StageOutput, plan: StepPlan, meter: StepMeter | None
    ) -> None:
        """Send the plan and its rows on, or the result; wanted arrays of all stages so far too."""
        wanted = (*read_rows_buffer(frame.buffers[1:]), *done.wanted)
        trace = plan.trace or ()
        if meter is not None:
            trace = (*trace, meter.trace(time.perf_counter()))
        if isinstance(done.output, StepResult):
            header = frame.header._replace(kind=FrameKind.RESULT)
            result = replace(done.output, wanted=wanted, trace=trace)
            self.transport.send(self._next, frame_with_rows(header, result))
            return
        header = frame.header._replace(dtype=wire_dtype(done.output.dtype))
        buffers = (tensor_buffer(done.output.contiguous()), *rows_buffer(wanted))
        meta = frame.meta if meter is None else encode(replace(plan, trace=trace))
        self.transport.send(self._next, Frame(header, meta, buffers))


def make_stage_worker(spec: WorkerSpec, transport: Transport, on_read: OnRead) -> StageWorker:
    """Load one stage's layers; its caches and its wires to the experts come with the limits."""
    from models.kernels.native import use_kernels
    from shards.checkpoint import open_model
    from shards.kv_cache import allocate_caches
    from shards.loading import load_stage
    from shards.threads import dtype_of, use_threads

    group = spec.group
    use_threads(group.threads)
    use_kernels(group.kernels)
    config, checkpoint = open_model(group.model_path, on_read)
    first, last = group.stage_layers[spec.index]
    dtype = dtype_of(group.dtype)
    quantization = group.quantization
    stage = load_stage(config, checkpoint, first, last, dtype, quantization=quantization)

    def make_runner(limits: EngineLimits, backend: ExpertBackend) -> ModelRunner:
        return ModelRunner(
            config,
            stage,
            first,
            last,
            allocate_caches(
                config,
                range(first, last),
                num_blocks=limits.num_blocks,
                block_size=limits.block_size,
                num_state_rows=limits.num_state_rows,
                dtype=dtype,
            ),
            backend,
            block_size=limits.block_size,
            dtype=dtype,
            few_tokens=limits.few_tokens,
            unused_ids=group.unused_token_ids,
            vocabulary=group.vocabulary,
        )

    shape = MoeShape(config.hidden_size, config.top_k)
    worker = StageWorker(spec, transport, shape, make_runner)
    worker.bytes_read = checkpoint.bytes_read
    return worker
