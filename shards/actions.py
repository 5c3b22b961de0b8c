"""What the supervisor wants done; the group does it."""

from __future__ import annotations

from dataclasses import dataclass

from shards.control import Control
from shards.spec import WorkerSpec


@dataclass(frozen=True, slots=True)
class Spawn:
    """Start this worker."""

    spec: WorkerSpec


@dataclass(frozen=True, slots=True)
class Discard:
    """Make sure that this worker is dead; its successor is spawned separately."""

    spec: WorkerSpec


@dataclass(frozen=True, slots=True)
class Mourn:
    """This worker has died, so many times in a row.

    With `blames`, what was running may have killed it; with `ends_epoch`, nothing runs on.
    """

    spec: WorkerSpec
    reason: str
    failures: int
    blames: bool
    ends_epoch: bool

    def __str__(self) -> str:
        which = f"{self.spec.peer} (incarnation {self.spec.incarnation})"
        return f"{which} died, {self.failures} in a row without progress: {self.reason}"


@dataclass(frozen=True, slots=True)
class Dial:
    """The ingress connects to a worker that has just started."""

    spec: WorkerSpec
    address: str


@dataclass(frozen=True, slots=True)
class Tell:
    """Send a control message to a live worker."""

    peer: str
    control: Control


@dataclass(frozen=True, slots=True)
class BeginEpoch:
    """Resume every journalled sequence in this epoch."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Suspend:
    """The current epoch is over: rows still on their way are stale."""


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The group cannot be healed."""

    reason: str


Action = Spawn | Discard | Mourn | Dial | Tell | BeginEpoch | Suspend | GiveUp
