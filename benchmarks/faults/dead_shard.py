"""Throughput with one expert shard dead for good, copies elsewhere, against the whole instance."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from benchmarks.faults.injector import is_whole
from benchmarks.faults.instances import Instance
from router.step import SamplingParams
from shards.client import ModelClient, WorkerStatus

log = logging.getLogger("conclave.chaos")

_STREAMS = 16
_SETTLE_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadShard:
    """Tokens per second, medians over the rounds."""

    whole: float
    dead: float
    num_shards: int

    @property
    def loss(self) -> float:
        """Share of the throughput that is lost."""
        return 1 - self.dead / self.whole

    @property
    def allowed(self) -> float:
        """The capacity that is lost, and two per cent."""
        return 1 / self.num_shards + 0.02

    def __str__(self) -> str:
        return (
            f"one of {self.num_shards} expert shards dead: {self.dead:.0f} tokens/s instead of "
            f"{self.whole:.0f}, {self.loss:.1%} lost, {self.allowed:.1%} allowed"
        )

    def as_json(self) -> dict[str, float]:
        """The figures and the verdict's two sides."""
        return {**asdict(self), "loss": self.loss, "allowed": self.allowed}


async def measure_dead_shard(
    instance: Instance, num_shards: int, rounds: int, seconds: float
) -> DeadShard:
    """Rounds of both states in turn, so that a loaded moment falls on both."""
    group, launcher = instance.group, instance.launcher
    whole: list[float] = []
    dead: list[float] = []
    for turn in range(rounds):
        shard = turn % num_shards
        whole.append(await _throughput(group, seconds))
        launcher.bar(f"expert-{shard}")
        os.kill(next(w.pid for w in _experts(group) if w.index == shard), signal.SIGKILL)
        await _until(lambda: not is_whole(group))
        dead.append(await _throughput(group, seconds))
        launcher.admit(f"expert-{shard}")
        await _until(lambda: is_whole(group))
        log.info(
            "round %d: %.0f tokens/s whole, %.0f without expert-%d",
            turn,
            whole[-1],
            dead[-1],
            shard,
        )
    return DeadShard(
        whole=statistics.median(whole), dead=statistics.median(dead), num_shards=num_shards
    )


def _experts(group: ModelClient) -> list[WorkerStatus]:
    return [worker for worker in group.workers() if worker.role == "expert"]


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def _throughput(group: ModelClient, seconds: float) -> float:
    """Tokens per second of a full batch, after a moment to settle."""
    begin = time.monotonic() + _SETTLE_S
    end, count = begin + seconds, 0

    async def ask(i: int) -> None:
        nonlocal count
        sampling = SamplingParams(max_tokens=200, temperature=1.0, seed=i)
        while time.monotonic() < end:
            stream = group.generate(tuple(range(5 + i, 17 + i)), sampling)
            async for _ in stream:
                now = time.monotonic()
                if now >= end:
                    stream.abort()
                    return
                count += now >= begin

    await asyncio.gather(*(ask(i) for i in range(_STREAMS)))
    return count / seconds
