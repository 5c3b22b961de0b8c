"""The chaos suite's own accounts: a disturbed stream must be found whatever is wrong with it."""

from __future__ import annotations

import asyncio
import math
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import pytest

from benchmarks.faults.accounts import draw_up, table
from benchmarks.faults.dead_shard import DeadShard
from benchmarks.faults.gaps import calm_windows, gaps_around, longest_gap, statistics_of
from benchmarks.faults.injector import Happening
from benchmarks.faults.kinds import Fault, rotation, wire_rotation
from benchmarks.faults.leftovers import Belongings
from benchmarks.faults.load import Load, StreamRecord
from benchmarks.faults.requests import Request, arrival_times, draw_requests
from benchmarks.faults.verdicts import Verdict, judge
from router.step import FinishReason, SamplingParams, Token
from shards.client import GroupFailed
from tests.groups import answer_of

TOKENS = [
    Token(seq_id=1, position=i, token_id=7 + i, logprob=-0.5 * i, top_logprobs=((7 + i, -0.1),))
    for i in range(4)
]
TOKENS[3] = replace(TOKENS[3], finish=FinishReason.LENGTH)
RIGHT = answer_of(TOKENS)


def _with(index: int, **changes: object) -> list[Token]:
    tokens = list(TOKENS)
    tokens[index] = replace(tokens[index], **changes)
    return tokens


@pytest.mark.parametrize(
    ("got", "error", "verdict"),
    [
        (TOKENS, "", Verdict.RIGHT),
        (_with(2, token_id=99), "", Verdict.CHANGED),
        (_with(2, logprob=math.nextafter(-1.0, 0.0)), "", Verdict.CHANGED),
        (_with(0, top_logprobs=((8, -0.1),)), "", Verdict.CHANGED),
        (_with(3, finish=FinishReason.STOP), "", Verdict.CHANGED),
        ([*TOKENS, TOKENS[3]], "", Verdict.CHANGED),
        ([TOKENS[0], TOKENS[0], *TOKENS[1:]], "", Verdict.CHANGED),
        ([TOKENS[0], *TOKENS[2:]], "", Verdict.CHANGED),
        (TOKENS[:3], "", Verdict.TRUNCATED),
        ([], "", Verdict.TRUNCATED),
        (TOKENS[:2], "GroupFailed: gone", Verdict.FAILED),
        (_with(0, token_id=99)[:2], "GroupFailed: gone", Verdict.CHANGED),
    ],
)
def test_a_stream_is_judged(got: list[Token], error: str, verdict: Verdict) -> None:
    assert judge(RIGHT, answer_of(got), error).verdict is verdict


@dataclass
class _Played:
    """A stream that plays what it was given; None waits for ever."""

    items: Sequence[Token | Exception | None]

    async def __aiter__(self) -> AsyncIterator[Token]:
        for item in self.items:
            await asyncio.sleep(0)
            if item is None:
                await asyncio.Event().wait()
            elif isinstance(item, Exception):
                raise item
            else:
                yield item

    def abort(self) -> None:
        """Nothing goes on."""


class _PlayedGroup:
    """Answers the i-th request with the i-th play."""

    def __init__(self, plays: Sequence[Sequence[Token | Exception | None]]) -> None:
        self._plays = iter(plays)

    def generate(self, prompt: tuple[int, ...], sampling: SamplingParams) -> _Played:
        return _Played(next(self._plays))


async def test_a_load_counts_every_way_to_go_wrong() -> None:
    plays: list[Sequence[Token | Exception | None]] = [
        TOKENS,
        _with(1, token_id=3),
        TOKENS[:2],
        [TOKENS[0], GroupFailed("gone")],
        [*TOKENS[:3], None],
        TOKENS,
    ]
    requests = [Request((5, 6), SamplingParams(max_tokens=4))] * 2
    load = Load(_PlayedGroup(plays), requests)  # type: ignore[arg-type]
    await asyncio.wait_for(load.run([0.0] * len(plays), patience=0.3), 10)
    account = draw_up("played", load.records, [RIGHT, RIGHT], [], (0.0, 1.0), 0)
    assert account.verdicts == {"right": 2, "failed": 1, "truncated": 2, "changed": 1}
    assert not account.is_clean
    assert "stream 1 (request 1): changed: position 1" in table(account)
    right = [r for r in load.records if r.judge(RIGHT).verdict is Verdict.RIGHT]
    assert draw_up("played", right, [RIGHT, RIGHT], [], (0.0, 1.0), 0).is_clean


def test_a_fault_that_is_not_healed_is_not_clean() -> None:
    happenings = [Happening(Fault("kill", "stage", 0), 5.0, pid=1)]
    account = draw_up("unhealed", [], [], happenings, (0.0, 4.0), 0)
    assert account.rows[0].unhealed == 1
    assert not account.is_clean


