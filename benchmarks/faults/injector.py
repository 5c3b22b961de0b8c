"""Makes faults happen, one after the other, and watches until the instance is whole again."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from benchmarks.faults.kinds import NODE, SIGNALS, SLOWNESS, Fault, Link
from benchmarks.faults.load import Load
from benchmarks.faults.wire import Wire
from shards.client import GroupState, ModelClient, WorkerStatus

log = logging.getLogger("conclave.chaos")

_POLL_S = 0.005
NOTICED_S = 0.3
"""A broken link that nobody has noticed by then is taken for one that need not be."""


@dataclass(slots=True)
class Happening:
    """One fault as it happened: `whole_at` is None when the instance never healed in time."""

    fault: Fault
    at: float
    pid: int = 0
    node_id: str = ""
    whole_at: float | None = None

    @property
    def window(self) -> tuple[float, float] | None:
        """When it may have been felt; None if it was not healed."""
        if self.whole_at is None:
            return None
        return self.at, max(self.whole_at, self.at + NOTICED_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Seconds between a healed instance and the next fault, and how long healing may take.

    `delay` and `rate` (bytes per second) are those of a slow link, for `slow_for` seconds.
    """

    pause: float = 3.0
    patience: float = 45.0
    delay: float = 0.05
    rate: float = 100_000.0
    slow_for: float = 1.0


class Nodes(Protocol):
    """The machines of a cluster that may be lost."""

    def remove_busiest(self) -> str:
        """Take one away without warning; its id. Blocks."""


def is_whole(group: ModelClient) -> bool:
    """Whether every worker lives and the instance is ready."""
    alive = all(worker.state == "alive" for worker in group.workers())
    return alive and group.state is GroupState.READY


class Injector:
    """Injects faults into one instance under load; `happenings` is what came of them."""

    def __init__(
        self,
        group: ModelClient,
        load: Load,
        pace: Pace,
        wire: Wire | None = None,
        nodes: Nodes | None = None,
    ) -> None:
        self._group = group
        self._load = load
        self._pace = pace
        self._wire = wire
        self._nodes = nodes
        self._begin = time.monotonic()
        self.happenings: list[Happening] = []

    async def run(self, faults: Iterator[Fault]) -> None:
        """The next fault comes `pause` seconds after the instance is whole, until the load ends.

        Ends early when there is no fault left, or when the instance cannot be healed.
        """
        while not await self._ends_within(self._pace.pause):
            fault = next(faults, None)
            if fault is None:
                return
            happening = await self.inject(fault)
            if happening is not None and not await self.heals(happening):
                return

    async def inject(self, fault: Fault) -> Happening | None:
        """Make one fault happen; None where there is nothing to harm at the moment."""
        happening = Happening(fault, time.monotonic())
        if fault.kind in SIGNALS:
            happening.pid = self._worker(fault).pid
            if hit := happening.pid != 0:
                kill = signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP
                os.kill(happening.pid, kill)
        elif fault.kind == NODE:
            assert self._nodes is not None
            happening.node_id = await asyncio.to_thread(self._nodes.remove_busiest)
            hit = True
        else:
            hit = await asyncio.to_thread(self._harm_link, fault) > 0
        if not hit:
            log.info("%8.3f s: %s is not there to be harmed", self._now(), fault)
            return None
        self.happenings.append(happening)
        pid = f", process {happening.pid}" if happening.pid else ""
        log.info("%8.3f s: %s%s, %d open", self._now(), fault, pid, self._load.num_open)
        return happening

    async def heals(self, happening: Happening) -> bool:
        """Wait until the instance is whole and tokens come; False when it has failed for good.

        A process that was stopped and is not found out is killed after `patience` seconds.
        """
        fault = happening.fault
        if fault.kind in SLOWNESS:
            await asyncio.sleep(self._pace.slow_for)
            assert self._wire is not None
            await asyncio.to_thread(self._wire.calm)
        happening.whole_at = await self._whole(happening, happening.at + self._pace.patience)
        if happening.whole_at is not None:
            log.info("%8.3f s: whole after %.3f s", self._now(), happening.whole_at - happening.at)
            return True
        log.error("%8.3f s: %s is not healed: %s", self._now(), fault, self._states())
        if fault.kind != "stop" or self._group.state is GroupState.FAILED:
            return False
        if self._worker(fault).pid == happening.pid:
            os.kill(happening.pid, signal.SIGKILL)
        return await self._whole(happening, time.monotonic() + self._pace.patience) is not None

    async def _whole(self, happening: Happening, deadline: float) -> float | None:
        """When everyone was there again, once a later token has shown that it works."""
        slow = happening.fault.kind in SLOWNESS
        unwell_at = time.monotonic() if slow else happening.at
        settled_at = happening.at + (NOTICED_S if happening.fault.dialer else 0.0)
        while (now := time.monotonic()) < deadline and self._group.state is not GroupState.FAILED:
            if not self._is_noticed(happening) or not is_whole(self._group):
                unwell_at = now
            elif now > settled_at and (
                not self._load.num_open or self._load.last_token_at > max(unwell_at, settled_at)
            ):
                return unwell_at
            await asyncio.sleep(_POLL_S)
        return None

    def _is_noticed(self, happening: Happening) -> bool:
        """Whether nobody takes what was lost for alive any more."""
        return not any(
            (happening.pid and w.pid == happening.pid)
            or (happening.node_id and w.node_id == happening.node_id and w.state == "alive")
            for w in self._group.workers()
        )

    def _harm_link(self, fault: Fault) -> int:
        assert self._wire is not None
        target = f"{fault.role}-{fault.index}"
        link = next((pair for pair in self._wire.links() if _matches(pair, fault, target)), None)
        if link is None:
            return 0
        match fault.kind:
            case "reset":
                return self._wire.reset(link)
            case "cut":
                return self._wire.cut(link)
            case "delay":
                return self._wire.slow(link, delay=self._pace.delay)
        return self._wire.slow(link, rate=self._pace.rate)

    def _worker(self, fault: Fault) -> WorkerStatus:
        wanted = (fault.role, fault.index)
        return next(w for w in self._group.workers() if (w.role, w.index) == wanted)

    def _states(self) -> str:
        workers = ", ".join(
            f"{w.role}-{w.index} {w.state}" for w in self._group.workers() if w.state != "alive"
        )
        return f"{self._group.state}, {workers or 'all alive'}, {self._load.num_open} open"

    async def _ends_within(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while not self._load.done and time.monotonic() < until:
            await asyncio.sleep(0.05)
        return self._load.done

    def _now(self) -> float:
        return time.monotonic() - self._begin


def _matches(pair: Link, fault: Fault, target: str) -> bool:
    return pair[0].rsplit("-", 1)[0] == fault.dialer and pair[1] == target
