"""Whether a checkpoint holds exactly a model: every tensor of it, and no other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from models.interface import ModelConfig, TensorSlice
from shards.checkpoint import Checkpoint, CheckpointError, extent_on_disk
from shards.quantization import int8_parameters, scale_slice

_NAMED = 20
"""Problems of one kind that are named; the others are counted."""
_ENOUGH = 10_000
"""Problems after which nothing more is looked for: the model is another one altogether."""


def verify(config: ModelConfig, checkpoint: Checkpoint) -> None:
    """Every tensor of the model is there, in its shape and a known dtype, and no other is.

    Raises one CheckpointError of one line that names the tensors that are missing, unexpected, or
    of a wrong shape or dtype, as far as there is room.
    """
    found = _Found()
    for wanted, is_int8 in _stored_slices(config):
        found.look_for(wanted, checkpoint, is_int8)
        if found.num_problems >= _ENOUGH:
            break
    at_least = "at least " if found.num_problems >= _ENOUGH else ""
    problems = [
        _listed("missing tensors", list(found.missing.values()), at_least),
        _listed("unexpected tensors", _unexpected(config, checkpoint, found)),
        _listed("tensors of a wrong shape", list(_wrong_shapes(checkpoint, found, at_least))),
        _listed("tensors of a wrong dtype", list(_wrong_dtypes(checkpoint, found))),
    ]
    if any(problems):
        raise CheckpointError(f"{checkpoint.path}: {'; '.join(filter(None, problems))}")


@dataclass(slots=True)
class _Found:
    """What a model's slices turned out to be in a checkpoint."""

    missing: dict[str, str] = field(default_factory=dict)
    """First spelling → all of them; each expert of a stacked tensor misses the same one."""
    extents: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Shape that each tensor must have to hold all that is read from it."""
    int8: set[str] = field(default_factory=set)
    num_problems: int = 0

    def look_for(self, wanted: TensorSlice, checkpoint: Checkpoint, is_int8: bool) -> None:
        """Note one slice as missing, or how much of its tensor is wanted."""
        try:
            source = checkpoint.find(wanted)
        except CheckpointError:
            names = [source.name for source in wanted.sources]
            self.missing.setdefault(names[0], " or ".join(names))
            self.num_problems += 1
            return
        extent = extent_on_disk(wanted, source)
        extent = tuple(map(max, self.extents.get(source.name, extent), extent))
        self.extents[source.name] = extent
        self.num_problems += any(map(int.__gt__, extent, checkpoint.shape(source.name)))
        if is_int8:
            self.int8.add(source.name)


def _unexpected(config: ModelConfig, checkpoint: Checkpoint, found: _Found) -> list[str]:
    if found.num_problems >= _ENOUGH:  # not all was looked for
        return []
    surplus = checkpoint.names - found.extents.keys()
    return sorted(surplus - config.ignored_tensors(surplus))


def _wrong_shapes(checkpoint: Checkpoint, found: _Found, at_least: str) -> Iterator[str]:
    for name, extent in found.extents.items():
        shape = checkpoint.shape(name)
        if shape != extent:
            yield f"{name} is {list(shape)}, not {at_least}{list(extent)}"


def _wrong_dtypes(checkpoint: Checkpoint, found: _Found) -> Iterator[str]:
    for name in found.extents:
        try:
            dtype = checkpoint.dtype(name)
        except CheckpointError as error:
            yield str(error).removeprefix(f"{checkpoint.path}: tensor ")
            continue
        if (dtype is torch.int8) != (name in found.int8):
            wanted = "int8, as quantization_config says" if name in found.int8 else "floating-point"
            yield f"{name} has dtype {dtype}; allowed: {wanted}"


def _listed(what: str, names: list[str], at_least: str = "") -> str:
    """`missing tensors: a, b`, with at most _NAMED names; nothing where there are none."""
    if not names:
        return ""
    surplus = len(names) - _NAMED
    more = f" and {at_least}{surplus} more" if surplus > 0 else ""
    return f"{what}: {', '.join(names[:_NAMED])}{more}"


def _stored_slices(config: ModelConfig) -> Iterator[tuple[TensorSlice, bool]]:
    """What the files hold, scales included, and whether it is int8."""
    for leaf, is_int8 in model_slices(config, config.quantization):
        yield leaf, is_int8
        if is_int8:
            yield scale_slice(leaf), False


def model_slices(config: ModelConfig, quantization: str) -> Iterator[tuple[TensorSlice, bool]]:
    """Every slice of the model, each of one tensor, and whether `quantization` makes it int8.

    Layer by layer: a reader may stop long before the last of many.
    """
    for layer_idx in range(config.num_layers):
        with torch.device("meta"):  # only the names are wanted, no memory
            stage = config.build_stage(layer_idx, layer_idx + 1, torch.float32)
        int8 = int8_parameters(stage, quantization)
        for name, wanted in stage.tensors().items():
            yield from ((leaf, name in int8) for leaf in wanted.leaves)
        if config.is_moe_layer(layer_idx):
            for expert in range(config.num_experts):
                for wanted in config.expert_tensors(layer_idx, expert).values():
                    yield wanted, quantization != "none"


def moe_pairs(config: ModelConfig, experts: Iterable[int]) -> list[tuple[int, int]]:
    """(layer_idx, expert) of the given experts in every MoE layer."""
    held = list(experts)
    layers = (i for i in range(config.num_layers) if config.is_moe_layer(i))
    return [(layer_idx, expert) for layer_idx in layers for expert in held]
