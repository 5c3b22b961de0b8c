"""What the group tells a worker between steps, and what a worker answers when it has started."""

from __future__ import annotations

from dataclasses import dataclass

from router.limits import EngineLimits
from router.placement import RoutingTable

INGRESS = "ingress-0"
"""Transport name of the process that owns the journal and watches the workers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerAddress:
    """A worker to dial, by its transport name."""

    peer: str
    address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """Applied in this order: dial `connect`, take `table`, begin `epoch`, answer `ack`, end.

    `coming_epoch` comes before all: steps of earlier epochs must not use the new connections. Then
    `limits`, always the same: whoever has no caches yet makes them.
    `keep_cache` goes with `epoch`: the stages' memory is as the last epoch left it.
    """

    coming_epoch: int = 0
    limits: EngineLimits | None = None
    connect: tuple[PeerAddress, ...] = ()
    table: RoutingTable | None = None
    epoch: int | None = None
    keep_cache: bool = False
    ack: int | None = None
    shutdown: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StartTimes:
    """Seconds that a worker took for parts of its start, by its own clock."""

    imports_s: float = 0.0
    read_s: float = 0.0
    """From the first header to the last byte of weights."""
    init_s: float = 0.0
    """The rest: kernels loaded, layers built."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A worker has loaded its weights and listens at `address`."""

    address: str
    pid: int
    node_id: str
    pulse: str = ""
    """Address at which its signs of life are heard."""
    birth: str = ""
    """What tells its process from all others; empty where that cannot be known."""
    bytes_read: int = 0
    free_bytes: int | None = None
    """Memory that its node has left then; None when nobody asked."""
    times: StartTimes = StartTimes()


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerEvent:
    """Worker to ingress: a control message is done (`ack`), a step of `lost_epoch` was lost, or the
    connection to the expert worker `lost_link` broke or cannot be made."""

    ack: int | None = None
    lost_epoch: int | None = None
    lost_link: str | None = None
