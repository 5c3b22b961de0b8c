"""Runs a model in process with the plainest caches and expert loop: the tests' own runner."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from models.interface import (
    BatchMeta,
    ExpertWeights,
    KVCache,
    LayerCache,
    ModelConfig,
    Routing,
    StateCache,
    TensorSlice,
)
from models.layers.activation import ACTIVATIONS
from models.layers.moe import expert_rows
from models.layers.rowwise import padded_rows
from models.registry import load_config

Checkpoint = Mapping[str, Tensor]


def read_checkpoint(folder: Path) -> dict[str, Tensor]:
    """Every tensor of every safetensors file in the folder."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def read_slice(checkpoint: Checkpoint, part: TensorSlice, dtype: torch.dtype) -> Tensor:
    """What a loader must return for one `TensorSlice`."""
    if part.parts:
        return torch.cat([read_slice(checkpoint, leaf, dtype) for leaf in part.parts])
    source = next(s for s in part.sources if s.name in checkpoint)
    tensor = checkpoint[source.name]
    if source.index is not None:
        tensor = tensor[source.index]
    tensor = tensor[source.start : source.stop]
    if source.transpose:
        tensor = tensor.t()
    assert tuple(tensor.shape) == part.shape
    return tensor.to(dtype).contiguous().clone()


@dataclass(frozen=True)
class Chunk:
    """Some tokens of one sequence; `length` is how many it has in all (None: up to here)."""

    seq: int
    start: int
    tokens: Sequence[int]
    length: int | None = None


