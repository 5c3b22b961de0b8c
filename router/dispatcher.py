"""Token routing: logical expert → physical expert, per token; calls that survive lost shards.

T tokens, k experts per token, D hidden size, N = T·k (token, slot) pairs, E logical experts.
One class, two homes: the Dispatcher actor and (direct dispatch) the stages. No sockets here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from router.expert_call import call_sequence, expert_call, expert_result, read_expert_call
from router.permutation import Permutation, combine, permute
from router.placement import RoutingTable
from router.transport.base import Frame, Header, PeerLost
from router.transport.tensors import buffer_tensor

__all__ = [
    "Exchange",
    "Permutation",
    "TokenDispatcher",
    "combine",
    "expert_result",
    "permute",
    "read_expert_call",
    "split_load",
]

Key = tuple[int, int, int, int, int]


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


@dataclass(frozen=True, slots=True)
class _Call:
    """One EXPERT_CALL under way: which experts of `exchange`, to which incarnation of a shard."""

    exchange: Exchange
    shard: int
    incarnation: int
    experts: tuple[int, ...]


class Exchange:
    """One MoE layer of one micro-batch: tokens out to experts and back. Made by `submit`."""

    def __init__(
        self, header: Header, hidden: Tensor, weights: Tensor, permutation: Permutation
    ) -> None:
        self.header = header
        self.hidden = hidden
        self.permutation = permutation
        self.held: tuple[int, ...] = ()
        """Experts that wait for a shard to come up."""
        self.outstanding: set[int] = set()
        """Sequence numbers of the calls under way."""
        self._weights = weights
        num_pairs = permutation.tokens.shape[0]
        self._rows = hidden.new_empty(num_pairs, hidden.shape[1])

    @property
    def key(self) -> Key:
        """(epoch, step, layer, micro_batch, source)."""
        return self.header.key

    @property
    def done(self) -> bool:
        """Whether every expert has answered."""
        return not self.outstanding and not self.held

    def result(self) -> Tensor:
        """The layer's expert output [T, D] in the dtype of `hidden`; only when `done`."""
        assert self.done, f"exchange {self.key} still waits for experts"
        return combine(self._rows, self.permutation, self._weights, self.hidden.dtype)

    def gather(self, experts: tuple[int, ...]) -> Tensor:
        """The input rows of `experts`, in their order, [n, D] on the CPU."""
        tokens = [self.permutation.tokens[start:stop] for start, stop in self._runs(experts)]
        rows = torch.cat(tokens) if len(tokens) > 1 else tokens[0]
        return self.hidden.index_select(0, rows).cpu()

    def scatter(self, experts: tuple[int, ...], buffer: memoryview) -> None:
        """Take the output rows of `experts`. Raises ValueError when their number is wrong."""
        runs = self._runs(experts)
        shape = (sum(stop - start for start, stop in runs), self._rows.shape[1])
        rows = buffer_tensor(buffer, self._rows.dtype, shape)
        taken = 0
        for start, stop in runs:
            self._rows[start:stop] = rows[taken : taken + stop - start]
            taken += stop - start

    def _runs(self, experts: tuple[int, ...]) -> list[tuple[int, int]]:
        """Row ranges of ascending `experts`; neighbours are joined."""
        runs: list[tuple[int, int]] = []
        for expert in experts:
            start = self.permutation.starts[expert]
            stop = start + self.permutation.counts[expert]
            if runs and runs[-1][1] == start:
                start = runs.pop()[0]
            runs.append((start, stop))
        return runs


