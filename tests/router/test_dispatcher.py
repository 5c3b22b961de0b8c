"""The dispatcher against a per-token dense computation, bit for bit, whatever is lost or late."""

from __future__ import annotations

from collections import deque

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

from router.dispatcher import Exchange, TokenDispatcher, split_load
from router.expert_call import expert_result, read_expert_call
from router.permutation import RowMoves, TorchRows, combine, permute
from router.placement import Placement, RoutingTable, ShardAddress, place_experts
from router.transport.base import Dtype, Frame, FrameKind, Header, PeerLost
from shards.row_moves import FastestRows

HIDDEN_SIZE = 5
MOVES = (TorchRows, FastestRows)


def expert(e: int, x: Tensor) -> Tensor:
    """A cheap expert whose bits do not depend on the number of rows: elementwise only."""
    return (x.roll(e + 1, dims=-1) * (0.37 * e + 0.9) - 0.11 * e).to(x.dtype)


def dense(hidden: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
    """The oracle: token by token, slot by slot."""
    out = torch.empty_like(hidden)
    for t in range(hidden.shape[0]):
        total = torch.zeros(hidden.shape[1], dtype=torch.float32)
        for slot in range(expert_ids.shape[1]):
            y = expert(int(expert_ids[t, slot]), hidden[t]).to(torch.float32)
            total = total + weights[t, slot].to(torch.float32) * y
        out[t] = total.to(hidden.dtype)
    return out


def batch(
    seed: int, num_tokens: int, num_experts: int, top_k: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, HIDDEN_SIZE, generator=generator).to(dtype)
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    weights, expert_ids = scores.topk(top_k, dim=-1)
    return hidden, expert_ids, weights.to(dtype)


def table(version: int, placement: Placement, incarnations: dict[int, int]) -> RoutingTable:
    return RoutingTable(
        version=version,
        placement=placement,
        addresses=tuple(
            ShardAddress(shard=s, incarnation=i, address=f"local:{s}")
            for s, i in sorted(incarnations.items())
        ),
    )


def answer(frame: Frame) -> Frame:
    """What an expert shard does."""
    pairs, rows = read_expert_call(frame)
    outputs, start = [], 0
    for e, count in pairs:
        outputs.append(expert(e, rows[start : start + count]))
        start += count
    return expert_result(frame, torch.cat(outputs))


def over_the_wire(frame: Frame) -> Frame:
    """Received frames own writable copies of what was sent."""
    return Frame(frame.header, frame.meta, tuple(memoryview(bytearray(b)) for b in frame.buffers))


class Wire:
    """Collects calls per shard; `dead` shards refuse."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, Frame]] = []
        self.dead: set[int] = set()

    def send(self, shard: int, frame: Frame) -> None:
        if shard in self.dead:
            raise PeerLost(f"expert-{shard}")
        self.calls.append((shard, over_the_wire(frame)))


def key(step: int = 0, epoch: int = 0, layer: int = 0) -> Header:
    return Header(kind=FrameKind.MOE_CALL, epoch=epoch, step=step, layer=layer, source=3)


def started(
    placement: Placement, dtype: torch.dtype = torch.float32
) -> tuple[TokenDispatcher, Wire, Exchange, Tensor]:
    wire = Wire()
    dispatcher = TokenDispatcher(wire.send)
    dispatcher.set_table(table(1, placement, dict.fromkeys(range(placement.num_shards), 0)))
    routed = batch(0, 9, len(placement.shards), 2, dtype)
    return dispatcher, wire, dispatcher.submit(key(), *routed), dense(*routed)


@given(st.integers(0, 9), st.integers(1, 6), st.data())
@settings(max_examples=60, deadline=None)
def test_permute_groups_by_expert_in_token_order(
    num_tokens: int, num_experts: int, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, num_experts))
    ids = [data.draw(st.permutations(range(num_experts)))[:top_k] for _ in range(num_tokens)]
    permutation = permute(torch.tensor(ids, dtype=torch.int64).view(-1, top_k), num_experts)
    rows = sorted((e, t) for t, chosen in enumerate(ids) for e in chosen)
    assert permutation.tokens.tolist() == [t for _, t in rows]
    assert permutation.counts == tuple(sum(e == x for x, _ in rows) for e in range(num_experts))
    assert permutation.positions.tolist() == [
        [rows.index((e, t)) for e in chosen] for t, chosen in enumerate(ids)
    ]


def test_permute_refuses_an_unknown_expert() -> None:
    with pytest.raises(ValueError, match="expert id 4"):
        permute(torch.tensor([[0, 4]]), 4)


def test_combine_sums_in_routing_order() -> None:
    # In float32 1e8 + 1 - 1e8 is 0 and 1e8 - 1e8 + 1 is 1: the order shows.
    permutation = permute(torch.tensor([[2, 0, 1], [2, 1, 0]]), 3)
    rows = torch.tensor([[1.0], [1.0], [-1e8], [-1e8], [1e8], [1e8]])
    assert combine(rows, permutation, torch.ones(2, 3), torch.float32).tolist() == [[0.0], [1.0]]


def test_split_load_balances_and_is_deterministic() -> None:
    holders = {0: [0], 1: [0, 1], 2: [0, 1], 3: [], 4: [1, 0]}
    split = split_load([(0, 5), (1, 4), (2, 3), (3, 1), (4, 3)], holders.__getitem__)
    assert split == {-1: [3], 0: [0, 4], 1: [1, 2]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (4, 1, 1), (4, 2, 1), (4, 3, 1), (4, 3, 2), (5, 4, 4)]
)
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 17, 50])
@pytest.mark.parametrize("moves", MOVES)
def test_equals_dense(
    dtype: torch.dtype, shape: tuple[int, int, int], num_tokens: int, moves: type[RowMoves]
) -> None:
    placement = place_experts(*shape)
    wire = Wire()
    dispatcher = TokenDispatcher(wire.send, moves())
    dispatcher.set_table(table(1, placement, dict.fromkeys(range(placement.num_shards), 0)))
    routed = batch(num_tokens, num_tokens, shape[0], min(2, shape[0]), dtype)
    exchange = dispatcher.submit(key(), *routed)
    for shard, frame in reversed(wire.calls):
        assert not exchange.done
        assert frame.header.dtype is not Dtype.NONE
        dispatcher.on_result(shard, over_the_wire(answer(frame)))
    assert exchange.done
    assert torch.equal(exchange.result(), dense(*routed))
    assert exchange.result().dtype == dtype
    dispatcher.check_invariants()


def test_one_call_per_shard_with_its_experts_ascending() -> None:
    placement = Placement(num_shards=3, shards=((2,), (0,), (2,), (0,), (1,)))
    wire = Wire()
    dispatcher = TokenDispatcher(wire.send)
    dispatcher.set_table(table(7, placement, {0: 0, 1: 0, 2: 0}))
    hidden = torch.arange(10.0).view(2, 5)
    dispatcher.submit(key(), hidden, torch.tensor([[3, 0], [2, 3]]), torch.ones(2, 2))
    assert [shard for shard, _ in wire.calls] == [0, 2]  # nothing for shard 1
    pairs, rows = read_expert_call(wire.calls[0][1])
    assert pairs == [(3, 2)]
    assert torch.equal(rows, hidden)
    pairs, rows = read_expert_call(wire.calls[1][1])
    assert pairs == [(0, 1), (2, 1)]
    assert torch.equal(rows, hidden)
    assert wire.calls[0][1].header.table_version == 7
    assert wire.calls[0][1].header.key == key().key
    totals = dispatcher.layers[0]
    assert (totals.exchanges, totals.calls, totals.resends) == (0, 2, 0)
    assert (totals.sent_bytes, totals.received_bytes) == (4 * 5 * 4, 0)
    dispatcher.on_result(0, over_the_wire(answer(wire.calls[0][1])))
    assert (totals.exchanges, totals.received_bytes) == (0, 2 * 5 * 4)
    dispatcher.on_result(2, over_the_wire(answer(wire.calls[1][1])))
    assert (totals.exchanges, totals.received_bytes) == (1, 4 * 5 * 4)
    assert 0 < totals.seconds < 60
    assert dispatcher.layers[0].tokens == [1, 0, 1, 2, 0]


def test_repeated_late_and_foreign_answers_are_dropped() -> None:
    dispatcher, wire, exchange, wanted = started(place_experts(4, 2, 1))
    (shard, call), (other, other_call) = wire.calls
    result = over_the_wire(answer(call))
    garbage = Frame(result.header, result.meta, (memoryview(bytearray(result.buffers[0].nbytes)),))
    dispatcher.on_result(other, garbage)  # a shard answers a call it was not given
    stale = Frame(garbage.header._replace(step=9), garbage.meta, garbage.buffers)
    dispatcher.on_result(shard, stale)
    assert dispatcher.on_result(shard, result) is None
    dispatcher.on_result(shard, garbage)
    assert dispatcher.on_result(other, over_the_wire(answer(other_call))) is exchange
    dispatcher.on_result(other, garbage)
    assert torch.equal(exchange.result(), wanted)


def test_a_lost_copy_is_replaced_by_another() -> None:
    dispatcher, wire, exchange, wanted = started(place_experts(4, 2, 2))
    calls, wire.calls = wire.calls, []
    late = over_the_wire(answer(dict(calls)[0]))
    wire.dead.add(0)
    dispatcher.on_lost(0)
    dispatcher.on_lost(0)  # send and recv may both report it
    assert dispatcher.layers[0].resends == 1
    assert {shard for shard, _ in wire.calls} == {1}
    assert dispatcher.on_result(0, late) is None
    for shard, frame in [*wire.calls, (1, dict(calls)[1])]:  # two calls of one exchange, one shard
        dispatcher.check_invariants()
        dispatcher.on_result(shard, over_the_wire(answer(frame)))
    assert torch.equal(exchange.result(), wanted)


def test_held_until_a_new_incarnation_comes() -> None:
    placement = place_experts(4, 2, 1)
    dispatcher, wire, exchange, wanted = started(placement)
    calls, wire.calls = wire.calls, []
    dispatcher.on_lost(1)
    dispatcher.on_result(0, over_the_wire(answer(calls[0][1])))
    dispatcher.set_table(table(2, placement, {0: 0, 1: 0}))  # the dead incarnation still listed
    assert not wire.calls
    assert not exchange.done
    dispatcher.set_table(table(1, placement, {0: 0, 1: 1}))  # not newer
    assert not wire.calls
    dispatcher.set_table(table(3, placement, {0: 0, 1: 1}))
    assert [shard for shard, _ in wire.calls] == [1]
    dispatcher.on_result(1, over_the_wire(answer(wire.calls[0][1])))
    assert torch.equal(exchange.result(), wanted)


def test_held_without_any_table() -> None:
    wire = Wire()
    dispatcher = TokenDispatcher(wire.send)
    routed = batch(5, 6, 4, 2, torch.bfloat16)
    exchange = dispatcher.submit(key(), *routed)
    dispatcher.on_lost(0)
    dispatcher.check_invariants()
    dispatcher.set_table(table(1, place_experts(4, 1, 1), {0: 0}))
    dispatcher.on_result(0, over_the_wire(answer(wire.calls[0][1])))
    assert torch.equal(exchange.result(), dense(*routed))


def test_dropped_epochs_are_forgotten() -> None:
    dispatcher, wire, exchange, _ = started(place_experts(4, 2, 1))
    with pytest.raises(ValueError, match="under way"):
        dispatcher.submit(key(), *batch(0, 1, 4, 1, torch.float32))
    dispatcher.drop_before(1)
    for shard, frame in wire.calls:
        assert dispatcher.on_result(shard, over_the_wire(answer(frame))) is None
    assert not exchange.done
    with pytest.raises(ValueError, match="dropped"):
        dispatcher.submit(key(), *batch(0, 1, 4, 1, torch.float32))
    assert not dispatcher.submit(key(epoch=1), *batch(0, 1, 4, 1, torch.float32)).done
    dispatcher.check_invariants()


def test_an_answer_of_the_wrong_size_is_refused() -> None:
    dispatcher, wire, _, _ = started(place_experts(4, 2, 1))
    shard, frame = wire.calls[0]
    result = answer(frame)
    with pytest.raises(ValueError, match="bytes"):
        dispatcher.on_result(shard, Frame(result.header, result.meta, (result.buffers[0][:-1],)))


class Interleavings(RuleBasedStateMachine):
    """Shards die, hang on to answers, come back, move; every exchange ends with the same bits."""

    @initialize(data=st.data())
    def start(self, data: st.DataObject) -> None:
        self.num_experts = data.draw(st.integers(1, 6))
        replicas = data.draw(st.integers(1, 3))
        shards = data.draw(st.integers(replicas, max(replicas, min(4, self.num_experts))))
        self.placement = place_experts(self.num_experts, shards, replicas)
        self.version = 0
        self.running = dict.fromkeys(range(shards), 0)
        self.inboxes: dict[tuple[int, int], deque[Frame]] = {}
        self.answers: list[tuple[int, Frame]] = []
        self.unreported: set[int] = set()
        self.connected: dict[int, int] = {}
        self.expected: list[tuple[Exchange, Tensor]] = []
        self.dispatcher = TokenDispatcher(self.send, data.draw(st.sampled_from(MOVES))())
        if data.draw(st.booleans()):
            self.publish()

    def send(self, shard: int, frame: Frame) -> None:
        incarnation = self.connected.get(shard)
        if incarnation is None or self.running.get(shard) != incarnation:
            raise PeerLost(f"expert-{shard}")
        assert all(shard in self.placement.shards[e] for e, _ in read_expert_call(frame)[0])
        inbox = self.inboxes.setdefault((shard, incarnation), deque())
        inbox.append(over_the_wire(frame))

    def publish(self) -> None:
        self.version += 1
        for shard, incarnation in self.running.items():
            if self.connected.get(shard) != incarnation:
                self.unreported.discard(shard)  # a replaced connection reports no loss
            self.connected[shard] = incarnation
        self.dispatcher.set_table(table(self.version, self.placement, self.running))

    @rule(seed=st.integers(0, 999), num_tokens=st.integers(0, 6), dtype=st.sampled_from([0, 1]))
    def submit(self, seed: int, num_tokens: int, dtype: int) -> None:
        top_k = min(self.num_experts, 1 + seed % 3)
        torch_dtype = (torch.float32, torch.bfloat16)[dtype]
        routed = batch(seed, num_tokens, self.num_experts, top_k, torch_dtype)
        header = key(step=len(self.expected), layer=seed % 2)
        self.expected.append((self.dispatcher.submit(header, *routed), dense(*routed)))

    @precondition(lambda self: any(self.inboxes.values()))
    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        shard, incarnation = data.draw(st.sampled_from([k for k, v in self.inboxes.items() if v]))
        frame = answer(self.inboxes[shard, incarnation].popleft())
        self.answers.append((shard, over_the_wire(frame)))

    @precondition(lambda self: self.answers)
    @rule(data=st.data(), repeat=st.booleans())
    def arrive(self, data: st.DataObject, repeat: bool) -> None:
        idx = data.draw(st.integers(0, len(self.answers) - 1))
        shard, frame = self.answers[idx]
        if not repeat:
            del self.answers[idx]
        finished = self.dispatcher.on_result(shard, frame)
        assert finished is None or finished.done

    @precondition(lambda self: self.running)
    @rule(data=st.data(), reported=st.booleans())
    def die(self, data: st.DataObject, reported: bool) -> None:
        shard = data.draw(st.sampled_from(sorted(self.running)))
        incarnation = self.running.pop(shard)
        self.inboxes.pop((shard, incarnation), None)
        if self.connected.get(shard) == incarnation:
            self.unreported.add(shard)
            if reported:
                self.report()

    @precondition(lambda self: self.unreported)
    @rule()
    def report(self) -> None:
        self.dispatcher.on_lost(self.unreported.pop())

    @rule(data=st.data(), told=st.booleans())
    def respawn(self, data: st.DataObject, told: bool) -> None:
        shard = data.draw(st.integers(0, self.placement.num_shards - 1))
        if shard not in self.running:
            self.running[shard] = self.version + 1
            if told:
                self.publish()

    @rule()
    def publish_again(self) -> None:
        self.publish()

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "dispatcher"):
            self.dispatcher.check_invariants()

    def teardown(self) -> None:
        if not hasattr(self, "dispatcher"):
            return
        while self.unreported:
            self.report()
        for shard in range(self.placement.num_shards):
            self.running.setdefault(shard, self.version + 1)
        self.publish()
        while any(self.inboxes.values()) or self.answers:
            for (shard, _), inbox in self.inboxes.items():
                self.answers += [(shard, over_the_wire(answer(frame))) for frame in inbox]
                inbox.clear()
            for shard, frame in self.answers:
                self.dispatcher.on_result(shard, frame)
            self.answers.clear()
            self.dispatcher.check_invariants()
        for exchange, wanted in self.expected:
            assert exchange.done
            assert torch.equal(exchange.result(), wanted)


def test_interleavings() -> None:
    run_state_machine_as_test(
        Interleavings,
        settings=settings(max_examples=80, stateful_step_count=40, deadline=None),
    )
