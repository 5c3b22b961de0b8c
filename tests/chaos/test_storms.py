"""Open-loop load while every kind of actor is killed in turn, and one shard never comes back."""

from __future__ import annotations

import asyncio
import os
import signal
from itertools import islice

from benchmarks.faults.injector import is_whole
from benchmarks.faults.instances import Instance, subprocess_instance
from benchmarks.faults.kinds import rotation
from shards.client import GroupState
from tests.chaos.storms import LAYOUT, assert_unnoticed, expected, run_storm, weather

ROLES = ("engine", "stage", "dispatcher", "expert")


def _workers(instance: Instance) -> list[tuple[str, int]]:
    return [(worker.role, worker.index) for worker in instance.group.workers()]


def test_nobody_notices_that_every_role_dies() -> None:
    account = run_storm(
        "nano-phimoe", lambda instance: islice(rotation(["kill"], _workers(instance), 3), 4)
    )
    assert_unnoticed(account, faults=4)
    assert {row.label for row in account.rows} == {f"kill {role}" for role in ROLES}


def test_one_shard_dead_for_good() -> None:
    """Its experts' copies answer, and the instance stays ready."""
    model = "nano-dbrx"
    expected(model)
    with subprocess_instance({"model": model, **LAYOUT}) as instance:
        group, launcher = instance.group, instance.launcher
        launcher.bar("expert-1")
        pid = next(w.pid for w in group.workers() if (w.role, w.index) == ("expert", 1))
        os.kill(pid, signal.SIGKILL)

        async def without_it() -> None:
            async with asyncio.timeout(20):
                while is_whole(group):
                    await asyncio.sleep(0.01)
            account = await weather(instance, model, iter(()), calm_s=5.0)
            assert_unnoticed(account, faults=0)
            assert group.state is GroupState.READY
            assert not is_whole(group), "it must still be dead"

        asyncio.run(without_it())
