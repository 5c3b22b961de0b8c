"""What rehearsals of the overlays rest on: without GPUs the plan is the same."""

from __future__ import annotations

import pytest

from deploy.rehearsal import VARIABLE, rehearsed
from k8s.render import overlays
from tests.k8s.rehearsals import (
    nano_model,
    planned,
    planned_overlay,
    ray_nodes,
    serve_args,
    serve_config,
)

FAMILIES = {
    "nano": "nano-jamba",
    "dbrx": "nano-dbrx",
    "jamba": "nano-jamba",
    "phi": "nano-phimoe",
}
NAMES = [overlay.name for overlay in overlays()]


@pytest.mark.parametrize("overlay", NAMES)
def test_without_gpus_the_plan_has_every_actor_on_the_same_node(overlay: str) -> None:
    places = planned(overlay)
    assert places == planned(overlay, gpus_per_node=0)
    nodes = {place.node for place in places.values()}
    assert len(nodes) == len(ray_nodes(overlay)["workers"]) == serve_args(overlay).get("nodes", 1)


def test_stages_and_shards_of_dbrx_are_in_halves_and_quarters() -> None:
    for overlay, nodes in (("dbrx", 2), ("dbrx-4x4", 4)):
        places = planned(overlay)
        assert len(places) == 3 + 4 + 16
        for index in range(4):
            assert places[f"stage-{index}"].node == index // (4 // nodes)
        for index in range(16):
            assert places[f"expert-{index}"].node == index // (16 // nodes)
            assert places[f"expert-{index}"].experts == (index,)


@pytest.mark.parametrize("overlay", NAMES)
def test_variants_deploy_the_same_on_the_same_nodes(overlay: str) -> None:
    base = planned_overlay(overlay).name
    assert serve_config(overlay) == serve_config(base)
    assert ray_nodes(overlay) == ray_nodes(base)


@pytest.mark.parametrize("overlay", NAMES)
def test_a_rehearsal_is_of_the_same_family_and_topology(
    overlay: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, nano_model(overlay))
    asked = serve_args(overlay)
    assert nano_model(overlay) == FAMILIES[overlay.partition("-")[0]]
    args, _ = rehearsed(asked)
    kept = ("expert_shards", "nodes", "quantization", "max_num_seqs", "max_replicas")
    assert {key: getattr(args, key) for key in kept if key in asked} == {
        key: asked[key] for key in kept if key in asked
    }
    assert args.stages == min(asked["stages"], 8 if "jamba" in overlay else 4)
