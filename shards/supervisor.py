"""Who is alive, what to respawn, when a new epoch begins: the group's policy without I/O.

Death of an expert worker only changes the routing table. Death of anything else ends the epoch:
the dead are respawned, everyone is connected again, and the journal resumes every sequence.
"""

from __future__ import annotations

from collections.abc import Iterator

from router.placement import RoutingTable, ShardAddress
from shards.actions import Action, BeginEpoch, Dial, Discard, GiveUp, Mourn, Spawn, Suspend, Tell
from shards.cache_budget import CachePlan, plan_caches
from shards.client import GroupState, Trouble, WorkerStatus
from shards.control import Control, PeerAddress, Started
from shards.lost_steps import LostSteps
from shards.member import MAX_FAILURES, PROVEN_S, Member
from shards.relinks import Relinks
from shards.spec import GroupSpec, Role, WorkerSpec, worker_specs
from shards.wiring import dialled_by


class Supervisor:
    """Events in, actions out."""

    def __init__(self, spec: GroupSpec) -> None:
        self._spec = spec
        self._placement = spec.placement
        self._members = {s.peer: Member(s) for s in worker_specs(spec)}
        self._lost_steps = LostSteps()
        self._relinks = Relinks()
        self._epoch = 0
        self._epoch_open = False
        self._epoch_judged = True
        self._caches_lost = True
        self._is_warm = spec.warm_up is None
        self._round = 0
        self._awaiting: set[str] = set()
        # Numbers of events: the last after which all were alive, the last death that blames.
        self._num_events = self._whole_no = self._blamed_no = 0
        self.table_version = 0
        self.caches: CachePlan | None = None
        """Decided when everyone has loaded for the first time, and never again."""
        self.state = GroupState.STARTING

    def start(self) -> list[Action]:
        """Spawn everyone."""
        return [Spawn(m.spec) for m in self._members.values()]

    def on_started(self, spec: WorkerSpec, started: Started, now: float) -> list[Action]:
        """A worker listens; when it was the last one missing, connect all and begin an epoch."""
        member = self._members[spec.peer]
        if self._is_over or member.spec != spec:
            return []
        self._num_events += 1
        member.rise(started, now, self._num_events)
        if all(m.started is not None for m in self._members.values()):
            self._whole_no = self._num_events
        actions: list[Action] = [Dial(spec, started.address)]
        if not self._epoch_open:
            actions += self._connect_everyone()
        elif spec.role is Role.EXPERT:
            actions += self._publish()
        self._refresh_state()
        return actions

    def on_ack(self, peer: str, ack: int) -> list[Action]:
        """A worker has dialled its peers; the epoch begins when all have."""
        if self._is_over or ack != self._round or peer not in self._awaiting:
            return []
        self._awaiting.discard(peer)
        return [] if self._awaiting else self._open_epoch()

    def _open_epoch(self) -> list[Action]:
        self._epoch += 1
        self._epoch_open, self._epoch_judged = True, False
        self._refresh_state()
        begin = Control(epoch=self._epoch, keep_cache=not self._caches_lost)
        self._caches_lost = False
        return [Tell(f"{Role.ENGINE}-0", begin), BeginEpoch(self._epoch)]

    def on_step_lost(self, epoch: int, now: float) -> list[Action]:
        """A step was dropped on a broken connection: end the epoch even if nobody died.

        The epoch may be the coming one, whose connections are just being made.
        """
        if self._is_over or epoch != (self._epoch if self._epoch_open else self._epoch + 1):
            return []
        if self._lost_steps.add(now):
            return self._give_up("steps keep being lost although every worker is alive")
        actions = self._end_epoch() + self.on_time(now)
        self._refresh_state()
        return actions

    def on_link_lost(self, peer: str, now: float) -> None:
        """Somebody's connection to an expert worker broke: if it lives, a new table mends it."""
        member = self._members.get(peer)
        if member is not None and member.started is not None and member.spec.role is Role.EXPERT:
            self._relinks.on_broken(now)

    def new_epoch(self) -> list[Action]:
        """End this epoch, in which nobody died, and begin another."""
        if self._is_over:
            return []
        self._epoch_judged = True
        actions = self._end_epoch() + self._connect_everyone()
        self._refresh_state()
        return actions

    def on_warm(self) -> list[Action]:
        """The warm-up is over: a new epoch forgets it, and the group is ready.

        All connections are those of the one before, in which nothing is under way any more.
        """
        self._is_warm = self._caches_lost = True
        actions = [*self._end_epoch(), *self._open_epoch()] if self._epoch_open else []
        self._refresh_state()
        return actions

    def on_died(
        self, spec: WorkerSpec, reason: str, now: float, fatal: bool = False
    ) -> list[Action]:
        """A worker's process is gone. `fatal` deaths (bad weights at start-up) are not retried."""
        member = self._members[spec.peer]
        if self._is_over or member.spec != spec:
            return []
        self._lost_steps.clear()  # they are explained
        actions = [self._bury(member, reason, now)]
        if (member.failures > MAX_FAILURES or fatal) and not self._is_spared(member):
            return actions + self._give_up(f"{spec.peer}: {reason}")
        self._caches_lost |= spec.role in (Role.ENGINE, Role.STAGE)
        if spec.role is not Role.EXPERT:
            self._epoch_judged = True
            actions += self._end_epoch()
        elif self._epoch_open:
            actions += self._publish()
        actions += self.on_time(now)
        self._refresh_state()
        return actions

    def _bury(self, member: Member, reason: str, now: float) -> Action:
        """Take note of a death.

        Of several workers that one event took, only the first may have died of what was running:
        who dies next must have started since, unless everyone was alive in between.
        """
        spec = member.spec
        # That a step was lost is often heard before the death that lost it: the epoch has ended
        # by then, and this death is still the one to judge what ran in it.
        runs = not self._epoch_judged and member.started is not None
        blames = runs and max(member.start_no, self._whole_no) > self._blamed_no
        if blames:
            self._num_events += 1
            self._blamed_no = self._num_events
        member.fall(reason, now)
        return Mourn(spec, reason, member.failures, blames, ends_epoch=spec.role is not Role.EXPERT)

    @property
    def due(self) -> float | None:
        """When `on_time` has something to do."""
        turns = [m.spawn_at for m in self._members.values() if m.spawn_at is not None]
        waits = (self._relinks.due, self._lost_steps.due)
        return min([*turns, *(due for due in waits if due is not None)], default=None)

    def on_time(self, now: float) -> list[Action]:
        """Start the successors whose turn has come; have connections made again."""
        if self._is_over:
            return []
        relinks = self._publish() if self._relinks.take(now) else []
        if self._lost_steps.take(now) and not self._epoch_open:
            relinks = self._connect_everyone()
        turn = [m for m in self._members.values() if m.spawn_at is not None and m.spawn_at <= now]
        for member in turn:
            member.spawn_at = None
        return [*relinks, *(Spawn(member.spec) for member in turn)]

    def on_connection_lost(self, peer: str, now: float) -> list[Action]:
        """The ingress's own connection broke: the worker is dying, or as good as dead."""
        member = self._members.get(peer)
        if member is None or member.started is None:
            return []
        return self.on_hung(member.spec, "connection lost", now)

    def on_hung(self, spec: WorkerSpec, reason: str, now: float) -> list[Action]:
        """This incarnation is to be treated as dead, and made so."""
        actions = self.on_died(spec, reason, now)
        return [Discard(spec), *actions] if actions else []

    def stop(self) -> list[Action]:
        """Tell every live worker to end."""
        self.state = GroupState.STOPPED
        return self._end_workers()

    def workers(self) -> tuple[WorkerStatus, ...]:
        """The actor map."""
        return tuple(self._status(m) for m in self._members.values())

    def trouble(self, now: float, since: float | None) -> Trouble | None:
        """Of the workers that are missed, who died most often, if any did."""
        if self.state is GroupState.READY:
            return None
        missing = [m for m in self._members.values() if m.started is None and m.deaths]
        worst = max(missing, key=lambda member: member.failures, default=None)
        return None if worst is None else worst.trouble(now, now if since is None else since)

    @property
    def _is_over(self) -> bool:
        return self.state in (GroupState.FAILED, GroupState.STOPPED)

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

    def on_progress(self, now: float) -> None:
        """Tokens were accepted: whoever is needed for them has healed; deaths are forgiven."""
        self._lost_steps.clear()
        for member in self._members.values():
            # Tokens come without an expert that has a copy: they prove nothing for it.
            proven_s = PROVEN_S if member.spec.role is Role.EXPERT else 0.0
            if member.started is not None and now - member.started_at >= proven_s:
                member.failures = 0

    def forgive(self) -> None:
        """The deaths so far were a request's fault."""
        for member in self._members.values():
            member.failures = 0

    def _is_spared(self, member: Member) -> bool:
        """Whether the group works without it: others hold all of its experts, and are alive."""
        if self._epoch == 0 or member.spec.role is not Role.EXPERT or self._placement is None:
            return False
        # The member itself has just fallen.
        live, own = set(self._live(Role.EXPERT)), self._placement.held_by(member.spec.index)
        holders = self._placement.shards
        return all(any(f"{Role.EXPERT}-{s}" in live for s in holders[e]) for e in own)

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
        """Whom a worker dials, where they are now."""
        for peer in dialled_by(spec):
            started = self._members[peer].started
            assert started is not None
            yield PeerAddress(peer=peer, address=started.address)

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
        # Calls of an epoch that is over must not be sent to those who are new in the table.
        coming = 0 if self._epoch_open else self._epoch + 1
        control = Control(coming_epoch=coming, table=table)
        return [Tell(peer, control) for peer in self._live(Role.DISPATCHER)]

    def _refresh_state(self) -> None:
        if self._epoch == 0 or self._is_over or not self._is_warm:
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

    def _status(self, member: Member) -> WorkerStatus:
        role, index = member.spec.role, member.spec.index
        placement = self._placement if role is Role.EXPERT else None
        layers = self._spec.stage_layers[index] if role is Role.STAGE else None
        return member.status(placement.held_by(index) if placement else (), layers)
