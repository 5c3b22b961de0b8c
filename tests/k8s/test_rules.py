"""Every rule of the linter against a change that breaks it, and it alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from k8s.documents import Document
from k8s.pod_rules import POD_RULES, PROXY_CALLBACK
from k8s.ray_pods import ray_pods
from k8s.service_rules import SERVICE_RULES, gpus_wanted
from k8s.set_rules import SET_RULES
from tests.k8s.manifests import cluster, documents, group, head, of_kind, ray, service, worker

Rule = Callable[..., Any]
Change = Callable[[list[Document]], Any]
RULES: dict[str, Rule] = {rule.__name__: rule for rule in (*POD_RULES, *SERVICE_RULES, *SET_RULES)}


def broken_by(found: list[Document]) -> dict[str, list[str]]:
    """Rules that complain, and what they say."""
    rayservice = of_kind(found, "RayService")
    said = {rule.__name__: list(rule(rayservice)) for rule in SERVICE_RULES}
    for rule in POD_RULES:
        said[rule.__name__] = [words for pod in ray_pods(rayservice) for words in rule(pod)]
    said |= {rule.__name__: list(rule(found)) for rule in SET_RULES}
    return {name: problems for name, problems in said.items() if problems}


def put(where: Callable[[list[Document]], Document], **values: Any) -> Change:
    """Set fields; a value of None takes the field away."""

    def change(found: list[Document]) -> None:
        for key, value in values.items():
            if value is None:
                where(found).pop(key)
            else:
                where(found)[key] = value

    return change


def head_ray(found: list[Document]) -> Document:
    return ray(head(found))


def worker_ray(found: list[Document]) -> Document:
    return ray(worker(found))


def metadata(found: list[Document]) -> Document:
    found_there: Document = of_kind(found, "RayService")["metadata"]
    return found_there


def budget(found: list[Document]) -> Document:
    found_there: Document = of_kind(found, "PodDisruptionBudget")["spec"]
    return found_there


def policy(found: list[Document]) -> Document:
    found_there: Document = of_kind(found, "NetworkPolicy")["spec"]
    return found_there


def limits(found: list[Document]) -> Document:
    found_there: Document = worker_ray(found)["resources"]["limits"]
    return found_there


def serve_says(old: str, new: str) -> Change:
    def change(found: list[Document]) -> None:
        assert old in service(found)["serveConfigV2"]
        service(found)["serveConfigV2"] = service(found)["serveConfigV2"].replace(old, new)

    return change


def image_volume(found: list[Document]) -> None:
    worker(found)["volumes"][1] = {"name": "weights", "image": {"reference": "weights:1"}}


def host_path(found: list[Document]) -> None:
    worker(found)["volumes"][1] = {"name": "weights", "hostPath": {"path": "/mnt"}}


def add_env(container: Callable[[list[Document]], Document], name: str, value: str) -> Change:
    return lambda found: container(found)["env"].append({"name": name, "value": value})


def no_callback(container: Callable[[list[Document]], Document]) -> Change:
    def change(found: list[Document]) -> None:
        (variable,) = [e for e in container(found)["env"] if e["name"] == PROXY_CALLBACK]
        variable["value"] = ""

    return change


def incremental(**options: Any) -> Change:
    strategy = {"type": "NewClusterWithIncrementalUpgrade", "clusterUpgradeOptions": options}
    return put(service, upgradeStrategy=strategy)


def twice(found: list[Document]) -> None:
    found.append(of_kind(found, "NetworkPolicy"))


def second_scaler(found: list[Document]) -> None:
    found.append({"kind": "HorizontalPodAutoscaler", "metadata": {"name": "x"}, "spec": {}})


def big_config_map(found: list[Document]) -> None:
    found.append({"kind": "ConfigMap", "metadata": {"name": "x"}, "data": {"a": "x" * 1_000_001}})


def without(kind: str) -> Change:
    return lambda found: found.remove(of_kind(found, kind))


BOTH = ("requests", "limits")
GPUS = "nvidia.com/gpu"
ENOUGH = {"gatewayClassName": "istio", "intervalSeconds": 1}
BREAKS: list[tuple[str, Change, str]] = [
    ("images_are_pinned", put(head_ray, image="registry.example.com/conclave:0.1.0"), "digest"),
    ("images_are_pinned", put(head_ray, image="conclave:latest"), "digest"),
    ("images_are_pinned", put(head_ray, image="conclave"), "digest"),
    ("images_are_pinned", image_volume, "weights:1"),
    ("mounts_have_volumes", lambda found: worker(found)["volumes"].pop(), "weights has no"),
    ("mounts_have_volumes", add_env(head_ray, "HF_HUB_OFFLINE", "1"), "is there twice"),
    ("requests_fit_limits", lambda found: limits(found).update(cpu="1"), "cpu requests"),
    ("requests_fit_limits", lambda found: limits(found).pop("memory"), "memory needs"),
    ("requests_fit_limits", lambda found: limits(found).pop("nvidia.com/gpu"), "must equal"),
    (
        "requests_fit_limits",
        lambda found: worker_ray(found)["resources"]["requests"].pop("ephemeral-storage"),
        "ephemeral-storage needs",
    ),
    (
        "shared_memory_is_counted",
        lambda found: worker(found)["volumes"][0]["emptyDir"].pop("sizeLimit"),
        "sizeLimit",
    ),
    (
        "shared_memory_is_counted",
        lambda found: worker(found)["volumes"][0]["emptyDir"].update(sizeLimit="29Gi"),
        "more than half",
    ),
    ("ports_have_names", lambda found: head_ray(found)["ports"].pop(), "dash-metrics"),
    ("ports_have_names", lambda found: worker_ray(found)["ports"].pop(0), "named serve"),
    (
        "ports_have_names",
        lambda found: worker_ray(found)["ports"][0].update(containerPort=9000),
        "serve is 9000",
    ),
    (
        "resources_are_said_once",
        lambda found: cluster(found)["headGroupSpec"]["rayStartParams"].pop("num-cpus"),
        'num-cpus must be "0"',
    ),
    ("resources_are_said_once", put(group, rayStartParams={"num-gpus": "8"}), "num-gpus"),
    (
        "resources_are_said_once",
        lambda found: [head_ray(found)["resources"][k].update(memory="15Gi") for k in BOTH],
        "needs 16Gi",
    ),
    ("nothing_is_downloaded", lambda found: worker_ray(found)["env"].pop(0), "HF_HUB_OFFLINE"),
    ("request_ids_are_checked", no_callback(head_ray), "must be deploy.proxy_request_id"),
    ("request_ids_are_checked", no_callback(worker_ray), "RAY_SERVE_HTTP_PROXY_CALLBACK"),
    ("privileges_are_dropped", put(worker_ray, securityContext={}), "capabilities"),
    ("privileges_are_dropped", put(head, securityContext={}), "runAsNonRoot"),
    ("privileges_are_dropped", host_path, "hostPath"),
    ("privileges_are_dropped", put(worker, automountServiceAccountToken=None), "must be false"),
    ("streams_may_end", put(head, terminationGracePeriodSeconds=660), "more than preStop's 660"),
    ("gpu_pods_find_their_nodes", put(worker, tolerations=None), "tolerations is missing"),
    ("gpu_pods_find_their_nodes", put(worker, nodeSelector=None), "nodeSelector is missing"),
    ("gpu_pods_find_their_nodes", put(worker, priorityClassName=None), "priorityClassName"),
    (
        "gpu_pods_find_their_nodes",
        lambda found: [head_ray(found)["resources"][k].update({GPUS: "1"}) for k in BOTH],
        "head must not hold",
    ),
    (
        "weights_are_read_only",
        lambda found: worker_ray(found)["volumeMounts"][1].pop("readOnly"),
        "weights must be readOnly",
    ),
    (
        "weights_are_read_only",
        lambda found: head(found)["volumes"][1]["persistentVolumeClaim"].pop("readOnly"),
        "claim must be readOnly",
    ),
    ("ready_means_serving", put(worker_ray, readinessProbe=None), "must ask the port"),
    ("name_leaves_room", lambda found: metadata(found).update(name="Con.clave"), "no DNS label"),
    ("name_leaves_room", lambda found: metadata(found).update(name="c" * 48), "48 characters"),
    ("version_is_pinned", put(cluster, rayVersion="2.60"), "full versions"),
    ("tokens_are_asked_for", put(cluster, authOptions=None), "mode must be token"),
    (
        "tokens_are_asked_for",
        put(cluster, authOptions={"mode": "token", "enableK8sTokenAuth": False}),
        "refused",
    ),
    ("no_alpha_fields", put(cluster, networkPolicy={"mode": "DenyAll"}), "networkPolicy"),
    ("no_alpha_fields", put(cluster, tlsOptions={"enabled": True}), "tlsOptions"),
    ("no_alpha_fields", put(cluster, gcsFaultToleranceOptions={"backend": "rocksdb"}), "gate"),
    (
        "no_alpha_fields",
        put(cluster, gcsFaultToleranceOptions={"redisPassword": {"value": "secret"}}),
        "from a Secret",
    ),
    ("upgrade_is_chosen", put(service, upgradeStrategy=None), "allowed are None, NewCluster"),
    ("upgrade_is_chosen", incremental(stepSizePercent=10, **ENOUGH), "enableInTreeAutoscaling"),
    ("upgrade_is_chosen", incremental(stepSizePercent=10), "are needed"),
    (
        "upgrade_is_chosen",
        incremental(stepSizePercent=10, maxSurgePercent=5, **ENOUGH),
        "must not be more",
    ),
    (
        "groups_count_right",
        lambda found: (
            group(found).update(resources={"CPU": "1"}),
            cluster(found)["headGroupSpec"].update(resources={"CPU": "1"}),
        ),
        "both resources",
    ),
    ("groups_count_right", put(group, replicas=3), "must be in 2..2"),
    (
        "groups_count_right",
        lambda found: cluster(found)["workerGroupSpecs"].append(group(found)),
        "must be another",
    ),
    ("head_is_not_asked", put(service, excludeHeadPodFromServeSvc=None), "must be true"),
    ("head_is_not_asked", put(metadata, annotations=None), "initializing-timeout"),
    ("serve_drains_before_pods", serve_says("_s: 600", "_s: 661"), "preStop must wait 661"),
    ("serve_drains_before_pods", put(service, rayClusterDeletionDelaySeconds=60), "600 or more"),
    ("nodes_suffice", serve_says("max_replicas: 1", "max_replicas: 2"), "the pods have 16"),
    ("nodes_suffice", serve_says("nodes: 2", "nodes: 3"), "3 pods are needed"),
    ("serve_config_is_ours", serve_says("host: 0.0.0.0", "host: 127.0.0.1"), "http_options.host"),
    ("serve_config_is_ours", serve_says("deploy.app:build", "app:build"), "import_path"),
    ("serve_config_is_ours", serve_says("device: cuda", "api_key: s3"), "belongs into the Secret"),
    ("serve_config_is_ours", serve_says("applications:", "apps:"), "must hold applications"),
    ("objects_have_own_names", twice, "is there 2 times"),
    ("instances_are_protected", without("NetworkPolicy"), "no NetworkPolicy"),
    ("instances_are_protected", without("PodDisruptionBudget"), "no PodDisruptionBudget"),
    (
        "selectors_are_ours",
        lambda found: budget(found)["selector"].update(matchLabels={"ray.io/cluster": "x"}),
        "which KubeRay writes",
    ),
    ("budgets_are_numbers", put(budget, minAvailable="50%"), "whole numbers"),
    ("budgets_are_numbers", put(budget, minAvailable=True), "whole numbers"),
    ("budgets_are_numbers", put(budget, maxUnavailable=1), "scale subresource"),
    ("policies_close_both_ways", put(policy, policyTypes=["Ingress"]), "Ingress and Egress"),
    ("ray_scales_alone", second_scaler, "not on Ray's pods"),
    ("config_maps_fit", big_config_map, "1000001 bytes"),
]
AUTOSCALED: list[tuple[str, Change, str]] = [
    ("autoscaler_may_delete", put(worker, restartPolicy="OnFailure"), "Never or unset"),
    ("autoscaler_may_delete", put(cluster, autoscalerOptions={"version": "v1"}), "must be v2"),
    ("autoscaler_may_delete", put(head, automountServiceAccountToken=False), "needs the service"),
]


@pytest.mark.parametrize(("rule", "change", "words"), BREAKS, ids=[f"{b[0]}" for b in BREAKS])
def test_a_broken_rule_is_named(rule: str, change: Change, words: str) -> None:
    found = documents("dbrx")
    assert broken_by(found) == {}
    change(found)
    said = broken_by(found)
    assert any(words in problem for problem in said.get(rule, ())), said


@pytest.mark.parametrize(("rule", "change", "words"), AUTOSCALED)
def test_a_broken_rule_of_the_autoscaler_is_named(rule: str, change: Change, words: str) -> None:
    found = documents("phi-3.5-moe")
    assert broken_by(found) == {}
    change(found)
    said = broken_by(found)
    assert any(words in problem for problem in said.get(rule, ())), said


@pytest.mark.parametrize(
    ("args", "gpus"),
    [
        ({}, 0),
        ({"device": "cpu", "stages": 4}, 0),
        ({"device": "cuda"}, 1),
        ({"device": "cuda", "stages": 8, "expert_shards": 8, "max_replicas": 2}, 16),
        ({"device": "cuda", "stages": 2, "expert_shards": 6, "layout": "disaggregated"}, 8),
    ],
)
def test_gpus_are_one_per_process_that_computes(args: Document, gpus: int) -> None:
    assert gpus_wanted(args) == gpus
