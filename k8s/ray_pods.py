"""The pods that KubeRay makes of an object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from k8s.documents import Document

GPU = "nvidia.com/gpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class RayPod:
    """One group's pod template; the first container is Ray's."""

    group: str
    is_head: bool
    labels: dict[str, str]
    spec: Document
    start_params: Document
    count: int
    """Pods at most."""

    @property
    def containers(self) -> list[Document]:
        """Those that run, then those that run before."""
        return [*self.spec.get("containers", ()), *self.spec.get("initContainers", ())]

    @property
    def ray(self) -> Document:
        """Ray's own container; empty where there is none."""
        containers = self.spec.get("containers") or [{}]
        first: Document = containers[0]
        return first

    def limit(self, resource: str) -> Any:
        """Of Ray's container; `0` where nothing is said."""
        return ((self.ray.get("resources") or {}).get("limits") or {}).get(resource, "0")


def ray_cluster(document: Document) -> Document:
    """The cluster that an object describes; empty where it describes none."""
    spec = document.get("spec") or {}
    key = {"RayService": "rayClusterConfig", "RayJob": "rayClusterSpec"}.get(document["kind"])
    cluster = spec if document["kind"] == "RayCluster" else spec.get(key) if key else None
    return cluster if isinstance(cluster, dict) else {}


def ray_pods(document: Document) -> list[RayPod]:
    """Head first, then the worker groups."""
    cluster = ray_cluster(document)
    if not cluster:
        return []
    head = cluster.get("headGroupSpec") or {}
    groups = cluster.get("workerGroupSpecs") or []
    workers = [_pod(group, str(group.get("groupName")), is_head=False) for group in groups]
    return [_pod(head, "head", is_head=True), *workers]


def _pod(group: Document, name: str, *, is_head: bool) -> RayPod:
    template = group.get("template") or {}
    return RayPod(
        group=name,
        is_head=is_head,
        labels=(template.get("metadata") or {}).get("labels") or {},
        spec=template.get("spec") or {},
        start_params=group.get("rayStartParams") or {},
        count=1 if is_head else int(group.get("maxReplicas") or 0),
    )
