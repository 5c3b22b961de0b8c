"""The simulator against steps that are played one by one; Serve's wrapper around the policies."""

from __future__ import annotations

import random
import time
from collections import deque
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
from ray.serve import autoscaling_policy as serve_policy

from benchmarks.autoscale_replica import Costs, Replica
from benchmarks.autoscale_scalers import Plan, Tuning, ours, serve_default
from benchmarks.autoscale_search import Task, clairvoyant, least_seconds
from benchmarks.autoscale_simulation import Simulation
from benchmarks.autoscale_traces import TRACES, Request
from deploy.scaling_policy import ScalingTargets

COSTS = Costs(
    model="small",
    startup_s=5.0,
    base_s=0.01,
    decode_s=0.002,
    prefill_s=0.001,
    seats=3,
    chunk_tokens=8,
    kv_blocks=10,
    block_size=4,
)
ONE = Plan(1e9, (1,))


def requests(seed: int, count: int = 60, rate: float = 4.0) -> list[Request]:
    rng = random.Random(seed)
    now, made = 0.0, []
    for _ in range(count):
        now += rng.expovariate(rate)
        made.append(Request(now, rng.randint(1, 25), rng.randint(1, 15)))
    return made


def played(given: list[Request]) -> list[tuple[float, float]]:
    """First token and end of each on one replica, every step played."""
    times: dict[int, list[float]] = {i: [] for i in range(len(given))}
    coming, waiting = deque(range(len(given))), deque[int]()
    prompt_left = [request.prompt for request in given]
    answer_left = [request.answer for request in given]
    blocks = [-(-(request.prompt + request.answer) // COSTS.block_size) for request in given]
    seated: list[int] = []
    now = 0.0
    while coming or waiting or seated:
        if not waiting and not seated:
            now = max(now, given[coming[0]].arrival)
        while coming and given[coming[0]].arrival <= now:
            waiting.append(coming.popleft())
        while waiting and len(seated) < COSTS.seats:
            if sum(blocks[i] for i in seated) + blocks[waiting[0]] > COSTS.kv_blocks:
                break
            seated.append(waiting.popleft())
        decoding = [i for i in seated if not prompt_left[i]]
        room, chunk = COSTS.chunk_tokens - len(decoding), {}
        for i in seated:
            if prompt_left[i] and room:
                chunk[i] = min(room, prompt_left[i])
                room -= chunk[i]
        tokens = sum(chunk.values())
        now += COSTS.base_s + COSTS.decode_s * len(decoding) + COSTS.prefill_s * tokens
        for i, done in chunk.items():
            prompt_left[i] -= done
        for i in [*decoding, *(i for i in chunk if not prompt_left[i])]:
            answer_left[i] -= 1
            times[i].append(now)
        seated = [i for i in seated if answer_left[i]]
    return [(each[0], each[-1]) for each in times.values()]


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("rate", [0.8, 4.0, 40.0])
def test_against_every_step(seed: int, rate: float) -> None:
    given = requests(seed, rate=rate)
    outcome = Simulation(COSTS, ONE).run(given)
    expected = played(given)
    assert [each.request for each in outcome.served] == given
    for served, (first, end) in zip(outcome.served, expected, strict=True):
        assert served.first == pytest.approx(first, abs=1e-6)
        assert served.end == pytest.approx(end, abs=1e-6)
    assert outcome.replica_s == pytest.approx(max(end for _, end in expected))


@pytest.mark.parametrize("seed", range(10))
def test_nothing_is_lost_and_no_seat_taken_twice(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replicas come and go all the time, under more than they can do."""
    plain, replicas = Replica.advance, set()

    def advance(self: Replica) -> Any:
        replicas.add(self)
        before = self.until
        ended = plain(self)
        assert self.running <= COSTS.seats
        held = sum(s.blocks for s in self.prefilling) + sum(s.blocks for *_, s in self.decoding)
        assert held + self.free_blocks == COSTS.kv_blocks
        assert self.free_blocks >= 0
        assert self.until > before
        return ended

    monkeypatch.setattr(Replica, "advance", advance)
    given = requests(seed, count=300, rate=20.0)
    plan = Plan(4.0, tuple(random.Random(seed).choices(range(1, 6), k=50)))
    outcome = Simulation(COSTS, plan, seed=seed).run(given)
    assert [each.request for each in outcome.served] == given
    for each in outcome.served:
        if not each.refused:
            assert each.first is not None
            assert each.end is not None
            assert each.request.arrival < each.first <= each.end
            assert each.left == 0
    assert all(not replica.live for replica in replicas)
    assert sum(each.refused for each in outcome.served) < len(given) / 2


def test_replica_seconds_are_counted_from_the_decision_to_the_last_token() -> None:
    """A second replica for the windows of 4 to 8 s, which is ready at 9 s and gone at 8 already."""
    given = [Request(0.5, 4, 1), Request(19.9, 4, 1)]
    plan = Plan(4.0, (1, 2, 1))
    outcome = Simulation(COSTS, plan).run(given)
    last = outcome.served[-1].end
    assert last is not None
    assert outcome.replica_s == pytest.approx(last + 4.0)
    assert outcome.most == 2


def test_a_replica_that_is_taken_away_ends_what_it_has() -> None:
    given = [Request(0.1 * i, 4, 400) for i in range(6)]
    roomy = replace(COSTS, kv_blocks=1000)
    fast = Simulation(roomy, Plan(0.6, (2, 1)), instant=True, first=2).run(given)
    assert all(each.end is not None for each in fast.served)
    ends = sorted(each.end or 0.0 for each in fast.served)
    # Six seats in two replicas: nobody waits until another has ended.
    assert max(each.first or 0.0 for each in fast.served) < ends[0]
    assert fast.replica_s > ends[-1]


def test_who_is_late_or_refused_does_not_count() -> None:
    given = requests(3, count=300, rate=1000.0)
    outcome = Simulation(COSTS, ONE).run(given)
    refused = sum(each.refused for each in outcome.served)
    assert refused > 200  # 3 seats and 48 that wait
    in_time = [
        each
        for each in outcome.served
        if each.first is not None and each.first - each.request.arrival <= 1.0
    ]
    assert outcome.attained(1.0, 1e9) == len(in_time) / 300
    assert outcome.attained(1e9, 1e9) == (300 - refused) / 300
    assert outcome.attained(1e9, 1e-9) < outcome.attained(1e9, 1e9)


@dataclass(frozen=True, eq=False)
class Ongoing:
    """A replica, as far as Serve's own policy sees it."""

    live: int


def ongoing(number: int) -> Any:
    return Ongoing(number)


def test_serves_default_policy_waits_out_its_delays() -> None:
    scaler = serve_default(Tuning(4.0, 10.0, 20.0, 6.0), most=9)
    busy, calm = [ongoing(6), ongoing(6)], [ongoing(2), ongoing(1), ongoing(0)]
    up = [scaler.decide(t, busy, 2, 0) for t in range(0, 30, 2)]
    first_up = up.index(3) * 2
    assert 10 <= first_up <= 14  # its look-back is empty at first
    down = [scaler.decide(t, calm, 3, 0) for t in range(30, 80, 2)]
    assert 20 <= down.index(1) * 2 <= 30
    assert serve_policy.time is time


def test_our_policy_runs_inside_serves_wrapper() -> None:
    """What is shipped to the controller, as it is: up for a step, down again after it."""
    scaler = ours(ScalingTargets(scale_down_delay_s=30.0), most=9)
    level = [Request(i / 4, 10, 10) for i in range(200)]
    jump = [Request(50 + i / 40, 10, 10) for i in range(4000)]
    after = [Request(150 + i / 4, 10, 10) for i in range(1200)]
    numbers = []

    class Watched:
        def decide(self, now: float, *args: Any) -> int:
            number = scaler.decide(now, *args)
            numbers.append((now, number))
            return number

    outcome = Simulation(COSTS, Watched()).run([*level, *jump, *after])
    assert not any(each.refused for each in outcome.served) or outcome.most > 1
    at = dict(numbers)
    assert at[48.0] == 1
    assert at[62.0] > 1  # within a look-back and a report
    assert at[440.0] == 1


@pytest.mark.parametrize("name", list(TRACES))
def test_traces_are_seeded_and_in_order(name: str) -> None:
    made = TRACES[name](1.0, 3)
    assert made == TRACES[name](1.0, 3)
    assert made != TRACES[name](1.0, 4)
    assert all(a.arrival <= b.arrival for a, b in pairwise(made))
    assert min(min(each.prompt, each.answer) for each in made) >= 1


def test_who_knows_the_future_is_never_beaten() -> None:
    given = requests(7, count=400, rate=6.0)
    mine = Simulation(COSTS, ours(ScalingTargets(ttft_s=1.0), 9)).run(given)
    task = Task(
        costs=COSTS,
        requests=given,
        most=9,
        ttft_s=1.0,
        token_s=0.1,
        attain=mine.attained(1.0, 0.1),
    )
    oracle = clairvoyant(task, processes=1)
    assert task.enough(oracle)
    assert least_seconds(task) <= oracle.replica_s <= mine.replica_s
