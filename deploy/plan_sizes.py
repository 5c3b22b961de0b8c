"""How many parameters a model has and how many bytes they take: sums over its tensor maps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from models.interface import TensorSlice
from shards.cache_bytes import block_bytes, slot_bytes

if TYPE_CHECKING:
    from models.interface import ModelConfig

_SCALE_BYTES = 4
"""Of the float32 scale that each row of an int8 matrix has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Numeric:
    """How a model is held: bytes of an element of its dtype, and what of it is int8."""

    itemsize: int
    quantization: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSizes:
    """Of one copy of a model; parameters as the checkpoint holds them, bytes as they are served."""

    parameters: int
    active_parameters: int
    """That one token meets, embedding table and head included."""
    expert_bytes: int
    other_bytes: int
    scale_bytes: int
    checkpoint_bytes: int
    """In files of the model's dtype, not quantised: a tied embedding table is there once."""
    one_expert_bytes: int
    """One expert in one layer, without its scales."""
    kv_bytes_per_token: int
    state_bytes_per_sequence: int

    @property
    def num_bytes(self) -> int:
        """Everything."""
        return self.expert_bytes + self.other_bytes + self.scale_bytes


def moe_layers(config: ModelConfig) -> list[int]:
    """Layers with routed experts."""
    return [layer for layer in range(config.num_layers) if config.is_moe_layer(layer)]


def weight_sizes(
    config: ModelConfig, numeric: Numeric, names: frozenset[str] = frozenset()
) -> WeightSizes:
    """Count a whole model, in one process; `names` are the checkpoint's tensors where it is here,
    which may hold a head of its own all the same where the configuration ties it."""
    routed = moe_layers(config)
    one = expert_parameters(config)
    everything = range(config.num_layers)
    plain = stage_parameters(config, (0, config.num_layers))
    shared = _tied_elements(config, names)
    other, other_scales = stage_bytes(config, (0, config.num_layers), numeric)
    each, each_scale = expert_bytes(config, numeric)
    count = len(routed) * config.num_experts
    return WeightSizes(
        parameters=plain - shared + count * one,
        active_parameters=plain - shared + len(routed) * config.top_k * one,
        expert_bytes=count * each,
        other_bytes=other,
        scale_bytes=other_scales + count * each_scale,
        checkpoint_bytes=(plain - shared + count * one) * numeric.itemsize,
        one_expert_bytes=each,
        kv_bytes_per_token=block_bytes(config, everything, 1, numeric.itemsize),
        state_bytes_per_sequence=slot_bytes(config, everything, numeric.itemsize),
    )


def expert_parameters(config: ModelConfig) -> int:
    """Of one routed expert in one layer; 0 where there are none."""
    routed = moe_layers(config)
    if not routed:
        return 0
    return sum(_elements(part) for part in config.expert_tensors(routed[0], 0).values())


def expert_bytes(config: ModelConfig, numeric: Numeric) -> tuple[int, int]:
    """Of one routed expert in one layer: its matrices, and their scales where they are int8."""
    routed = moe_layers(config)
    if not routed:
        return 0, 0
    parts = config.expert_tensors(routed[0], 0).values()
    elements = sum(map(_elements, parts))
    if numeric.quantization == "none":
        return elements * numeric.itemsize, 0
    return elements, _SCALE_BYTES * sum(part.shape[0] for part in parts)


def stage_bytes(config: ModelConfig, layers: tuple[int, int], numeric: Numeric) -> tuple[int, int]:
    """What the stage of the layers first..last-1 holds: its parameters, and scales of int8 ones.

    A last stage holds a tied embedding table once more, as its head.
    """
    all_int8 = numeric.quantization == "int8-all"
    plain = scales = 0
    for name, part in _stage_tensors(config, range(*layers)).items():
        if all_int8 and name.partition(".")[2] in config.quantizable:
            plain += _elements(part)
            scales += _SCALE_BYTES * part.shape[0]
        else:
            plain += _elements(part) * numeric.itemsize
    return plain, scales


def stage_parameters(config: ModelConfig, layers: tuple[int, int]) -> int:
    """How many parameters the stage of the layers first..last-1 holds."""
    return sum(map(_elements, _stage_tensors(config, range(*layers)).values()))


def _stage_tensors(config: ModelConfig, layers: Iterable[int]) -> dict[str, TensorSlice]:
    """By `layer.name`; those of the ends have no layer."""
    held = list(layers)
    tensors = {
        f"{layer}.{name}": part
        for layer in held
        for name, part in config.layer_tensors(layer).items()
    }
    if held[0] == 0:
        tensors["embedding"] = config.embedding_tensor()
    if held[-1] == config.num_layers - 1:
        tensors.update(config.head_tensors())
    return tensors


def _tied_elements(config: ModelConfig, names: frozenset[str]) -> int:
    """Of the head that is the embedding table, which a checkpoint holds once."""
    table = config.embedding_tensor().sources[0].name
    return sum(
        _elements(part)
        for part in config.head_tensors().values()
        if any(source.name == table for source in part.sources)
        and part.sources[0].name not in names
    )


def _elements(part: TensorSlice) -> int:
    return prod(part.shape)
