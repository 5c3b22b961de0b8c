"""Model instances of real workers, and ways to ask them for tokens."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deploy.config import parse_args
from deploy.resolve import resolve
from deploy.served_model import load_served_model
from deploy.vocabulary import vocabulary_of
from router.step import SamplingParams, Token
from router.transport.base import Transport
from router.transport.sockets import SocketTransport
from shards.client import GroupState
from shards.control import INGRESS
from shards.group import ModelGroup
from shards.launcher import WorkerEvents
from shards.spec import WarmUp, WorkerSpec
from shards.subprocess_launcher import SubprocessLauncher
from shards.worker import RunsForever, announce, make_worker


@dataclass(frozen=True)
class Answer:
    """What one sequence gave: token ids, their logprobs, why it ended, best alternatives."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float | None, ...]
    finish: str
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()


MakeWorker = Callable[[WorkerSpec, Transport], RunsForever]


class ThreadLauncher:
    """Workers as threads of this process: the same loops and sockets without start-up time."""

    def __init__(self, make: MakeWorker = make_worker) -> None:
        self._make = make
        self._threads: list[threading.Thread] = []

    def spawn(self, spec: WorkerSpec, events: WorkerEvents) -> None:
        thread = threading.Thread(target=self._run, args=(spec, events), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _run(self, spec: WorkerSpec, events: WorkerEvents) -> None:
        transport = SocketTransport(spec.peer, spec.group.secret)
        worker = self._make(spec, transport)
        events.started(spec, announce(worker, spec))
        worker.run()

    def discard(self, spec: WorkerSpec) -> None:
        """A thread whose connection is gone has ended by itself."""

    def close(self) -> None:
        for thread in self._threads:
            thread.join(timeout=10)
            assert not thread.is_alive(), "a worker thread did not end"


@contextmanager
def running_group(
    model: str | Path,
    *,
    processes: bool = False,
    make: MakeWorker = make_worker,
    warm_up: WarmUp | None = None,
    env: Mapping[str, str] | None = None,
    **options: Any,
) -> Iterator[ModelGroup]:
    """A started group whose workers are threads, built by `make`, or with `processes` subprocesses
    of this test."""
    resolved = resolve(parse_args({"model": str(model), "dtype": "float32", **options}))
    served = load_served_model("tested", resolved.model_path, resolved.vocab_size, 1)
    spec = replace(resolved.spec, vocabulary=vocabulary_of(served), warm_up=warm_up)
    transport = SocketTransport(INGRESS, spec.secret)
    environment = {"OMP_NUM_THREADS": "1", "CONCLAVE_LOG_LEVEL": "info", **(env or {})}
    launcher = SubprocessLauncher(environment) if processes else ThreadLauncher(make)
    group = ModelGroup(spec, launcher, transport)
    group.start(timeout=120)
    try:
        yield group
    finally:
        group.stop()


def answer_of(tokens: Sequence[Token]) -> Answer:
    """A whole answer, or what there is of it."""
    return Answer(
        tuple(t.token_id for t in tokens),
        tuple(t.logprob for t in tokens),
        str(tokens[-1].finish) if tokens else "",
        tuple(t.top_logprobs for t in tokens),
    )


async def ask(group: ModelGroup, prompt: tuple[int, ...], sampling: SamplingParams) -> Answer:
    """One sequence to its end."""
    return answer_of([token async for token in group.generate(prompt, sampling)])


async def ask_all(
    group: ModelGroup, prompts: list[tuple[int, ...]], sampling: SamplingParams
) -> list[Answer]:
    """All sequences at once."""
    return list(await asyncio.gather(*(ask(group, p, sampling) for p in prompts)))


def kill_worker(group: ModelGroup, role: str, index: int) -> int:
    """SIGKILL one worker process by its id; returns the id."""
    pid = next(w.pid for w in group.workers() if (w.role, w.index) == (role, index))
    os.kill(pid, signal.SIGKILL)
    return pid


async def healed(group: ModelGroup, timeout: float = 60.0) -> None:
    """Wait until every worker lives and the group is ready again."""
    async with asyncio.timeout(timeout):
        while group.state is not GroupState.READY or any(
            w.state != "alive" for w in group.workers()
        ):
            await asyncio.sleep(0.05)
