"""How many replicas are asked for: bounds, monotony, quick up, slow down, and a closed loop."""

from __future__ import annotations

import random
from bisect import bisect_right
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.scaling_policy import (
    ReplicaLoad,
    ScalingPolicy,
    ScalingTargets,
    Work,
    prefill_share,
    replicas_needed,
)

TARGETS = ScalingTargets(ttft_s=2.0, scale_down_delay_s=60.0, startup_s=20.0)
BOUNDS = (1, 50)
SEATS = 32.0
IDLE = ReplicaLoad(
    seats=SEATS,
    sequences=0,
    arrivals=0,
    departures=0,
    residence=0,
    prefill=0,
    backlog_s=0,
    oldest_wait_s=0,
    memory=0,
)
NO_WORK = Work(
    seats=SEATS, sequences=0, queue=0, prefill=0, prompt_s=0, backlog_s=0, memory=0, horizon_s=20
)


def steady(rate: float, residence_s: float, replicas: int, prompt_s: float = 0.1) -> ReplicaLoad:
    """One of so many replicas that share `rate` sequences a second, each of which stays so long."""
    each = rate / replicas
    return replace(
        IDLE,
        sequences=each * residence_s,
        arrivals=each,
        departures=each,
        residence=each * residence_s,
        prefill=each * prompt_s,
        memory=min(1.0, each * residence_s / SEATS * 0.5),
    )


def settle(policy: ScalingPolicy, load: ReplicaLoad, replicas: int, seconds: int = 300) -> int:
    """The number after so long with that load on each replica."""
    target = replicas
    for second in range(seconds):
        target = policy.decide(float(second), [load] * replicas, target, BOUNDS)
    return target


load_strategy = st.builds(
    ReplicaLoad,
    **{
        field.name: st.floats(0, 1000) if field.name != "seats" else st.floats(1, 500)
        for field in fields(ReplicaLoad)
    },
)


@given(
    st.lists(st.lists(load_strategy, max_size=4), min_size=1, max_size=12),
    st.integers(0, 5),
    st.integers(0, 5),
)
def test_never_outside_the_bounds(history: list[list[ReplicaLoad]], least: int, span: int) -> None:
    policy, target = ScalingPolicy(TARGETS), least
    for second, loads in enumerate(history):
        target = policy.decide(second * 7.0, loads, target, (least, least + span))
        assert least <= target <= least + span


work_strategy = st.builds(
    Work,
    seats=st.floats(1, 200),
    sequences=st.floats(0, 2000),
    queue=st.floats(0, 2000),
    prefill=st.floats(0, 30),
    prompt_s=st.floats(0, 3),
    backlog_s=st.floats(0, 500),
    memory=st.floats(0, 40),
    batch=st.floats(0, 200),
    slowdown=st.floats(0, 1),
    horizon_s=st.floats(1, 300),
)


@given(
    work_strategy,
    st.sampled_from(["sequences", "queue", "prefill", "backlog_s", "memory"]),
    st.floats(0, 100),
)
def test_more_work_never_needs_fewer(work: Work, name: str, more: float) -> None:
    heavier: Work = replace(work, **{name: getattr(work, name) + more})
    assert replicas_needed(heavier, TARGETS) >= replicas_needed(work, TARGETS) - 1e-9


@given(work_strategy, st.floats(0.1, 30), st.floats(0, 30))
def test_a_laxer_target_never_needs_more(work: Work, ttft_s: float, more: float) -> None:
    strict, lax = replace(TARGETS, ttft_s=ttft_s), replace(TARGETS, ttft_s=ttft_s + more)
    assert replicas_needed(work, lax) <= replicas_needed(work, strict) + 1e-9


def test_by_seats_by_prompts_and_by_memory() -> None:
    targets = replace(TARGETS, occupancy=0.5, memory=0.8)
    assert replicas_needed(replace(NO_WORK, sequences=80), targets) == pytest.approx(5)
    assert replicas_needed(replace(NO_WORK, sequences=40, queue=40), targets) == pytest.approx(5)
    assert replicas_needed(replace(NO_WORK, memory=4), targets) == pytest.approx(5)
    share = prefill_share(0.2, 2.0, 5)
    prompts = replace(NO_WORK, prefill=5 * share, prompt_s=0.2)
    assert replicas_needed(prompts, targets) == pytest.approx(5, abs=0.2)


def test_a_backlog_is_worked_off_in_the_time_that_a_replica_takes_to_start() -> None:
    """Three replicas compute three seconds of prompts per second: a minute's worth in 20."""
    needed = replicas_needed(replace(NO_WORK, backlog_s=60.0), TARGETS)
    assert needed == pytest.approx(3)


