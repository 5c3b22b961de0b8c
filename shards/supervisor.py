"""Who is alive, what to respawn, when a new epoch begins: the group's policy without I/O.

Death of an expert worker only changes the routing table. Death of anything else ends the epoch:
the dead are respawned, everyone is connected again, and the journal resumes every sequence.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

from router.placement import RoutingTable, ShardAddress
from shards.cache_budget import CachePlan, plan_caches
from shards.client import GroupState, WorkerStatus
from shards.control import Control, PeerAddress, Started
from shards.spec import GroupSpec, Role, WorkerSpec, worker_specs

MAX_DEATHS = 8
DEATH_WINDOW_S = 60.0


@dataclass(frozen=True, slots=True)
class Spawn:
    """Start this worker."""

    spec: WorkerSpec


@dataclass(frozen=True, slots=True)
class Discard:
    """Make sure that this worker is dead; its successor is spawned separately."""

    spec: WorkerSpec


@dataclass(frozen=True, slots=True)
class Dial:
    """The ingress connects to a worker that has just started."""

    target: PeerAddress


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


Action = Spawn | Discard | Dial | Tell | BeginEpoch | Suspend | GiveUp


@dataclass(slots=True)
class _Member:
    spec: WorkerSpec
    started: Started | None = None


class Supervisor:
    """Events in, actions out."""

    def __init__(self, spec: GroupSpec) -> None:
        self._spec = spec
        self._placement = spec.placement
        self._members = {s.peer: _Member(s) for s in worker_specs(spec)}
        self._deaths: dict[str, deque[float]] = {}
        self._epoch = 0
        self._epoch_open = False
        self._caches_lost = True
        self._round = 0
        self._awaiting: set[str] = set()
        self.table_version = 0
        self.caches: CachePlan | None = None
        """Decided when everyone has loaded for the first time, and never again."""
        self.state = GroupState.STARTING

    def start(self) -> list[Action]:
        """Spawn everyone."""
        return [Spawn(m.spec) for m in self._members.values()]

    def on_started(self, spec: WorkerSpec, started: Started) -> list[Action]:
        """A worker listens; when it was the last one missing, connect all and begin an epoch."""
        member = self._members[spec.peer]
        if self.state in (GroupState.FAILED, GroupState.STOPPED) or member.spec != spec:
            return []
        member.started = started
        actions: list[Action] = [Dial(PeerAddress(peer=spec.peer, address=started.address))]
        if not self._epoch_open:
            actions += self._connect_everyone()
        elif spec.role is Role.EXPERT:
            actions += self._publish()
        self._refresh_state()
        return actions

    def on_ack(self, peer: str, ack: int) -> list[Action]:
        """A worker has dialled its peers; the epoch begins when all have."""
        if ack != self._round or peer not in self._awaiting:
            return []
        self._awaiting.discard(peer)
        if self._awaiting:
            return []
        self._epoch += 1
        self._epoch_open = True
        self._refresh_state()
        begin = Control(epoch=self._epoch, keep_cache=not self._caches_lost)
        self._caches_lost = False
        return [Tell(f"{Role.ENGINE}-0", begin), BeginEpoch(self._epoch)]

    def on_step_lost(self, epoch: int, now: float) -> list[Action]:
        """A step was dropped on a broken connection: end the epoch even if nobody died."""
        if not self._epoch_open or epoch != self._epoch:
            return []
        if self._fails_too_often("steps", now):
            return self._give_up("steps keep being lost although every worker is alive")
        actions = self._end_epoch() + self._connect_everyone()
        self._refresh_state()
        return actions

    def on_died(
        self, spec: WorkerSpec, reason: str, now: float, fatal: bool = False
    ) -> list[Action]:
        """A worker's process is gone. `fatal` deaths (bad weights at start-up) are not retried."""
        member = self._members[spec.peer]
        if self.state in (GroupState.FAILED, GroupState.STOPPED) or member.spec != spec:
            return []
        if self._fails_too_often(spec.peer, now) or fatal:
            return self._give_up(f"{spec.peer}: {reason}")
        member.spec = replace(spec, incarnation=spec.incarnation + 1)
        member.started = None
        actions: list[Action] = []
        self._caches_lost |= spec.role in (Role.ENGINE, Role.STAGE)
        if spec.role is not Role.EXPERT:
            actions += self._end_epoch()
        elif self._epoch_open:
            actions += self._publish()
        actions.append(Spawn(member.spec))
        self._refresh_state()
        return actions

    def on_connection_lost(self, peer: str, now: float) -> list[Action]:
        """The ingress's own connection broke: the worker is dying, or as good as dead."""
        member = self._members.get(peer)
        if member is None or member.started is None:
            return []
        spec = member.spec
        return [Discard(spec), *self.on_died(spec, "connection lost", now)]

    def stop(self) -> list[Action]:
        """Tell every live worker to end."""
        self.state = GroupState.STOPPED
        return self._end_workers()

    def workers(self) -> tuple[WorkerStatus, ...]:
        """The actor map."""
        return tuple(self._status(m) for m in self._members.values())

    def _give_up(self, reason: str) -> list[Action]:
        self.state = GroupState.FAILED
        return [*self._end_workers(), GiveUp(reason)]

    def _end_workers(self) -> list[Action]:
        return [Tell(peer, Control(shutdown=True)) for peer in self._live()]

    def _live(self, *roles: Role) -> list[str]:
        return [
            peer
            for peer, m in self._members.items()
            if m.started is not None and (not roles or m.spec.role in roles)
        ]

    def on_progress(self) -> None:
        """Tokens were accepted: whatever died before has healed, and is held against nobody."""
        self._deaths.clear()

    def _fails_too_often(self, peer: str, now: float) -> bool:
        """Count a failure; true when one worker keeps dying and no token came in between."""
        deaths = self._deaths.setdefault(peer, deque())
        deaths.append(now)
        while now - deaths[0] > DEATH_WINDOW_S:
            deaths.popleft()
        return len(deaths) > MAX_DEATHS

    def _end_epoch(self) -> list[Action]:
        self._awaiting.clear()
        if not self._epoch_open:
            return []
        self._epoch_open = False
        return [Suspend()]

    def _connect_everyone(self) -> list[Action]:
        """When nobody is missing, tell all whom to dial; their answers open the epoch."""
        missing = [m for m in self._members.values() if m.started is None]
        # A missing expert holds back only the first epoch: later its tokens wait in the dispatcher.
        if any(self._epoch == 0 or m.spec.role is not Role.EXPERT for m in missing):
            return []
        if self.caches is None:
            loaded = {p: m.started for p, m in self._members.items() if m.started is not None}
            try:
                self.caches = plan_caches(self._spec, loaded)
            except ValueError as error:
                return self._give_up(str(error))
        self._round += 1
        dialers = self._live(Role.ENGINE, Role.STAGE)
        self._awaiting = set(dialers)
        return self._publish() + [
            Tell(
                peer,
                Control(
                    coming_epoch=self._epoch + 1,
                    limits=self.caches.limits,
                    connect=tuple(self._targets(self._members[peer].spec)),
                    ack=self._round,
                ),
            )
            for peer in dialers
        ]

    def _targets(self, spec: WorkerSpec) -> Iterator[PeerAddress]:
        """Whom a worker dials. Expert workers are dialled from the routing table."""
        last = len(self._spec.stage_layers) - 1
        names: list[str] = []
        if spec.role is Role.ENGINE and self._spec.executor == "pipeline":
            names = [f"{Role.STAGE}-0"]
        elif spec.role is Role.STAGE:
            names = [f"{Role.STAGE}-{spec.index + 1}" if spec.index < last else f"{Role.ENGINE}-0"]
            if self._spec.num_expert_shards:
                names.append(f"{Role.DISPATCHER}-0")
        for name in names:
            started = self._members[name].started
            assert started is not None
            yield PeerAddress(peer=name, address=started.address)

    def _publish(self) -> list[Action]:
        if self._placement is None:
            return []
        self.table_version += 1
        addresses = tuple(
            ShardAddress(
                shard=m.spec.index, incarnation=m.spec.incarnation, address=m.started.address
            )
            for m in self._members.values()
            if m.spec.role is Role.EXPERT and m.started is not None
        )
        table = RoutingTable(
            version=self.table_version, placement=self._placement, addresses=addresses
        )
        return [Tell(peer, Control(table=table)) for peer in self._live(Role.DISPATCHER)]

    def _refresh_state(self) -> None:
        if self._epoch == 0:
            return
        everyone = all(m.started is not None for m in self._members.values())
        held = self._placement is None or all(
            any(self._members[f"{Role.EXPERT}-{s}"].started for s in holders)
            for holders in self._placement.shards
        )
        # With a copy of every expert alive nothing is being held back: still ready.
        core = all(
            m.started is not None for m in self._members.values() if m.spec.role is not Role.EXPERT
        )
        ready = everyone or (core and held)
        self.state = GroupState.READY if ready and self._epoch_open else GroupState.RECOVERING

    def _status(self, member: _Member) -> WorkerStatus:
        spec, started = member.spec, member.started
        is_stage = spec.role is Role.STAGE
        is_expert = spec.role is Role.EXPERT and self._placement is not None
        return WorkerStatus(
            role=str(spec.role),
            index=spec.index,
            pid=started.pid if started else 0,
            node_id=started.node_id if started else "",
            state="alive" if started else "starting",
            incarnation=spec.incarnation,
            experts=self._placement.held_by(spec.index) if is_expert and self._placement else (),
            layers=self._spec.stage_layers[spec.index] if is_stage else None,
        )
