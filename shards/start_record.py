"""How long a group took to become ready, and of what that time was made."""

from __future__ import annotations

from dataclasses import dataclass

from shards.control import Started, StartTimes
from shards.spec import WorkerSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStart:
    """One worker's first start, in seconds."""

    worker: str
    placement_s: float
    """What its own times do not explain: a place and a process for it, the report's way back."""
    times: StartTimes
    num_bytes: int
    """Weights read."""

    @property
    def whole_s(self) -> float:
        """From the wish to have it until it was there."""
        return self.placement_s + self.times.imports_s + self.times.read_s + self.times.init_s


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupStart:
    """A group's start, in seconds that follow each other; workers start side by side."""

    workers: tuple[WorkerStart, ...] = ()
    """In the order in which they were there."""
    load_s: float = 0.0
    """Until the last worker was there."""
    connect_s: float = 0.0
    """Caches made, peers dialled, until the first epoch began."""
    first_token_s: float = 0.0
    """From then until the warm-up's token was there; 0 without a warm-up."""


class StartRecord:
    """Events in, a GroupStart out: a recorder without I/O. `now` is any clock that only rises."""

    def __init__(self) -> None:
        self._spawned: dict[WorkerSpec, float] = {}
        self._workers: dict[str, WorkerStart] = {}
        self._began: float | None = None
        self._loaded = 0.0
        self._epoch: float | None = None
        self._token: float | None = None

    def on_spawn(self, spec: WorkerSpec, now: float) -> None:
        """A worker is to be started."""
        if self._epoch is None:
            self._began = now if self._began is None else self._began
            self._spawned[spec] = now

    def on_started(self, spec: WorkerSpec, started: Started, now: float) -> None:
        """It is there; who dies before the group is ready is counted as its successor."""
        spawned = self._spawned.pop(spec, None)
        if spawned is None:
            return
        times = started.times
        own_s = times.imports_s + times.read_s + times.init_s
        self._workers.pop(spec.peer, None)
        self._workers[spec.peer] = WorkerStart(
            worker=spec.peer,
            placement_s=max(0.0, now - spawned - own_s),
            times=times,
            num_bytes=started.bytes_read,
        )
        self._loaded = now

    def on_epoch(self, now: float) -> None:
        """An epoch begins."""
        self._epoch = now if self._epoch is None else self._epoch

    def on_token(self, now: float) -> None:
        """The warm-up's token is there."""
        self._token = now if self._token is None else self._token

    @property
    def start(self) -> GroupStart:
        """As far as it has come."""
        if self._began is None or self._epoch is None:
            return GroupStart(workers=tuple(self._workers.values()))
        return GroupStart(
            workers=tuple(self._workers.values()),
            load_s=self._loaded - self._began,
            connect_s=self._epoch - self._loaded,
            first_token_s=0.0 if self._token is None else self._token - self._epoch,
        )
