"""Rules about monitors and alerts break where they should; and no rule at all goes untested."""

from __future__ import annotations

from typing import Any

import pytest

from k8s.documents import Document
from tests.k8s.manifests import Change, documents, of_kind
from tests.k8s.test_rules import AUTOSCALED, BREAKS, RULES, broken_by, put


def monitor(found: list[Document]) -> Document:
    spec: Document = of_kind(found, "PodMonitor")["spec"]
    return spec


def agents(found: list[Document]) -> Document:
    endpoint: Document = monitor(found)["podMetricsEndpoints"][0]
    return endpoint


def with_alert(**values: Any) -> Change:
    """An alert that is right but for `values`."""
    notes = {"summary": "s", "description": "d", "runbook": "r"}
    alert = {"alert": "A", "expr": "up == 0", "labels": {"severity": "info"}, "annotations": notes}
    spec = {"groups": [{"name": "g", "rules": [{**alert, **values}]}]}
    rule = {"kind": "PrometheusRule", "metadata": {"name": "x"}, "spec": spec}
    return lambda found: found.append(rule)


OTHERS = {"app.kubernetes.io/instance": "conclave"}
MONITORED: list[tuple[str, Change, str]] = [
    (
        "monitors_find_pods",
        lambda found: monitor(found)["selector"].update(matchLabels=OTHERS),
        "no RayService",
    ),
    (
        "monitors_find_pods",
        lambda found: monitor(found)["selector"].update(matchLabels={"ray.io/cluster": "c"}),
        "no RayService",
    ),
    ("monitors_find_pods", put(agents, port="metric"), "no pod has a port named metric"),
    (
        "monitors_find_pods",
        lambda found: agents(found)["relabelings"].pop(0),
        "no relabeling to ray_io_cluster",
    ),
    ("alerts_can_be_answered", with_alert(expr="rate(up)"), "expected type matrix"),
    ("alerts_can_be_answered", with_alert(expr="sum by (x"), "expr sum by (x"),
    ("alerts_can_be_answered", with_alert(labels={"severity": "bad"}), "labels.severity"),
    ("alerts_can_be_answered", with_alert(annotations={"summary": "s"}), "annotations.runbook"),
]


@pytest.mark.parametrize(("rule", "change", "words"), MONITORED)
def test_a_broken_rule_of_monitoring_is_named(rule: str, change: Change, words: str) -> None:
    found = documents("dbrx-monitored")
    assert broken_by(found) == {}
    change(found)
    said = broken_by(found)
    assert any(words in problem for problem in said.get(rule, ())), said


def test_an_alert_that_is_right_is_accepted() -> None:
    found = documents("dbrx-monitored")
    with_alert()(found)
    assert broken_by(found) == {}


def test_no_rule_goes_untested() -> None:
    assert {rule for rule, _, _ in (*BREAKS, *AUTOSCALED, *MONITORED)} == set(RULES)
