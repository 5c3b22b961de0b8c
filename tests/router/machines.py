"""State machines that compare the code with a naive model after every operation."""

from __future__ import annotations

import sys
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, run_state_machine_as_test

STEPS_PER_RUN = 100

every_length = pytest.mark.parametrize(
    "num_operations",
    [
        10_000,
        pytest.param(100_000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)
"""For tests that `drive` a machine: the short form, and the one of CONCLAVE_SLOW."""


class Machine(RuleBasedStateMachine):
    """Counts its operations, and calls `check` after each of them, `finish` at a run's end."""

    num_operations: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        # Hypothesis may repeat a run while it handles the failure of another one.
        self._handled = sys.exc_info()[1]

    def check(self) -> None:
        """The invariants, and everything that can be compared without changing anything."""
        raise AssertionError("a machine that checks nothing")

    def finish(self) -> None:
        """What must hold at the end of a run in which nothing failed."""

    @invariant()
    def holds(self) -> None:
        type(self).num_operations += 1
        self.check()

    def teardown(self) -> None:
        # Hypothesis has looked once before the first operation.
        type(self).num_operations -= 1
        if sys.exc_info()[1] is self._handled:
            self.finish()


def drive(machine: type[Machine], num_operations: int) -> None:
    """Run at least so many operations, the same ones every time."""
    before = machine.num_operations
    run_state_machine_as_test(
        machine,
        settings=settings(
            # Every third run or so ends early: no rule of its swarm is left that may run.
            max_examples=2 * num_operations // STEPS_PER_RUN,
            stateful_step_count=STEPS_PER_RUN,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert machine.num_operations - before >= num_operations
