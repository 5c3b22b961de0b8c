"""Numbers of the overlays: what `conclave plan` says, and nothing by hand."""

from __future__ import annotations

from functools import cache

import pytest

from k8s.documents import load_text
from k8s.placements import OVERLAYS, Overlay, Plan, ask_plan, placement_text, pod_numbers
from k8s.render import FOLDER, overlays
from k8s.service_rules import gpus_wanted
from tests.k8s.manifests import documents, group, ray, worker

plan_of = cache(ask_plan)
each_overlay = pytest.mark.parametrize("overlay", OVERLAYS, ids=[o.name for o in OVERLAYS])


def test_every_placement_is_planned() -> None:
    placed = {file.parent.name for file in (FOLDER / "overlays").glob("*/placement.yaml")}
    assert placed == {overlay.name for overlay in OVERLAYS}
    assert placed < {folder.name for folder in overlays()}


@each_overlay
def test_the_plan_says_what_is_committed(overlay: Overlay) -> None:
    committed = (FOLDER / "overlays" / overlay.name / "placement.yaml").read_text()
    assert placement_text(overlay, plan_of(overlay)) == committed, (
        "stale: run python -m k8s.placements, then python -m k8s.render"
    )


@each_overlay
def test_serve_is_asked_for_what_was_planned(overlay: Overlay) -> None:
    plan = plan_of(overlay)
    text = (FOLDER / "overlays" / overlay.name / "serve.yaml").read_text()
    args = load_text(text)["applications"][0]["args"]
    shared = args.keys() & plan["serve"].keys() - {"model"}
    assert {"stages", "expert_shards"} <= shared
    assert {key: args[key] for key in shared} == {key: plan["serve"][key] for key in shared}
    assert args["max_replicas"] == overlay.max_replicas
    if overlay.checkpoint is not None:
        assert {"max_model_len", "max_num_seqs", "quantization", "nodes"} <= shared
        assert gpus_wanted(args) == overlay.max_replicas * plan["totals"]["gpus_used"]


@each_overlay
def test_pods_are_the_nodes_of_the_plan(overlay: Overlay) -> None:
    plan, found = plan_of(overlay), documents(overlay.name)
    assert plan["fits"]
    assert group(found)["replicas"] == len(plan["nodes"])
    limits = ray(worker(found))["resources"]["limits"]
    gpus = {node["gpu_count"] for node in plan["nodes"]}
    assert gpus == {int(limits.get("nvidia.com/gpu", 0))}
    needed = max(node["cpu_memory_bytes"] for node in plan["nodes"])
    assert int(limits["memory"].removesuffix("Gi")) * 2**30 > needed + overlay.shm_gib * 2**30


def test_memory_is_rounded_up_with_room_for_ray() -> None:
    overlay = Overlay(name="x", instance="x", plan=(), shm_gib=3, checkpoint="c", max_replicas=2)
    node = {"bundles": [0], "cpu_cores": 5, "gpu_count": 4}
    nodes = [{**node, "cpu_memory_bytes": 2**30}, {**node, "cpu_memory_bytes": 5 * 2**30 + 1}]
    plan: Plan = {"nodes": nodes}
    assert pod_numbers(overlay, plan) == {
        "instance": "x",
        "workers": "2",
        "max_workers": "4",
        "cpu": "7",
        "memory": "24Gi",
        "shm": "3Gi",
        "gpus": "4",
        "checkpoint": "c",
    }
