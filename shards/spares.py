"""Which node has a spare process, when the next one is made, and who takes it: without I/O.

A spare has imported what any worker imports, and holds no weights. It is made only while no worker
is starting, so it never competes with a recovery, and a node never has more than one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from shards.spec import WorkerSpec

MAX_DEATHS = 3
DEATH_WINDOW_S = 60.0

Process = TypeVar("Process")
"""How a launcher knows a process; compared by identity."""


@dataclass(slots=True)
class _Spare(Generic[Process]):
    node: str
    process: Process | None = None
    """None while it is being made."""
    warm: bool = False


class Spares(Generic[Process]):
    """Events in, answers out; not thread-safe. Nodes are named as the launcher likes."""

    def __init__(self) -> None:
        self._spares: list[_Spare[Process]] = []
        self._starting: set[WorkerSpec] = set()
        self._deaths: deque[float] = deque()
        self._closed = False

    def on_spawn(self, spec: WorkerSpec) -> None:
        """A worker starts: nothing is made until it has answered."""
        self._starting.add(spec)

    def on_answered(self, spec: WorkerSpec) -> None:
        """A worker has loaded. What went wrong with spares before is forgiven."""
        self._starting.discard(spec)
        self._deaths.clear()

    def on_died(self, spec: WorkerSpec) -> None:
        """A worker ended, perhaps before it answered."""
        self._starting.discard(spec)

    def wanted(self, nodes: Iterable[str]) -> list[str]:
        """Nodes that get a spare now; `put` or `give_up` follows for each."""
        if self._closed or self._starting or len(self._deaths) >= MAX_DEATHS:
            return []
        missing = sorted(set(nodes) - {spare.node for spare in self._spares})
        self._spares += [_Spare(node) for node in missing]
        return missing

    def put(self, node: str, process: Process) -> bool:
        """A process was started as the spare of `node`; False: it is not wanted any more."""
        for spare in self._spares:
            if spare.node == node:
                spare.process = process
        return not self._closed

    def give_up(self, node: str) -> None:
        """None could be started on `node`; tried again when a worker has been started."""
        self._spares = [s for s in self._spares if s.node != node or s.process is not None]

    def on_warm(self, process: Process) -> None:
        """A spare is ready to be taken."""
        for spare in self._spares:
            spare.warm |= spare.process is process

    def take(self, node: str) -> Process | None:
        """The spare of `node` if it is warm: the caller's from now on."""
        for spare in self._spares:
            if spare.node == node and spare.warm and not self._closed:
                self._spares.remove(spare)
                return spare.process
        return None

    def on_ended(self, process: Process, now: float) -> bool:
        """A process that was made as a spare ended; False: it had been taken.

        Spares that keep ending are not made again before a worker has answered.
        """
        for spare in self._spares:
            if spare.process is process:
                self._spares.remove(spare)
                self._deaths.append(now)
                while now - self._deaths[0] > DEATH_WINDOW_S:
                    self._deaths.popleft()
                return True
        return False

    def close(self) -> list[Process]:
        """No more are made or taken; those that there are, are the caller's to end."""
        self._closed = True
        return [spare.process for spare in self._spares if spare.process is not None]

    def check_invariants(self) -> None:
        """At most one spare per node, and only what was started can be warm."""
        nodes = [spare.node for spare in self._spares]
        assert len(nodes) == len(set(nodes)), nodes
        assert all(spare.process is not None for spare in self._spares if spare.warm)
