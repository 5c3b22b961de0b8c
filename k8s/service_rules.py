"""What schemas cannot say about a RayService: each rule yields what breaks it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import yaml

from k8s.documents import Document, load_text
from k8s.pod_rules import prestop_seconds
from k8s.quantities import quantity
from k8s.ray_pods import GPU, ray_cluster, ray_pods

ServiceRule = Callable[[Document], Iterator[str]]

MAX_NAME = 47
"""KubeRay makes the cluster's name of it, and labels of that."""

_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_DURATION = re.compile(r"(\d+h)?(\d+m)?(\d+s)?")
_INCREMENTAL = "NewClusterWithIncrementalUpgrade"
_UPGRADES = ("None", "NewCluster", _INCREMENTAL)


def name_leaves_room(service: Document) -> Iterator[str]:
    """A DNS label of at most 47 characters."""
    name = str(service["metadata"]["name"])
    if len(name) > MAX_NAME:
        yield f"metadata.name: {len(name)} characters, allowed are {MAX_NAME}"
    if not _NAME.fullmatch(name):
        yield f"metadata.name: {name} is no DNS label"


def version_is_pinned(service: Document) -> Iterator[str]:
    """KubeRay decides by it which features and probes there are."""
    version = str(ray_cluster(service).get("rayVersion"))
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        yield f"rayVersion: {version}: allowed are full versions such as 2.60.0"


def tokens_are_asked_for(service: Document) -> Iterator[str]:
    """Ray's own ports answer to a token; the other kind is refused for RayServices."""
    options = ray_cluster(service).get("authOptions") or {}
    if options.get("mode") != "token":
        yield "authOptions.mode must be token"
    if "enableK8sTokenAuth" in options:
        yield "authOptions.enableK8sTokenAuth is refused for RayServices"


def no_alpha_fields(service: Document) -> Iterator[str]:
    """What KubeRay refuses while its feature gate is off, as it is by default."""
    cluster = ray_cluster(service)
    for field in ("networkPolicy", "tlsOptions", "historyServerOptions", "upgradeStrategy"):
        if field in cluster:
            yield f"{field} needs a feature gate that is off by default, or is for RayClusters"
    storage = cluster.get("gcsFaultToleranceOptions") or {}
    if storage.get("backend") == "rocksdb":
        yield "gcsFaultToleranceOptions.backend: rocksdb needs a feature gate that is off"
    for key in ("redisPassword", "redisUsername"):
        if "value" in (storage.get(key) or {}):
            yield f"gcsFaultToleranceOptions.{key}: allowed are values from a Secret"


def upgrade_is_chosen(service: Document) -> Iterator[str]:
    """Said, never left to the default, which asks for all GPUs twice."""
    strategy = service["spec"].get("upgradeStrategy") or {}
    kind = strategy.get("type")
    if kind not in _UPGRADES:
        yield f"upgradeStrategy.type: {kind}: allowed are {', '.join(_UPGRADES)}"
    if kind != _INCREMENTAL:
        return
    options = strategy.get("clusterUpgradeOptions") or {}
    if not ray_cluster(service).get("enableInTreeAutoscaling"):
        yield f"upgradeStrategy: {_INCREMENTAL} needs enableInTreeAutoscaling"
    if not {"gatewayClassName", "stepSizePercent", "intervalSeconds"} <= options.keys():
        yield "clusterUpgradeOptions: gatewayClassName, stepSizePercent, intervalSeconds are needed"
    elif options["stepSizePercent"] > options.get("maxSurgePercent", 100):
        yield "clusterUpgradeOptions: stepSizePercent must not be more than maxSurgePercent"


def autoscaler_may_delete(service: Document) -> Iterator[str]:
    """Autoscaler v2 owns its pods: the kubelet must not restart what it takes away."""
    cluster = ray_cluster(service)
    if not cluster.get("enableInTreeAutoscaling"):
        return
    options = cluster.get("autoscalerOptions") or {}
    if options.get("version") != "v2":
        yield "autoscalerOptions.version must be v2"
    for field in ("securityContext", "resources"):
        if field not in options:
            yield f"autoscalerOptions.{field} is missing"
    for pod in ray_pods(service):
        if pod.spec.get("restartPolicy", "Never") != "Never":
            yield f"{pod.group}: restartPolicy must be Never or unset with autoscaler v2"
    if ray_pods(service)[0].spec.get("automountServiceAccountToken") is False:
        yield "head: the autoscaler in its pod needs the service account's token"