def test_the_longest_gap_is_the_one_that_overlaps() -> None:
    times = [0.0, 1.0, 1.1, 1.2, 4.0, 4.1]
    assert longest_gap(times, (1.15, 1.18)) == pytest.approx(0.1)
    assert longest_gap(times, (1.15, 1.3)) == pytest.approx(2.8)
    assert longest_gap(times, (0.5, 4.05)) == pytest.approx(2.8)
    assert longest_gap(times, (4.2, 5.0)) is None, "it had ended"
    assert longest_gap(times, (-2.0, -1.0)) is None, "it had not begun"
    assert longest_gap([3.0], (2.0, 4.0)) is None


def test_what_is_added_is_against_windows_of_the_same_length() -> None:
    """Ten steady streams, one of which stops for a second when something dies."""
    steady = [0.01 * i for i in range(1000)]
    paused = [t + (t >= 7.0) for t in steady]
    records = [StreamRecord(0, 0.0, times=steady) for _ in range(9)]
    records.append(StreamRecord(0, 0.0, times=paused))
    happenings = [Happening(Fault("kill", "expert", 1), 6.995, pid=1, whole_at=7.5)]
    account = draw_up("paused", records, [RIGHT], happenings, (0.0, 6.0), 0)
    (row,) = account.rows
    assert (row.label, row.count, row.unhealed) == ("kill expert", 1, 0)
    assert row.recovery_most == pytest.approx(0.505)
    assert row.gap.count == 10
    assert row.added.p50 == pytest.approx(0.0, abs=1e-6)
    assert row.added.p99 == row.added.most == pytest.approx(1000.0)
    assert account.calm_gap.most == pytest.approx(10.0)


def test_calm_windows_stay_in_the_calm() -> None:
    windows = calm_windows((10.0, 14.0), [1.0, 9.0], seed=3)
    assert len(windows) == 16
    assert all(start >= 10.0 and end <= 14.0 + 1e-9 for start, end in windows)
    assert statistics_of(gaps_around([], windows)).count == 0


def test_every_kind_of_actor_is_met_in_each_round() -> None:
    workers = [("engine", 0), ("stage", 0), ("stage", 1), ("expert", 0), ("expert", 1)]
    faults = rotation(("kill", "stop"), workers, seed=5)
    rounds = [list(islice(faults, 6)) for _ in range(2)]
    for faults_of_round in rounds:
        labels = {f.label for f in faults_of_round}
        assert labels == {
            f"{k} {r}" for k in ("kill", "stop") for r in ("engine", "stage", "expert")
        }
    assert {f.index for f in rounds[0] if f.role == "stage"} == {0}
    assert {f.index for f in rounds[1] if f.role == "stage"} == {1}
    again = rotation(("kill", "stop"), workers, seed=5)
    assert rounds[0] == list(islice(again, 6))


def test_every_pair_of_roles_is_met_in_each_round() -> None:
    links = [("stage-0", "stage-1"), ("dispatcher-0", "expert-0"), ("dispatcher-0", "expert-1")]
    faults = list(islice(wire_rotation(("reset", "cut"), links, seed=1), 8))
    assert {str(f) for f in faults[:4]} == {
        f"{kind} {link}"
        for kind in ("reset", "cut")
        for link in ("stage to stage-1", "dispatcher to expert-0")
    }
    assert "reset dispatcher to expert-1" in {str(f) for f in faults[4:]}


def test_the_load_is_the_seeds() -> None:
    assert draw_requests(1, 50) == draw_requests(1, 50)
    assert draw_requests(1, 50) != draw_requests(2, 50)
    requests = draw_requests(1, 400)
    assert {r.sampling.temperature == 0.0 for r in requests} == {True, False}
    assert len(set(requests)) == 400
    times = arrival_times(4, 4000, rate=20.0)
    assert times == sorted(times)
    assert times[-1] == pytest.approx(200, rel=0.1)


def test_the_share_that_may_be_lost() -> None:
    shard = DeadShard(whole=1000.0, dead=740.0, num_shards=4)
    assert shard.loss == pytest.approx(0.26)
    assert shard.loss <= shard.allowed < 0.2701


def test_what_is_left_behind_is_found() -> None:
    before = os.environ.copy()
    try:
        belongings = Belongings()
        code = "print(flush=True); input()"
        pipe = subprocess.PIPE
        child = subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe)
        assert child.stdout is not None
        assert child.stdout.readline(), "only a program that runs has its environment"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(f"\0conclave-left-{os.getpid()}")
        listener.listen()
        address = f"unix:@conclave-left-{os.getpid()}"
        left = belongings.left([address, "unix:@conclave-never", "tcp:127.0.0.1:1"])
        assert [line.split(":")[0] for line in left] == [f"process {child.pid}", "socket unix"]
        child.communicate()
        listener.close()
        assert belongings.left([address]) == []
    finally:
        os.environ.clear()
        os.environ.update(before)
