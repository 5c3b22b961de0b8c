"""PromQL that panels share, over what the dashboard's variables choose."""

from __future__ import annotations

from k8s.dashboard_panels import Query

NODES = 'namespace=~"$namespace", conclave_instance=~"$instance"'
"""Chooses what Ray says of its nodes."""
REPLICAS = f'{NODES}, replica_id=~"$replica"'
"""Chooses what replicas of ours say."""
_QUANTILES = {"p50": "0.5", "p95": "0.95", "p99": "0.99"}


def ours(name: str, *matchers: str) -> str:
    """A metric of docs/observability.md, as Ray's agents name it."""
    return f"ray_conclave_{name}{{{', '.join((REPLICAS, *matchers))}}}"


def rays(name: str, *matchers: str) -> str:
    """A metric of Ray's own."""
    return f"ray_{name}{{{', '.join((NODES, *matchers))}}}"


def rate(name: str, *matchers: str) -> str:
    """Per second, of a counter of ours."""
    return f"rate({ours(name, *matchers)}[$__rate_interval])"


def lately(name: str) -> str:
    """How much a counter of ours has grown in ten minutes."""
    return f"increase({ours(name)}[10m])"


def total(series: str, *labels: str) -> str:
    """Summed over everything but `labels`."""
    return f"sum by ({', '.join(labels)}) ({series})" if labels else f"sum({series})"


def ratio(part: str, whole: str, *labels: str) -> str:
    """One sum over another."""
    return f"{total(part, *labels)} / {total(whole, *labels)}"


def mean(name: str, *labels: str) -> str:
    """Of the values that a histogram or summary of ours was given."""
    return ratio(rate(f"{name}_sum"), rate(f"{name}_count"), *labels)


def quantile(share: str, name: str, *labels: str) -> str:
    """Of the values that a histogram of ours was given."""
    return f"histogram_quantile({share}, {total(rate(f'{name}_bucket'), 'le', *labels)})"


def quantiles(name: str) -> tuple[Query, ...]:
    """Middle and end of a histogram of ours."""
    return tuple(Query(quantile(share, name), legend) for legend, share in _QUANTILES.items())


def each(series: str, label: str, words: str = "") -> Query:
    """One line for each value of a label."""
    return Query(total(series, label), f"{words} {{{{{label}}}}}".lstrip())
