"""Where a plan puts actors: as serving does, once each, and only where there is room."""

from __future__ import annotations

import shlex
from collections import Counter
from typing import Any

import pytest

from deploy.config import ConfigError, parse_args, parse_options
from deploy.demo import NANO_MODELS
from deploy.plan import make_plan
from deploy.plan_model import planned_model
from deploy.plan_options import PlanArgs
from deploy.reservation import bundle_cpus
from deploy.resolve import resolve
from shards.bundles import bundle_index
from shards.cache_budget import plan_caches
from shards.control import Started
from shards.partition import layer_ranges_text
from shards.spec import worker_specs

TOPOLOGIES: list[dict[str, Any]] = [
    {},
    {"stages": 2},
    {"stages": 3, "expert_shards": 2},
    {"expert_shards": 4, "expert_replicas": 2},
    {"stages": 4, "expert_shards": 5, "quantization": "int8"},
    {"stages": 2, "expert_shards": 16, "quantization": "int8-all", "dispatch": "direct"},
    {"stage_layers": "0,1-3", "expert_shards": 3, "dtype": "bfloat16"},
    {"stages": 4, "expert_shards": 5, "nodes": 3},
]
PODS: list[tuple[str, dict[str, Any]]] = [
    ("phi-3.5-moe", {"gpus_per_node": 2}),
    ("jamba-mini", {"gpus_per_node": 4}),
    ("jamba-3b", {}),
    ("dbrx", {"nodes": 2, "stages": 16, "expert_shards": 16, "context": 32768}),
    ("dbrx", {"nodes": 4, "gpus_per_node": 4, "layout": "disaggregated"}),
    ("dbrx", {"nodes": 2, "expert_replicas": 2, "quantization": "int8"}),
    ("jamba-large", {"nodes": 2, "quantization": "int8"}),
    ("phi-tiny-moe", {"gpus_per_node": 1}),
]


def plan(model: str, **options: Any) -> dict[str, Any]:
    args = parse_options(PlanArgs, {"model": model, **options})
    return make_plan(args, planned_model(model))


@pytest.mark.parametrize("options", TOPOLOGIES)
@pytest.mark.parametrize("name", NANO_MODELS)
def test_the_plan_is_what_serving_chooses(name: str, options: dict[str, Any]) -> None:
    if options.get("stage_layers") and name == "nano-jamba":
        options = {**options, "stage_layers": "0,1-7"}
    found = plan(name, gpus_per_node=0, **options)
    served = resolve(parse_args({"model": name, **options}))
    spec = served.spec
    assert found["options"]["stage_layers"] == layer_ranges_text(spec.stage_layers)
    assert found["options"]["executor"] == spec.executor
    assert found["options"]["quantization"] == spec.quantization
    names = {"ingress-0", *(worker.peer for worker in worker_specs(spec))}
    actors = {actor["name"]: actor for actor in found["actors"]}
    assert actors.keys() == names
    for index in range(spec.num_expert_shards):
        assert spec.placement is not None
        assert actors[f"expert-{index}"]["experts"] == list(spec.placement.held_by(index))
    assert [bundle["resources"]["CPU"] for bundle in found["bundles"]] == bundle_cpus(served)
    for worker in worker_specs(spec):
        assert actors[worker.peer]["bundle"] == bundle_index(worker)
    if "nodes" in options:
        assert {actor["node"] for actor in found["actors"]} == {0, 1, 2}
        assert all(actor["node"] == actor["bundle"] for actor in found["actors"])
    # What it says to serve with makes the same again.
    again = resolve(parse_args(found["serve"])).spec
    assert again.num_nodes == spec.num_nodes
    assert again.stage_layers == spec.stage_layers
    assert again.placement == spec.placement
    assert again.limits.max_num_seqs == spec.limits.max_num_seqs


@pytest.mark.parametrize(("model", "options"), PODS)
def test_every_layer_and_expert_has_its_places(model: str, options: dict[str, Any]) -> None:
    found = plan(model, **options)
    assert found["fits"], found["reasons"]
    assert not found["servable"]
    actors, sizes = found["actors"], found["model"]
    layers = Counter(i for a in actors if a["layers"] for i in range(*a["layers"]))
    assert layers == Counter(range(sizes["num_layers"]))
    experts = Counter(expert for actor in actors for expert in actor["experts"])
    copies = options.get("expert_replicas", 1)
    held = range(sizes["num_experts"]) if sizes["moe_layers"] else ()
    assert experts == Counter(dict.fromkeys(held, copies))


