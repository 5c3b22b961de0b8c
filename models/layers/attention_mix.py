"""What mixes tokens in an attention layer: norm, attention, residual and norm.

In one call where kernels compute all of it, else step by step: the bits are the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from models.interface import BatchMeta, KVCache
from models.kernels.attention import MAX_HEAD_DIM
from models.kernels.native import native_kernels_together
from models.kernels.whole import AttentionMixer, Norm
from models.layers.attention import PagedAttention
from models.layers.norm import add_rms_norm, layer_norm, rms_norm
from models.layers.rope import RotaryEmbedding
from models.layers.rowwise import project


class AttentionMix:
    """The mixing half of an attention layer; [R, D] → residual and normed, both [R, D]."""

    def __init__(
        self,
        attention: PagedAttention,
        rope: RotaryEmbedding | None,
        *,
        projection: str,
        norms: tuple[str, str],
        norm_eps: float,
        is_rms: bool,
        limit: float | None = None,
    ) -> None:
        """Names of the output product and of the norms' weights; the inputs' product is `qkv`.

        What comes out of that is clamped to ±`limit`. Norms are RMSNorm or LayerNorm.
        """
        assert limit is None or rope is not None, "heads are clamped where they are rotated"
        self._attention, self._rope, self._limit = attention, rope, limit
        self._projection, self._norms = projection, norms
        self._eps, self._is_rms = norm_eps, is_rms
        norm = "rms_norm" if is_rms else "layer_norm"
        self._parts = ("linear", "attention", norm, *(("rope",) if rope else ()))
        self._weights: Mapping[str, Tensor] = {}
        self._whole: AttentionMixer | None = None

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """The layer's parameters; a norm's bias and a product's bias and scale may be missing."""
        self._weights = weights
        self._whole = None

    def __call__(self, x: Tensor, meta: BatchMeta, cache: KVCache) -> tuple[Tensor, Tensor]:
        """Writes the batch's keys and values into the cache."""
        kernels = native_kernels_together(self._parts, x)
        if kernels is None or self._attention.head_dim > MAX_HEAD_DIM:
            return self.step_by_step(x, meta, cache)
        whole = self._whole or self._make_whole()
        angles = None if self._rope is None else self._rope.angles(meta)
        batch = self._attention.paged(meta, cache)
        return whole(kernels.name, x, batch, cache, angles, meta.program)

    def step_by_step(self, x: Tensor, meta: BatchMeta, cache: KVCache) -> tuple[Tensor, Tensor]:
        """The same, every operation by itself: kernels and PyTorch in any mixture."""
        meta.settle()
        w, shape = self._weights, self._attention
        counts = [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads]
        heads = project(self._norm(self._norms[0], x), w, "qkv")
        heads = heads.view(x.shape[0], -1, shape.head_dim)
        if self._rope is not None:
            heads = self._rope.rotate(heads, meta, counts[0] + counts[1], self._limit)
        q, k, v = torch.split_with_sizes(heads, counts, dim=1)
        mixed = project(self._attention(q, k, v, meta, cache), w, self._projection)
        if self._is_rms:
            return add_rms_norm(x, mixed, w[self._norms[1]], self._eps)
        residual = x + mixed
        return residual, self._norm(self._norms[1], residual)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        w = self._weights
        if self._is_rms:
            return rms_norm(x, w[name], self._eps)
        return layer_norm(x, w[name], w.get(f"{name}_bias"), self._eps)

    def _make_whole(self) -> AttentionMixer:
        w, shape = self._weights, self._attention
        before, after = (
            Norm.of(w[name], w.get(f"{name}_bias"), self._eps, is_rms=self._is_rms)
            for name in self._norms
        )
        self._whole = AttentionMixer(
            w,
            ("qkv", self._projection),
            (before, after),
            dtype=w[self._norms[0]].dtype,
            heads=(shape.num_heads, shape.num_kv_heads, shape.head_dim),
            window=shape.window,
            limit=self._limit,
        )
        return self._whole
