"""A worker that does not come back: requests wait for a while, then they are told to come again."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any

import pytest

from deploy.config import parse_args
from deploy.resolve import resolve
from router.step import SamplingParams, Token
from router.transport.sockets import SocketTransport
from shards.client import GroupState, GroupUnavailable
from shards.control import INGRESS
from shards.group import ModelGroup
from shards.launcher import WorkerEvents
from shards.spec import WorkerSpec
from shards.stream import GroupStream
from tests.e2e.workers import Workers
from tests.groups import ThreadLauncher, ask_all, healed

GREEDY = SamplingParams(max_tokens=200, temperature=0.0)
PROMPTS = [(5, 6, 7), (8, 9)]


class Gate(ThreadLauncher):
    """Starts successors only once it is opened."""

    def __init__(self, workers: Workers) -> None:
        super().__init__(workers.make)
        self.workers = workers
        self.opened = threading.Event()

    def spawn(self, spec: WorkerSpec, events: WorkerEvents) -> None:
        if spec.incarnation == 0:
            super().spawn(spec, events)
            return

        def later() -> None:
            self.opened.wait(60)
            super(Gate, self).spawn(spec, events)

        threading.Thread(target=later, daemon=True).start()


async def _rest(stream: GroupStream) -> list[Token]:
    return [token async for token in stream]


@pytest.mark.parametrize("victim", ["stage-0", "expert-1"])
async def test_waiting_has_a_bound(victim: str, caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = {"model": "nano-dbrx", "dtype": "float32", "expert_shards": 2}
    spec = resolve(parse_args({**options, "recovery_timeout": 0.8})).spec
    gate = Gate(Workers())
    group = ModelGroup(spec, gate, SocketTransport(INGRESS, spec.secret))
    group.start(timeout=60)
    try:
        expected = await ask_all(group, PROMPTS, GREEDY)
        streams = [group.generate(prompt, GREEDY) for prompt in PROMPTS]
        began = [await anext(aiter(stream)) for stream in streams]
        assert all(token.position == 0 for token in began)
        with caplog.at_level(logging.WARNING, "conclave.group"):
            gate.workers._transports[victim].kill()
            for stream in streams:
                with pytest.raises(GroupUnavailable):
                    await asyncio.wait_for(_rest(stream), 30)
        assert sum("died" in record.getMessage() for record in caplog.records) == 1
        assert group.state is GroupState.RECOVERING
        assert group.trouble is not None
        assert (group.trouble.worker, group.trouble.deaths_in_a_row) == (victim, 1)
        with pytest.raises(GroupUnavailable):
            group.generate(PROMPTS[0], GREEDY)
        gate.opened.set()
        await healed(group)
        assert group.unavailable is None
        assert group.trouble is None
        assert await ask_all(group, PROMPTS, GREEDY) == expected
    finally:
        gate.opened.set()
        group.stop()
