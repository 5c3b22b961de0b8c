"""What a start took: parts that follow each other and add up."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shards.control import Started, StartTimes
from shards.spec import worker_specs
from shards.start_clock import StartClock
from shards.start_record import StartRecord
from tests.shards.test_supervisor import group_spec


def started(imports_s: float = 0.0, read_s: float = 0.0, init_s: float = 0.0) -> Started:
    times = StartTimes(imports_s=imports_s, read_s=read_s, init_s=init_s)
    return Started(address="a", pid=1, node_id="n", times=times, bytes_read=9)


def test_a_worker_times_its_own_parts() -> None:
    now = 100.0
    clock = StartClock(lambda: now)
    now = 102.0
    clock.imported()
    now = 105.0
    clock.read(2.5)
    now = 106.0
    assert clock.times == StartTimes(imports_s=2.0, read_s=2.5, init_s=1.5)


def test_what_workers_do_not_explain_is_placement() -> None:
    engine, stage = worker_specs(group_spec(stages=1, experts=1))[:2]
    record = StartRecord()
    record.on_spawn(engine, 10.0)
    record.on_spawn(stage, 10.5)
    record.on_started(engine, started(imports_s=1.0), 13.0)
    record.on_started(stage, started(imports_s=1.0, read_s=3.0, init_s=0.25), 17.0)
    record.on_epoch(17.5)
    record.on_token(17.75)
    start = record.start
    assert [worker.worker for worker in start.workers] == ["engine-0", "stage-0"]
    assert [worker.placement_s for worker in start.workers] == [2.0, 2.25]
    assert [worker.whole_s for worker in start.workers] == [3.0, 6.5]
    assert (start.load_s, start.connect_s, start.first_token_s) == (7.0, 0.5, 0.25)
    assert start.workers[1].num_bytes == 9


def test_later_epochs_and_respawned_workers_are_not_the_start() -> None:
    (engine, *_) = worker_specs(group_spec())
    record = StartRecord()
    record.on_spawn(engine, 1.0)
    record.on_started(engine, started(), 2.0)
    record.on_epoch(3.0)
    record.on_token(4.0)
    before = record.start
    successor = replace(engine, incarnation=1)
    record.on_spawn(successor, 50.0)
    record.on_started(successor, started(), 60.0)
    record.on_epoch(61.0)
    record.on_token(62.0)
    assert record.start == before


def test_who_dies_while_loading_counts_as_its_successor() -> None:
    (engine, *_) = worker_specs(group_spec())
    record = StartRecord()
    record.on_spawn(engine, 1.0)
    record.on_spawn(replace(engine, incarnation=1), 5.0)
    record.on_started(replace(engine, incarnation=1), started(read_s=1.0), 8.0)
    record.on_epoch(8.0)
    (worker,) = record.start.workers
    assert worker.placement_s == pytest.approx(2.0)
    assert record.start.load_s == pytest.approx(7.0)
