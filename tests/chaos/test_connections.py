"""Connections that break or crawl while everyone lives: still every stream is right."""

from __future__ import annotations

from benchmarks.faults.kinds import Fault
from tests.chaos.storms import assert_unnoticed, run_wire_storm

LINKS = [
    ("engine", "stage", 0),
    ("stage", "stage", 1),
    ("stage", "engine", 0),
    ("stage", "dispatcher", 0),
    ("dispatcher", "expert", 1),
    ("ingress", "stage", 0),
]


def test_nobody_notices_a_broken_connection() -> None:
    faults = [
        Fault(("reset", "cut")[turn % 2], role, index, dialer)
        for turn, (dialer, role, index) in enumerate(LINKS)
    ]
    account = run_wire_storm("nano-jamba", "tcp", lambda _: iter(faults))
    assert_unnoticed(account, faults=len(faults))


def test_nobody_notices_a_slow_connection() -> None:
    faults = [
        Fault("delay", "stage", 0, "engine"),
        Fault("delay", "expert", 1, "dispatcher"),
        Fault("throttle", "dispatcher", 0, "stage"),
    ]
    account = run_wire_storm("nano-dbrx", "unix", lambda _: iter(faults))
    assert_unnoticed(account, faults=len(faults))
    assert all(row.recovery_most < 5 for row in account.rows), "slow is not dead"