@pytest.mark.parametrize(("model", "options"), PODS)
def test_every_gpu_has_one_process_and_room_for_it(model: str, options: dict[str, Any]) -> None:
    found = plan(model, **options)
    usable = found["hardware"]["usable_gpu_memory_bytes"]
    assert usable == int(0.9 * 80 * 2**30)
    processes: dict[tuple[int, int], set[str]] = {}
    taken: Counter[tuple[int, int]] = Counter()
    for actor in found["actors"]:
        for gpu in actor["gpus"]:
            processes.setdefault((actor["node"], gpu), set()).add(actor["process"])
            memory = actor["memory"]
            taken[actor["node"], gpu] += sum(memory.values()) - memory["process"]
    assert all(len(names) == 1 for names in processes.values())
    assert max(taken.values()) <= usable
    assert len(processes) == found["totals"]["gpus_used"]
    assert len(processes) <= options.get("nodes", 1) * options.get("gpus_per_node", 8)
    assert all(gpu < options.get("gpus_per_node", 8) for _, gpu in processes)
    for node in found["nodes"]:
        here = {gpu: size for (index, gpu), size in taken.items() if index == node["index"]}
        assert {gpu["index"]: gpu["gpu_memory_bytes"] for gpu in node["gpus"]} == here
        assert node["gpu_memory_bytes"] == sum(here.values())


@pytest.mark.parametrize(("model", "options"), PODS)
def test_bundles_reserve_what_their_actors_count(model: str, options: dict[str, Any]) -> None:
    found = plan(model, **options)
    by_name = {actor["name"]: actor for actor in found["actors"]}
    bundled = [name for bundle in found["bundles"] for name in bundle["actors"]]
    assert sorted(bundled) == sorted(by_name)
    for index, bundle in enumerate(found["bundles"]):
        here = [by_name[name] for name in bundle["actors"]]
        assert bundle["index"] == index
        assert {actor["bundle"] for actor in here} == {index}
        assert {actor["node"] for actor in here} == {bundle["node"]}
        assert bundle["resources"].get("GPU", 0) == sum(actor["gpu_count"] for actor in here)
    assert {"ingress-0", "engine-0"} <= set(found["bundles"][0]["actors"])


def test_colocated_stages_are_spread_over_the_gpus_of_the_experts() -> None:
    found = plan("dbrx", nodes=2, stages=4, expert_shards=16)
    places = {actor["name"]: (actor["node"], actor["gpus"][0]) for actor in found["actors"][3:]}
    assert [places[f"stage-{i}"] for i in range(4)] == [(0, 0), (0, 4), (1, 0), (1, 4)]
    assert [places[f"expert-{i}"] for i in range(16)] == [(i // 8, i % 8) for i in range(16)]


def test_nodes_that_are_full_of_gpus_hold_what_serving_spreads() -> None:
    """One bundle per node without GPUs, nodes filled one after the other with them: the same."""
    for nodes, gpus, stages in ((2, 8, 16), (2, 8, 4), (4, 4, 16), (4, 4, 8)):
        asked = {"nodes": nodes, "stages": stages, "expert_shards": 16}
        full, spread = (plan("dbrx", gpus_per_node=count, **asked) for count in (gpus, 0))
        assert full["serve"]["nodes"] == spread["serve"]["nodes"] == nodes
        assert {a["name"]: a["node"] for a in full["actors"]} == {
            a["name"]: a["node"] for a in spread["actors"]
        }


def test_a_plan_for_more_nodes_than_actors_uses_fewer() -> None:
    found = plan("nano-jamba", gpus_per_node=0, nodes=5, stages=3)
    assert (found["totals"]["nodes_used"], found["serve"]["nodes"]) == (3, 3)
    alone = plan("nano-jamba", gpus_per_node=0, nodes=5)
    assert alone["totals"]["nodes_used"] == 1
    assert "nodes" not in alone["serve"]


def test_disaggregated_stages_and_experts_share_no_gpu() -> None:
    found = plan("dbrx", nodes=2, layout="disaggregated")
    assert all(len(gpu["actors"]) == 1 for node in found["nodes"] for gpu in node["gpus"])


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("dbrx", {"gpus_per_node": 2}),
        ("jamba-large", {}),
        ("phi-3.5-moe", {"gpus_per_node": 1}),
        ("dbrx", {"context": 32768, "concurrency": 512}),
    ],
)
def test_what_does_not_fit_is_refused_with_what_does(model: str, options: dict[str, Any]) -> None:
    found = plan(model, **options)
    assert not found["fits"]
    assert found["reasons"]
    assert found["nearest"] == found["alternatives"][0]
    for other in found["alternatives"]:
        words = shlex.split(other["command"])
        assert words[:3] == ["conclave", "plan", model]
        given = {k.removeprefix("--").replace("-", "_"): v for k, v in _pairs(words[3:])}
        again = plan(model, **given)
        assert again["fits"], other
        assert again["options"]["stages"] == other["stages"]
        assert again["options"]["expert_shards"] == other["expert_shards"]