def test_slower_in_company_counts() -> None:
    """Played out: replicas with steps of 1 + b/10, 48 sequences in two of them, 60 % wanted.

    A sequence's time is proportional to its step, the rate of arrivals is given.
    """
    rate = 48 / (1 + 2.4)  # sequences per unit of step time
    needed = replicas_needed(
        replace(NO_WORK, sequences=48, batch=24, slowdown=0.1), replace(TARGETS, occupancy=0.5)
    )
    running = 0.0
    for _ in range(1000):  # the fixed point of `running = rate * step(running / needed)`
        running = rate * (1 + running / needed / 10)
    assert running / needed == pytest.approx(16, rel=1e-3)


@pytest.mark.parametrize(("prompt_s", "replicas"), [(0.1, 1), (0.3, 1), (0.3, 4), (0.8, 2)])
def test_prompts_seldom_wait_too_long(prompt_s: float, replicas: int) -> None:
    """Single servers that play the queue: requests go to the emptier of two."""
    share = prefill_share(prompt_s, 2.0, replicas)
    rng = random.Random(5)
    free = [0.0] * replicas
    now, late, total = 0.0, 0, 40_000
    for _ in range(total):
        now += rng.expovariate(share * replicas / prompt_s)
        mine = min(rng.choices(range(replicas), k=2), key=free.__getitem__)
        begins = max(now, free[mine])
        # Squared coefficient of variation 2: nine in ten are short, the tenth is long.
        p = (1 + (1 / 3) ** 0.5) / 2
        mean = prompt_s / 2 / (p if rng.random() < p else 1 - p)
        free[mine] = begins + rng.expovariate(1 / mean)
        late += begins - now > 2.0 - prompt_s
    assert late / total <= 0.05