def groups_count_right(service: Document) -> Iterator[str]:
    """replicas within their bounds, and resources in one place."""
    cluster = ray_cluster(service)
    groups = [cluster.get("headGroupSpec") or {}, *(cluster.get("workerGroupSpecs") or [])]
    for group in groups:
        name = group.get("groupName", "head")
        params = group.get("rayStartParams") or {}
        numbers = [
            key for key in params if key.startswith("num-") or key in ("memory", "resources")
        ]
        if group.get("resources") and numbers:
            yield f"{name}: both resources and rayStartParams {', '.join(numbers)}: allowed is one"
        if "replicas" in group:
            low, now, high = (group.get(k, 0) for k in ("minReplicas", "replicas", "maxReplicas"))
            if not low <= now <= high:
                yield f"{name}: replicas {now} must be in {low}..{high}"
    names = [group.get("groupName") for group in groups[1:]]
    if len(set(names)) != len(names):
        yield "workerGroupSpecs: every groupName must be another"


def head_is_not_asked(service: Document) -> Iterator[str]:
    """Requests go straight to where an ingress is; a start that hangs is noticed."""
    if service["spec"].get("excludeHeadPodFromServeSvc") is not True:
        yield "excludeHeadPodFromServeSvc must be true"
    annotations = service["metadata"].get("annotations") or {}
    timeout = str(annotations.get("ray.io/initializing-timeout", ""))
    if not timeout or not _DURATION.fullmatch(timeout):
        yield "metadata.annotations: ray.io/initializing-timeout must be a duration such as 30m"


def serve_drains_before_pods(service: Document) -> Iterator[str]:
    """Serve's own drain, then the pods' wait, then the old cluster's end: each at least as long."""
    delay = service["spec"].get("rayClusterDeletionDelaySeconds", 0)
    for application in applications(service):
        for deployment in application.get("deployments") or [{}]:
            drain = deployment.get("graceful_shutdown_timeout_s")
            if drain is None:
                yield "serveConfigV2: Ingress needs graceful_shutdown_timeout_s"
                continue
            if delay < drain:
                yield f"rayClusterDeletionDelaySeconds {delay} must be {drain} or more"
            for pod in ray_pods(service):
                if (prestop_seconds(pod) or 0) < drain:
                    yield f"{pod.group}: preStop must wait {drain} s or more, as long as Serve"


def nodes_suffice(service: Document) -> Iterator[str]:
    """GPUs and worker pods at most are enough for all model instances at most."""
    pods = ray_pods(service)
    asked = [application.get("args") or {} for application in applications(service)]
    has = sum(pod.count * quantity(pod.limit(GPU)) for pod in pods)
    needs = sum(map(gpus_wanted, asked))
    if needs > has:
        yield f"maxReplicas: {needs} GPUs are needed for max_replicas, the pods have {has:g}"
    workers = sum(pod.count for pod in pods if not pod.is_head)
    nodes = sum(int(args.get("nodes", 1)) * _most_replicas(args) for args in asked)
    if nodes > workers:
        yield f"maxReplicas: {nodes} pods are needed for nodes and max_replicas, not {workers}"


def gpus_wanted(args: Document) -> int:
    """GPUs of all model instances that the options of an application allow.

    A stage has a GPU, and expert actors have their own unless they live in the stages' processes.
    """
    if args.get("device", "auto") != "cuda":
        return 0
    apart = args.get("layout", "colocated") == "disaggregated"
    each = int(args.get("stages", 1)) + (int(args.get("expert_shards", 1)) if apart else 0)
    return each * _most_replicas(args)


def _most_replicas(args: Document) -> int:
    return int(args.get("max_replicas") or args.get("min_replicas") or 1)


def serve_config_is_ours(service: Document) -> Iterator[str]:
    """serveConfigV2 is text to Kubernetes: whether it is YAML of our application we say."""
    try:
        config = load_text(service["spec"].get("serveConfigV2") or "")
    except yaml.YAMLError as error:
        yield f"serveConfigV2: {' '.join(str(error).split())}"
        return
    if not isinstance(config, dict) or not config.get("applications"):
        yield "serveConfigV2: must hold applications"
        return
    if (config.get("http_options") or {}).get("host") != "0.0.0.0":
        yield "serveConfigV2: http_options.host must be 0.0.0.0, or no other pod reaches it"
    for application in applications(service):
        if application.get("import_path") != "deploy.app:build":
            yield "serveConfigV2: import_path must be deploy.app:build"
        if "api_key" in (application.get("args") or {}):
            yield "serveConfigV2: api_key belongs into the Secret conclave-api-key"


def applications(service: Document) -> list[Any]:
    """What serveConfigV2 deploys; empty where it cannot be read."""
    try:
        config = load_text(service["spec"].get("serveConfigV2") or "")
    except yaml.YAMLError:
        return []
    return list(config.get("applications") or []) if isinstance(config, dict) else []


SERVICE_RULES: tuple[ServiceRule, ...] = (
    name_leaves_room,
    version_is_pinned,
    tokens_are_asked_for,
    no_alpha_fields,
    upgrade_is_chosen,
    autoscaler_may_delete,
    groups_count_right,
    head_is_not_asked,
    serve_drains_before_pods,
    nodes_suffice,
    serve_config_is_ours,
)