class TokenDispatcher:
    """Sends each token to a live copy of its experts and gathers the answers.

    `send(shard, frame)` writes to the incarnation of the newest table and raises PeerLost. The
    owner feeds tables, answers and losses; which copy computes never changes a bit.
    """

    def __init__(self, send: Callable[[int, Frame], None]) -> None:
        self.table: RoutingTable | None = None
        self.num_calls = 0
        self.num_resends = 0
        self.sent_bytes = 0
        self.received_bytes = 0
        self.tokens: dict[int, list[int]] = {}
        """Per layer, how many tokens each logical expert got."""
        self.oldest_epoch = 0
        self._send = send
        self._sequence = 0
        self._live: dict[int, int] = {}
        self._lost: set[tuple[int, int]] = set()
        self._calls: dict[int, _Call] = {}
        self._exchanges: dict[Key, Exchange] = {}

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
        work = self._take_calls(lambda call: listed.get(call.shard) != call.incarnation)
        self.num_resends += len(work)
        for exchange in self._exchanges.values():
            if exchange.held:
                work.append((exchange, exchange.held))
                exchange.held = ()
        self._dispatch(work)

    def submit(self, key: Header, hidden: Tensor, expert_ids: Tensor, weights: Tensor) -> Exchange:
        """Start the exchange of `hidden` [T, D], routed by `expert_ids` and `weights` [T, k].

        `hidden` must not change until the exchange is done. Raises ValueError for an epoch that
        was dropped, a key under way or an unknown expert.
        """
        if key.epoch < self.oldest_epoch or key.key in self._exchanges:
            raise ValueError(f"exchange {key.key}: dropped or under way already")
        num_experts = self._num_experts(expert_ids)
        permutation = permute(expert_ids, num_experts)
        exchange = Exchange(key, hidden, weights, permutation)
        seen = self.tokens.get(key.layer, [0] * num_experts)
        self.tokens[key.layer] = list(map(sum, zip_longest(seen, permutation.counts, fillvalue=0)))
        used = tuple(expert for expert, count in enumerate(permutation.counts) if count)
        if used:
            self._exchanges[exchange.key] = exchange
            self._dispatch([(exchange, used)])
        return exchange

    def on_result(self, shard: int, frame: Frame) -> Exchange | None:
        """Take an EXPERT_RESULT; the exchange it completes, if any.

        Late, repeated and unknown answers are dropped. Raises ValueError for a wrong size.
        """
        sequence = call_sequence(frame)
        call = self._calls.get(sequence)
        if call is None or call.shard != shard or call.exchange.key != frame.header.key:
            return None
        exchange = call.exchange
        exchange.scatter(call.experts, frame.buffers[0])
        self.received_bytes += frame.buffers[0].nbytes
        del self._calls[sequence]
        exchange.outstanding.remove(sequence)
        if not exchange.done:
            return None
        del self._exchanges[exchange.key]
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
            assert all(exchange.permutation.counts[e] for e in (*away, *exchange.held))
            assert not any(self._holders(e) for e in exchange.held)
        for sequence, call in self._calls.items():
            assert sequence in call.exchange.outstanding
            assert self._exchanges[call.exchange.key] is call.exchange
            assert self._live.get(call.shard) == call.incarnation

    def _num_experts(self, expert_ids: Tensor) -> int:
        if self.table is not None:
            return len(self.table.placement.shards)
        return int(expert_ids.max()) + 1 if expert_ids.numel() else 0

    def _holders(self, expert: int) -> list[int]:
        if self.table is None:
            return []
        return [s for s in self.table.placement.shards[expert] if s in self._live]

    def _dispatch(self, work: Iterable[tuple[Exchange, tuple[int, ...]]]) -> None:
        """Send calls until every expert is under way or held, burying shards on the way."""
        queue = deque(work)
        while queue:
            exchange, experts = queue.popleft()
            counts = exchange.permutation.counts
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
        counts = exchange.permutation.counts
        self._sequence += 1
        pairs = [(expert, counts[expert]) for expert in experts]
        rows = exchange.gather(experts)
        frame = expert_call(exchange.header, self.table.version, self._sequence, pairs, rows)
        # Known before it is sent: a loss in `send` finds it among the shard's calls.
        self._calls[self._sequence] = _Call(exchange, shard, self._live[shard], experts)
        exchange.outstanding.add(self._sequence)
        self.num_calls += 1
        self.sent_bytes += rows.nbytes
        self._send(shard, frame)

    def _bury(self, shard: int) -> list[tuple[Exchange, tuple[int, ...]]]:
        """Mark the shard's incarnation dead; what it still owed."""
        incarnation = self._live.pop(shard, None)
        if incarnation is not None:
            self._lost.add((shard, incarnation))
        work = self._take_calls(lambda call: call.shard == shard)
        self.num_resends += len(work)
        return work

    def _take_calls(self, gone: Callable[[_Call], bool]) -> list[tuple[Exchange, tuple[int, ...]]]:
        work = []
        for sequence, call in list(self._calls.items()):
            if gone(call):
                del self._calls[sequence]
                call.exchange.outstanding.remove(sequence)
                work.append((call.exchange, call.experts))
        return work
