"""Experts in other processes: the connections to them, and a stage's two ways of using them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from models.interface import Routing
from router.dispatcher import Exchange, TokenDispatcher
from router.placement import RoutingTable
from router.transport.base import Frame, FrameKind, Header, PeerLost, Transport
from shards.expert_backend import ExchangeKey
from shards.moe_wire import MoeShape, moe_call, read_moe_result
from shards.row_moves import FastestRows
from shards.spec import Role

Advance = Callable[[], None]
"""One turn of the owner's data loop; raises StepLost when the step cannot finish."""


class StepLost(Exception):
    """The step in hand cannot finish: a peer it needs is gone, or the worker is stopping."""


def exchange_header(key: ExchangeKey, layer_idx: int, stage_idx: int) -> Header:
    """The key of one exchange on the wire."""
    return Header(
        kind=FrameKind.MOE_CALL,
        epoch=key.epoch,
        step=key.step_id,
        layer=layer_idx,
        micro_batch=key.micro_batch,
        source=stage_idx,
    )


class ExpertLinks:
    """A TokenDispatcher over a transport: dials the shards of each new routing table.

    `unreachable` is told of listed shards without a connection; the next table dials them again.
    """

    def __init__(
        self,
        transport: Transport,
        unreachable: Callable[[str], None],
        patience: float,
        first_epoch: int = 0,
    ) -> None:
        """`patience` (seconds): a shard that does not answer must not hold up all the others."""
        self._transport = transport
        self._patience = patience
        self._unreachable = unreachable
        self._connected: dict[int, int] = {}
        self.dispatcher = TokenDispatcher(self._send, FastestRows(), first_epoch=first_epoch)

    def _send(self, shard: int, frame: Frame) -> None:
        self._transport.send(_peer(shard), frame)

    def set_table(self, table: RoutingTable) -> None:
        """Connect to incarnations not seen before, then route by the table."""
        for entry in table.addresses:
            if self._connected.get(entry.shard) == entry.incarnation:
                continue
            try:
                self._transport.connect(_peer(entry.shard), entry.address, self._patience)
            except PeerLost:
                # Sending to it will fail and resend; the next table has its successor.
                self._unreachable(f"{Role.EXPERT}-{entry.shard}")
                continue
            self._connected[entry.shard] = entry.incarnation
            self.dispatcher.on_connected(entry.shard, entry.incarnation)
        self.dispatcher.set_table(table)

    def on_result(self, peer: str, frame: Frame) -> None:
        """An EXPERT_RESULT frame has arrived."""
        self.dispatcher.on_result(_shard(peer), frame)

    def on_lost(self, peer: str) -> None:
        """A connection ended; other roles than experts are none of our business."""
        if peer.startswith(f"{Role.EXPERT}-"):
            shard = _shard(peer)
            self._connected.pop(shard, None)
            self.dispatcher.on_lost(shard)
            self._unreachable(peer)


@cache
def _peer(shard: int) -> str:
    return f"{Role.EXPERT}-{shard}"


@cache
def _shard(peer: str) -> int:
    return int(peer.rsplit("-", 1)[1])


@dataclass(slots=True)
class DirectHandle:
    """An exchange run by this stage's own TokenDispatcher."""

    exchange: Exchange
    advance: Advance

    def result(self) -> Tensor:
        """Turn the data loop until every expert has answered: [T, D]."""
        while not self.exchange.done:
            self.advance()
        return self.exchange.result()


class DirectBackend:
    """`--dispatch direct`: the stage permutes, scatters and combines itself."""

    def __init__(self, links: ExpertLinks, stage_idx: int, advance: Advance) -> None:
        self._links = links
        self._stage_idx = stage_idx
        self._advance = advance

    def submit(
        self, key: ExchangeKey, layer_idx: int, hidden: Tensor, routing: Routing
    ) -> DirectHandle:
        """Send [T, D] rows to their experts."""
        header = exchange_header(key, layer_idx, self._stage_idx)
        exchange = self._links.dispatcher.submit(
            header, hidden, routing.expert_ids, routing.weights
        )
        return DirectHandle(exchange, self._advance)


@dataclass(slots=True)
class ActorHandle:
    """An exchange run by the dispatcher worker."""

    key: tuple[int, ...]
    backend: ActorBackend

    def result(self) -> Tensor:
        """Turn the data loop until the dispatcher has answered: [T, D]."""
        return self.backend.wait(self.key)


class ActorBackend:
    """`--dispatch actor`: the stage hands rows and routing to the dispatcher worker."""

    def __init__(
        self, transport: Transport, shape: MoeShape, stage_idx: int, advance: Advance
    ) -> None:
        self._transport = transport
        self._shape = shape
        self._stage_idx = stage_idx
        self._advance = advance
        self._results: dict[tuple[int, ...], Frame] = {}

    def submit(
        self, key: ExchangeKey, layer_idx: int, hidden: Tensor, routing: Routing
    ) -> ActorHandle:
        """Send one MOE_CALL. Raises StepLost when the dispatcher is gone."""
        header = exchange_header(key, layer_idx, self._stage_idx)
        try:
            self._transport.send(f"{Role.DISPATCHER}-0", moe_call(header, hidden, routing))
        except PeerLost as error:
            raise StepLost(str(error)) from error
        return ActorHandle(header.key, self)

    def on_result(self, frame: Frame) -> None:
        """A MOE_RESULT frame has arrived."""
        self._results[frame.header.key] = frame

    def wait(self, key: tuple[int, ...]) -> Tensor:
        """Turn the data loop until the answer for `key` is here."""
        while key not in self._results:
            self._advance()
        return read_moe_result(self._results.pop(key), self._shape)

    def forget(self) -> None:
        """Drop answers of steps that were lost."""
        self._results.clear()
