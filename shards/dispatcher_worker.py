"""The dispatcher worker: routes tokens for the stages, or only publishes tables to them."""

from __future__ import annotations

import logging

from router.codec import encode
from router.dispatcher import Exchange, TokenDispatcher
from router.layer_totals import LayerTotals
from router.placement import RoutingTable
from router.transport.base import Frame, FrameKind, Header, PeerLost, Transport
from shards.moe_wire import MoeShape, moe_result, read_moe_call
from shards.remote_experts import ExpertLinks
from shards.spec import Role, WorkerSpec
from shards.worker import Worker

log = logging.getLogger("conclave.dispatcher")


class DispatcherWorker(Worker):
    """With `--dispatch actor` every MoE exchange passes here; with `direct` only tables do."""

    def __init__(self, spec: WorkerSpec, transport: Transport, shape: MoeShape) -> None:
        super().__init__(spec, transport)
        self._shape = shape
        self._links = ExpertLinks(
            transport,
            self.on_unreachable,
            patience=spec.group.deadlines.hang_s,
            first_epoch=spec.group.first_epoch,
        )
        self._open: dict[tuple[int, ...], tuple[str, Exchange]] = {}
        self._table: RoutingTable | None = None

    @property
    def dispatcher(self) -> TokenDispatcher:
        """The routing core."""
        return self._links.dispatcher

    @property
    def layer_totals(self) -> dict[int, LayerTotals]:
        """Nothing with `--dispatch direct`."""
        return self.dispatcher.layers

    def on_frame(self, peer: str, frame: Frame) -> None:
        """MoE calls from stages, results from experts, table requests from stages."""
        match frame.header.kind:
            case FrameKind.MOE_CALL:
                self._begin(peer, frame)
            case FrameKind.EXPERT_RESULT:
                self._links.on_result(peer, frame)
                self._answer(frame.header.key)
            case FrameKind.TABLE:
                self._publish(peer)
            case _:
                super().on_frame(peer, frame)

    def _begin(self, stage: str, frame: Frame) -> None:
        """Start an exchange; a stage that has not heard of the new epoch yet gets no answer."""
        epoch = frame.header.epoch
        if epoch < self.dispatcher.oldest_epoch:
            return
        self.on_coming_epoch(epoch)
        exchange = self.dispatcher.submit(frame.header, *read_moe_call(frame, self._shape))
        self._open[frame.header.key] = (stage, exchange)
        self._answer(frame.header.key)

    def on_coming_epoch(self, epoch: int) -> None:
        """Calls of earlier epochs are nobody's any more, and are not sent again."""
        if epoch > self.dispatcher.oldest_epoch:
            self.dispatcher.drop_before(epoch)
            self._open.clear()

    def on_lost(self, peer: str) -> None:
        """An expert worker died: its outstanding calls go to other copies, or wait."""
        self._links.on_lost(peer)

    def on_table(self, table: RoutingTable) -> None:
        """Route by a new table, and pass it on to stages that dispatch for themselves."""
        self._table = table
        if self.spec.group.dispatch == "direct":
            for index in range(len(self.spec.group.stage_layers)):
                self._publish(f"{Role.STAGE}-{index}")
        else:
            self._links.set_table(table)

    def _publish(self, stage: str) -> None:
        if self._table is None:
            return
        # A stage must not send calls of an epoch that is over to those who are new in the table.
        epoch, version = self.dispatcher.oldest_epoch, self._table.version
        header = Header(kind=FrameKind.TABLE, epoch=epoch, table_version=version)
        try:
            self.transport.send(stage, Frame(header, encode(self._table)))
        except PeerLost:
            # A stage asks for the table itself once it has dialled this worker.
            log.info("%s: %s is not there", self.spec.peer, stage)

    def _answer(self, key: tuple[int, ...]) -> None:
        """Send the combined rows of a finished exchange back to its stage."""
        peer, exchange = self._open.get(key, ("", None))
        if exchange is None or not exchange.done:
            return
        del self._open[key]
        try:
            self.transport.send(peer, moe_result(exchange.header, exchange.result()))
        except PeerLost:
            log.info("%s: %s does not wait any more", self.spec.peer, peer)


def make_dispatcher_worker(spec: WorkerSpec, transport: Transport) -> DispatcherWorker:
    """The dispatcher of a group; it reads the config only, no weights."""
    from pathlib import Path

    from models.kernels.native import use_kernels
    from models.registry import load_config
    from shards.threads import use_threads

    use_threads(spec.group.threads)
    use_kernels(spec.group.kernels)
    config = load_config(Path(spec.group.model_path))
    return DispatcherWorker(spec, transport, MoeShape(config.hidden_size, config.top_k))
