"""Progress of loading: throttled, never in the way, shown on a terminal and gone afterwards."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest

from deploy.load_bar import loading_shown
from shards.load_progress import LoadProgress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_reports_are_few_and_the_last_one_is_the_sum(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    reports: list[tuple[float, int]] = []
    progress = LoadProgress("stage-1", lambda n: reports.append((clock.now, n)), clock)
    clock.now = 103.0  # importing the libraries is not reading
    progress.on_read(0)
    for _ in range(1000):
        clock.now += 0.01
        progress.on_read(7)
    assert 10 <= len(reports) <= 40
    assert all(b[0] - a[0] >= 0.25 for a, b in pairwise(reports))
    assert [n for _, n in reports] == sorted(n for _, n in reports)
    with caplog.at_level(logging.INFO, "conclave"):
        progress.finish()
    assert reports[-1][1] == 7000
    assert caplog.messages == ["stage-1: read 7000 bytes of weights in 10.00 s"]


def test_a_failing_report_is_the_last_one(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    calls: list[int] = []

    def report(num_bytes: int) -> None:
        calls.append(num_bytes)
        raise ConnectionError("no board")

    progress = LoadProgress("expert-0", report, clock)
    for _ in range(5):
        clock.now += 1
        progress.on_read(3)
    with caplog.at_level(logging.INFO, "conclave"):
        progress.finish()
    assert calls == [6]
    assert "no board" in caplog.text
    assert "read 15 bytes" in caplog.text


def test_a_worker_without_weights_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def report(num_bytes: int) -> None:
        raise AssertionError

    with caplog.at_level(logging.INFO, "conclave"):
        LoadProgress("dispatcher-0", report).finish()
    assert not caplog.messages


class Poll:
    """Counts up to `end`; `done` is set when a later poll proves that the end was shown."""

    def __init__(self, end: int) -> None:
        self._values = iter([0, end // 2, end])
        self._end = end
        self._seen_end = False
        self.done = threading.Event()

    def __call__(self) -> int:
        if self._seen_end:
            self.done.set()
        value = next(self._values, self._end)
        self._seen_end = value == self._end
        return value


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """Standard error is a terminal; gives what it was sent."""
    ours, theirs = os.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    sent: list[bytes] = []

    def read() -> None:
        while True:
            try:
                sent.append(os.read(ours, 4096))
            except OSError:  # how a terminal says that its other end is closed
                return

    reader = threading.Thread(target=read)
    with os.fdopen(theirs, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        reader.start()

        def finished() -> str:
            stderr.close()
            reader.join(timeout=30)
            return b"".join(sent).decode()

        yield finished
        monkeypatch.undo()
    os.close(ours)


ERASED = "\x1b[2K"


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    poll = Poll(3 * 2**20)
    with terminal(monkeypatch) as finished:
        with loading_shown("big-model", 3 * 2**20, poll):
            assert poll.done.wait(30)
        text = finished()
    assert "loading big-model" in text
    assert "3.0/3.0" in text
    assert text.endswith(ERASED)


def test_the_bar_vanishes_on_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    poll = Poll(10)
    with terminal(monkeypatch) as finished:
        with pytest.raises(TimeoutError, match="no actor"):
            _load_in_vain(poll)
        text = finished()
    assert "loading big-model" in text
    assert text.endswith(ERASED)


def _load_in_vain(poll: Poll) -> None:
    with loading_shown("big-model", 20, poll):
        assert poll.done.wait(30)
        raise TimeoutError("no actor")


def test_replicas_counted_twice_fill_the_bar_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    poll = Poll(2**21)
    with terminal(monkeypatch) as finished:
        with loading_shown("big-model", 2**20, poll):
            assert poll.done.wait(30)
        text = finished()
    assert "1.0/1.0" in text
    assert "2.0/1.0" not in text


def test_log_lines_elsewhere(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    poll = Poll(5000)
    with caplog.at_level(logging.INFO, "conclave"), loading_shown("big-model", 5000, poll):
        assert poll.done.wait(30)
    assert caplog.messages == [
        "loading big-model: 50 % of 5000 bytes",
        "loading big-model: 100 % of 5000 bytes",
    ]
    assert capsys.readouterr() == ("", "")


def test_a_failing_poll_does_not_stop_the_loading(caplog: pytest.LogCaptureFixture) -> None:
    asked = threading.Event()

    def poll() -> int:
        asked.set()
        raise ConnectionError("no board")

    with loading_shown("big-model", 10, poll):
        assert asked.wait(30)
    assert "no board" in caplog.text
