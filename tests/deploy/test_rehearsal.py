"""CONCLAVE_REHEARSAL: the topology that is configured, on a nano model and without a GPU."""

from __future__ import annotations

from typing import Any

import pytest

from deploy.app import build
from deploy.config import ConfigError, parse_args
from deploy.rehearsal import VARIABLE, recut, rehearsed

CONFIGURED: dict[str, Any] = {
    "model": "/models/dbrx-instruct",
    "device": "cuda",
    "stages": 16,
    "expert_shards": "16",
    "expert_replicas": 2,
    "nodes": 2,
    "quantization": "int8",
    "max_model_len": 32768,
    "max_num_seqs": 64,
    "max_replicas": 3,
}


@pytest.fixture(autouse=True)
def rehearsing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "nano-dbrx")


def test_what_is_configured_stays_but_for_model_and_gpus() -> None:
    args, changes = rehearsed(CONFIGURED)
    asked = parse_args({**CONFIGURED, "device": "cpu"})
    changed = {
        "model": "nano-dbrx",
        "served_model_name": "dbrx-instruct",
        "stages": 4,  # it has no more layers
        "max_model_len": 512,  # nor positions
    }
    assert args == asked.model_copy(update=changed)
    assert sorted(changes) == [
        f"{VARIABLE}: device=cpu instead of cuda",
        f"{VARIABLE}: max_model_len=512 instead of 32768",
        f"{VARIABLE}: model=nano-dbrx instead of /models/dbrx-instruct",
        f"{VARIABLE}: stages=4 instead of 16",
    ]


def test_what_needs_a_gpu_is_replaced() -> None:
    wanted = {"layout": "colocated", "attention_backend": "flash_attention_2"}
    args, changes = rehearsed({"model": "m", **wanted, "mamba_backend": "mamba_ssm"})
    assert (args.layout, args.attention_backend, args.mamba_backend) == (
        "disaggregated",
        "auto",
        "auto",
    )
    assert len(changes) == 4


def test_more_shards_than_copies_of_experts_are_cut() -> None:
    args, _ = rehearsed({"model": "m", "expert_shards": 33, "expert_replicas": 2})
    assert args.expert_shards == 32


def test_a_wrong_option_is_still_wrong() -> None:
    for wrong in ({"device": "cdua"}, {"stage": 2}, {"stages": "many"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            rehearsed({"model": "m", **wrong})
    with pytest.raises(ConfigError, match="model is missing"):
        rehearsed({"stages": 2})


@pytest.mark.parametrize("name", ["nano", "dbrx", "nano-DBRX"])
def test_a_wrong_model_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, name)
    with pytest.raises(ConfigError, match=f"{VARIABLE}={name}: allowed values are nano-dbrx, nano"):
        rehearsed({"model": "m"})


def test_without_it_nothing_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")
    with pytest.raises(ConfigError, match="device=cuda"):
        build(CONFIGURED)
    assert rehearsed({"model": "m", "stages": 16}) == (parse_args({"model": "m", "stages": 16}), ())


def test_the_application_says_what_was_changed() -> None:
    deployment = build({**CONFIGURED, "stage_layers": "0-9,10-39", "stages": 2})._bound_deployment
    (resolved,) = deployment.init_args
    assert resolved.served_model_name == "dbrx-instruct"
    assert resolved.spec.stage_layers == ((0, 1), (1, 4))
    assert f"{VARIABLE}: stage_layers=0-0,1-3 instead of 0-9,10-39" in resolved.warnings
    # One bundle per node: three actors and what is on the node of two stages and 16 shards.
    reserved = deployment._replica_config
    assert [each["CPU"] for each in reserved.placement_group_bundles] == [1.2, 0.9]
    assert reserved.placement_group_strategy == "STRICT_SPREAD"


@pytest.mark.parametrize(
    ("ranges", "num_layers", "expected"),
    [
        (((0, 20), (20, 40)), 4, ((0, 2), (2, 4))),
        (((0, 10), (10, 40)), 4, ((0, 1), (1, 4))),
        (((0, 1), (1, 2), (2, 40)), 4, ((0, 1), (1, 2), (2, 4))),
        (((0, 38), (38, 39), (39, 40)), 4, ((0, 2), (2, 3), (3, 4))),
        (tuple((i, i + 1) for i in range(40)), 4, ((0, 1), (1, 2), (2, 3), (3, 4))),
        (((0, 40),), 8, ((0, 8),)),
        (((0, 1), (1, 2)), 8, ((0, 4), (4, 8))),
    ],
)
def test_layers_are_cut_in_proportion(
    ranges: tuple[tuple[int, int], ...], num_layers: int, expected: tuple[tuple[int, int], ...]
) -> None:
    assert recut(ranges, num_layers) == expected
