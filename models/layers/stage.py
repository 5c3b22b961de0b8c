"""A pipeline stage: some decoder layers, with embedding and head where the stage owns them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from models.interface import DecoderLayer, TensorSlice
from models.layers.rowwise import linear

FinalNorm = Callable[[Tensor, Mapping[str, Tensor]], Tensor]


class LoadableLayer(DecoderLayer, Protocol):
    """A decoder layer that names its parameters and takes them."""

    quantizable: frozenset[str]
    """Those of the parameters that may be int8, where the layer has them."""

    def tensors(self) -> dict[str, TensorSlice]:
        """The layer's parameters and where they are read from."""

    def load(self, weights: dict[str, Tensor]) -> None:
        """Take the parameters named by `tensors()`."""


class Stage:
    """The layers of one stage; implements `models.interface.StageModel`.

    `embedding` is the token table (first stage), `head` the tensors of the last stage: those of the
    final norm, `lm_head` [V, D] with an optional `lm_head_bias` [V], and `score` [num_labels, D]
    with an optional `score_bias`.
    """

    def __init__(
        self,
        *,
        layers: Sequence[LoadableLayer],
        embedding: TensorSlice | None,
        head: dict[str, TensorSlice],
        final_norm: FinalNorm,
    ) -> None:
        self.layers: tuple[DecoderLayer, ...] = tuple(layers)
        self._loadable = tuple(layers)
        self._final_norm = final_norm
        self._slices: dict[str, TensorSlice] = {}
        if embedding is not None:
            self._slices["embedding"] = embedding
        self._slices.update({f"head.{name}": part for name, part in head.items()})
        for layer in layers:
            for name, part in layer.tensors().items():
                self._slices[f"layers.{layer.layer_idx}.{name}"] = part
        self._quantizable = self._slices.keys() & {
            f"layers.{layer.layer_idx}.{name}" for layer in layers for name in layer.quantizable
        }
        self._embedding: Tensor | None = None
        self._head: dict[str, Tensor] = {}

    def embed(self, token_ids: Tensor) -> Tensor:
        """First stage: [R] int64 → [R, D]."""
        assert self._embedding is not None, "this stage holds no loaded embedding"
        return self._embedding.index_select(0, token_ids)

    def norm(self, x: Tensor) -> Tensor:
        """Last stage: final norm, [R', D] → [R', D]."""
        return self._final_norm(x, self._head)

    def logits(self, normed: Tensor) -> Tensor:
        """Last stage, `lm` head: [R', D] → [R', V]."""
        return linear(normed, self._head["lm_head"], self._head.get("lm_head_bias"))

    def scores(self, normed: Tensor) -> Tensor:
        """Last stage, `score` head: [R', D] → [R', num_labels]."""
        return linear(normed, self._head["score"], self._head.get("score_bias"))

    def tensors(self) -> dict[str, TensorSlice]:
        """Every parameter of the stage by its own name."""
        return dict(self._slices)

    def quantizable(self) -> frozenset[str]:
        """The parameters that may be int8."""
        return frozenset(self._quantizable)

    def load(self, weights: dict[str, Tensor]) -> None:
        """Take all parameters; ValueError names one that is missing, unknown or misshapen."""
        shapes = {name: part.shape for name, part in self._slices.items()}
        for name in self._quantizable & weights.keys():
            if weights[name].dtype == torch.int8:
                shapes[f"{name}_scale"] = shapes[name][:1]
        for name, expected in shapes.items():
            if name not in weights:
                raise ValueError(f"parameter {name} is missing")
            if tuple(weights[name].shape) != expected:
                shape = tuple(weights[name].shape)
                raise ValueError(f"parameter {name} has shape {shape}, expected {expected}")
        unknown = sorted(weights.keys() - shapes.keys())
        if unknown:
            raise ValueError(f"parameter {unknown[0]} does not belong to this stage")
        self._embedding = weights.get("embedding")
        self._head = _below("head.", weights)
        for layer in self._loadable:
            layer.load(_below(f"layers.{layer.layer_idx}.", weights))


def _below(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) :]: w for name, w in weights.items() if name.startswith(prefix)}
