"""Whether a checkpoint holds exactly a model: every tensor of it, and no other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product

import torch

from models.interface import ModelConfig, TensorSlice
from shards.checkpoint import Checkpoint, CheckpointError, extent_on_disk


def verify(config: ModelConfig, checkpoint: Checkpoint) -> None:
    """Every tensor of the model is there, in its shape and a known dtype, and no other is.

    Raises one CheckpointError that names each missing, wrongly shaped and unexpected tensor.
    """
    problems: list[str] = []
    extents: dict[str, tuple[int, ...]] = {}
    for wanted in _all_slices(config):
        try:
            source = checkpoint.find(wanted)
        except CheckpointError:
            problems.append("missing tensor " + " or ".join(s.name for s in wanted.sources))
            continue
        extent = extent_on_disk(wanted, source)
        known = extents.get(source.name, extent)
        extents[source.name] = tuple(map(max, known, extent))
    for name, extent in extents.items():
        if checkpoint.shape(name) != extent:
            problems.append(
                f"tensor {name} has shape {list(checkpoint.shape(name))}, not {list(extent)}"
            )
        try:
            checkpoint.dtype(name)
        except CheckpointError as error:
            problems.append(str(error))
    unexpected = checkpoint.names - extents.keys()
    unexpected -= config.ignored_tensors(unexpected)
    problems += [f"unexpected tensor {name}" for name in sorted(unexpected)]
    if problems:
        raise CheckpointError("\n  ".join([f"{checkpoint.path}:", *dict.fromkeys(problems)]))


def _all_slices(config: ModelConfig) -> Iterator[TensorSlice]:
    with torch.device("meta"):  # only the names are wanted, no memory
        yield from config.build_stage(0, config.num_layers, torch.float32).tensors().values()
    for layer_idx, expert in moe_pairs(config, range(config.num_experts)):
        yield from config.expert_tensors(layer_idx, expert).values()


def moe_pairs(config: ModelConfig, experts: Iterable[int]) -> list[tuple[int, int]]:
    """(layer_idx, expert) of the given experts in every MoE layer."""
    layers = [i for i in range(config.num_layers) if config.is_moe_layer(i)]
    return list(product(layers, experts))