def test_short_prompts_may_fill_more_than_long_ones() -> None:
    shares = [prefill_share(prompt_s, 2.0, 1) for prompt_s in (0, 0.05, 0.2, 0.5, 1.5, 9)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.85
    assert shares[-1] < 0.25


def test_nothing_known_changes_nothing() -> None:
    assert ScalingPolicy(TARGETS).decide(0.0, [], 7, BOUNDS) == 7
    assert ScalingPolicy(TARGETS).decide(0.0, [], 70, BOUNDS) == 50


@pytest.mark.parametrize("least", [0, 1, 3])
def test_no_load_goes_to_the_least(least: int) -> None:
    policy, target = ScalingPolicy(TARGETS), 6
    for second in range(62):
        target = policy.decide(float(second), [IDLE] * 6, target, (least, 9))
    assert target == least


@pytest.mark.parametrize("name", ["sequences", "arrivals", "prefill"])
def test_anything_at_all_keeps_one(name: str) -> None:
    policy, target = ScalingPolicy(TARGETS), 1
    for second in range(100):
        load = replace(IDLE, **{name: 0.01})
        target = policy.decide(float(second), [load], target, (0, 9))
    assert target == 1


def test_up_within_one_look_back() -> None:
    """Five times the arrivals: asked for by the first reports that show them."""
    policy = ScalingPolicy(TARGETS)
    calm = steady(2.0, 10.0, 1)
    assert settle(policy, calm, 1) == 1
    target = 1
    for second in range(10):  # the reports' own average rises over ten seconds
        rate = 2.0 + 8.0 * (second + 1) / 10
        load = replace(calm, arrivals=rate, prefill=rate * 0.1, sequences=20.0 + 3 * second)
        target = policy.decide(300.0 + second, [load], target, BOUNDS)
    assert target >= 4  # 100 sequences at once, at 27 per replica


def test_refused_work_counts() -> None:
    """A full replica that sends half away: twice as many, though no more run than before."""
    full = replace(steady(3.2, 10.0, 1), arrivals=6.4)
    assert settle(ScalingPolicy(TARGETS), full, 1) == 3  # 64 sequences at 27 per replica


def test_down_only_after_the_delay() -> None:
    policy = ScalingPolicy(TARGETS)
    assert settle(policy, steady(10.0, 10.0, 4), 4) == 4
    seen = []
    for second in range(200):
        seen.append(policy.decide(300.0 + second, [steady(2.0, 10.0, 4)] * 4, 4, BOUNDS))
    lower = next(second for second, number in enumerate(seen) if number < 4)
    # The level, averaged over half a minute, falls before the delay begins to count.
    assert 60 <= lower <= 95
    assert seen[-1] == 1


def test_a_short_dip_changes_nothing() -> None:
    policy = ScalingPolicy(TARGETS)
    busy, calm = [steady(10.0, 10.0, 4)] * 4, [steady(1.0, 10.0, 4)] * 4
    target = settle(policy, busy[0], 4)
    for second in range(300, 900):
        loads = calm if second % 100 < 40 else busy
        target = policy.decide(float(second), loads, target, BOUNDS)
        assert target >= 4


def test_never_less_than_what_runs_needs() -> None:
    """Nothing arrives any more, but 70 sequences go on for ever."""
    policy = ScalingPolicy(TARGETS)
    load = replace(IDLE, sequences=23.4)
    assert settle(policy, load, 3, seconds=900) == 3
    assert settle(ScalingPolicy(TARGETS), replace(IDLE, sequences=32.0), 3, seconds=900) >= 3


def test_what_runs_now_counts_whatever_ran_lately() -> None:
    """Idle for minutes, and all at once every seat of three replicas is taken."""
    policy = ScalingPolicy(TARGETS)
    assert settle(policy, IDLE, 3) == 1
    full = replace(IDLE, sequences=SEATS)
    assert policy.decide(301.0, [full] * 3, 1, BOUNDS) == 3


def test_a_backlog_that_is_gone_by_then_asks_for_nothing() -> None:
    policy = ScalingPolicy(TARGETS)
    calm = steady(1.0, 10.0, 1)
    assert settle(policy, calm, 1) == 1
    small = replace(calm, backlog_s=1.5, oldest_wait_s=0.5)
    assert policy.decide(301.0, [small], 1, BOUNDS) == 1
    large = replace(calm, backlog_s=90.0, oldest_wait_s=0.5)
    assert policy.decide(302.0, [large], 1, BOUNDS) >= 4


def test_who_waits_too_long_is_not_argued_with() -> None:
    policy = ScalingPolicy(TARGETS)
    calm = steady(1.0, 10.0, 1)
    assert settle(policy, calm, 1) == 1
    # Two more than there are seats: by itself hardly a reason.
    late = replace(calm, sequences=SEATS + 2, oldest_wait_s=2.1)
    assert policy.decide(301.0, [late], 1, BOUNDS) >= 2


def test_a_rise_is_met_before_it_has_come() -> None:
    """Arrivals that grow by 1 % a second, a minute's start: what is asked for is ahead of them."""
    slow_start = replace(TARGETS, startup_s=60.0)
    policy, target, rate = ScalingPolicy(slow_start), 4, 8.0
    for second in range(100):
        rate = 8.0 * 1.01**second
        target = policy.decide(float(second), [steady(rate, 10.0, 4)] * 4, target, BOUNDS)
    now_needed = rate * 10.0 / (SEATS * TARGETS.occupancy)
    assert target > now_needed * 1.1


class Fluid:
    """Replicas with steps of `base + each * batch` that share the arrivals, in equilibrium."""

    def __init__(self, base_s: float, each_s: float, tokens: float, prompt_s: float) -> None:
        self.base_s, self.each_s, self.tokens, self.prompt_s = base_s, each_s, tokens, prompt_s

    def loads(self, rate: float, replicas: int, knows: bool) -> list[ReplicaLoad]:
        arrivals = rate / replicas
        # The fixed point of `batch = arrivals * tokens * (base + each * batch)`, if there is one.
        share = arrivals * self.tokens * self.each_s
        batch = arrivals * self.tokens * self.base_s / (1 - share) if share < 1 else 1e9
        batch = min(batch, 20 * SEATS)
        load = replace(
            IDLE,
            sequences=batch,
            arrivals=arrivals,
            departures=arrivals,
            residence=batch,
            prefill=arrivals * self.prompt_s,
            slowdown=self.each_s / self.base_s if knows else 0.0,
        )
        return [load] * replicas


@given(
    rate=st.floats(0.2, 40),
    base_s=st.floats(0.01, 0.05),
    part=st.floats(0, 0.05),
    tokens=st.floats(20, 300),
    prompt_s=st.floats(0.01, 0.4),
    start=st.integers(1, 40),
    knows=st.booleans(),
)
def test_no_flapping_at_steady_load(**given: Any) -> None:
    """Whatever the number was, it settles, and then stays for ten minutes."""
    rate, target, knows = given["rate"], given["start"], given["knows"]
    base_s = given["base_s"]
    model = Fluid(base_s, base_s * given["part"], given["tokens"], given["prompt_s"])
    policy, seen = ScalingPolicy(TARGETS), []
    for second in range(0, 1800, 5):
        loads = model.loads(rate, max(1, target), knows)
        target = policy.decide(float(second), loads, target, BOUNDS)
        seen.append(target)
    assert len(set(seen[240:])) <= (1 if knows else 2)


def test_chance_does_not_flap() -> None:
    """Poisson arrivals at a level that is not near a border: few changes in an hour."""
    rng = random.Random(3)
    policy, target, changes = ScalingPolicy(TARGETS), 3, 0
    rate, residence = 6.0, 10.0
    begins, now = [], 0.0
    while now < 3600:
        now += rng.expovariate(rate)
        begins.append(now)
    ends = sorted(begin + rng.expovariate(1 / residence) for begin in begins)
    for second in range(60, 3600, 2):
        came = (bisect_right(begins, second) - bisect_right(begins, second - 10)) / 10
        left = (bisect_right(ends, second) - bisect_right(ends, second - 10)) / 10
        under_way = bisect_right(begins, second) - bisect_right(ends, second)
        load = replace(
            IDLE,
            sequences=under_way / target,
            arrivals=came / target,
            departures=left / target,
            residence=left * residence / target,
            prefill=came * 0.1 / target,
        )
        new = policy.decide(float(second), [load] * target, target, BOUNDS)
        changes += new != target
        target = new
    assert changes <= 12
