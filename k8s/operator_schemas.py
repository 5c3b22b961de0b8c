"""Kinds of the Prometheus operator, as far as they are used here: other fields are refused.

Where the operator's own CRDs are given, those judge instead.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_DURATION: Schema = {"type": "string", "pattern": r"^(\d+d)?(\d+h)?(\d+m)?(\d+s)?$", "minLength": 2}
_TEXTS: Schema = {"type": "object", "additionalProperties": _TEXT}


def _object(required: tuple[str, ...] = (), **properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required)}


def _list(items: Schema) -> Schema:
    return {"type": "array", "minItems": 1, "items": items}


_RELABELING = _object(
    action={
        "type": "string",
        "enum": ["replace", "keep", "drop", "labelmap", "labeldrop", "labelkeep"],
    },
    sourceLabels=_list({"type": "string", "pattern": "^[a-zA-Z_][a-zA-Z0-9_]*$"}),
    targetLabel=_TEXT,
    regex=_TEXT,
    replacement=_TEXT,
)
_ENDPOINT = _object(
    port=_TEXT,
    path=_TEXT,
    interval=_DURATION,
    scrapeTimeout=_DURATION,
    relabelings=_list(_RELABELING),
    metricRelabelings=_list(_RELABELING),
)
_POD_MONITOR = _object(
    ("spec",),
    spec=_object(
        ("selector", "podMetricsEndpoints"),
        selector=_object(("matchLabels",), matchLabels=_TEXTS),
        podMetricsEndpoints=_list(_ENDPOINT),
    ),
)
_RULE = _object(
    ("expr",),
    alert=_TEXT,
    record=_TEXT,
    expr=_TEXT,
    labels=_TEXTS,
    annotations=_TEXTS,
    **{"for": _DURATION},
)
_PROMETHEUS_RULE = _object(
    ("spec",),
    spec=_object(
        ("groups",),
        groups=_list(
            _object(("name", "rules"), name=_TEXT, interval=_DURATION, rules=_list(_RULE))
        ),
    ),
)

OPERATOR_KINDS: dict[tuple[str, str], Schema] = {
    ("monitoring.coreos.com/v1", "PodMonitor"): _POD_MONITOR,
    ("monitoring.coreos.com/v1", "PrometheusRule"): _PROMETHEUS_RULE,
}
