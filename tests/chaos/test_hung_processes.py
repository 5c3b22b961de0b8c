"""SIGSTOP: a process that is there and does nothing is found out, and nobody notices."""

from __future__ import annotations

from benchmarks.faults.kinds import Fault
from tests.chaos.storms import assert_unnoticed, run_storm


def test_nobody_notices_a_hung_process() -> None:
    faults = [Fault("stop", "expert", 2), Fault("stop", "stage", 1)]
    account = run_storm("nano-jamba", lambda _: iter(faults))
    assert_unnoticed(account, faults=2)
