"""Where traces go and how many requests have one: options checked without OpenTelemetry."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from urllib.parse import urlsplit

EXTRA = "otel"
PARENT_HEADERS = ("traceparent", "tracestate")
"""Those that say whose trace a request belongs to."""
_EXPORTER = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
_PATH = "/v1/traces"


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceOptions:
    """`endpoint` is the collector's base URL, as OTEL_EXPORTER_OTLP_ENDPOINT has it."""

    endpoint: str
    sample_ratio: float = 1.0
    """Of requests whose caller has not decided, from 0 to 1."""

    @property
    def url(self) -> str:
        """Where spans are posted to."""
        return self.endpoint.rstrip("/") + _PATH


def check_endpoint(value: str) -> str:
    """`http://HOST:PORT` or `https://...`, perhaps with a path. Raises ValueError."""
    try:
        parts = urlsplit(value)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good or not value.isascii() or not value.isprintable() or " " in value:
        raise ValueError("allowed are URLs such as http://collector:4318")
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError(
            "allowed are URLs without a user, a query and a fragment; "
            "headers are read from OTEL_EXPORTER_OTLP_HEADERS"
        )
    if parts.path.rstrip("/").endswith(_PATH):
        raise ValueError(f"allowed are URLs without {_PATH}, which is added")
    return value


def missing_exporter() -> str:
    """Why no trace can be sent from here; empty where the exporter is installed."""
    try:
        found = find_spec(_EXPORTER) is not None
    except ModuleNotFoundError:
        found = False
    if found:
        return ""
    return (
        "the package opentelemetry-exporter-otlp-proto-http is not installed: "
        f"install Conclave with its extra, pip install --editable '.[{EXTRA}]'"
    )
