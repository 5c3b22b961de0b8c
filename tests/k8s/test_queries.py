"""What expressions need is read out of them whole."""

from __future__ import annotations

import pytest

from k8s.queries import all_wanted, dashboard_expressions, wanted


@pytest.mark.parametrize(
    ("expression", "needs"),
    [
        ("up", {"up": set()}),
        ('a_total{code="5", x!~"y"}', {"a_total": {"code", "x"}}),
        ("sum by (p, q) (rate(a_total[5m]))", {"a_total": {"p", "q"}}),
        ("sum without (p) (a)", {"a": {"p"}}),
        ("sum by (p) (max by (p, q) (a))", {"a": {"p", "q"}}),
        ("histogram_quantile(0.9, sum by (le, r) (rate(h_bucket[1m])))", {"h_bucket": {"le", "r"}}),
        ("histogram_quantile(0.9, rate(h_bucket[1m]))", {"h_bucket": {"le"}}),
        ("a / on (p) b", {"a": {"p"}, "b": {"p"}}),
        ('(a{p="1"} > 0.5 and b) unless on (q) -c', {"a": {"p", "q"}, "b": {"q"}, "c": {"q"}}),
        ("max_over_time(sum by (p) (a)[1h:1m])", {"a": {"p"}}),
        ("1000 * sum(a * b) / 3", {"a": set(), "b": set()}),
        ('rate(a{p=~"$p"}[$__rate_interval])', {"a": {"p"}}),
        ('absent(a{p="1"}) or topk(5, b)', {"a": {"p"}, "b": set()}),
    ],
)
def test_metrics_and_their_labels(expression: str, needs: dict[str, set[str]]) -> None:
    assert wanted(expression) == needs


@pytest.mark.parametrize("expression", ["", "a{", "rate(a)", "summ(a)", "sum by p (a)", "a[5m"])
def test_what_prometheus_would_refuse(expression: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        wanted(expression)


def test_needs_of_one_metric_add_up() -> None:
    assert all_wanted(["sum by (p) (a)", 'a{q="1"}', "b"]) == {"a": {"p", "q"}, "b": set()}


def test_every_query_of_a_dashboard_is_read() -> None:
    inner = {"type": "timeseries", "targets": [{"expr": "a"}, {"expr": "b"}]}
    row = {"type": "row", "panels": [inner]}
    variable = {"type": "query", "definition": 'label_values(c{p="1"}, q)'}
    source = {"type": "datasource"}
    dashboard = {
        "panels": [row, {"targets": [{"expr": "d"}]}],
        "templating": {"list": [source, variable]},
    }
    needs = all_wanted(dashboard_expressions(dashboard))
    assert needs == {"a": set(), "b": set(), "c": {"p", "q"}, "d": set()}
