"""Pauses between respawns, and how long requests wait."""

from __future__ import annotations

from itertools import pairwise

from shards.client import GroupState
from shards.control import Started
from shards.member import MAX_FAILURES, STABLE_S, Member, respawn_pause_s
from shards.patience import Patience
from shards.spec import Role, WorkerSpec
from tests.shards.test_supervisor import World, group_spec

READY, RECOVERING = GroupState.READY, GroupState.RECOVERING


def test_pauses_begin_late_and_double_up_to_a_bound() -> None:
    pauses = [respawn_pause_s(n) for n in range(1, 100)]
    assert pauses[:5] == [0.0, 0.0, 0.5, 1.0, 2.0]
    assert all(a <= b <= max(0.5, 2 * a) for a, b in pairwise(pauses))
    assert max(pauses) == pauses[-1] == 30.0


def test_only_deaths_in_a_row_count() -> None:
    member = Member(WorkerSpec(group=group_spec(), role=Role.STAGE, index=0))
    started = Started(address="a", pid=1, node_id="n")
    now = 0.0
    for life, failures in ((1.0, 1), (STABLE_S - 1, 2), (STABLE_S, 1), (0.0, 2)):
        member.rise(started, now, 1)
        member.fall("died", now + life)
        now += life
        assert member.failures == failures
    assert member.deaths == member.spec.incarnation == 4
    member.fall("died while loading", now)
    assert member.failures == 3
    assert member.spawn_at == now + 0.5


def test_a_worker_that_keeps_dying_backs_off_and_is_named() -> None:
    world = World(group_spec())
    world.settle()
    began = world.now
    for failures in range(1, MAX_FAILURES + 1):
        world.die("stage-0", world.now)
        assert world.supervisor.due == (
            world.now + respawn_pause_s(failures) if failures > 2 else None
        )
        trouble = world.supervisor.trouble(world.now, None)
        assert trouble is not None
        assert (trouble.worker, trouble.reason) == ("stage-0", "killed")
        assert trouble.deaths_in_a_row == failures
        assert trouble.respawn_in_s == respawn_pause_s(failures)
        status = next(w for w in world.supervisor.workers() if w.role == "stage" and w.index == 0)
        assert status.state == ("backing off" if failures > 2 else "starting")
        assert status.deaths == failures
        assert not world.gave_up
        world.settle()
        assert world.supervisor.trouble(world.now, None) is None
    assert world.now - began >= sum(map(respawn_pause_s, range(1, MAX_FAILURES + 1)))
    world.die("stage-0", world.now)
    assert world.gave_up == "stage-0: killed"


def test_waiting_is_over_once_and_begins_anew_when_ready() -> None:
    patience = Patience(10.0)
    assert patience.due is None
    for now, state, over in (
        (0.0, READY, False),
        (5.0, RECOVERING, False),
        (14.9, RECOVERING, False),
        (15.0, RECOVERING, True),
        (16.0, RECOVERING, False),
        (17.0, READY, False),
        (18.0, RECOVERING, False),
        (27.9, RECOVERING, False),
        (28.0, RECOVERING, True),
    ):
        if patience.due is not None and state is RECOVERING:
            assert over is (now >= patience.due)
        assert patience.look(state, now) is over, now
        assert (patience.refusal(None) is not None) is (patience.over)
    refusal = patience.refusal(None)
    assert refusal is not None
    assert "10 s" in str(refusal)
    assert refusal.retry_after_s > 0
