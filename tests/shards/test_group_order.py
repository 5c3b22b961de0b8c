"""The group's thread, with a scripted engine: what is said last, and what stays over."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import pytest

from router.codec import decode, encode
from router.limits import EngineLimits
from router.step import Admit, FinishReason, SamplingParams, Token, TokenBatch
from router.transport.base import (
    Frame,
    FrameKind,
    Header,
    Lost,
    PeerLost,
    Received,
    Transport,
)
from router.transport.local import LocalNetwork, LocalTransport
from shards import member
from shards.client import GroupFailed, GroupState, WorkerKilled
from shards.control import INGRESS, Control, Started, WorkerEvent
from shards.group import ModelGroup
from shards.launcher import WorkerEvents
from shards.spec import Deadlines, GroupSpec, WorkerSpec

POISON = 13
SAMPLING = SamplingParams(max_tokens=1)


def group_spec(**deadlines: float) -> GroupSpec:
    return GroupSpec(
        model_path="/nowhere",
        dtype="float32",
        executor="local",
        dispatch="actor",
        stage_layers=((0, 1),),
        placement=None,
        limits=EngineLimits(
            block_size=16,
            num_blocks=8,
            num_state_slots=0,
            max_num_seqs=4,
            max_num_batched_tokens=64,
            max_model_len=64,
        ),
        threads=1,
        secret="s",
        deadlines=Deadlines(hang_s=3600.0, step_s=3600.0, **deadlines),
    )


class Engines:
    """A launcher whose engines answer with one token, and die of a poisonous prompt.

    Their last words and the report of their death reach the group at the same time.
    """

    def __init__(self, network: LocalNetwork, kills: Callable[[Admit], bool]) -> None:
        self.spawned = 0
        self.discarded: list[WorkerSpec] = []
        self.deaf = 0
        """So many of the first engines never start."""
        self._network = network
        self._kills = kills

    def spawn(self, spec: WorkerSpec, events: WorkerEvents) -> None:
        self.spawned += 1
        if self.spawned > self.deaf:
            threading.Thread(target=self._run, args=(spec, events), daemon=True).start()

    def discard(self, spec: WorkerSpec) -> None:
        self.discarded.append(spec)

    def close(self) -> None:
        return

    def _run(self, spec: WorkerSpec, events: WorkerEvents) -> None:
        transport = LocalTransport(spec.peer, self._network)
        events.started(spec, Started(address=transport.address, pid=1, node_id="n"))
        epoch = 0
        while True:
            event = transport.recv(None)
            if not isinstance(event, Received):
                break
            if event.frame.header.kind is FrameKind.CONTROL:
                control = decode(Control, event.frame.meta)
                epoch = control.epoch or epoch
                if control.ack is not None:
                    _say(transport, FrameKind.EVENT, WorkerEvent(ack=control.ack))
                if control.shutdown:
                    break
            elif event.frame.header.kind is FrameKind.ADMIT:
                admit = decode(Admit, event.frame.meta)
                if admit.epoch != epoch:
                    continue
                started = (admit.seq_id,)
                if self._kills(admit):
                    _say(transport, FrameKind.TOKENS, TokenBatch(epoch=epoch, started=started))
                    break
                last = Token(
                    seq_id=admit.seq_id,
                    position=len(admit.emitted),
                    token_id=7,
                    finish=FinishReason.LENGTH,
                )
                batch = TokenBatch(epoch=epoch, started=started, tokens=(last,))
                _say(transport, FrameKind.TOKENS, batch)
        events.died(spec, "killed", False)
        transport.close()


def _say(transport: Transport, kind: FrameKind, message: object) -> None:
    # The ingress may have ended: the next `recv` says so.
    with suppress(PeerLost):
        transport.send(INGRESS, Frame(Header(kind=kind), encode(message)))


class Slow(LocalTransport):
    """The ingress's; what comes while it does something else comes all at once."""

    def recv(self, timeout: float | None) -> Received | Lost | None:
        time.sleep(0.003)
        return super().recv(timeout)


def make_group(kills: Callable[[Admit], bool], **deadlines: float) -> tuple[ModelGroup, Engines]:
    network = LocalNetwork()
    engines = Engines(network, kills)
    return ModelGroup(group_spec(**deadlines), engines, Slow(INGRESS, network)), engines


async def _answer(group: ModelGroup, prompt: tuple[int, ...]) -> list[int]:
    return [token.token_id async for token in group.generate(prompt, SAMPLING)]


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member, "_FIRST_PAUSE_S", 0.01)


async def test_the_last_words_count_whatever_is_reported_first() -> None:
    group, engines = make_group(lambda admit: POISON in admit.prompt)
    group.start(timeout=10)
    try:
        async with asyncio.timeout(30):
            healthy = [asyncio.create_task(_answer(group, (n, n))) for n in range(3)]
            with pytest.raises(WorkerKilled):
                await _answer(group, (1, POISON))
            assert await asyncio.gather(*healthy) == [[7]] * 3
            assert await _answer(group, (1, 2)) == [7]
        assert engines.spawned <= 1 + 3
    finally:
        group.stop()


async def test_every_culprit_fails_and_the_workers_are_forgiven() -> None:
    group, engines = make_group(lambda admit: POISON in admit.prompt)
    group.start(timeout=10)
    try:
        async with asyncio.timeout(30):
            prompts = [(n, POISON if n % 2 else n) for n in range(8)]
            answers = [asyncio.create_task(_answer(group, prompt)) for prompt in prompts]
            found = await asyncio.gather(*answers, return_exceptions=True)
        for prompt, answer in zip(prompts, found, strict=True):
            assert isinstance(answer, WorkerKilled) if POISON in prompt else answer == [7]
        assert engines.spawned > 9, "more than a worker's own fault would have been allowed"
        assert group.state is not GroupState.FAILED
    finally:
        group.stop()


async def test_a_group_that_has_given_up_stays_so() -> None:
    group, engines = make_group(lambda admit: True)
    group.start(timeout=10)
    answers = [asyncio.create_task(_answer(group, (n, n))) for n in range(12)]
    async with asyncio.timeout(30):
        failures = await asyncio.gather(*answers, return_exceptions=True)
    assert {type(failure) for failure in failures} <= {WorkerKilled, GroupFailed}
    assert GroupFailed in {type(failure) for failure in failures}
    assert group.state is GroupState.FAILED
    assert group.failure
    spawned = engines.spawned
    group.stop()
    assert group.state is GroupState.FAILED
    assert engines.spawned == spawned


async def test_a_worker_that_never_loads_is_replaced() -> None:
    group, engines = make_group(lambda admit: False, load_s=0.2)
    engines.deaf = 2
    group.start(timeout=10)
    try:
        assert await _answer(group, (1, 2)) == [7]
        (status,) = group.workers()
        assert (status.deaths, status.incarnation) == (2, 2)
        assert "not loaded" in status.last_reason
        assert [spec.incarnation for spec in engines.discarded] == [0, 1]
    finally:
        group.stop()


async def test_patience_of_a_century_is_no_error() -> None:
    group, _ = make_group(lambda admit: POISON in admit.prompt, recovery_s=3.2e9)
    group.start(timeout=10)
    try:
        with pytest.raises(WorkerKilled):
            await asyncio.wait_for(_answer(group, (1, POISON)), 30)
        assert await _answer(group, (1, 2)) == [7]
    finally:
        group.stop()
