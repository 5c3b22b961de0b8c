"""SIGSTOP of any worker behind the ingress: found, killed, and treated like any other death."""

from __future__ import annotations

import asyncio
import os
import signal
import threading

import pytest

from router.step import SamplingParams
from router.transport.base import Frame, FrameKind, Transport
from shards.client import WorkerStatus
from shards.group import ModelGroup
from shards.spec import WorkerSpec
from shards.stage_worker import StageWorker
from shards.worker import RunsForever, make_worker
from tests.groups import Answer, ask_all, healed, running_group

GREEDY = SamplingParams(max_tokens=160, temperature=0.0, logprobs=1)
PROMPTS = [tuple(range(5, 5 + n)) for n in (4, 11, 30)]


def stop_worker(group: ModelGroup, role: str, index: int) -> int:
    """SIGSTOP one worker process; returns its id."""
    pid = next(w.pid for w in group.workers() if (w.role, w.index) == (role, index))
    os.kill(pid, signal.SIGSTOP)
    return pid


def is_gone(pid: int) -> bool:
    """Whether a process has ended, or only waits to be buried."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def _status(group: ModelGroup, victim: tuple[str, int]) -> WorkerStatus:
    return next(w for w in group.workers() if (w.role, w.index) == victim)


async def _stopped_in_the_middle(
    group: ModelGroup, victim: tuple[str, int]
) -> tuple[list[Answer], int]:
    asked = asyncio.create_task(ask_all(group, PROMPTS, GREEDY))
    stream = group.generate((7, 8, 9), GREEDY)
    async for token in stream:
        if token.position == 4:
            break
    stream.abort()
    assert not asked.done(), "the streams must still be open when the worker stops"
    pid = stop_worker(group, *victim)
    return await asyncio.wait_for(asked, 60), pid


@pytest.mark.parametrize("dispatch", ["actor", "direct"])
async def test_every_role_may_stop(dispatch: str) -> None:
    roles = [("expert", 0), ("stage", 1), ("dispatcher", 0), ("engine", 0)]
    with running_group(
        "nano-jamba",
        processes=True,
        stages=2,
        expert_shards=2,
        expert_replicas=2,
        dispatch=dispatch,
        hang_deadline=0.5,
    ) as group:
        expected = await ask_all(group, PROMPTS, GREEDY)
        for victim in roles:
            answers, pid = await _stopped_in_the_middle(group, victim)
            assert answers == expected, victim
            async with asyncio.timeout(60):
                # It is killed a moment before anybody is told.
                while not is_gone(pid) or _status(group, victim).deaths == 0:
                    await asyncio.sleep(0.02)
            await healed(group)
            status = _status(group, victim)
            assert (status.incarnation, status.deaths) == (1, 1)
            assert "hung" in status.last_reason
        assert sum(w.deaths for w in group.workers()) == len(roles), "nobody else was given up"


async def test_a_loop_that_only_waits_is_not_stuck() -> None:
    """Longer than the step deadline without any request, and then with one."""
    with running_group("nano-dbrx", stages=2, step_deadline=1, hang_deadline=0.4) as group:
        await asyncio.sleep(3)
        assert sum(w.deaths for w in group.workers()) == 0
        assert len(await ask_all(group, PROMPTS, GREEDY)) == len(PROMPTS)


async def test_a_loop_that_does_not_turn_is_stuck() -> None:
    """All its process's signs of life go on."""
    entered, leave = threading.Event(), threading.Event()

    def make(spec: WorkerSpec, transport: Transport) -> RunsForever:
        worker = make_worker(spec, transport)
        if isinstance(worker, StageWorker) and spec.incarnation == 0:
            run_step = worker._run_step

            def stuck(frame: Frame) -> None:
                entered.set()
                leave.wait(60)
                run_step(frame)

            worker._run_step = stuck  # type: ignore[method-assign]
        return worker

    options = {"expert_shards": 2, "step_deadline": 2, "hang_deadline": 0.4}
    with running_group("nano-dbrx", make=make, **options) as group:
        answers = asyncio.create_task(ask_all(group, PROMPTS, GREEDY))
        async with asyncio.timeout(60):
            assert await asyncio.to_thread(entered.wait, 30)
            while (status := group.workers()[1]).deaths == 0:
                await asyncio.sleep(0.02)
            assert (status.role, status.deaths) == ("stage", 1)
            assert "has not turned" in status.last_reason
            with running_group("nano-dbrx") as healthy:
                assert await answers == await ask_all(healthy, PROMPTS, GREEDY)
        leave.set()


async def test_a_step_that_nobody_has_any_more_is_given_up() -> None:
    """Everybody lives, every loop waits."""
    lost: list[Frame] = []

    def make(spec: WorkerSpec, transport: Transport) -> RunsForever:
        worker = make_worker(spec, transport)
        if isinstance(worker, StageWorker):
            on_frame = worker.on_frame

            def forgetful(peer: str, frame: Frame) -> None:
                header = frame.header
                begins = not lost and header.kind is FrameKind.STEP and header.step == 7
                if begins or (lost and header.epoch == lost[0].header.epoch):
                    lost.append(frame)
                else:
                    on_frame(peer, frame)

            worker.on_frame = forgetful  # type: ignore[method-assign]
        return worker

    with running_group("nano-dbrx", expert_shards=2) as healthy:
        expected = await ask_all(healthy, PROMPTS, GREEDY)
    options = {"expert_shards": 2, "step_deadline": 1, "hang_deadline": 0.4}
    with running_group("nano-dbrx", make=make, **options) as group:
        assert await asyncio.wait_for(ask_all(group, PROMPTS, GREEDY), 60) == expected
        assert lost
        assert sum(w.deaths for w in group.workers()) == 0


async def test_an_idle_group_notices_too() -> None:
    with running_group("nano-dbrx", processes=True, stages=1, hang_deadline=0.3) as group:
        pid = stop_worker(group, "stage" if group.spec.executor == "pipeline" else "engine", 0)
        async with asyncio.timeout(60):
            while not is_gone(pid):
                await asyncio.sleep(0.02)
        await healed(group)
        assert sum(w.deaths for w in group.workers()) == 1
        assert len(await ask_all(group, PROMPTS, GREEDY)) == len(PROMPTS)