def _pairs(words: list[str]) -> list[tuple[str, str]]:
    return list(zip(words[::2], words[1::2], strict=True))


def test_the_nearest_has_the_fewest_machines() -> None:
    nearest = plan("jamba-large")["nearest"]
    assert (nearest["nodes"], nearest["gpus_per_node"], nearest["quantization"]) == (2, 8, "none")
    int8 = plan("jamba-large")["alternatives"][1]
    assert (int8["nodes"], int8["gpus_per_node"], int8["quantization"]) == (1, 8, "int8")
    assert plan("phi-3.5-moe", gpus_per_node=1)["nearest"]["gpus_per_node"] == 2


def test_too_many_processes_for_the_gpus() -> None:
    found = plan("dbrx", stages=4, expert_shards=16)
    assert found["reasons"] == ["16 GPUs are needed, one per process, but there are 8"]
    assert not found["fits"]


def test_a_node_without_gpus_needs_memory_for_everything() -> None:
    roomy = plan("nano-jamba", gpus_per_node=0, stages=2, nodes=2)
    needed = max(node["cpu_memory_bytes"] for node in roomy["nodes"])
    options: dict[str, Any] = {"gpus_per_node": 0, "stages": 2, "nodes": 2}
    assert plan("nano-jamba", **options, node_memory=needed)["fits"]
    tight = plan("nano-jamba", **options, node_memory=needed - 1)
    assert not tight["fits"]
    assert len(tight["reasons"]) == 1


def test_a_node_has_room_for_the_caches_that_serving_gives_itself() -> None:
    """Caches of a thousand sequences are far larger than anything else here."""
    asked = {"max_num_seqs": 1000, "max_model_len": 512, "max_num_batched_tokens": 16}
    found = plan(
        "nano-dbrx", gpus_per_node=0, concurrency=1000, context=512, max_num_batched_tokens=16
    )
    spec = resolve(parse_args({"model": "nano-dbrx", **asked})).spec
    memory = [actor["memory"] for actor in found["actors"]]
    loaded = sum(part["process"] + part["weights"] for part in memory)
    free = found["nodes"][0]["cpu_memory_bytes"] - loaded
    block = spec.cache_costs[0].block_bytes
    for missing, blocks in ((0, spec.limits.num_blocks), (2 * block, spec.limits.num_blocks - 1)):
        started = Started(address="", pid=1, node_id="", free_bytes=free - missing)
        assert plan_caches(spec, {"engine-0": started}).limits.num_blocks == blocks


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "no-such-model"}, "model=no-such-model: no such folder"),
        ({"context": 40_000}, "context=40000: allowed values are 2..32768"),
        ({"stages": 41, "gpus_per_node": 64}, "stages=41"),
        ({"expert_shards": 17}, "expert_shards=17: allowed values are 1..16"),
        ({"expert_replicas": 9, "expert_shards": 8}, "expert_replicas=9"),
        ({"quantization": "int4"}, "quantization=int4: allowed values are none, int8, int8-all"),
        ({"layout": "colocated", "gpus_per_node": 0}, "layout=colocated"),
        ({"layout": "elsewhere"}, "layout=elsewhere: allowed values are auto, colocated"),
        ({"gpu_memory": "lots"}, "gpu_memory"),
        ({"concurrency": 0}, "concurrency=0: allowed values are 1 or more"),
        ({"device": "cuda"}, "unknown option device: allowed options are model, nodes"),
        ({"max_num_batched_tokens": 10**6}, "max_num_batched_tokens=1000000"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(**{"model": "dbrx", "nodes": 4, **options})
    assert words in str(caught.value)
