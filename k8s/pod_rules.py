"""What schemas cannot say about one pod template: each rule yields what breaks it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator

from k8s.documents import Document
from k8s.quantities import quantity
from k8s.ray_pods import GPU, RayPod

PodRule = Callable[[RayPod], Iterator[str]]

_GIB = 1024**3
HEAD_MEMORY = 16 * _GIB
"""The head keeps cluster state, dashboard and Serve's controller: less has been killed."""

HEAD_PORTS = {
    "serve": 8000,
    "metrics": 8080,
    "gcs-server": 6379,
    "dashboard": 8265,
    "as-metrics": 44217,
    "dash-metrics": 44227,
}
WORKER_PORTS = {name: HEAD_PORTS[name] for name in ("serve", "metrics")}

PROXY_CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
PROXY_MIDDLEWARES = "deploy.proxy_request_id:middlewares"
"""As `conclave serve` sets it for a Ray of its own."""

_PINNED = re.compile(r"@sha256:[0-9a-f]{64}$")
_OF_THIS_MACHINE = re.compile(r"^[a-z0-9._-]+:(?!latest$)[\w][\w.-]*$")
"""Built here and loaded into the nodes: a name without a registry has no digest yet, but a tag."""


def images_are_pinned(pod: RayPod) -> Iterator[str]:
    """By digest; what no registry has seen by a tag that is not latest."""
    for container in pod.containers:
        image = str(container.get("image"))
        if not _PINNED.search(image) and not _OF_THIS_MACHINE.match(image):
            yield f"{container.get('name')}: image {image}: allowed are images by digest"
    for volume in pod.spec.get("volumes", ()):
        reference = (volume.get("image") or {}).get("reference")
        if reference is not None and not _PINNED.search(reference):
            yield f"volume {volume['name']}: image {reference}: allowed are images by digest"


def mounts_have_volumes(pod: RayPod) -> Iterator[str]:
    """Every mount names a volume of the pod, and no volume or variable is there twice."""
    volumes = [volume.get("name") for volume in pod.spec.get("volumes", ())]
    yield from (f"volume {name} is there twice" for name in _twice(volumes))
    for container in pod.containers:
        name = container.get("name")
        for mount in container.get("volumeMounts", ()):
            if mount.get("name") not in volumes:
                yield f"{name}: volumeMount {mount.get('name')} has no volume"
        variables = [variable.get("name") for variable in container.get("env", ())]
        yield from (f"{name}: env {each} is there twice" for each in _twice(variables))


def requests_fit_limits(pod: RayPod) -> Iterator[str]:
    """CPU and memory are guaranteed, and devices, which cannot be overcommitted, are equal."""
    for container in pod.containers:
        name, resources = container.get("name"), container.get("resources") or {}
        requests, limits = resources.get("requests") or {}, resources.get("limits") or {}
        for key in ("cpu", "memory"):
            if key not in requests or key not in limits:
                yield f"{name}: resources: {key} needs a request and a limit"
        for key in sorted(requests.keys() | limits.keys()):
            if "/" in key and quantity(requests.get(key, 0)) != quantity(limits.get(key, 0)):
                yield f"{name}: resources: the request of {key} must equal its limit"
            elif quantity(requests.get(key, 0)) > quantity(limits.get(key, "1E")):
                yield f"{name}: resources: {key} requests {requests[key]} > {limits[key]}"
    if "ephemeral-storage" not in ((pod.ray.get("resources") or {}).get("requests") or {}):
        yield "resources: ephemeral-storage needs a request: Ray's logs and spills are in the pod"


def shared_memory_is_counted(pod: RayPod) -> Iterator[str]:
    """/dev/shm is memory with a bound, which the container's own limit covers twice over."""
    mounts = {mount.get("mountPath"): mount for mount in pod.ray.get("volumeMounts", ())}
    named = {volume.get("name"): volume for volume in pod.spec.get("volumes", ())}
    shm = (named.get(mounts.get("/dev/shm", {}).get("name")) or {}).get("emptyDir") or {}
    if shm.get("medium") != "Memory" or "sizeLimit" not in shm:
        yield "/dev/shm: needs an emptyDir of medium Memory with a sizeLimit"
    elif 2 * quantity(shm["sizeLimit"]) > quantity(pod.limit("memory")):
        yield f"/dev/shm: {shm['sizeLimit']} is more than half of the memory it is counted in"


def ports_have_names(pod: RayPod) -> Iterator[str]:
    """KubeRay and monitors find ports by name; the head needs `serve` even when excluded."""
    has = {port.get("name"): port.get("containerPort") for port in pod.ray.get("ports", ())}
    for name, number in (HEAD_PORTS if pod.is_head else WORKER_PORTS).items():
        if name not in has:
            yield f"ports: no port is named {name}"
        elif has[name] != number:
            yield f"ports: {name} is {has[name]}, Ray and Serve are set up for {number}"


def resources_are_said_once(pod: RayPod) -> Iterator[str]:
    """Ray reads a pod's limits; the head alone says that it computes nothing."""
    numbers = sorted(key for key in pod.start_params if key.startswith("num-"))
    if pod.is_head and pod.start_params.get("num-cpus") != "0":
        yield 'rayStartParams: num-cpus must be "0": the head serves no model'
    if not pod.is_head and numbers:
        yield f"rayStartParams: {', '.join(numbers)}: what a worker has is said by its limits"
    if pod.is_head and quantity(pod.limit("memory")) < HEAD_MEMORY:
        yield f"resources: memory {pod.limit('memory')}: the head needs 16Gi or more"


