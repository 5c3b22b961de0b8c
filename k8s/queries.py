"""What a PromQL expression asks for: metrics, and labels of theirs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import promql_parser as promql

from k8s.documents import Document

Wanted = dict[str, set[str]]
"""Metric → labels that it is chosen, grouped or matched by."""

FROM_PROMETHEUS = frozenset({"up"})
"""Metrics that a scrape does not hold: Prometheus makes them of it."""
FROM_DISCOVERY = frozenset(
    {"namespace", "pod", "job", "endpoint", "instance", "ray_io_cluster", "conclave_instance"}
)
"""Labels that Prometheus puts on whatever it scrapes; the last two are our PodMonitor's."""

_GRAFANA_SPANS = re.compile(r"\$__(?:rate_interval|interval|range)\b")


def wanted(expression: str) -> Wanted:
    """What one expression needs. Raises ValueError where it is no PromQL."""
    found: Wanted = {}
    _read(promql.parse(_GRAFANA_SPANS.sub("5m", expression)), frozenset(), found)
    return found


def all_wanted(expressions: Iterable[str]) -> Wanted:
    """What several expressions need together."""
    found: Wanted = {}
    for expression in expressions:
        for metric, labels in wanted(expression).items():
            found.setdefault(metric, set()).update(labels)
    return found


def rule_expressions(rule: Document) -> Iterator[str]:
    """Of every alert and recording of a PrometheusRule."""
    for group in rule["spec"]["groups"]:
        for each in group["rules"]:
            yield str(each["expr"])


def dashboard_expressions(dashboard: Document) -> Iterator[str]:
    """Of every panel, also inside rows, and of the queries that fill its variables."""
    panels = list(dashboard["panels"])
    while panels:
        panel = panels.pop()
        panels += panel.get("panels", ())
        yield from (target["expr"] for target in panel.get("targets", ()))
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            query = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["definition"])
            assert query is not None, variable["definition"]
            yield f"count by ({query[2]}) ({query[1]})"


def _read(node: promql.Expr, labels: frozenset[str], found: Wanted) -> None:
    """`labels` are those that what lies around the node asks of everything inside it."""
    if isinstance(node, promql.VectorSelector):
        chosen = {matcher.name for matcher in node.matchers.matchers}
        assert node.name is not None, f"{node} names no metric"
        found.setdefault(node.name, set()).update(labels | chosen)
    elif isinstance(node, promql.AggregateExpr):
        kept = node.modifier.labels if node.modifier is not None else ()
        _read(node.expr, frozenset(kept), found)
    elif isinstance(node, promql.BinaryExpr):
        matching = node.modifier.matching if node.modifier is not None else None
        both = labels | frozenset(matching.labels if matching is not None else ())
        _read(node.lhs, both, found)
        _read(node.rhs, both, found)
    elif isinstance(node, promql.Call):
        for argument in node.args:
            inside = labels | {"le"} if node.func.name == "histogram_quantile" else labels
            _read(argument, inside, found)
    elif isinstance(node, promql.MatrixSelector):
        _read(node.vector_selector, labels, found)
    elif isinstance(node, promql.ParenExpr | promql.SubqueryExpr | promql.UnaryExpr):
        _read(node.expr, labels, found)
