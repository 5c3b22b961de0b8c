"""The rivals: Serve's default policy as well tuned as a grid allows, and who knows the future."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.pool import Pool

from benchmarks.autoscale_replica import Costs
from benchmarks.autoscale_scalers import Plan, Tuning, serve_default
from benchmarks.autoscale_simulation import Outcome, Simulation
from benchmarks.autoscale_traces import Request

TARGETS = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 15.0, 18.0, 21.0, 24.0, 28.0, 32.0)
DELAYS = tuple(itertools.product((0.0, 10.0, 30.0), (0.0, 30.0, 120.0, 300.0), (4.0, 30.0)))
"""Upscale delay, downscale delay, look-back; Serve's own are 30, 600 and 30 s."""
WINDOW_S = 30.0
_FILLINGS = (0.3, 0.4, 0.5, 0.6, 0.75, 0.9)
_BUSY = (0.3, 0.45, 0.6, 0.75)
_BLOCKS = (16,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A trace, what it costs to serve, and what has to be attained."""

    costs: Costs
    requests: Sequence[Request]
    most: int
    ttft_s: float
    token_s: float
    attain: float

    def enough(self, outcome: Outcome) -> bool:
        """Whether as many requests met the targets as have to."""
        return outcome.attained(self.ttft_s, self.token_s) >= self.attain

    def with_tuning(self, tuning: Tuning) -> Outcome:
        """Serve's default policy."""
        return Simulation(self.costs, serve_default(tuning, self.most)).run(self.requests)

    def with_plan(self, plan: Plan) -> Outcome:
        """So many replicas, ready when they are wanted."""
        return Simulation(self.costs, plan, instant=True, first=plan.numbers[0]).run(self.requests)


def tuned(task: Task, processes: int) -> dict[Tuning, float]:
    """For each choice of delays the highest target that attains enough, and its replica seconds.

    A higher target never attains more, give or take chance: the grid is halved, not walked.
    """
    with Pool(processes) as pool:
        found = pool.starmap(_highest_target, [(task, delays) for delays in DELAYS])
    return {tuning: replica_s for each in found if each is not None for tuning, replica_s in [each]}


def _highest_target(task: Task, delays: tuple[float, float, float]) -> tuple[Tuning, float] | None:
    low, high, best = 0, len(TARGETS), None
    while low < high:
        middle = (low + high) // 2
        tuning = Tuning(TARGETS[middle], *delays)
        outcome = task.with_tuning(tuning)
        if task.enough(outcome):
            low, best = middle + 1, (tuning, outcome.replica_s)
        else:
            high = middle
    return best


def clairvoyant(task: Task, processes: int) -> Outcome:
    """The cheapest plan found by who knows every arrival and length beforehand.

    Its replicas need no time to start. It begins with what the sequences under way and the prompts
    of each window take, filled to the degree that is cheapest, and then takes away what the
    targets can spare.
    """
    fillings = [(a, b) for a in _FILLINGS for b in _BUSY]
    with Pool(processes) as pool:
        plans = [_plan(task, *filling) for filling in fillings]
        outcomes = pool.map(task.with_plan, plans)
    rated = [(o.replica_s, i) for i, o in enumerate(outcomes) if task.enough(o)]
    if not rated:
        raise ValueError("no plan attains enough: allow more replicas")
    plan = plans[min(rated)[1]]
    for size in _BLOCKS:
        plan = _spare(plan, size, lambda p: task.enough(task.with_plan(p)))
    return task.with_plan(plan)


def _plan(task: Task, filling: float, busy: float) -> Plan:
    costs, full = task.costs, max(1.0, filling * task.costs.seats)
    count = math.ceil(max(request.arrival for request in task.requests) / WINDOW_S) + 2
    seats, prompts = [0.0] * count, [0.0] * count
    step_s = costs.step_s(round(full), 0)
    for request in task.requests:
        prompt_s = request.prompt * costs.prefill_s
        prompts[int(request.arrival / WINDOW_S)] += prompt_s
        begin = request.arrival
        end = begin + prompt_s + request.answer * step_s
        while begin < end:
            window = int(begin / WINDOW_S)
            until = min(end, (window + 1) * WINDOW_S)
            if window < count:
                seats[window] += until - begin
            begin = until
    numbers = (
        max(1, math.ceil(max(s / WINDOW_S / full, p / WINDOW_S / busy)))
        for s, p in zip(seats, prompts, strict=True)
    )
    return Plan(WINDOW_S, tuple(min(task.most, number) for number in numbers))


def _spare(plan: Plan, size: int, enough: Callable[[Plan], bool]) -> Plan:
    """One replica less in every block of windows where that is still enough."""
    for begin in range(0, len(plan.numbers), size):
        block = range(begin, min(begin + size, len(plan.numbers)))
        fewer = list(plan.numbers)
        for index in block:
            fewer[index] = max(1, fewer[index] - 1)
        candidate = replace(plan, numbers=tuple(fewer))
        if candidate != plan and enough(candidate):
            plan = candidate
    return plan


def least_seconds(task: Task) -> float:
    """Below this nobody can be: every step full of sequences, and one replica all the time."""
    costs = task.costs
    token_s = costs.step_s(costs.seats, 0) / costs.seats
    work = sum(r.prompt * costs.prefill_s + (r.answer - 1) * token_s for r in task.requests)
    return max(work, task.requests[-1].arrival)
