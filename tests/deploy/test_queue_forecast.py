"""The forecast against a clock that ticks: seats, blocks and prompts that take turns."""

from __future__ import annotations

import random

import pytest

from deploy.queue_forecast import Demand, forecast


def simulate(demands: list[Demand], num_seats: int, num_blocks: int) -> list[tuple[int, int]]:
    """(begins, ends) of each by playing every tick, for demands of whole seconds."""
    waiting = list(range(len(demands)))
    prefilling: list[int] = []
    decoding: dict[int, float] = {}
    begins: dict[int, int] = {}
    ends: dict[int, int] = {}
    left = {index: demand.prefill_s for index, demand in enumerate(demands)}
    tick = 0
    while len(ends) < len(demands):
        for index in [i for i, end in decoding.items() if end <= tick]:
            ends[index] = tick
            del decoding[index]
        while waiting:
            held = [min(demands[i].blocks, num_blocks) for i in (*prefilling, *decoding)]
            need = min(demands[waiting[0]].blocks, num_blocks)
            if len(held) >= num_seats or sum(held) + need > num_blocks:
                break
            index = waiting.pop(0)
            if demands[index].prefill_s:
                prefilling.append(index)
            else:
                begins[index] = tick
                decoding[index] = tick + demands[index].decode_s
                if not demands[index].decode_s:
                    ends[index] = tick
                    del decoding[index]
        if prefilling:
            begins.setdefault(prefilling[0], tick)
            left[prefilling[0]] -= 1
            if not left[prefilling[0]]:
                index = prefilling.pop(0)
                decoding[index] = tick + 1 + demands[index].decode_s
        tick += 1
    return [(begins[i], ends[i]) for i in range(len(demands))]


@pytest.mark.parametrize("seed", range(300))
def test_against_every_tick(seed: int) -> None:
    rng = random.Random(seed)
    demands = [
        Demand(
            prefill_s=rng.choice([0, 0, 1, 2, 5]),
            decode_s=rng.choice([0, 1, 3, 10]),
            blocks=rng.randint(0, 9),
        )
        for _ in range(rng.randint(1, 15))
    ]
    seats, blocks = rng.randint(1, 4), rng.choice([8, 12, 10**9])
    turns = forecast(demands, seats, blocks)
    assert [(turn.begins, turn.ends) for turn in turns] == simulate(demands, seats, blocks)


def test_an_idle_server_begins_at_once() -> None:
    [turn] = forecast([Demand(prefill_s=2, decode_s=3, blocks=100)], 1, 4)
    assert (turn.begins, turn.ends) == (0, 5)
