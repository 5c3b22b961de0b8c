"""Overlays as they are rehearsed: their pods as Ray nodes, their plan with a nano model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deploy.config import parse_options
from deploy.demo import NANO_MODELS
from deploy.plan import make_plan
from deploy.plan_model import planned_model
from deploy.plan_options import PlanArgs
from k8s.documents import Document, load_text
from k8s.placements import OVERLAYS, Overlay
from k8s.render import FOLDER, source_folders
from tests.k8s.manifests import cluster, documents, group, head, ray, service, worker

Plan = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """One actor of a plan."""

    node: int
    experts: tuple[int, ...]


def serve_config(overlay: str) -> Document:
    """What is deployed."""
    config: Document = load_text(service(documents(overlay))["serveConfigV2"])
    return config


def serve_args(overlay: str) -> Document:
    """The application's options."""
    args: Document = serve_config(overlay)["applications"][0]["args"]
    return args


def planned_overlay(overlay: str) -> Overlay:
    """What the numbers of an overlay were planned for, whichever overlay it builds upon."""
    folders = source_folders(FOLDER / "overlays" / overlay)
    (name,) = [folder.name for folder in folders if (folder / "placement.yaml").is_file()]
    return next(each for each in OVERLAYS if each.name == name)


def nano_model(overlay: str) -> str:
    """The nano model of the same family."""
    family = planned_model(planned_overlay(overlay).plan[0]).config.family
    (name,) = [name for name in NANO_MODELS if planned_model(name).config.family == family]
    return name


def ray_nodes(overlay: str) -> dict[str, Any]:
    """Head and workers with their CPUs and no GPU, as options of `Cluster.add_node`."""
    found = documents(overlay)
    of_head = cluster(found)["headGroupSpec"]["rayStartParams"]
    of_workers = group(found)["rayStartParams"]
    assert of_head.keys() <= {"num-cpus", "dashboard-host"}, "not simulated"
    assert not of_workers, "not simulated"
    cpus = int(ray(worker(found))["resources"]["limits"]["cpu"])
    return {
        "head": {"num_cpus": int(of_head["num-cpus"]), "num_gpus": 0},
        "workers": [{"num_cpus": cpus, "num_gpus": 0}] * group(found)["replicas"],
    }


def environment(overlay: str) -> dict[str, str]:
    """What both kinds of pods say in their environment, secrets left out."""
    found = documents(overlay)
    said = [
        {each["name"]: each["value"] for each in ray(pod)["env"] if "value" in each}
        for pod in (head(found), worker(found))
    ]
    assert said[0] == said[1], "head and workers differ"
    return said[0]


def planned(overlay: str, **options: Any) -> dict[str, Place]:
    """Where the overlay's own plan, GPUs and all, has each actor of the nano model.

    With as many stages as that has layers for.
    """
    words = planned_overlay(overlay).plan[1:]
    pairs = zip(words[::2], words[1::2], strict=True)
    asked = {flag.removeprefix("--").replace("-", "_"): value for flag, value in pairs}
    model = planned_model(nano_model(overlay))
    args = serve_args(overlay)
    stages = min(args["stages"], model.config.num_layers)
    counts = {"stages": stages, "expert_shards": args["expert_shards"]}
    asked |= {"model": model.name, "context": 512, **counts, **options}
    plan = make_plan(parse_options(PlanArgs, asked), model)
    assert plan["fits"]
    return {
        actor["name"]: Place(node=actor["node"], experts=tuple(actor["experts"]))
        for actor in plan["actors"]
    }
