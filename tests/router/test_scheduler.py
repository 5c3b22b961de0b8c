"""Scheduling policy: who goes first, who shares, who is preempted, and that nobody starves."""

from __future__ import annotations

from dataclasses import replace

import pytest

from router.engine import EngineCore, EngineLimits
from router.sequence import MAX_OVERTAKES
from router.step import Admit, Sampled, SamplingParams, StepPlan, StepResult, Token

LIMITS = EngineLimits(
    block_size=4,
    num_blocks=1000,
    num_state_slots=0,
    max_num_seqs=8,
    max_num_batched_tokens=64,
    max_model_len=2000,
)


class Loop:
    """A core and the steps it has in flight, answered in order with token 7."""

    def __init__(self, limits: EngineLimits) -> None:
        self.core = EngineCore(limits)
        self.plans: list[StepPlan] = []
        self.num_admitted = 0

    def admit(self, num_prompt: int, max_tokens: int, priority: int = 0) -> int:
        seq_id = self.num_admitted
        self.num_admitted += 1
        admit = Admit(
            seq_id=seq_id,
            epoch=0,
            prompt=(1,) * num_prompt,
            sampling=SamplingParams(max_tokens=max_tokens),
            priority=priority,
        )
        assert self.core.admit(admit) is None
        return seq_id

    def fill(self) -> list[StepPlan]:
        new = list(iter(self.core.schedule, None))
        self.plans += new
        self.core.check_invariants()
        return new

    def drain(self) -> tuple[Token, ...]:
        plan = self.plans.pop(0)
        sampled = tuple(Sampled(seq_id=r.seq_id, token_id=7) for r in plan.scheduled if r.samples)
        tokens = self.core.apply(StepResult(epoch=0, step_id=plan.step_id, sampled=sampled))
        self.core.check_invariants()
        return tokens

    def step(self) -> tuple[StepPlan, tuple[Token, ...]]:
        """One plan and its tokens; for one step in flight."""
        (plan,) = self.fill()
        return plan, self.drain()

    def finished(self, max_steps: int) -> list[int]:
        """Sequences in the order of their end."""
        order: list[int] = []
        for _ in range(max_steps):
            if not self.core.has_work:
                break
            self.fill()
            order += [token.seq_id for token in self.drain() if token.finish]
        assert not self.core.has_work
        return order


def _chunks(plan: StepPlan) -> dict[int, int]:
    return {row.seq_id: row.num_tokens for row in plan.scheduled}


def test_short_prompts_do_not_wait_for_a_huge_one() -> None:
    loop = Loop(LIMITS)
    huge = loop.admit(1900, max_tokens=1)
    loop.step()
    shorts = [loop.admit(10, max_tokens=1) for _ in range(6)]
    done: list[int] = []
    for _ in range(4):
        plan, tokens = loop.step()
        assert _chunks(plan)[huge] >= 32
        assert sum(_chunks(plan).values()) == 64 or set(shorts) <= set(done)
        done += [token.seq_id for token in tokens]
    assert done == shorts


