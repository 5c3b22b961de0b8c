"""Deaths with a warm spare at hand, and deaths of the spare itself: no stream notices either."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest

from deploy.config import parse_args
from deploy.resolve import resolve
from router.step import SamplingParams
from router.transport.sockets import SocketTransport
from shards.control import INGRESS
from shards.group import ModelGroup
from shards.subprocess_launcher import SubprocessLauncher
from tests.groups import Answer, ask_all, healed, kill_worker

GREEDY = SamplingParams(max_tokens=80, temperature=0.0, logprobs=1)
PROMPTS = [tuple(range(5, 5 + n)) for n in (4, 11, 30)]


class Launcher(SubprocessLauncher):
    """Says which process is the spare."""

    def _spare(self) -> Popen[bytes] | None:
        with self._lock:
            return next((spare.process for spare in self._spares._spares if spare.warm), None)

    async def warm(self, other_than: int = 0) -> int:
        """Process id of the spare, once there is one and it is warm."""
        async with asyncio.timeout(60):
            while (spare := self._spare()) is None or spare.pid == other_than:
                await asyncio.sleep(0.02)
        return spare.pid


@contextmanager
def running(model: str, **options: Any) -> Iterator[tuple[ModelGroup, Launcher]]:
    """A started group of subprocesses, and what starts them."""
    spec = resolve(parse_args({"model": model, "dtype": "float32", **options})).spec
    launcher = Launcher({"OMP_NUM_THREADS": "1", "CONCLAVE_LOG_LEVEL": "info"})
    group = ModelGroup(spec, launcher, SocketTransport(INGRESS, spec.secret))
    group.start(timeout=120)
    try:
        yield group, launcher
    finally:
        group.stop()


def pid_of(group: ModelGroup, role: str, index: int) -> int:
    return next(w.pid for w in group.workers() if (w.role, w.index) == (role, index))


async def killed(group: ModelGroup, role: str, index: int) -> list[Answer]:
    """What all prompts are answered while a worker dies in their middle."""
    asked = asyncio.create_task(ask_all(group, PROMPTS, GREEDY))
    async for _ in (stream := group.generate((7, 8, 9), GREEDY)):
        stream.abort()
        break
    assert not asked.done(), "the streams must still be open when the worker dies"
    kill_worker(group, role, index)
    answers = await asyncio.wait_for(asked, 60)
    await healed(group)
    return answers


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


async def test_a_spare_becomes_any_worker() -> None:
    options: dict[str, Any] = {"stages": 2, "expert_shards": 2, "expert_replicas": 2}
    with running("nano-jamba", **options) as (group, launcher):
        expected = await ask_all(group, PROMPTS, GREEDY)
        spare = 0
        for victim in (("expert", 1), ("stage", 0), ("dispatcher", 0), ("engine", 0)):
            spare = await launcher.warm(other_than=spare)
            assert await killed(group, *victim) == expected, victim
            assert pid_of(group, *victim) == spare, victim
        # One that has become a worker dies like any other.
        successor = await launcher.warm(other_than=spare)
        assert await killed(group, "engine", 0) == expected
        assert pid_of(group, "engine", 0) == successor
        last = await launcher.warm(other_than=successor)
    assert all(gone(pid) for pid in (spare, successor, last))


async def test_nobody_notices_what_happens_to_a_spare() -> None:
    with running("nano-dbrx", stages=1, expert_shards=2) as (group, launcher):
        expected = await ask_all(group, PROMPTS, GREEDY)
        workers = group.workers()
        spare = await launcher.warm()
        os.kill(spare, signal.SIGKILL)
        successor = await launcher.warm(other_than=spare)
        assert gone(spare)
        # One that hangs is given up, and an ordinary process started.
        os.kill(successor, signal.SIGSTOP)
        assert await ask_all(group, PROMPTS, GREEDY) == expected
        assert group.workers() == workers
        assert await killed(group, "expert", 1) == expected
        assert pid_of(group, "expert", 1) not in (spare, successor)
        assert gone(successor)
        # A worker dies again before the next spare is warm.
        assert await killed(group, "expert", 1) == expected
        last = await launcher.warm()
    assert gone(last)


@pytest.mark.parametrize("options", [{}, {"stages": 2, "warm_spare": False}])
async def test_without_a_spare(options: dict[str, Any]) -> None:
    with running("nano-dbrx", **options) as (group, launcher):
        expected = await ask_all(group, PROMPTS, GREEDY)
        assert await killed(group, "engine", 0) == expected
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(launcher.warm(), 1)
        assert all("--spare" not in command for command in children())


def children() -> list[str]:
    """Command lines of this process's children."""
    lists = Path("/proc/self/task").glob("*/children")
    pids = [pid for each in lists for pid in each.read_text().split()]
    return [Path(f"/proc/{pid}/cmdline").read_text() for pid in pids]
