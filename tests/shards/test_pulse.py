"""Verdicts about silent workers, against a simulated world whose truth the test knows."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.pulse import BEATS_PER_DEADLINE, Beat, PulseJudge
from shards.spec import Deadlines

HANG_S, STEP_S = 1.0, 20.0
LOOK_S = 0.025
DEADLINES = Deadlines(hang_s=HANG_S, step_s=STEP_S)


def nobody(peer: str) -> bool:
    return False


def look(
    judge: PulseJudge,
    now: float,
    beats: list[tuple[str, Beat]],
    at_work: Callable[[str], bool] = nobody,
) -> dict[str, str]:
    """One look of the watch: all that has come, then the verdicts."""
    for peer, beat in beats:
        judge.on_beat(peer, beat, now)
    return judge.verdicts(now, at_work)


class Worker:
    """Beats at its own phase until it stops; `turns` says how its data loop gets on."""

    def __init__(self, rng: random.Random, stops_at: float, stuck_from: float) -> None:
        self.stops_at = stops_at
        self._stuck_from = stuck_from
        self._interval = HANG_S / BEATS_PER_DEADLINE
        self._next = rng.random() * self._interval

    def beats_until(self, now: float) -> list[Beat]:
        beats = []
        while self._next <= min(now, self.stops_at):
            beats.append(Beat(turns=int(min(self._next, self._stuck_from) * 100)))
            self._next += self._interval
        return beats


@pytest.mark.parametrize("seed", range(30))
def test_only_who_stops_or_is_stuck_is_given_up_and_soon(seed: int) -> None:
    rng = random.Random(seed)
    workers = {
        f"w{i}": Worker(
            rng,
            stops_at=rng.choice([rng.uniform(1, 30), 1e9]),
            stuck_from=rng.choice([rng.uniform(0, 10), 1e9]),
        )
        for i in range(5)
    }
    judge = PulseJudge(DEADLINES)
    for peer in workers:
        judge.watch(peer, 0.0)
    now, found = 0.0, {}
    while now < 40:
        now += LOOK_S
        for peer, reason in look(
            judge, now, [(p, b) for p, w in workers.items() for b in w.beats_until(now)]
        ).items():
            assert peer not in found
            found[peer] = (now, reason)
    for peer, worker in workers.items():
        due = min(worker.stops_at + HANG_S, worker._stuck_from + STEP_S)
        if due > 39:
            assert peer not in found
            continue
        at, reason = found[peer]
        # A stop is known of from the last beat on, which may have been a whole interval before;
        # the last turn, from the next beat on.
        interval = HANG_S / BEATS_PER_DEADLINE
        silent = worker.stops_at + HANG_S < worker._stuck_from + STEP_S
        late = 2 * LOOK_S + (0 if silent else interval)
        assert due - interval - LOOK_S <= at <= due + late, reason
        assert ("no sign of life" in reason) is silent


@given(
    pauses=st.lists(st.floats(0.001, 30.0), min_size=1, max_size=60),
    late=st.lists(st.booleans(), min_size=60, max_size=60),
)
def test_pauses_of_the_judge_are_held_against_nobody(pauses: list[float], late: list[bool]) -> None:
    """However long it does not look: who is heard at every second look is never given up."""
    judge = PulseJudge(DEADLINES)
    judge.watch("w", 0.0)
    now, silent_looks = 0.0, 0
    for turn, (pause, is_late) in enumerate(zip(pauses, late, strict=False)):
        now += pause
        silent_looks = silent_looks + 1 if is_late and silent_looks < 1 else 0
        beats = [] if silent_looks else [("w", Beat(turns=turn))]
        assert not look(judge, now, beats)


def test_a_machine_that_slept_judges_by_what_comes_after() -> None:
    judge = PulseJudge(DEADLINES)
    judge.watch("w", 0.0)
    assert not look(judge, 0.1, [("w", Beat(turns=1))])
    now = 1000.0
    for _ in range(int(0.8 * HANG_S / LOOK_S)):
        assert not look(judge, now, [])
        now += LOOK_S
    assert not look(judge, now, [("w", Beat(turns=2))])
    for _ in range(int(HANG_S / LOOK_S) + 1):
        now += LOOK_S
        found = look(judge, now, [])
    assert "w" in found


def test_who_is_at_work_has_until_the_step_deadline() -> None:
    judge = PulseJudge(DEADLINES)
    judge.watch("w", 0.0)
    now = 0.0
    while now < STEP_S - 2 * LOOK_S:
        now += LOOK_S
        assert not look(judge, now, [], at_work=lambda peer: True)
    found = [look(judge, now + i * LOOK_S, [], at_work=lambda peer: True) for i in range(1, 5)]
    assert [list(each) for each in found].count(["w"]) == 1


def test_forgotten_and_unknown_workers_are_not_judged() -> None:
    judge = PulseJudge(DEADLINES)
    judge.watch("a", 0.0)
    judge.watch("b", 0.0)
    judge.forget("a")
    judge.forget("nobody")
    gone: list[str] = []
    for i in range(200):
        gone += look(judge, i * LOOK_S, [("c", Beat(turns=i))])
    assert gone == ["b"]
    judge.watch("b", 5.0)
    assert not look(judge, 5.5, [])
