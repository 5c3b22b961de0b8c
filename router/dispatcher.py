"""Token routing: logical expert → physical expert, per token; calls that survive lost shards.

T tokens, k experts per token, D hidden size, N = T·k (token, slot) pairs, E logical experts.
One class, two homes: the Dispatcher actor and (direct dispatch) the stages. No sockets here.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from router.exchange import Exchange, Key
from router.expert_call import call_sequence, expert_call
from router.layer_totals import LayerTotals
from router.permutation import RowMoves, TorchRows
from router.placement import RoutingTable
from router.row_pool import RowPool
from router.transport.base import Frame, Header, PeerLost

__all__ = ["Exchange", "TokenDispatcher", "split_load"]


def split_load(
    counts: Sequence[tuple[int, int]], holders: Callable[[int], Sequence[int]]
) -> dict[int, list[int]]:
    """Choose a shard for each (expert, tokens): shard → its experts ascending; -1 where none is.

    Experts without a choice first, then the largest first to the least loaded holder.
    """
    chosen: dict[int, list[int]] = {}
    load: dict[int, int] = {}
    open_choices: list[tuple[int, int, Sequence[int]]] = []
    for expert, count in counts:
        shards = holders(expert)
        if len(shards) > 1:
            open_choices.append((-count, expert, shards))
            continue
        shard = shards[0] if shards else -1
        chosen.setdefault(shard, []).append(expert)
        load[shard] = load.get(shard, 0) + count
    for negative, expert, shards in sorted(open_choices):
        shard = min(shards, key=lambda shard: load.get(shard, 0))  # the first among equals
        chosen.setdefault(shard, []).append(expert)
        load[shard] = load.get(shard, 0) - negative
    return {shard: sorted(experts) for shard, experts in sorted(chosen.items())}


class _Call(NamedTuple):
    """One EXPERT_CALL under way: which experts of `exchange`, to which incarnation of a shard."""

    exchange: Exchange
    shard: int
    incarnation: int
    experts: tuple[int, ...]


class TokenDispatcher:
    """Sends each token to a live copy of its experts and gathers the answers.

    `send(shard, frame)` writes to the incarnation of the newest table and raises PeerLost. The
    owner feeds tables, answers and losses; which copy computes never changes a bit. `moves` makes
    the passes over the rows, PyTorch by default.
    """

    def __init__(
        self,
        send: Callable[[int, Frame], None],
        moves: RowMoves | None = None,
        *,
        first_epoch: int = 0,
    ) -> None:
        """Exchanges before `first_epoch` are not counted."""
        self.table: RoutingTable | None = None
        self.layers: dict[int, LayerTotals] = {}
        self._uncounted: dict[int, LayerTotals] = {}
        self._first_epoch = first_epoch
        self.oldest_epoch = 0
        self._send = send
        self._sequence = 0
        self._live: dict[int, int] = {}
        self._lost: set[tuple[int, int]] = set()
        self._calls: dict[int, _Call] = {}
        self._exchanges: dict[Key, Exchange] = {}
        self._moves: RowMoves = TorchRows() if moves is None else moves
        self._pool = RowPool()
        self._copies: dict[int, list[int]] = {}
        self._order: tuple[int, ...] = ()
        """`_holders` and `_order_of`, as long as neither the table nor who lives changes."""

    def set_table(self, table: RoutingTable) -> None:
        """Route by `table` from now on; one that is not newer is ignored.

        Calls to incarnations that are no longer listed go elsewhere; held experts are sent.
        """
        if self.table is not None:
            if table.version <= self.table.version:
                return
            if len(table.placement.shards) != len(self.table.placement.shards):
                raise ValueError(f"table {table.version}: the number of experts never changes")
        self.table = table
        listed = {address.shard: address.incarnation for address in table.addresses}
        self._lost = {pair for pair in self._lost if listed.get(pair[0]) == pair[1]}
        self._live = {s: i for s, i in listed.items() if (s, i) not in self._lost}
        self._forget_copies()
        work = self._take_calls(lambda call: listed.get(call.shard) != call.incarnation)
        for exchange in self._exchanges.values():
            if exchange.held:
                work.append((exchange, exchange.held))
                exchange.held = ()
        self._dispatch(work)

    def submit(self, key: Header, hidden: Tensor, expert_ids: Tensor, weights: Tensor) -> Exchange:
        """Start the exchange of `hidden` [T, D], routed by `expert_ids` and `weights` [T, k].

        Raises ValueError for an epoch that was dropped, a key under way or an unknown expert.
        """
        exchange_key = key.key
        if key.epoch < self.oldest_epoch or exchange_key in self._exchanges:
            raise ValueError(f"exchange {exchange_key}: dropped or under way already")
        exchange = Exchange(
            key, hidden, expert_ids, weights, self._order_of(expert_ids), self._moves, self._pool
        )
        counts = exchange.counts
        self._totals(key).count_tokens(counts)
        used = tuple(expert for expert, count in enumerate(counts) if count)
        if used:
            self._exchanges[exchange_key] = exchange
            self._dispatch([(exchange, used)])
        return exchange

    def _totals(self, key: Header) -> LayerTotals:
        layers = self.layers if key.epoch >= self._first_epoch else self._uncounted
        return layers.setdefault(key.layer, LayerTotals())

    def on_result(self, shard: int, frame: Frame) -> Exchange | None:
        """Take an EXPERT_RESULT; the exchange it completes, if any.

        Late, repeated and unknown answers are dropped. Raises ValueError for a wrong size.
        """
        sequence = call_sequence(frame)
        call = self._calls.get(sequence)
        if call is None or call.shard != shard or call.exchange.key != frame.header.key:
            return None
        (buffer,) = frame.buffers
        exchange = call.exchange
        exchange.answer(call.experts, buffer)
        totals = self._totals(exchange.header)
        totals.received_bytes += buffer.nbytes
        del self._calls[sequence]
        exchange.outstanding.remove(sequence)
        if not exchange.done:
            return None
        del self._exchanges[exchange.key]
        totals.exchanges += 1
        totals.seconds += time.perf_counter() - exchange.started
        return exchange

    def on_connected(self, shard: int, incarnation: int) -> None:
        """There is a connection again: the next table that lists this incarnation may use it."""
        self._lost.discard((shard, incarnation))

    def on_lost(self, shard: int) -> None:
        """The connection to `shard` is gone: its calls go to other copies or wait for a table."""
        self._dispatch(self._bury(shard))

    def drop_before(self, epoch: int) -> None:
        """Forget exchanges of epochs before `epoch`; they never become done."""
        self.oldest_epoch = max(self.oldest_epoch, epoch)
        self._exchanges = {k: e for k, e in self._exchanges.items() if k[0] >= self.oldest_epoch}
        self._calls = {
            s: call
            for s, call in self._calls.items()
            if call.exchange.header.epoch >= self.oldest_epoch
        }

    def check_invariants(self) -> None:
        """Every expert of every exchange is answered, under way at a live shard, or held."""
        for key, exchange in self._exchanges.items():
            assert key == exchange.key
            assert not exchange.done
            away = [e for s in exchange.outstanding for e in self._calls[s].experts]
            assert len(away) == len(set(away))
            assert not set(away) & set(exchange.held)
            assert all(exchange.counts[e] for e in (*away, *exchange.held))
            assert not any(self._holders(e) for e in exchange.held)
        for sequence, call in self._calls.items():
            assert sequence in call.exchange.outstanding
            assert self._exchanges[call.exchange.key] is call.exchange
            assert self._live.get(call.shard) == call.incarnation

    def _order_of(self, expert_ids: Tensor) -> tuple[int, ...]:
        """All experts, those of one shard together: what it is sent then lies together."""
        if self.table is None:
            return tuple(range(int(expert_ids.max()) + 1 if expert_ids.numel() else 0))
        if not self._order:
            experts = range(len(self.table.placement.shards))
            # A place of its own for those that nobody holds now.
            self._order = tuple(sorted(experts, key=lambda e: (*self._holders(e)[:1], -1)[0]))
        return self._order

    def _forget_copies(self) -> None:
        """The table or who lives has changed."""
        self._copies.clear()
        self._order = ()

    def _holders(self, expert: int) -> list[int]:
        """Live shards with a copy of `expert`, the preferred one first."""
        copies = self._copies.get(expert)
        if copies is None:
            held = () if self.table is None else self.table.placement.shards[expert]
            copies = self._copies[expert] = [shard for shard in held if shard in self._live]
        return copies

    def _dispatch(self, work: Iterable[tuple[Exchange, tuple[int, ...]]]) -> None:
        """Send calls until every expert is under way or held, burying shards on the way."""
        queue = deque(work)
        while queue:
            exchange, experts = queue.popleft()
            counts = exchange.counts
            split = split_load([(e, counts[e]) for e in experts], self._holders)
            for shard, group in split.items():
                if shard == -1:
                    exchange.held += tuple(group)
                    continue
                try:
                    self._send_call(exchange, shard, tuple(group))
                except PeerLost:
                    queue.extend(self._bury(shard))

    def _send_call(self, exchange: Exchange, shard: int, experts: tuple[int, ...]) -> None:
        assert self.table is not None
        self._sequence = sequence = self._sequence + 1
        rows = exchange.questions(experts)
        frame = expert_call(
            exchange.header,
            self.table.version,
            sequence,
            [(expert, exchange.counts[expert]) for expert in experts],
            rows,
            exchange.dtype,
        )
        # Known before it is sent: a loss in `send` finds it among the shard's calls.
        self._calls[sequence] = _Call(exchange, shard, self._live[shard], experts)
        exchange.outstanding.add(sequence)
        totals = self._totals(exchange.header)
        totals.calls += 1
        totals.sent_bytes += rows.nbytes
        self._send(shard, frame)

    def _bury(self, shard: int) -> list[tuple[Exchange, tuple[int, ...]]]:
        """Mark the shard's incarnation dead; what it still owed."""
        incarnation = self._live.pop(shard, None)
        if incarnation is not None:
            self._lost.add((shard, incarnation))
            self._forget_copies()
        return self._take_calls(lambda call: call.shard == shard)

    def _take_calls(self, gone: Callable[[_Call], bool]) -> list[tuple[Exchange, tuple[int, ...]]]:
        work = []
        for sequence, call in list(self._calls.items()):
            if gone(call):
                del self._calls[sequence]
                call.exchange.outstanding.remove(sequence)
                self._totals(call.exchange.header).resends += 1
                work.append((call.exchange, call.experts))
        return work