def test_a_huge_prompt_advances_under_a_stream_of_short_ones() -> None:
    loop = Loop(LIMITS)
    huges = [loop.admit(900, max_tokens=1) for _ in range(2)]
    ended: list[int] = []
    for _ in range(2 * 900 // 32 + 10):
        for _ in range(2):
            loop.admit(60, max_tokens=1)
        ended += [token.seq_id for token in loop.step()[1]]
    assert set(huges) <= set(ended)


def test_decodes_come_first_and_prefill_takes_the_rest() -> None:
    loop = Loop(LIMITS)
    decoding = [loop.admit(4, max_tokens=50) for _ in range(3)]
    loop.step()
    prefilling = loop.admit(500, max_tokens=5)
    for _ in range(3):
        plan, _ = loop.step()
        assert [row.seq_id for row in plan.scheduled] == [*decoding, prefilling]
        assert _chunks(plan) == {**dict.fromkeys(decoding, 1), prefilling: 61}


def test_first_come_first_served_within_priorities() -> None:
    loop = Loop(replace(LIMITS, max_num_seqs=1))
    first = loop.admit(4, max_tokens=2)
    loop.fill()
    late, later = loop.admit(4, max_tokens=2), loop.admit(4, max_tokens=2)
    urgent = loop.admit(4, max_tokens=2, priority=-1)
    loop.drain()
    # The urgent one also takes the only seat, so the first is computed again, before the others.
    assert loop.finished(50) == [urgent, first, late, later]


def test_the_last_arrival_of_the_worst_priority_is_preempted() -> None:
    # Four sequences start with 2 blocks each; in the end each wants 4.
    loop = Loop(replace(LIMITS, num_blocks=12, max_model_len=40))
    ids = [loop.admit(7, max_tokens=9, priority=p) for p in (0, 1, 1, 0)]
    plan, _ = loop.step()
    assert set(_chunks(plan)) == set(ids)
    while not loop.core.load().preemptions:
        plan, _ = loop.step()
    assert plan.released == (ids[2],)
    assert set(_chunks(plan)) == set(ids) - {ids[2]}
    assert sorted(loop.finished(60)) == ids


def test_nobody_in_flight_is_preempted() -> None:
    loop = Loop(replace(LIMITS, num_blocks=5, max_model_len=16, max_in_flight=2))
    old, young = loop.admit(7, max_tokens=9), loop.admit(7, max_tokens=9)
    first, second = loop.fill()
    assert (set(_chunks(first)), set(_chunks(second))) == ({old}, {young})
    alone = 0
    while loop.core.has_work:
        loop.drain()
        before = list(loop.plans)
        for plan in loop.fill():
            flying = {seq_id for other in before for seq_id in _chunks(other)}
            assert not flying & {*plan.released, *_chunks(plan)}
            before.append(plan)
        # `old` wants a third or fourth block, `young` has the rest and must land first.
        alone += [set(_chunks(plan)) for plan in loop.plans] == [{young}]
    assert alone >= 1
    assert loop.core.load().preemptions >= 1


def test_a_slot_goes_to_the_better_priority() -> None:
    loop = Loop(replace(LIMITS, num_state_slots=1))
    low = loop.admit(8, max_tokens=20, priority=5)
    for _ in range(3):
        loop.step()
    same = loop.admit(8, max_tokens=2, priority=5)
    loop.step()
    assert loop.core.load().preemptions == 0
    high = loop.admit(8, max_tokens=2, priority=1)
    plan, _ = loop.step()
    assert set(_chunks(plan)) == {high}
    assert plan.released == (low,)
    assert loop.finished(60) == [high, low, same]


def test_an_urgent_sequence_joins_a_full_pipeline_within_its_budget() -> None:
    loop = Loop(replace(LIMITS, max_in_flight=2, max_num_batched_tokens=3))
    for _ in range(6):
        loop.admit(1, max_tokens=30, priority=1)
    for plan in loop.fill():
        assert len(plan.scheduled) == 3
        loop.drain()
    urgent = loop.admit(5, max_tokens=3)
    first, second = loop.fill()
    assert (len(first.scheduled), len(second.scheduled)) == (3, 3)
    assert _chunks(first)[urgent] == 1


@pytest.mark.parametrize("num_seqs", [2, 3, 6, 7])
@pytest.mark.parametrize("max_in_flight", [2, 3])
def test_the_running_set_is_spread_over_the_pipeline(num_seqs: int, max_in_flight: int) -> None:
    loop = Loop(replace(LIMITS, max_in_flight=max_in_flight))
    for _ in range(num_seqs):
        loop.admit(4, max_tokens=100)
    sizes: list[int] = []
    emitted = dict.fromkeys(range(num_seqs), 0)
    for _ in range(20 * max_in_flight):
        sizes += [len(plan.scheduled) for plan in loop.fill()]
        assert len(loop.plans) == min(max_in_flight, num_seqs)
        for token in loop.drain():
            emitted[token.seq_id] += 1
    assert max(sizes) <= -(-num_seqs // max_in_flight)
    assert max(emitted.values()) - min(emitted.values()) <= 2


@pytest.mark.parametrize(("num_seqs", "sizes"), [(2, [2]), (6, [6]), (7, [3, 4])])
def test_few_decoding_sequences_go_together(num_seqs: int, sizes: list[int]) -> None:
    """Wherever they began; a long prompt meanwhile fills the pipeline and holds nobody up."""
    loop = Loop(replace(LIMITS, max_in_flight=2, few_tokens=6, max_num_batched_tokens=24))
    emitted = {loop.admit(4, max_tokens=100): 0 for _ in range(num_seqs)}
    for turn in range(40):
        if turn == 20:
            emitted[loop.admit(100, max_tokens=1)] = 0
        loop.fill()
        if 10 < turn < 20 or turn > 35:
            assert sorted(len(plan.scheduled) for plan in loop.plans) == sizes
        for token in loop.drain():
            emitted[token.seq_id] += 1
    *decoding, last = emitted.values()
    assert last == 1
    assert min(decoding) >= (30 if len(sizes) == 1 else 18), "a turn ends one step"
    assert max(decoding) - min(decoding) <= 3


def test_lockstep_sequences_spread_out_again() -> None:
    loop = Loop(replace(LIMITS, max_in_flight=2))
    for num_arriving in (1, 3):
        for _ in range(num_arriving):
            loop.admit(4, max_tokens=40)
        loop.fill()
    assert [len(plan.scheduled) for plan in loop.plans] == [1, 3]
    for _ in range(6):
        loop.drain()
        loop.fill()
    assert [len(plan.scheduled) for plan in loop.plans] == [2, 2]


def test_whoever_waited_longest_runs_next() -> None:
    loop = Loop(replace(LIMITS, max_in_flight=2))
    emitted = dict.fromkeys([loop.admit(4, max_tokens=100) for _ in range(4)], 0)
    for _ in range(40):
        # One step at a time, though the share is that of two.
        plan = loop.core.schedule()
        assert plan is not None
        loop.plans.append(plan)
        for token in loop.drain():
            emitted[token.seq_id] += 1
    assert min(emitted.values()) >= 18


def test_a_newcomer_leaves_running_sequences_room_to_grow() -> None:
    loop = Loop(replace(LIMITS, num_blocks=4, max_model_len=16))
    running = loop.admit(7, max_tokens=5)
    loop.step()
    waiting = loop.admit(8, max_tokens=4)
    plan, _ = loop.step()
    assert set(_chunks(plan)) == {running}
    assert loop.finished(20) == [running, waiting]
    assert loop.core.load().preemptions == 0


def test_a_sequence_is_preempted_a_bounded_number_of_times() -> None:
    loop = Loop(replace(LIMITS, num_blocks=60, max_model_len=240, max_num_batched_tokens=256))
    low = loop.admit(60, max_tokens=170, priority=1)
    ended: list[int] = []
    num_released = 0
    while low not in ended:
        load = loop.core.load()
        spare = load.total_blocks - load.used_blocks - 2
        # Whenever it runs alone, a better one fills the cache and soon needs its blocks.
        if load.running == 1 and not load.waiting and spare > 0:
            loop.admit(4 * spare, max_tokens=9)
        plan, tokens = loop.step()
        num_released += low in plan.released
        ended += [token.seq_id for token in tokens if token.finish]
    assert num_released == MAX_OVERTAKES


def test_the_lowest_priority_does_not_starve() -> None:
    loop = Loop(replace(LIMITS, max_num_seqs=2, num_blocks=60, max_model_len=100))
    low = loop.admit(90, max_tokens=10, priority=9)
    ended: list[int] = []
    # Later arrivals may cost it at most MAX_OVERTAKES starts of 5 steps, two at a time.
    for _ in range(MAX_OVERTAKES * 5 + 2 + 10):
        while loop.core.load().waiting < 3:
            loop.admit(60, max_tokens=4)
        ended += [token.seq_id for token in loop.step()[1] if token.finish]
    assert low in ended


def test_a_large_sequence_is_passed_by_small_ones_a_bounded_number_of_times() -> None:
    loop = Loop(replace(LIMITS, num_blocks=20, max_model_len=80))
    loop.admit(20, max_tokens=20)
    loop.step()
    large = loop.admit(70, max_tokens=4)
    before = 0
    for _ in range(500):
        while loop.core.load().waiting < 3:
            loop.admit(4, max_tokens=30)
        plan, _ = loop.step()
        if large in _chunks(plan):
            break
        before += len(plan.new)
    else:
        pytest.fail("the large sequence never started")
    assert 1 <= before <= MAX_OVERTAKES + LIMITS.max_num_seqs


def test_only_the_sequence_that_crosses_is_prefilled_again() -> None:
    loop = Loop(replace(LIMITS, reprefill_length=10, num_state_slots=4, max_num_batched_tokens=8))
    crossing, below, above = (loop.admit(n, max_tokens=4) for n in (9, 2, 25))
    starts: list[tuple[int, int]] = []
    zeroed = 0
    while loop.core.has_work:
        plan, _ = loop.step()
        zeroed += len(plan.state_ops)
        new = {new.seq_id for new in plan.new}
        for row in plan.scheduled:
            assert row.length >= 25 or row.seq_id != above
            assert (row.start == 0) == (row.seq_id in new)
            if row.start == 0:
                starts.append((row.seq_id, row.length))
    assert sorted(starts) == [(crossing, 9), (crossing, 11), (below, 2), (above, 25)]
    assert zeroed == len(starts)
    assert loop.core.load().preemptions == 0
