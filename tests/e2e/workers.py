"""Worker threads that can be watched and killed: SIGKILL without the time a process takes."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import NoReturn

from router.expert_call import read_expert_call
from router.transport.base import Frame, FrameKind, Lost, Received, Transport
from shards.group import ModelGroup
from shards.pulse_sender import PulseSender
from shards.spec import WorkerSpec
from shards.worker import RunsForever, make_worker
from tests.groups import healed


class Killed(BaseException):
    """Ends a worker's thread; nothing that a worker catches."""


class MortalTransport:
    """A worker's transport; once killed, every connection breaks and its thread ends."""

    def __init__(self, inner: Transport) -> None:
        self._inner = inner
        self._killed = False
        self.experts_asked: set[int] = set()
        """Logical experts that rows came for."""

    def kill(self) -> None:
        """Die before the next frame goes in or out. Thread-safe."""
        self._killed = True
        self._inner.wake()

    def _die(self) -> NoReturn:
        self._inner.close()
        raise Killed

    @property
    def address(self) -> str:
        return self._inner.address

    def connect(self, peer: str, address: str, patience: float | None = None) -> None:
        self._inner.connect(peer, address, patience)

    def drop(self, peer: str, reason: str) -> None:
        self._inner.drop(peer, reason)

    def send(self, peer: str, frame: Frame) -> None:
        if self._killed:
            self._die()
        self._inner.send(peer, frame)

    def recv(self, timeout: float | None) -> Received | Lost | None:
        event = self._inner.recv(timeout)
        if self._killed:
            self._die()
        if isinstance(event, Received) and event.frame.header.kind is FrameKind.EXPERT_CALL:
            pairs, _ = read_expert_call(event.frame)
            self.experts_asked |= {expert for expert, _ in pairs}
        return event

    def wake(self) -> None:
        self._inner.wake()

    def close(self) -> None:
        self._inner.close()


class MortalWorker:
    """A worker whose thread ends in silence when it is killed."""

    def __init__(self, worker: RunsForever) -> None:
        self._worker = worker

    @property
    def bytes_read(self) -> int:
        return self._worker.bytes_read

    @property
    def transport(self) -> Transport:
        return self._worker.transport

    @property
    def pulse(self) -> PulseSender:
        return self._worker.pulse

    def run(self) -> None:
        with suppress(Killed):
            self._worker.run()


class Workers:
    """Builds workers (`running_group(make=...)`), watches them and kills them by name."""

    def __init__(self) -> None:
        self._transports: dict[str, MortalTransport] = {}

    def make(self, spec: WorkerSpec, transport: Transport) -> RunsForever:
        """A worker of this group, or the one that takes a dead one's place."""
        mortal = self._transports[spec.peer] = MortalTransport(transport)
        return MortalWorker(make_worker(spec, mortal))

    def experts_asked(self, shard: int) -> set[int]:
        """Logical experts that this expert worker has computed."""
        return self._transports[f"expert-{shard}"].experts_asked

    async def kill(self, group: ModelGroup, role: str, index: int) -> None:
        """Kill one worker and wait until its successor serves; no other may have died of it."""
        expected = incarnations(group)
        expected[role, index] += 1
        self._transports[f"{role}-{index}"].kill()
        async with asyncio.timeout(60):
            while incarnations(group)[role, index] != expected[role, index]:
                await asyncio.sleep(0.005)
        await healed(group)
        assert incarnations(group) == expected


def incarnations(group: ModelGroup) -> dict[tuple[str, int], int]:
    """How often each worker was replaced, by role and index."""
    return {(worker.role, worker.index): worker.incarnation for worker in group.workers()}
