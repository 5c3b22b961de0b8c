"""What schemas cannot say about monitors and alerts."""

from __future__ import annotations

from collections.abc import Iterator

from k8s.documents import Document
from k8s.queries import rule_expressions, wanted
from k8s.ray_pods import RayPod, ray_pods

_SEVERITIES = ("critical", "warning", "info")
_SCRAPED = ("ray_io_cluster", "conclave_instance")


def monitors_find_pods(documents: list[Document]) -> Iterator[str]:
    """Each PodMonitor selects all pods of a RayService beside it, by ports that they name."""
    clusters = [pods for document in documents if (pods := ray_pods(document))]
    for monitor in documents:
        if monitor["kind"] != "PodMonitor":
            continue
        name, spec = monitor["metadata"]["name"], monitor["spec"]
        labels = spec["selector"]["matchLabels"].items()
        found = [pods for pods in clusters if all(labels <= pod.labels.items() for pod in pods)]
        if not found:
            yield f"PodMonitor/{name}: selects the pods of no RayService that is here"
        ports = _ports(found)
        for endpoint in spec["podMetricsEndpoints"]:
            if found and endpoint.get("port") not in ports:
                yield f"PodMonitor/{name}: no pod has a port named {endpoint.get('port')}"
            targets = {each.get("targetLabel") for each in endpoint.get("relabelings", ())}
            for label in _SCRAPED:
                if label not in targets:
                    yield f"PodMonitor/{name}: {endpoint.get('port')}: no relabeling to {label}"


def alerts_can_be_answered(documents: list[Document]) -> Iterator[str]:
    """Every alert parses, and says how bad it is, what it means and where to read on."""
    for document in documents:
        if document["kind"] != "PrometheusRule":
            continue
        prefix = f"PrometheusRule/{document['metadata']['name']}"
        for expression in rule_expressions(document):
            try:
                wanted(expression)
            except ValueError as error:
                yield f"{prefix}: expr {expression}: {error}"
        for group in document["spec"]["groups"]:
            for rule in group["rules"]:
                yield from (f"{prefix}: {words}" for words in _alert_problems(rule))


def _ports(clusters: list[list[RayPod]]) -> set[str]:
    return {
        str(port.get("name"))
        for pods in clusters
        for pod in pods
        for port in pod.ray.get("ports", ())
    }


def _alert_problems(rule: Document) -> Iterator[str]:
    if "alert" not in rule:
        return
    if (rule.get("labels") or {}).get("severity") not in _SEVERITIES:
        yield f"{rule['alert']}: labels.severity: allowed are {', '.join(_SEVERITIES)}"
    for key in ("summary", "description", "runbook"):
        if not (rule.get("annotations") or {}).get(key):
            yield f"{rule['alert']}: annotations.{key} is missing"
