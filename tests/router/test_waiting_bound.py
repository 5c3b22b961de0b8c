"""The bound on waiting, counted from outside, under arrivals that are chosen to break it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.engine import EngineCore, EngineLimits
from router.sequence import MAX_OVERTAKES
from router.step import Admit, Sampled, SamplingParams, StepPlan, StepResult
from tests.router.drawn_limits import engine_limits

MAX_LENGTH = 40


class Watch:
    """Runs a core and counts, for everybody, the later arrivals that start while it waits.

    Sequences are numbered in the order of arrival, so a larger number is a later one.
    """

    def __init__(self, limits: EngineLimits) -> None:
        self.core = EngineCore(limits)
        self.limits = limits
        self.most = MAX_OVERTAKES - 1 + limits.num_seats
        self.plans: list[StepPlan] = []
        self.running: set[int] = set()
        self.overtaken: dict[int, int] = {}
        self.num_admitted = 0
        self.num_preempted = 0
        self.most_seen = 0
        self.steps_first = 0

    @property
    def waiting(self) -> list[int]:
        return [seq_id for seq_id in self.overtaken if seq_id not in self.running]

    def admit(self, num_prompt: int, max_tokens: int, priority: int) -> int:
        seq_id = self.num_admitted
        self.num_admitted += 1
        admit = Admit(
            seq_id=seq_id,
            epoch=0,
            prompt=tuple(7919 * seq_id + i for i in range(num_prompt)),
            sampling=SamplingParams(max_tokens=max_tokens),
            priority=priority,
        )
        assert self.core.admit(admit) is None
        self.overtaken[seq_id] = 0
        return seq_id

    def step(self) -> None:
        """Plan what can be planned, and answer the oldest step."""
        while (plan := self.core.schedule()) is not None:
            self._count(plan)
            self.plans.append(plan)
        plan = self.plans.pop(0)
        sampled = tuple(Sampled(seq_id=r.seq_id, token_id=7) for r in plan.scheduled if r.samples)
        for token in self.core.apply(StepResult(epoch=0, step_id=plan.step_id, sampled=sampled)):
            if token.finish is not None:
                del self.overtaken[token.seq_id]
                self.running.discard(token.seq_id)
        self.core.check_invariants()

    def _count(self, plan: StepPlan) -> None:
        before = self.waiting
        self.num_preempted += len(self.running & set(plan.released))
        self.running -= set(plan.released)
        for new in plan.new:
            for other in before:
                if other < new.seq_id and other not in self.running:
                    self.overtaken[other] += 1
            self.running.add(new.seq_id)
        self.most_seen = max(self.most_seen, *self.overtaken.values())
        assert self.most_seen <= self.most, "overtaken too often"
        # The first of all, once it is overtaken no more: those that run end, and it starts.
        first = min(self.overtaken)
        is_first = first in self.waiting and self.overtaken[first] >= MAX_OVERTAKES
        self.steps_first = self.steps_first + 1 if is_first else 0
        assert self.steps_first <= self.limits.num_seats * self.limits.max_model_len


requests = st.tuples(
    st.sampled_from([1, 1, 2, 3, 5, 8, 13, 21, 30, 39]),
    st.sampled_from([1, 1, 2, 4, 9, 20]),
)


def flood(
    limits: EngineLimits,
    load: list[tuple[int, int]],
    victim: tuple[int, int],
    crowd: list[tuple[int, int]],
    priorities: list[int],
    num_waiting: int = 3,
) -> Watch:
    """Keep later arrivals waiting behind `victim` until it has ended.

    `crowd` and `priorities` come round and round, each at its own pace.
    """
    watch = Watch(limits)
    for num_prompt, max_tokens in load:
        watch.admit(num_prompt, max_tokens, 0)
    if load:
        watch.step()
    number = watch.admit(*victim, priority=9)
    num_steps = 0
    while number in watch.overtaken:
        while len(watch.waiting) < num_waiting:
            count = watch.num_admitted
            watch.admit(*crowd[count % len(crowd)], priorities[count % len(priorities)])
        watch.step()
        num_steps += 1
        assert num_steps < 10_000, "it starves"
    return watch


LIMITS = EngineLimits(
    block_size=4,
    num_blocks=12,
    num_state_slots=0,
    max_num_seqs=4,
    max_num_batched_tokens=16,
    max_model_len=MAX_LENGTH,
)


@pytest.mark.parametrize("max_in_flight", [1, 2, 3])
@pytest.mark.parametrize("priority", [9, 0], ids=["equal", "better"])
def test_short_ones_pass_a_huge_one_as_often_as_they_may(priority: int, max_in_flight: int) -> None:
    limits = replace(LIMITS, max_in_flight=max_in_flight)
    watch = flood(limits, [(20, 20)], (39, 1), [(2, 9)], [priority])
    assert watch.most_seen >= MAX_OVERTAKES, "hardly anybody passed"


def test_urgent_ones_take_the_place_of_others_as_often_as_they_may() -> None:
    watch = Watch(replace(LIMITS, max_num_seqs=1))
    low = watch.admit(8, 20, priority=9)
    num_steps = 0
    while low in watch.overtaken:
        watch.step()
        if low in watch.running:
            watch.admit(2, 2, priority=0)
        num_steps += 1
        assert num_steps < 1000, "it starves"
    assert watch.num_preempted == MAX_OVERTAKES


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    engine_limits(MAX_LENGTH),
    st.lists(requests, max_size=4),
    requests,
    st.lists(requests, min_size=1, max_size=4),
    st.lists(st.tuples(st.sampled_from([0, 3, 9]), st.integers(1, 20)), min_size=1, max_size=4),
    st.sampled_from([2, 3, 30]),
)
def test_nobody_is_overtaken_more_often_than_the_bound(
    limits: EngineLimits,
    load: list[tuple[int, int]],
    victim: tuple[int, int],
    crowd: list[tuple[int, int]],
    runs: list[tuple[int, int]],
    num_waiting: int,
) -> None:
    priorities = [priority for priority, times in runs for _ in range(times)]
    flood(limits, load, victim, crowd, priorities, num_waiting)


def test_those_of_a_middle_priority_have_no_second_right_of_way() -> None:
    """When the last of all has been overtaken too often, so have many that came after it."""
    watch = Watch(replace(LIMITS, max_num_seqs=1))
    watch.admit(2, 9, priority=0)
    watch.step()
    watch.admit(2, 2, priority=9)
    for _ in range(40):
        watch.admit(2, 2, priority=3)
    for _ in range(MAX_OVERTAKES):
        watch.admit(2, 2, priority=0)
    while watch.overtaken:
        watch.step()