class Served:
    """A loaded model with caches for a few sequences; unwritten keys and values are NaN."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        dtype: torch.dtype = torch.float32,
        *,
        cuts: Sequence[int] = (),
        block_size: int = 16,
        num_seqs: int = 6,
        max_length: int = 192,
    ) -> None:
        self.config, self.dtype, self.block_size = config, dtype, block_size
        bounds = [0, *cuts, config.num_layers]
        self.stages = [config.build_stage(a, b, dtype) for a, b in itertools.pairwise(bounds)]
        for stage in self.stages:
            parts = stage.tensors().items()
            stage.load({name: read_slice(checkpoint, part, dtype) for name, part in parts})
        self.experts = {
            (layer, expert): ExpertWeights(
                **{
                    name: read_slice(checkpoint, part, dtype)
                    for name, part in config.expert_tensors(layer, expert).items()
                }
            )
            for layer in range(config.num_layers)
            if config.is_moe_layer(layer)
            for expert in range(config.num_experts)
        }
        blocks = -(-max_length // block_size)
        self.caches = [self._cache(i, blocks * num_seqs) for i in range(config.num_layers)]
        # Every sequence's blocks lie scattered over the cache.
        shuffled = torch.randperm(blocks * num_seqs, generator=torch.Generator().manual_seed(5))
        self.tables = shuffled.view(num_seqs, blocks)
        self.routings: dict[int, Routing] = {}

    @classmethod
    def open(cls, folder: Path, dtype: torch.dtype = torch.float32, **options: object) -> Served:
        """Load a checkpoint folder."""
        tensors = read_checkpoint(folder)
        config = load_config(folder).with_tensors(frozenset(tensors))
        return cls(config, tensors, dtype, **options)  # type: ignore[arg-type]

    def _cache(self, layer: int, num_blocks: int) -> LayerCache:
        shape = self.config.cache_shape(layer)
        if shape.kind == "kv":
            size = (num_blocks, shape.num_kv_heads, self.block_size, shape.head_dim)
            nan = torch.full(size, float("nan"), dtype=self.dtype)
            return KVCache(nan, nan.clone())
        slots = num_blocks
        return StateCache(
            torch.zeros(slots, *shape.conv_shape, dtype=self.dtype),
            torch.zeros(slots, *shape.ssm_shape),
        )

    def forget(self, seq: int) -> None:
        """Zero a sequence's state slot."""
        for cache in self.caches:
            if isinstance(cache, StateCache):
                cache.conv[seq].zero_()
                cache.ssm[seq].zero_()

    @torch.no_grad()
    def step(self, chunks: Sequence[Chunk]) -> list[Tensor]:
        """Logits [len(tokens), V] of each chunk, all computed in one packed batch."""
        return self._split(self.stages[-1].logits(self._normed(chunks)), chunks)

    @torch.no_grad()
    def scores(self, chunks: Sequence[Chunk]) -> list[Tensor]:
        """Classification scores [len(tokens), num_labels] of each chunk, likewise."""
        return self._split(self.stages[-1].scores(self._normed(chunks)), chunks)

    def _split(self, rows: Tensor, chunks: Sequence[Chunk]) -> list[Tensor]:
        counts = [len(c.tokens) for c in chunks]
        return list(rows[: sum(counts)].split(counts))

    def _normed(self, chunks: Sequence[Chunk]) -> Tensor:
        """[R, D] rows after the final norm, padding included."""
        meta = self._meta(chunks)
        tokens = [t for c in chunks for t in c.tokens]
        ids = torch.zeros(meta.num_rows, dtype=torch.int64)
        ids[: len(tokens)] = torch.tensor(tokens)
        x = self.stages[0].embed(ids)
        for stage in self.stages:
            for layer in stage.layers:
                residual, h = layer.mix(x, meta, self.caches[layer.layer_idx])
                if layer.is_moe:
                    outputs = self._experts(layer.layer_idx, h, layer.gate(h), meta.num_tokens)
                    x = layer.combine(residual, outputs)
                else:
                    x = layer.dense(residual, h, meta)
        return self.stages[-1].norm(x)

    def _meta(self, chunks: Sequence[Chunk]) -> BatchMeta:
        counts = [len(c.tokens) for c in chunks]
        starts = [0, *itertools.accumulate(counts)]
        total = starts[-1]
        rows = padded_rows(total, self.dtype)
        positions = torch.zeros(rows, dtype=torch.int64)
        slots = []
        for chunk, first, count in zip(chunks, starts, counts, strict=False):
            at = torch.arange(chunk.start, chunk.start + count)
            positions[first : first + count] = at
            blocks = self.tables[chunk.seq][at // self.block_size]
            slots.append(blocks * self.block_size + at % self.block_size)
        return BatchMeta(
            num_tokens=total,
            num_rows=rows,
            query_starts=tuple(starts),
            starts=tuple(c.start for c in chunks),
            lengths=tuple(c.length or c.start + len(c.tokens) for c in chunks),
            positions=positions,
            slot_mapping=torch.cat(slots),
            block_tables=self.tables[[c.seq for c in chunks]],
            state_slots=tuple(c.seq for c in chunks),
        )

    def _experts(self, layer: int, h: Tensor, routing: Routing, num_tokens: int) -> Tensor:
        """Every expert over the rows routed to it; combined in routing order, in float32."""
        self.routings[layer] = routing
        ids = routing.expert_ids[:num_tokens]
        results = h.new_zeros(num_tokens, ids.shape[1], h.shape[1])
        for expert in ids.unique().tolist():
            rows, slots = torch.nonzero(ids == expert, as_tuple=True)
            weights = self.experts[layer, expert]
            act = ACTIVATIONS[self.config.activation]
            results[rows, slots] = expert_rows(h[rows], [(weights, len(rows))], act)
        total = torch.zeros(num_tokens, h.shape[1])
        for slot in range(ids.shape[1]):
            weight = routing.weights[:num_tokens, slot, None].float()
            total = total + weight * results[:, slot].float()
        out = h.new_zeros(h.shape)
        out[:num_tokens] = total.to(h.dtype)
        return out


def tokens_of(seed: int, count: int, vocab_size: int = 97) -> list[int]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (count,), generator=generator).tolist()


def in_chunks(served: Served, seq: int, tokens: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """Feed a sequence in chunks of the given sizes (the last one repeated): logits [T, V]."""
    served.forget(seq)
    start, rows = 0, []
    for size in itertools.chain(sizes, itertools.repeat(sizes[-1])):
        if start >= len(tokens):
            break
        piece = tokens[start : start + size]
        rows += served.step([Chunk(seq, start, piece, len(tokens))])
        start += len(piece)
    return torch.cat(rows)