def nothing_is_downloaded(pod: RayPod) -> Iterator[str]:
    """No process asks a hub for what the image or the weights lack."""
    said = {variable["name"]: variable.get("value") for variable in pod.ray.get("env", ())}
    if said.get("HF_HUB_OFFLINE") != "1":
        yield 'env: HF_HUB_OFFLINE must be "1"'


def request_ids_are_checked(pod: RayPod) -> Iterator[str]:
    """Serve's proxies, on head and workers, take away the request ids that are not sane."""
    said = {variable["name"]: variable.get("value") for variable in pod.ray.get("env", ())}
    if said.get(PROXY_CALLBACK) != PROXY_MIDDLEWARES:
        yield f"env: {PROXY_CALLBACK} must be {PROXY_MIDDLEWARES}"


def privileges_are_dropped(pod: RayPod) -> Iterator[str]:
    """What the `restricted` level of pod security asks for, and no API token in workers."""
    security = pod.spec.get("securityContext") or {}
    if security.get("runAsNonRoot") is not True:
        yield "securityContext: runAsNonRoot must be true"
    if (security.get("seccompProfile") or {}).get("type") != "RuntimeDefault":
        yield "securityContext: seccompProfile must be RuntimeDefault"
    for container in pod.containers:
        own = container.get("securityContext") or {}
        if own.get("allowPrivilegeEscalation") is not False:
            yield f"{container['name']}: allowPrivilegeEscalation must be false"
        if (own.get("capabilities") or {}).get("drop") != ["ALL"]:
            yield f"{container['name']}: capabilities: ALL must be dropped"
    for volume in pod.spec.get("volumes", ()):
        if "hostPath" in volume:
            yield f"volume {volume['name']}: hostPath is refused by pod security"
    if not pod.is_head and pod.spec.get("automountServiceAccountToken") is not False:
        yield "automountServiceAccountToken must be false: workers ask the API server for nothing"


def streams_may_end(pod: RayPod) -> Iterator[str]:
    """A pod that is deleted waits for its streams, and the grace period is longer than that."""
    waits = prestop_seconds(pod)
    grace = pod.spec.get("terminationGracePeriodSeconds", 30)
    if waits is None:
        yield "lifecycle: preStop.sleep is missing: streams would be cut at once"
    elif grace <= waits:
        yield f"terminationGracePeriodSeconds {grace} must be more than preStop's {waits} s"


def prestop_seconds(pod: RayPod) -> int | None:
    """How long a deleted pod goes on before Ray is told."""
    hook: Document = (pod.ray.get("lifecycle") or {}).get("preStop") or {}
    seconds = (hook.get("sleep") or {}).get("seconds")
    return None if seconds is None else int(seconds)


def gpu_pods_find_their_nodes(pod: RayPod) -> Iterator[str]:
    """GPU pods go to GPU nodes, past their taint, before batch work; others never do."""
    if quantity(pod.limit(GPU)) == 0:
        return
    if pod.is_head:
        yield f"resources: the head must not hold {GPU}"
    for field in ("nodeSelector", "tolerations", "priorityClassName"):
        if not pod.spec.get(field):
            yield f"{field} is missing on a pod with GPUs"


def weights_are_read_only(pod: RayPod) -> Iterator[str]:
    """Ray's container never writes to a checkpoint, and many nodes can hold it."""
    named = {volume.get("name"): volume for volume in pod.spec.get("volumes", ())}
    for mount in pod.ray.get("volumeMounts", ()):
        volume = named.get(mount.get("name")) or {}
        if mount.get("mountPath") == "/dev/shm":
            continue
        holds_weights = volume.keys() & {"persistentVolumeClaim", "image", "ephemeral"}
        if holds_weights and mount.get("readOnly") is not True:
            yield f"volumeMount {mount['name']}: weights must be readOnly"
    for volume in named.values():
        claim = volume.get("persistentVolumeClaim")
        if claim is not None and claim.get("readOnly") is not True:
            yield f"volume {volume['name']}: the claim must be readOnly: many nodes mount it"


def ready_means_serving(pod: RayPod) -> Iterator[str]:
    """KubeRay's own probe of workers needs bash and wget, which the image does not have."""
    if pod.is_head:
        return
    probe = ((pod.ray.get("readinessProbe") or {}).get("httpGet")) or {}
    if probe.get("path") != "/-/healthz" or probe.get("port") != "serve":
        yield "readinessProbe: must ask the port named serve for /-/healthz"


POD_RULES: tuple[PodRule, ...] = (
    images_are_pinned,
    mounts_have_volumes,
    requests_fit_limits,
    shared_memory_is_counted,
    ports_have_names,
    resources_are_said_once,
    nothing_is_downloaded,
    request_ids_are_checked,
    privileges_are_dropped,
    streams_may_end,
    gpu_pods_find_their_nodes,
    weights_are_read_only,
    ready_means_serving,
)


def _twice(names: list[str | None]) -> list[str]:
    return sorted(str(name) for name, count in Counter(names).items() if count > 1)
