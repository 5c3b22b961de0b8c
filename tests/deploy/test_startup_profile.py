"""The table of a start: every part once, sums that add up, the same numbers as JSON."""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict

import msgspec
import pytest

from deploy.replica_start import ReplicaClock, ReplicaStart
from deploy.startup_profile import CommandClock, startup_json, startup_parts, startup_table
from shards.control import StartTimes
from shards.process_birth import age_s
from shards.start_record import GroupStart, WorkerStart

COMMAND = {"imports": 1.0, "checks": 2.0, "Ray": 4.0, "Serve": 3.0, "application": 20.0}
WORKERS = (
    WorkerStart(worker="engine-0", placement_s=1.0, times=StartTimes(imports_s=0.5), num_bytes=0),
    WorkerStart(
        worker="stage-0",
        placement_s=2.0,
        times=StartTimes(imports_s=1.5, read_s=2.25, init_s=0.25),
        num_bytes=12345,
    ),
)
GROUP = GroupStart(workers=WORKERS, load_s=6.0, connect_s=0.5, first_token_s=0.125)
REPLICA = ReplicaStart(
    replica_id="r", imports_s=2.5, kernels_s=1.0, tokenizer_s=0.25, group=GROUP, rest_s=0.5
)


def test_the_parts_add_up_to_the_whole() -> None:
    parts = startup_parts(COMMAND, REPLICA)
    assert sum(part.seconds for part in parts) == pytest.approx(sum(COMMAND.values()))
    taken = {(part.name, part.where): part.seconds for part in parts}
    assert len(taken) == len(parts)
    assert taken["read", "stage-0"] == 2.25
    assert taken["placement", "stage-0"] == 2.0
    assert taken["first token", "instance"] == 0.125
    # What the application took and its replica does not explain.
    assert taken["placement", "replica"] == pytest.approx(20.0 - 2.5 - 1.0 - 0.25 - 6.625 - 0.5)


def test_the_table_and_the_json_say_the_same() -> None:
    parts = startup_parts(COMMAND, REPLICA)
    table, document = startup_table(parts, REPLICA), json.loads(startup_json(parts, REPLICA))
    rows = re.findall(r"^  (\S.*?) +(\S+) +([\d.]+) +([\d.]+)$", table, re.M)
    shown = [float(seconds) for _, _, seconds, _ in rows[: len(parts)]]
    assert shown == [pytest.approx(part["seconds"], abs=0.01) for part in document["parts"]]
    own, rays = document["own_seconds"], document["ray_seconds"]
    assert f"in all 30.00 s: {rays:.2f} s Ray's, {own:.2f} s ours" in table
    assert rays == pytest.approx(4.0 + 3.0 + 9.125 + 2.0)
    assert "12,345" in table


def test_what_a_replica_answers_is_understood() -> None:
    assert msgspec.convert(asdict(REPLICA), ReplicaStart) == REPLICA


def test_a_replica_explains_all_of_its_time() -> None:
    clock = ReplicaClock()
    began = time.monotonic()
    for name in ("kernels", "tokenizer", "tokenizer"):
        with clock.part(name):
            time.sleep(0.01)
    start = clock.start("r", GroupStart())
    ended = time.monotonic()
    assert start.kernels_s >= 0.01
    assert start.tokenizer_s >= 0.02
    assert start.inside_s <= ended - began + 0.001
    assert start.imports_s > 0


def test_the_command_began_with_its_process() -> None:
    first = age_s()
    assert first > 0
    clock = CommandClock()
    clock.mark("checks")
    assert clock.parts["imports"] >= first
    assert clock.parts["checks"] >= 0
