"""Calls into Ray on threads of their own: none outlives its launcher."""

from __future__ import annotations

import threading

import pytest

from shards.ray_actors import Background


def test_the_end_waits_for_what_is_under_way_and_begins_nothing() -> None:
    background = Background()
    entered, leave, calls = threading.Event(), threading.Event(), list[str]()

    def slow(name: str) -> None:
        entered.set()
        leave.wait(10)
        calls.append(name)
        background.call(calls.append, f"after {name}")

    background.call(slow, "first")
    assert entered.wait(10)
    timer = threading.Timer(0.2, leave.set)
    timer.start()
    background.close()
    assert calls == ["first"]
    background.call(calls.append, "late")
    background.close()
    timer.join()
    assert calls == ["first"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_one_that_fails_is_not_waited_for() -> None:
    background = Background()
    failed = threading.Event()

    def fail() -> None:
        failed.set()
        raise RuntimeError("as a test")

    background.call(fail)
    assert failed.wait(10)
    background.close()
    assert not background._threads
