"""From a checkpoint to the weights of one worker: its own bytes and no others."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from models.interface import ExpertWeights, ModelConfig, StageModel, TensorSlice
from models.quantization_config import effective_quantization
from shards.checkpoint import Checkpoint, CheckpointError
from shards.expert_bank import ExpertBank
from shards.pages import Arena
from shards.quantization import (
    int8_parameters,
    quantize_rows,
    scale_name,
    scale_slice,
)
from shards.readers import Readers
from shards.verify import moe_pairs

Device = torch.device | str


def load_stage(
    config: ModelConfig,
    checkpoint: Checkpoint,
    first: int,
    last: int,
    dtype: torch.dtype,
    device: Device = "cpu",
    *,
    quantization: str = "none",
) -> StageModel:
    """Layers first..last-1 with their weights; reads no routed expert. Raises CheckpointError."""
    stage = config.build_stage(first, last, dtype)
    int8 = int8_parameters(stage, effective_quantization(quantization, config))
    weights: dict[str, Tensor] = {}
    arena = Arena()
    with Readers(checkpoint) as readers:
        for name, wanted in stage.tensors().items():
            if name in int8:
                values, scale = read_int8(config, checkpoint, wanted, device, arena, readers)
                weights[name], weights[scale_name(name)] = values, scale
            else:
                weights[name] = readers.read(wanted, dtype, device, arena)
    stage.load(weights)
    return stage


def load_experts(
    config: ModelConfig,
    checkpoint: Checkpoint,
    experts: Iterable[int],
    dtype: torch.dtype,
    device: Device = "cpu",
    *,
    quantization: str = "none",
) -> ExpertBank:
    """The given logical experts of every MoE layer, nothing else. Raises CheckpointError."""
    int8 = effective_quantization(quantization, config) != "none"
    arena = Arena()

    def load(readers: Readers, layer_idx: int, expert: int) -> ExpertWeights:
        parts: dict[str, Tensor] = {}
        for name, wanted in config.expert_tensors(layer_idx, expert).items():
            if int8:
                values, scale = read_int8(config, checkpoint, wanted, device, arena, readers)
                parts[name], parts[scale_name(name)] = values, scale
            else:
                parts[name] = readers.read(wanted, dtype, device, arena)
        return ExpertWeights(**parts)

    with Readers(checkpoint) as readers:
        weights = {pair: load(readers, *pair) for pair in moe_pairs(config, experts)}
    return ExpertBank(config, weights)


def read_int8(
    config: ModelConfig,
    checkpoint: Checkpoint,
    wanted: TensorSlice,
    device: Device = "cpu",
    arena: Arena | None = None,
    readers: Readers | None = None,
) -> tuple[Tensor, Tensor]:
    """A matrix as int8 values [N, K] and float32 scales [N], as stored or quantised when read.

    Quantised from the values on disk, whatever dtype is served, one tensor at a time; what is
    stored is left to `readers`, if there are any.
    """
    if config.quantization != "none":
        source = checkpoint if readers is None else readers
        values = source.read(wanted, torch.int8, device, arena)
        return values, source.read(scale_slice(wanted), torch.float32, device)
    empty = torch.empty if arena is None else arena.empty
    values = empty(wanted.shape, dtype=torch.int8, device=device)
    scale = torch.empty(wanted.shape[:1], device=device)
    start = 0
    for leaf in wanted.leaves:
        rows = slice(start, start := start + leaf.shape[0])
        name = checkpoint.find(leaf).name
        matrix = checkpoint.read(leaf, checkpoint.dtype(name), device)
        try:
            values[rows], scale[rows] = quantize_rows(matrix)
        except ValueError as error:
            raise CheckpointError(f"{checkpoint.path}: tensor {name}: {error}") from error
    return values, scale
