"""Options of traces: refused at once, by name."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from deploy.config import ConfigError, parse_args
from deploy.resolve import resolve

NANO: dict[str, Any] = {"model": "nano-jamba"}


@pytest.mark.parametrize(
    "endpoint",
    ["collector:4318", "grpc://collector:4317", "http://", "http://x:99999", "http://x:0",
     "http://a b", "http://u:p@x", "http://x?a=1", "http://x#a", "http://x/v1/traces",
     "http://x/v1/traces/", "http://[x", "http://caf\u00e9", "http://x\n", ""],
)  # fmt: skip
def test_wrong_endpoints_are_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="otlp_endpoint") as refused:
        parse_args({**NANO, "otlp_endpoint": endpoint})
    assert "allowed" in str(refused.value)


@pytest.mark.parametrize("ratio", ["-0.1", "1.01", "nan", "half", "inf"])
def test_wrong_ratios_are_refused(ratio: str) -> None:
    with pytest.raises(ConfigError, match="trace_sample_ratio"):
        parse_args({**NANO, "otlp_endpoint": "http://x", "trace_sample_ratio": ratio})


def test_a_ratio_alone_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match=r"trace_sample_ratio=0.1: allowed only with otlp_end"):
        parse_args({**NANO, "trace_sample_ratio": "0.1"})


def test_what_they_come_to() -> None:
    assert parse_args(NANO).traces is None
    traces = parse_args({**NANO, "otlp_endpoint": "https://x:4318/base/"}).traces
    assert traces is not None
    assert (traces.url, traces.sample_ratio) == ("https://x:4318/base/v1/traces", 1.0)
    options = {**NANO, "otlp_endpoint": "http://[::1]:4318", "trace_sample_ratio": "0"}
    resolved = resolve(parse_args(options)).traces
    assert resolved is not None
    assert (resolved.url, resolved.sample_ratio) == ("http://[::1]:4318/v1/traces", 0.0)


@pytest.mark.parametrize("found", [None, ModuleNotFoundError("opentelemetry")])
def test_a_missing_exporter_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, found: Exception | None
) -> None:
    def find_spec(name: str) -> None:
        assert name.startswith("opentelemetry.")
        if found is not None:
            raise found

    monkeypatch.setattr("deploy.trace_options.find_spec", find_spec)
    with pytest.raises(ConfigError, match=r"otlp_endpoint=http://x: .*\.\[otel\]"):
        parse_args({**NANO, "otlp_endpoint": "http://x"})
    assert parse_args(NANO).traces is None
    assert importlib.util.find_spec("json")


def test_the_extra_is_what_the_error_says() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert 'otel = ["opentelemetry-exporter-otlp-proto-http' in text
