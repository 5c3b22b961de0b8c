"""What each worker of a group will read of its checkpoint, from headers alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from models.interface import ModelConfig, TensorSlice
from shards.checkpoint import Checkpoint
from shards.quantization import int8_parameters, scale_slice
from shards.spec import GroupSpec, Role
from shards.verify import moe_pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLoad:
    """Bytes that one worker reads for its half-open range of `layers` and its `experts`."""

    role: Role
    index: int
    layers: tuple[int, int] | None
    experts: tuple[int, ...]
    num_bytes: int


def plan_loading(
    group: GroupSpec, config: ModelConfig, checkpoint: Checkpoint
) -> tuple[WorkerLoad, ...]:
    """Every worker of `group` that reads weights. Raises CheckpointError."""
    if group.executor == "local":
        layers = (0, config.num_layers)
        experts = range(config.num_experts) if moe_pairs(config, [0]) else ()
        num_bytes = _stage_bytes(config, checkpoint, layers)
        num_bytes += _expert_bytes(config, checkpoint, experts)
        return (_load(Role.ENGINE, 0, num_bytes, layers, experts),)
    stages = (
        _load(Role.STAGE, index, _stage_bytes(config, checkpoint, layers), layers)
        for index, layers in enumerate(group.stage_layers)
    )
    return (*stages, *_expert_loads(group, config, checkpoint))


def _expert_loads(
    group: GroupSpec, config: ModelConfig, checkpoint: Checkpoint
) -> Iterable[WorkerLoad]:
    if group.placement is None:
        return
    for index in range(group.placement.num_shards):
        held = group.placement.held_by(index)
        num_bytes = _expert_bytes(config, checkpoint, held)
        yield _load(Role.EXPERT, index, num_bytes, experts=held)


def _load(
    role: Role,
    index: int,
    num_bytes: int,
    layers: tuple[int, int] | None = None,
    experts: Iterable[int] = (),
) -> WorkerLoad:
    return WorkerLoad(
        role=role, index=index, layers=layers, experts=tuple(experts), num_bytes=num_bytes
    )


def _stage_bytes(config: ModelConfig, checkpoint: Checkpoint, layers: tuple[int, int]) -> int:
    with torch.device("meta"):  # only its slices are wanted, no memory
        stage = config.build_stage(*layers, torch.float32)
    int8 = int8_parameters(stage, config.quantization)
    return sum(
        _stored_bytes(checkpoint, wanted, name in int8) for name, wanted in stage.tensors().items()
    )


def _expert_bytes(config: ModelConfig, checkpoint: Checkpoint, experts: Iterable[int]) -> int:
    int8 = config.quantization != "none"
    return sum(
        _stored_bytes(checkpoint, wanted, int8)
        for pair in moe_pairs(config, experts)
        for wanted in config.expert_tensors(*pair).values()
    )


def _stored_bytes(checkpoint: Checkpoint, wanted: TensorSlice, int8: bool) -> int:
    """Of a slice, and of its scales where the files hold it as int8."""
    scale = checkpoint.num_bytes(scale_slice(wanted)) if int8 else 0
    return checkpoint.num_bytes(wanted) + scale
