"""Lost steps: tried again at once, then after pauses, and not for ever."""

from __future__ import annotations

from shards.load_bound import LoadBound
from shards.lost_steps import LOST_STEPS_WINDOW_S, MAX_LOST_STEPS, LostSteps
from shards.spec import Role, WorkerSpec
from tests.shards.test_supervisor import World, group_spec


def test_pauses_double_and_count_within_a_window() -> None:
    lost, now, pauses = LostSteps(), 0.0, []
    for _ in range(MAX_LOST_STEPS):
        assert not lost.add(now)
        assert lost.due is not None
        pauses.append(lost.due - now)
        assert not lost.take(lost.due - 0.001) or pauses[-1] == 0
        now = lost.due
        lost.take(now)
        assert lost.due is None
    assert pauses == [0.0, 0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0]
    assert lost.add(now)
    assert not lost.add(now + LOST_STEPS_WINDOW_S + 1), "they are forgotten"
    lost.clear()
    assert lost.due is not None, "whatever explains them, everyone must be connected again"
    assert not lost.add(now + LOST_STEPS_WINDOW_S + 2)


def test_a_link_that_refuses_for_a_moment_is_outlived() -> None:
    world = World(group_spec())
    world.settle()
    supervisor, now, tries = world.supervisor, 0.0, 0
    while now < 10.0 and not world.gave_up:
        tries += 1
        world.do(supervisor.on_step_lost(supervisor._epoch + (not world.open), now))
        while supervisor.due is not None:
            now = max(now, supervisor.due)
            world.do(supervisor.on_time(now))
        world.settle()
        now += 0.001
    assert not world.gave_up
    assert tries < 8
    assert world.open


def test_who_takes_too_long_to_load() -> None:
    bound = LoadBound(10.0)
    one, other = (WorkerSpec(group=group_spec(), role=Role.STAGE, index=i) for i in range(2))
    assert bound.due is None
    bound.begin(one, 1.0)
    bound.begin(other, 2.0)
    assert bound.due == 11.0
    assert bound.overdue(10.9) == []
    bound.end(one)
    assert bound.due == 12.0
    assert bound.overdue(12.0) == [other]
    assert bound.overdue(99.0) == []
    bound.end(other)
    assert bound.due is None
