"""Short storms for the tests: a load that lasts as long as the faults, and its account."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import cache
from typing import Any

from benchmarks.faults.accounts import Account, draw_up, table
from benchmarks.faults.injector import Pace
from benchmarks.faults.instances import Instance, subprocess_instance, undisturbed_answers
from benchmarks.faults.kinds import Fault
from benchmarks.faults.leftovers import Belongings
from benchmarks.faults.requests import arrival_times, draw_requests
from benchmarks.faults.storm import storm
from benchmarks.faults.wire import Wire
from tests.groups import Answer

RATE = 6.0
REQUESTS = tuple(draw_requests(7, 24))
PACE = Pace(pause=0.5, patience=20.0)
LAYOUT: dict[str, Any] = {"stages": 2, "expert_shards": 4, "expert_replicas": 2}


@cache
def expected(model: str) -> tuple[Answer, ...]:
    """What one undisturbed process answers, once per test run."""
    return tuple(undisturbed_answers(model, REQUESTS))


async def weather(
    instance: Instance, model: str, faults: Iterator[Fault], calm_s: float = 1.0, **more: Any
) -> Account:
    """One instance through these faults, under load from before the first to after the last."""
    arrivals = arrival_times(7, 400, RATE)
    happened = await storm(
        instance.group,
        REQUESTS,
        arrivals,
        faults,
        calm_s=calm_s,
        pace=PACE,
        to_the_end=False,
        **more,
    )
    return draw_up(
        model,
        happened.records,
        expected(model),
        happened.happenings,
        happened.calm,
        seed=7,
    )


def assert_unnoticed(account: Account, faults: int) -> None:
    """Every fault happened and was healed, and no stream shows it."""
    assert account.is_clean, table(account)
    assert sum(row.count for row in account.rows) == faults, table(account)
    assert account.verdicts["right"] >= 8, "hardly anything was asked"


def run_storm(model: str, faults: Callable[[Instance], Iterator[Fault]], **options: Any) -> Account:
    """A fresh instance of subprocesses, its storm, and what it leaves behind."""
    expected(model)
    belongings = Belongings()
    with subprocess_instance({"model": model, **LAYOUT, **options}) as instance:
        account = asyncio.run(weather(instance, model, faults(instance)))
        belongings.look()
    assert belongings.left(instance.launcher.addresses) == []
    return account


def run_wire_storm(
    model: str, kind: str, faults: Callable[[Wire], Iterator[Fault]], **options: Any
) -> Account:
    """The same with every connection through a proxy that listens on `kind` sockets."""
    expected(model)
    belongings = Belongings()
    with (
        closing(Wire(kind)) as wire,
        subprocess_instance({"model": model, **LAYOUT, **options}, wire) as instance,
    ):
        account = asyncio.run(weather(instance, model, faults(wire), wire=wire))
        belongings.look()
    assert belongings.left(instance.launcher.addresses) == []
    return account
