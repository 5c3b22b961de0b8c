"""The healing policy, checked against what a group must satisfy after any storm of deaths."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from router.engine import EngineLimits
from router.placement import place_experts
from shards.actions import Action, BeginEpoch, Dial, GiveUp, Mourn, Spawn, Suspend, Tell
from shards.client import GroupState
from shards.control import Started
from shards.member import MAX_FAILURES, PROVEN_S
from shards.relinks import RELINK_S
from shards.spec import CacheCost, GroupSpec, WorkerSpec, worker_specs
from shards.supervisor import Supervisor

LIMITS = EngineLimits(
    block_size=16,
    num_blocks=8,
    num_state_slots=0,
    max_num_seqs=4,
    max_num_batched_tokens=64,
    max_model_len=64,
)


def group_spec(
    stages: int = 2, experts: int = 2, replicas: int = 1, *, measured: bool = False
) -> GroupSpec:
    return GroupSpec(
        model_path="/nowhere",
        dtype="float32",
        executor="pipeline",
        dispatch="actor",
        stage_layers=tuple((i, i + 1) for i in range(stages)),
        placement=place_experts(16, experts, replicas),
        limits=LIMITS,
        threads=1,
        secret="s",
        cache_costs=tuple(CacheCost(block_bytes=1024, state_bytes=0) for _ in range(stages))
        if measured
        else (),
    )


CACHES = ("engine", "stage")
"""Workers with whom what is cached is lost."""


class World:
    """Carries the supervisor's actions out: processes, connections, tables and epochs."""

    def __init__(self, spec: GroupSpec) -> None:
        self.supervisor = Supervisor(spec)
        self.starting: dict[str, WorkerSpec] = {}
        self.alive: dict[str, str] = {}
        self.specs: dict[str, WorkerSpec] = {}
        self.acks: list[tuple[str, int]] = []
        self.dialled: dict[tuple[str, str], str] = {}
        self.epochs: list[int] = []
        self.open = False
        self.engine_epoch = 0
        self.memory: dict[str, str] = {}
        self.tables: dict[str, int] = {}
        self.limits: dict[str, EngineLimits] = {}
        self.decided: EngineLimits | None = None
        self.free = 1 << 20
        self.gave_up = ""
        self.now = 0.0
        self.deaths: list[Mourn] = []
        self.do(self.supervisor.start())

    def do(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Spawn(spec):
                    assert spec.peer not in self.starting
                    assert spec.peer not in self.alive
                    self.starting[spec.peer] = spec
                case Dial(spec, address):
                    assert self.alive.get(spec.peer) == address
                case Tell(peer, control):
                    if peer not in self.alive:
                        continue
                    if control.shutdown:
                        del self.alive[peer]
                    if control.limits is not None:
                        self.limits[peer] = control.limits
                    for target in control.connect:
                        self.dialled[peer, target.peer] = target.address
                    if control.table is not None:
                        self.tables[peer] = control.table.version
                    if control.epoch is not None:
                        self.engine_epoch = control.epoch
                        memory = {p: self.alive[p] for p in self.alive if p.startswith(CACHES)}
                        assert control.keep_cache == (memory == self.memory)
                        self.memory = memory
                    if control.ack is not None:
                        self.acks.append((peer, control.ack))
                case Suspend():
                    assert self.open
                    self.open = False
                case BeginEpoch(epoch):
                    assert not self.open
                    assert self.engine_epoch == epoch
                    self.open = True
                    self.epochs.append(epoch)
                    self.check_connections()
                    self.check_limits()
                case Mourn():
                    self.deaths.append(action)
                case GiveUp(reason):
                    self.gave_up = reason

    def check_connections(self) -> None:
        """Whoever dials somebody in the data path has dialled the incarnation that lives now."""
        for spec in worker_specs(self.supervisor._spec):
            if spec.role in ("engine", "stage"):
                dialled = {t: a for (p, t), a in self.dialled.items() if p == spec.peer}
                assert dialled, spec.peer
                for target, address in dialled.items():
                    assert self.alive.get(target) == address, (spec.peer, target)

    def check_limits(self) -> None:
        """Engine and stages that live know the same limits, and they are those of all epochs."""
        core = [peer for peer in self.alive if peer.startswith(("engine", "stage"))]
        self.decided = self.decided or self.limits["engine-0"]
        assert [self.limits.get(peer) for peer in core] == [self.decided] * len(core)

    def come_up(self, peer: str) -> None:
        spec = self.starting.pop(peer)
        address = f"{peer}@{spec.incarnation}"
        self.alive[peer] = address
        self.specs[peer] = spec
        started = Started(address=address, pid=1, node_id="n", free_bytes=self.free)
        self.do(self.supervisor.on_started(spec, started, self.now))

    def die(self, peer: str, now: float, fatal: bool = False) -> None:
        self.now = max(self.now, now)
        spec = self.specs[peer]
        del self.alive[peer]
        for key in [k for k in self.dialled if k[0] == peer]:
            del self.dialled[key]
        self.acks = [(p, a) for p, a in self.acks if p != peer]
        self.limits.pop(peer, None)
        self.do(self.supervisor.on_died(spec, "killed", now, fatal))

    def ack(self) -> None:
        peer, ack = self.acks.pop(0)
        self.do(self.supervisor.on_ack(peer, ack))

    def settle(self) -> None:
        while self.starting or self.acks or self.supervisor.due is not None:
            if self.supervisor.due is not None:
                self.now = max(self.now, self.supervisor.due)
                self.do(self.supervisor.on_time(self.now))
            elif self.starting:
                self.come_up(next(iter(self.starting)))
            else:
                self.ack()


def test_first_epoch_waits_for_everyone_including_experts() -> None:
    world = World(group_spec())
    while len(world.starting) > 1:
        world.come_up(next(p for p in world.starting if p != "expert-1"))
    assert not world.acks
    assert world.supervisor.state is GroupState.STARTING
    world.settle()
    assert world.epochs == [1]
    assert world.supervisor.state is GroupState.READY


@pytest.mark.parametrize("victim", ["engine-0", "stage-0", "stage-1", "dispatcher-0"])
def test_death_of_the_core_ends_the_epoch_and_begins_the_next(victim: str) -> None:
    world = World(group_spec())
    world.settle()
    world.die(victim, 0.0)
    assert not world.open
    assert world.supervisor.state is GroupState.RECOVERING
    world.settle()
    assert world.epochs == [1, 2]
    assert world.supervisor.state is GroupState.READY


def test_death_of_an_expert_changes_the_table_and_not_the_epoch() -> None:
    world = World(group_spec(experts=2, replicas=2))
    world.settle()
    before = world.tables["dispatcher-0"]
    world.die("expert-0", 0.0)
    assert world.open
    assert world.tables["dispatcher-0"] == before + 1
    assert world.supervisor.state is GroupState.READY, "every expert still has a copy"
    world.settle()
    assert world.tables["dispatcher-0"] == before + 2
    assert world.epochs == [1]


def test_an_expert_without_a_copy_is_missed_but_holds_no_epoch_back() -> None:
    world = World(group_spec(experts=2, replicas=1))
    world.settle()
    world.die("expert-0", 0.0)
    assert world.open
    assert world.supervisor.state is GroupState.RECOVERING
    world.die("stage-0", 1.0)
    world.come_up("stage-0")
    while world.acks:
        world.ack()
    assert world.epochs == [1, 2]
    world.settle()
    assert world.supervisor.state is GroupState.READY


def test_fatal_and_repeated_deaths_give_up() -> None:
    world = World(group_spec())
    world.come_up("stage-0")
    world.die("stage-0", 0.0, fatal=True)
    assert world.gave_up.startswith("stage-0")
    assert world.supervisor.state is GroupState.FAILED
    world = World(group_spec())
    for _ in range(MAX_FAILURES + 1):
        world.settle()
        world.die("stage-0", 1.0)
    assert world.supervisor.state is GroupState.FAILED


def test_deaths_with_progress_in_between_are_always_healed() -> None:
    world = World(group_spec(experts=2, replicas=2))
    for turn in range(4 * MAX_FAILURES):
        world.settle()
        now = world.now + 2 * PROVEN_S * turn
        world.supervisor.on_progress(now)
        world.die(("stage-0", "expert-1", "engine-0")[turn % 3], now)
        assert world.supervisor.due is None, "nobody pauses"
    world.settle()
    assert world.supervisor.state is GroupState.READY


def test_an_expert_with_copies_may_die_for_ever_but_ever_more_slowly() -> None:
    """Tokens come without it: they prove nothing for it."""
    world = World(group_spec(experts=2, replicas=2))
    world.settle()
    now, deaths = 0.0, 0
    while now < 600.0:
        world.die("expert-1", now, fatal=deaths > 15)
        deaths += 1
        due = world.supervisor.due
        assert world.supervisor.state is GroupState.READY
        assert world.supervisor.trouble(now, None) is None
        now = now + 0.01 if due is None else due
        world.now = now
        world.do(world.supervisor.on_time(now))
        world.come_up("expert-1")
        world.supervisor.on_progress(now)
    assert deaths < 40
    assert not world.gave_up
    world.supervisor.on_progress(now + PROVEN_S)
    world.die("expert-1", now + PROVEN_S)
    assert world.supervisor.due is None, "it had lived, and was needed"
    # Without its copy it is like any other.
    for _ in range(MAX_FAILURES):
        world.settle()
        world.die("expert-0", now)
        if not world.gave_up:
            world.die("expert-1", now)
    assert world.gave_up


@pytest.mark.parametrize("ends", ["fails", "stops"])
def test_what_is_over_stays_over(ends: str) -> None:
    world = World(group_spec())
    world.settle()
    supervisor = world.supervisor
    if ends == "fails":
        world.die("stage-0", 1.0, fatal=True)
    else:
        world.do(supervisor.stop())
    state = supervisor.state
    assert state in (GroupState.FAILED, GroupState.STOPPED)
    assert supervisor.new_epoch() == []
    assert supervisor.on_step_lost(1, 2.0) == []
    assert supervisor.on_time(1e9) == []
    assert supervisor.on_ack("engine-0", 1) == []
    assert supervisor.state is state


def test_a_lost_step_without_a_death_begins_a_new_epoch() -> None:
    world = World(group_spec())
    world.settle()
    world.do(world.supervisor.on_step_lost(1, 0.0))
    assert not world.open
    world.settle()
    assert world.epochs == [1, 2]
    world.do(world.supervisor.on_step_lost(1, 0.0))
    assert world.open, "reports of an earlier epoch are stale"


def test_a_step_may_be_lost_before_its_epoch_has_begun() -> None:
    world = World(group_spec())
    world.settle()
    world.die("stage-0", 0.0)
    while world.starting:
        world.come_up(next(iter(world.starting)))
    world.ack()
    world.do(world.supervisor.on_step_lost(2, 0.0))
    assert len(world.acks) > 2, "everyone is told once more whom to dial"
    world.settle()
    assert world.epochs == [1, 2]
    assert world.supervisor.state is GroupState.READY


def test_a_broken_connection_to_a_living_expert_is_made_again() -> None:
    world = World(group_spec(experts=2, replicas=2))
    world.settle()
    before = world.tables["dispatcher-0"]
    world.supervisor.on_link_lost("stage-0", 1.0)
    assert world.supervisor.due is None, "only experts are dialled from tables"
    world.supervisor.on_link_lost("expert-1", 1.0)
    world.supervisor.on_link_lost("expert-0", 1.01)
    assert world.supervisor.due == 1.0 + RELINK_S
    world.do(world.supervisor.on_time(1.0))
    assert world.tables["dispatcher-0"] == before
    world.do(world.supervisor.on_time(1.0 + RELINK_S))
    assert world.tables["dispatcher-0"] == before + 1
    assert world.supervisor.due is None
    world.die("expert-1", 2.0)
    world.supervisor.on_link_lost("expert-1", 2.0)
    assert world.supervisor.due is None, "its successor comes with a table of its own"


def test_of_one_event_only_the_first_death_blames_what_was_running() -> None:
    world = World(group_spec(experts=3, replicas=2))
    world.settle()

    def blames(peer: str) -> bool:
        world.die(peer, world.now)
        return world.deaths[-1].blames

    assert blames("expert-0")
    assert not blames("expert-1"), "a node may have gone, and they with it"
    world.come_up("expert-0")
    assert blames("expert-0"), "it has started since"
    assert not blames("expert-2")
    world.settle()
    assert blames("expert-2"), "everyone was alive in between"
    world.settle()
    assert blames("stage-0")
    assert not blames("expert-0")
    world.come_up("stage-0")
    assert not blames("stage-0"), "nothing ran yet"


def test_a_death_is_blamed_though_its_lost_step_is_heard_first() -> None:
    world = World(group_spec())
    world.settle()

    def blames(peer: str) -> bool:
        world.die(peer, world.now)
        return world.deaths[-1].blames

    world.do(world.supervisor.on_step_lost(1, world.now))
    assert not world.open
    assert blames("stage-0"), "it may have died of that step"
    assert not blames("stage-1"), "of one event the first"
    world.settle()
    world.do(world.supervisor.on_step_lost(2, world.now))
    world.settle()
    assert world.epochs == [1, 2, 3]
    assert blames("stage-0"), "a new epoch runs"
    world.settle()
    world.do(world.supervisor.new_epoch())
    assert not blames("stage-0"), "the epoch had ended before, and not of a lost step"


def test_measured_caches_are_decided_once_by_whoever_saw_least() -> None:
    world = World(group_spec(measured=True))
    for peer, free in {"stage-0": 1 << 20, "expert-1": 20 << 10}.items():
        world.free = free
        world.come_up(peer)
    world.free = 1 << 20
    world.settle()
    # Half of 20 KiB for two stages of 1 KiB a block.
    assert world.decided == replace(LIMITS, num_blocks=5)
    world.die("stage-0", 0.0)
    world.free = 1 << 10
    world.settle()
    assert world.epochs == [1, 2], "and check_limits has seen the same limits"


def test_caches_that_hold_no_sequence_fail_the_group() -> None:
    world = World(group_spec(measured=True))
    world.free = 16 * 1024 - 1  # half of it for two stages with 4 blocks of 1 KiB each
    world.settle()
    assert world.supervisor.state is GroupState.FAILED
    assert not world.epochs
    for word in ("kv_cache_memory=auto", "node n", "16.0 KiB", "max_model_len=64", "8.0 KiB"):
        assert word in world.gave_up
    assert not world.alive, "workers that nobody needs are told to end"
    world = World(group_spec(measured=True))
    world.free = 16 * 1024
    world.settle()
    assert world.decided == replace(LIMITS, num_blocks=4)


@pytest.mark.parametrize("seed", range(60))
def test_any_storm_of_deaths_heals(seed: int) -> None:
    rng = random.Random(seed)
    measured = bool(seed % 2)
    world = World(group_spec(stages=3, experts=3, replicas=rng.choice([1, 2]), measured=measured))
    for now in range(200):
        world.free = rng.randrange(40 << 10, 1 << 20)
        choices = ["up"] * bool(world.starting) + ["ack"] * bool(world.acks)
        if world.alive and rng.random() < 0.1:
            # Far enough apart that the window never overflows.
            world.die(rng.choice(sorted(world.alive)), now * 100.0)
        elif rng.random() < 0.05:
            epoch = rng.choice([world.supervisor._epoch, world.supervisor._epoch + 1])
            world.do(world.supervisor.on_step_lost(epoch, now * 100.0))
        elif rng.random() < 0.05:
            world.supervisor.on_link_lost(f"expert-{rng.randrange(3)}", now * 100.0)
        elif world.supervisor.due is not None and rng.random() < 0.5:
            world.do(world.supervisor.on_time(now * 100.0))
        elif choices:
            if rng.choice(choices) == "up":
                world.come_up(rng.choice(sorted(world.starting)))
            else:
                world.ack()
        assert not world.gave_up
    world.settle()
    assert world.open
    assert world.decided is not None
    # At least 20 KiB for three stages of 1 KiB a block.
    assert world.decided.num_blocks >= 6 if measured else world.decided == LIMITS
    assert world.supervisor.state is GroupState.READY
    assert world.epochs == list(range(1, len(world.epochs) + 1))
    assert all(w.state == "alive" for w in world.supervisor.workers())


def test_a_recovery_is_counted_when_the_successor_has_loaded() -> None:
    world = World(group_spec())
    world.settle()
    before = {(w.role, w.index): (w.deaths, w.recoveries) for w in world.supervisor.workers()}
    assert set(before.values()) == {(0, 0)}
    world.die("expert-1", 1.0)
    expert = next(w for w in world.supervisor.workers() if (w.role, w.index) == ("expert", 1))
    assert (expert.deaths, expert.recoveries) == (1, 0)
    world.settle()
    after = {(w.role, w.index): (w.deaths, w.recoveries) for w in world.supervisor.workers()}
    assert after == before | {("expert", 1): (1, 1)}
