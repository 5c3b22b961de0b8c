"""From a checkpoint to the weights of one worker: its own bytes and no others."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from models.interface import ExpertWeights, ModelConfig, StageModel
from shards.checkpoint import Checkpoint
from shards.expert_bank import ExpertBank
from shards.verify import moe_pairs


def load_stage(
    config: ModelConfig,
    checkpoint: Checkpoint,
    first: int,
    last: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> StageModel:
    """Layers first..last-1 with their weights; reads no routed expert. Raises CheckpointError."""
    stage = config.build_stage(first, last, dtype)
    slices = stage.tensors().items()
    stage.load({name: checkpoint.read(wanted, dtype, device) for name, wanted in slices})
    return stage


def load_experts(
    config: ModelConfig,
    checkpoint: Checkpoint,
    experts: Iterable[int],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> ExpertBank:
    """The given logical experts of every MoE layer, nothing else. Raises CheckpointError."""

    def load(layer_idx: int, expert: int) -> ExpertWeights:
        slices = config.expert_tensors(layer_idx, expert)
        return ExpertWeights(
            **{name: checkpoint.read(wanted, dtype, device) for name, wanted in slices.items()}
        )

    return ExpertBank(config, {pair: load(*pair) for pair in moe_pairs(config, experts)})
