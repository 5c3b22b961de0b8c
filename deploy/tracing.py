"""Traces of requests, sent by OTLP over HTTP: who is sampled, and what becomes of the spans.

Imported only where there is a collector; workers never import OpenTelemetry.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from deploy.request_record import QUIET_ROUTES, RequestRecord
from deploy.request_trace import RequestTrace, TraceClock
from deploy.span_sender import SpanSender
from deploy.trace_options import TraceOptions
from deploy.version import VERSION

_THEIRS = "opentelemetry"
Headers = Mapping[str, Sequence[str]]
"""Every value of each of `PARENT_HEADERS`."""


class _Complaints(logging.Handler):
    """Keeps what OpenTelemetry logs, line for line, out of sight: we say it once."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._first = ""
        logger = logging.getLogger(_THEIRS)
        logger.addHandler(self)
        logger.propagate = False

    def emit(self, record: logging.LogRecord) -> None:
        """The first complaint has the reason; those that follow it say that it went on."""
        if record.name.startswith("opentelemetry.exporter."):
            self._first = self._first or record.getMessage()

    def take(self) -> str:
        """The first one since the last time."""
        first, self._first = self._first, ""
        return first

    def close(self) -> None:
        """Hear no more."""
        logging.getLogger(_THEIRS).removeHandler(self)
        super().close()


class Tracing:
    """The traces of one replica."""

    def __init__(self, options: TraceOptions, *, model: str, replica_id: str) -> None:
        self.on_dropped: Callable[[int], None] = lambda count: None
        self._complaints = _Complaints()
        exporter = OTLPSpanExporter(endpoint=options.url)
        resource = {
            "service.name": "conclave",
            "service.version": VERSION,
            "service.instance.id": replica_id,
            "conclave.model": model,
        }
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(options.sample_ratio)),
            resource=Resource.create(resource),
            shutdown_on_exit=False,
        )
        self._sender = SpanSender(
            exporter, lambda count: self.on_dropped(count), why=self._complaints.take
        )
        self._provider.add_span_processor(self._sender)
        self._tracer = self._provider.get_tracer("conclave", VERSION)
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, record: RequestRecord, headers: Headers | None = None) -> RequestTrace | None:
        """The trace of a request that has just come; None when it is not sampled.

        Whether it is, its caller's `traceparent` decides, else chance.
        """
        if record.route in QUIET_ROUTES:
            return None
        clock = TraceClock.now()
        span = self._tracer.start_span(
            "conclave.request",
            context=self._parent(headers or {}),
            kind=SpanKind.SERVER,
            start_time=clock.unix_ns,
        )
        return RequestTrace(self._tracer, span, clock) if span.is_recording() else None

    def flush(self) -> bool:
        """Wait until every span has been sent or dropped; whether it has."""
        return self._sender.force_flush()

    def close(self) -> None:
        """Send what is left, but not for long."""
        self._provider.shutdown()
        self._complaints.close()

    def _parent(self, headers: Headers) -> Context:
        # A request has one parent or none: several headers name none.
        if len(headers.get("traceparent", ())) != 1:
            return Context()
        carrier = {name: list(values) for name, values in headers.items() if values}
        return self._propagator.extract(carrier, Context())
