"""Spans that are sent, and what becomes of those that are not."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from deploy.span_sender import MAX_BATCH, SpanSender
from shards.logs import TextLines
from tests.deploy.test_request_log import logged


class Sink(SpanExporter):
    """Keeps batches, as soon as it is let; fails when told to."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.free = threading.Event()
        self.free.set()
        self.result: SpanExportResult | Exception = SpanExportResult.SUCCESS
        self.busy = threading.Event()
        self.closed = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.busy.set()
        assert self.free.wait(20)
        if isinstance(self.result, Exception):
            raise self.result
        if self.result is SpanExportResult.SUCCESS:
            self.batches.append([span.name for span in spans])
        return self.result

    def shutdown(self) -> None:
        self.closed = True


@pytest.fixture
def sink() -> Iterator[Sink]:
    sink = Sink()
    yield sink
    sink.free.set()


def span(name: str) -> ReadableSpan:
    return ReadableSpan(name=name)


def test_everything_arrives_in_batches(sink: Sink) -> None:
    sender = SpanSender(sink, on_dropped=pytest.fail, gather_s=0.01)
    for number in range(2 * MAX_BATCH + 1):
        sender.on_end(span(str(number)))
    assert sender.force_flush()
    assert [name for batch in sink.batches for name in batch] == [
        str(number) for number in range(2 * MAX_BATCH + 1)
    ]
    assert max(map(len, sink.batches)) <= MAX_BATCH
    sender.on_end(span("last"))
    sender.shutdown()
    assert sink.batches[-1] == ["last"]
    assert sink.closed


def test_what_finds_no_room_is_counted_and_said_once(sink: Sink) -> None:
    dropped: list[int] = []
    sink.free.clear()
    with logged(TextLines(), logging.WARNING) as lines:
        sender = SpanSender(sink, dropped.append, max_waiting=3, gather_s=0.01)
        sender.on_end(span("taken"))
        assert sink.busy.wait(20)
        for number in range(10):
            sender.on_end(span(str(number)))
        assert not sender.force_flush(timeout_millis=50)
    assert sum(dropped) == 7
    assert lines.getvalue().count("some are dropped") == 1
    sink.free.set()
    assert sender.force_flush()
    assert [name for batch in sink.batches for name in batch] == ["taken", "0", "1", "2"]
    sender.shutdown()


@pytest.mark.parametrize("failure", [SpanExportResult.FAILURE, OSError("no route")])
def test_an_outage_is_said_when_it_begins_and_ends(
    sink: Sink, failure: SpanExportResult | Exception
) -> None:
    dropped: list[int] = []
    sender = SpanSender(sink, dropped.append, gather_s=0.05)
    with logged(TextLines(), logging.WARNING) as lines:
        for result in (failure, failure, SpanExportResult.SUCCESS, SpanExportResult.SUCCESS):
            sink.result = result
            sender.on_end(span("x"))
            sender.on_end(span("y"))
            assert sender.force_flush()
    sender.shutdown()
    assert sum(dropped) == 4
    assert sink.batches == [["x", "y"]] * 2
    said = lines.getvalue().splitlines()
    assert ["takes no spans" in line for line in said] == [True, False]
    assert "again" in said[1]


def test_a_stuck_collector_does_not_hold_up_the_end(sink: Sink) -> None:
    sink.free.clear()
    sender = SpanSender(sink, lambda count: None, max_waiting=1, gather_s=0.01)
    sender.on_end(span("stuck"))
    assert sink.busy.wait(20)
    sender.on_end(span("waits"))
    sender.shutdown()
    assert sink.closed
    assert sink.batches == []
