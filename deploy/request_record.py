"""One record per request: what metrics and the access log say of it in the end."""

from __future__ import annotations

import logging
import re
import time
import uuid
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from deploy.openai_errors import ApiError
from shards import logs

if TYPE_CHECKING:
    from deploy.metrics import Metrics
    from deploy.request_trace import RequestTrace
    from shards.client import TokenSource

log = logging.getLogger("conclave.access")

CLIENT_GONE = 499
QUIET_ROUTES = frozenset({"/health", "/ready", "/metrics"})
"""Asked every few seconds by machines: logged at level debug."""
_SANE_ID = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]{0,126}[\x21-\x7e])?")
_current: ContextVar[RequestRecord | None] = ContextVar("request_record", default=None)


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """Filled in while a request is answered; times in seconds. It never holds text of anybody."""

    request_id: str
    route: str
    status: int = 0
    stream: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_token_s: float | None = None
    finish_reasons: list[str] = field(default_factory=list)
    error_code: str | None = None
    refused: bool = False
    """Turned away for the time being: told when to come back."""
    client_gone: bool = False
    started: float = field(default_factory=time.perf_counter)
    trace: RequestTrace | None = None
    """None where the request is not sampled, or no collector is there."""

    def fail(self, error: ApiError) -> None:
        """Note the error that the caller is told of."""
        self.error_code = error.code or error.kind
        self.refused = error.retry_after is not None

    def watched(self, source: TokenSource) -> TokenSource:
        """The same source; the request's trace, if any, hears of what is started there."""
        return source if self.trace is None else self.trace.watched(source)

    def fields(self, duration_s: float) -> dict[str, Any]:
        """The access record; what does not apply is left out."""
        every = {
            "request_id": self.request_id,
            "route": self.route,
            "status": self.status,
            "stream": self.stream or None,
            "prompt_tokens": self.prompt_tokens or None,
            "completion_tokens": self.completion_tokens or None,
            "ttft_seconds": _rounded(self.first_token_s),
            "duration_seconds": _rounded(duration_s),
            "finish_reasons": self.finish_reasons or None,
            "error_code": self.error_code,
            "client_gone": self.client_gone or None,
            "trace_id": self.trace.trace_id if self.trace is not None else None,
        }
        return {key: value for key, value in every.items() if value is not None}


def current_record() -> RequestRecord:
    """The record of the request that is being answered here; one that nobody reads without any."""
    return _current.get() or RequestRecord(request_id=new_id(), route="")


def new_id() -> str:
    """A request id of our own."""
    return uuid.uuid4().hex


def sane_id(value: str | None) -> str | None:
    """A client's request id, if it is 1 to 128 printable ASCII characters."""
    return value if value is not None and _SANE_ID.fullmatch(value) else None


def begin(metrics: Metrics, record: RequestRecord) -> None:
    """Make `record` that of everything which this task does from now on."""
    _current.set(record)
    logs.request_id.set(record.request_id)
    metrics.in_progress.inc()


def finish(metrics: Metrics, record: RequestRecord) -> None:
    """Count and log a request that is over."""
    if record.client_gone:
        record.status = CLIENT_GONE
    duration = time.perf_counter() - record.started
    metrics.count(record, duration)
    level = logging.DEBUG if record.route in QUIET_ROUTES else logging.INFO
    log.log(level, "request", extra={"fields": record.fields(duration)})
    if record.trace is not None:
        record.trace.finish(record)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
