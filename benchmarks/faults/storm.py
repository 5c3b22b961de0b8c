"""Load and faults on one instance: an undisturbed while first, then fault after fault."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.faults.gaps import Window
from benchmarks.faults.injector import Happening, Injector, Nodes, Pace
from benchmarks.faults.kinds import Fault
from benchmarks.faults.load import Load, StreamRecord
from benchmarks.faults.requests import Request
from benchmarks.faults.wire import Wire
from shards.client import ModelClient

_WARM_UP_S = 1.0


@dataclass(frozen=True, slots=True)
class Storm:
    """What was recorded; `calm` is the undisturbed time, without its first second."""

    records: list[StreamRecord]
    happenings: list[Happening]
    calm: Window


async def storm(
    group: ModelClient,
    requests: Sequence[Request],
    arrivals: Sequence[float],
    faults: Iterator[Fault],
    *,
    calm_s: float,
    pace: Pace,
    wire: Wire | None = None,
    nodes: Nodes | None = None,
    to_the_end: bool = True,
) -> Storm:
    """Ask `requests` in turn at `arrivals`; `faults` begin after `calm_s` seconds.

    With `to_the_end` everything is asked even if the faults are over before.
    """
    load = Load(group, requests)
    begin = time.monotonic()
    asking = asyncio.create_task(load.run(arrivals, pace.patience))
    injector = Injector(group, load, pace, wire, nodes)
    await asyncio.wait([asking], timeout=calm_s)
    calm = (begin + min(_WARM_UP_S, calm_s / 2), time.monotonic())
    await injector.run(faults)
    if not to_the_end:
        load.finish()
    await asking
    return Storm(load.records, injector.happenings, calm)
