"""What must hold between the objects of one manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from k8s.documents import Document
from k8s.monitor_rules import alerts_can_be_answered, monitors_find_pods
from k8s.ray_pods import RayPod, ray_pods

SetRule = Callable[[list[Document]], Iterator[str]]

_CONFIG_MAP_BYTES = 1_000_000
_NOT_OURS = ("ray.io/", "app.kubernetes.io/name", "app.kubernetes.io/created-by")
"""KubeRay writes these, and others than one might think."""


def objects_have_own_names(documents: list[Document]) -> Iterator[str]:
    """The second of two equal objects would replace the first."""
    names = Counter((each["kind"], each["metadata"]["name"]) for each in documents)
    for (kind, name), count in names.items():
        if count > 1:
            yield f"{kind}/{name} is there {count} times"


def instances_are_protected(documents: list[Document]) -> Iterator[str]:
    """Each RayService has a NetworkPolicy over all its pods and a budget over its workers."""
    for service in _of_kind(documents, "RayService"):
        name, pods = service["metadata"]["name"], ray_pods(service)
        workers = [pod for pod in pods if not pod.is_head]
        policies = [each["spec"].get("podSelector") for each in _of_kind(documents, _POLICY)]
        if not any(_selects_all(selector, pods) for selector in policies):
            yield f"RayService/{name}: no {_POLICY} selects all its pods"
        budgets = [each["spec"].get("selector") for each in _of_kind(documents, _BUDGET)]
        if not any(_selects_all(selector, workers) for selector in budgets):
            yield f"RayService/{name}: no {_BUDGET} selects its workers"


def selectors_are_ours(documents: list[Document]) -> Iterator[str]:
    """KubeRay's labels change with every cluster: selectors of pods use the templates' own."""
    for document in [*_of_kind(documents, _POLICY), *_of_kind(documents, _BUDGET)]:
        spec, name = document["spec"], document["metadata"]["name"]
        selector = spec.get("podSelector") or spec.get("selector") or {}
        for key in selector.get("matchLabels") or {}:
            if key.startswith(_NOT_OURS):
                yield f"{document['kind']}/{name}: selects by {key}, which KubeRay writes"


def budgets_are_numbers(documents: list[Document]) -> Iterator[str]:
    """Percentages need a scale subresource, which RayClusters lack; so does maxUnavailable."""
    for budget in _of_kind(documents, _BUDGET):
        name, least = budget["metadata"]["name"], budget["spec"].get("minAvailable")
        if type(least) is not int or least < 1:
            yield f"{_BUDGET}/{name}: minAvailable: {least}: allowed are whole numbers from 1"
        if "maxUnavailable" in budget["spec"]:
            yield f"{_BUDGET}/{name}: maxUnavailable needs a scale subresource"


def policies_close_both_ways(documents: list[Document]) -> Iterator[str]:
    """A policy that names one direction leaves the other open."""
    for policy in _of_kind(documents, _POLICY):
        if sorted(policy["spec"].get("policyTypes") or ()) != ["Egress", "Ingress"]:
            yield f"{_POLICY}/{policy['metadata']['name']}: policyTypes must be Ingress and Egress"


def ray_scales_alone(documents: list[Document]) -> Iterator[str]:
    """Serve and Ray's autoscaler decide; a second opinion on the same pods makes them flap."""
    for document in documents:
        if document["kind"] in ("HorizontalPodAutoscaler", "ScaledObject"):
            yield f"{document['kind']}/{document['metadata']['name']}: not on Ray's pods"


def config_maps_fit(documents: list[Document]) -> Iterator[str]:
    """The API server refuses more than 1 MiB."""
    for document in _of_kind(documents, "ConfigMap"):
        size = sum(len(str(value).encode()) for value in (document.get("data") or {}).values())
        if size > _CONFIG_MAP_BYTES:
            yield f"ConfigMap/{document['metadata']['name']}: {size} bytes, allowed is 1 MB"


_POLICY, _BUDGET = "NetworkPolicy", "PodDisruptionBudget"

SET_RULES: tuple[SetRule, ...] = (
    objects_have_own_names,
    instances_are_protected,
    selectors_are_ours,
    budgets_are_numbers,
    policies_close_both_ways,
    ray_scales_alone,
    config_maps_fit,
    monitors_find_pods,
    alerts_can_be_answered,
)


def _of_kind(documents: list[Document], kind: str) -> list[Document]:
    return [document for document in documents if document["kind"] == kind]


def _selects_all(selector: Any, pods: list[RayPod]) -> bool:
    wanted = (selector or {}).get("matchLabels") or {}
    return bool(wanted) and all(wanted.items() <= pod.labels.items() for pod in pods)
