"""Ten mistakes that have cost platform teams an evening: the linter names every one."""

from __future__ import annotations

import pytest

from k8s.documents import Document
from k8s.lint import lint_text
from k8s.ray_pods import GPU
from k8s.render import RENDERED
from k8s.schemas import Schemas
from tests.k8s.manifests import (
    Change,
    cluster,
    group,
    head,
    of_kind,
    problems_after,
    ray,
    service,
    worker,
)


def misspelt_field(found: list[Document]) -> None:
    cluster(found)["rayVersoin"] = cluster(found).pop("rayVersion")


def misspelt_pod_field(found: list[Document]) -> None:
    ray(worker(found))["volumeMount"] = ray(worker(found)).pop("volumeMounts")


def wrong_type(found: list[Document]) -> None:
    group(found)["replicas"] = "1"


def wrong_pod_type(found: list[Document]) -> None:
    worker(found)["terminationGracePeriodSeconds"] = "150"


def missing_volume(found: list[Document]) -> None:
    worker(found)["volumes"] = worker(found)["volumes"][:1]


def percentage(found: list[Document]) -> None:
    of_kind(found, "PodDisruptionBudget")["spec"]["minAvailable"] = "50%"


def percentage_of_the_unavailable(found: list[Document]) -> None:
    of_kind(found, "PodDisruptionBudget")["spec"]["maxUnavailable"] = "50%"


def resources_twice(found: list[Document]) -> None:
    group(found)["resources"] = {"GPU": "8"}
    group(found)["rayStartParams"]["num-gpus"] = "8"


def gpus_beside_the_limits(found: list[Document]) -> None:
    group(found)["rayStartParams"]["num-gpus"] = "8"


def no_serve_port(found: list[Document]) -> None:
    ports = ray(head(found))["ports"]
    ports[:] = [port for port in ports if port["name"] != "serve"]


def long_name(found: list[Document]) -> None:
    of_kind(found, "RayService")["metadata"]["name"] = "c" * 48


def autoscaler_restarts(found: list[Document]) -> None:
    worker(found)["restartPolicy"] = "Always"


def gpus_overcommitted(found: list[Document]) -> None:
    ray(worker(found))["resources"]["requests"][GPU] = "4"


MISTAKES: list[tuple[Change, str, str]] = [
    (misspelt_field, "nano", "'rayVersoin' was unexpected"),
    (misspelt_pod_field, "nano", "'volumeMount' was unexpected"),
    (wrong_type, "nano", "replicas: '1' is not of type 'integer'"),
    (wrong_pod_type, "nano", "'150' is not of type 'integer'"),
    (missing_volume, "dbrx", "volumeMount weights has no volume"),
    (percentage, "dbrx", "minAvailable: 50%: allowed are whole numbers"),
    (percentage_of_the_unavailable, "dbrx", "maxUnavailable needs a scale subresource"),
    (gpus_beside_the_limits, "dbrx", "num-gpus: what a worker has is said by its limits"),
    (resources_twice, "dbrx", "both resources and rayStartParams num-gpus"),
    (no_serve_port, "dbrx", "no port is named serve"),
    (long_name, "nano", "48 characters, allowed are 47"),
    (autoscaler_restarts, "phi-3.5-moe", "restartPolicy must be Never or unset"),
    (gpus_overcommitted, "dbrx", f"the request of {GPU} must equal its limit"),
]


@pytest.mark.parametrize(
    ("change", "overlay", "named"),
    MISTAKES,
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_the_linter_names_the_mistake(
    change: Change, overlay: str, named: str, schemas: Schemas
) -> None:
    problems = problems_after(change, overlay, schemas)
    assert any(named in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("change", "overlay", "named"),
    [mistake for mistake in MISTAKES if mistake[0] not in (misspelt_field, wrong_type)],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_most_are_named_without_crds(
    change: Change, overlay: str, named: str, without_crds: Schemas
) -> None:
    problems = problems_after(change, overlay, without_crds)
    assert any(named in problem for problem in problems), problems


@pytest.mark.parametrize("before", ["    rayVersion: ", "  excludeHeadPodFromServeSvc: "])
def test_a_key_that_is_there_twice_is_named(before: str, without_crds: Schemas) -> None:
    text = (RENDERED / "nano.yaml").read_text()
    assert before in text
    (problem,) = lint_text(text.replace(before, f"{before}first\n{before}", 1), without_crds)
    assert "duplicate key" in problem


def test_a_key_of_the_serve_configuration_that_is_there_twice_is_named(
    without_crds: Schemas,
) -> None:
    def twice(found: list[Document]) -> None:
        service(found)["serveConfigV2"] += "proxy_location: HeadOnly\n"

    (problem, *_) = problems_after(twice, "nano", without_crds)
    assert "duplicate key 'proxy_location'" in problem
