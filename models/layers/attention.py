"""Causal grouped-query attention over a paged cache, with one reduction order for every batch.

Where there is a native kernel it does all of it, in an order of its own. Here, queries are cut into
tiles of a fixed number of rows, keys into splits of `SPLIT` at absolute positions. Every (tile,
split) pair is the same two matrix products, in float32; the maximum is exact, and the splits are
summed one after the other in absolute order. A split that holds no visible key contributes exact
zeros, so neither its presence nor its absence changes a bit: prefill chunks, one-token decodes and
mixed batches agree.

Legend: U (tile, split) pairs, M rows per tile, G key/value heads, h head_dim, S splits of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.interface import BatchMeta, KVCache
from models.kernels.attention import MAX_HEAD_DIM, PagedBatch
from models.kernels.native import native_kernels
from models.layers.batch_memo import BatchMemo

SPLIT = 64
"""Keys per split."""
_MIN_TILE_ROWS = 8
_GROUP_ELEMENTS = 1 << 21
"""Keys gathered at once, in elements: bounds memory, cannot change bits."""


@dataclass(frozen=True, slots=True)
class _TileGroup:
    """n query tiles computed together, each against S splits."""

    query_rows: Tensor
    """[n, Q] row of each query (the last one repeated where a tile is not full)."""
    key_slots: Tensor
    """[n * S, SPLIT] flat cache index of each key; hidden keys point at a visible one."""
    hidden: Tensor
    """[n, S, 1, M, SPLIT] True where a query must not see a key."""


@dataclass(frozen=True, slots=True)
class _Plan:
    groups: tuple[_TileGroup, ...]
    order: Tensor
    """[T] where each token's output lies in the groups' outputs, one behind the other."""
    written_rows: Tensor
    """[T * G] cache row that each token's key and value of each head are written to."""


class PagedAttention:
    """Attention shared by the layers of a stage: no weights, only shapes and the batch's plan."""

    def __init__(
        self, *, num_heads: int, num_kv_heads: int, head_dim: int, window: int | None = None
    ) -> None:
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.window = window
        self._heads_per_kv = num_heads // num_kv_heads
        self._queries_per_tile = max(1, _MIN_TILE_ROWS // self._heads_per_kv)
        used_rows = self._queries_per_tile * self._heads_per_kv
        self._tile_rows = -(-used_rows // _MIN_TILE_ROWS) * _MIN_TILE_ROWS
        self._plans = BatchMemo(self._plan)
        self._batches = BatchMemo(PagedBatch)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, meta: BatchMeta, cache: KVCache) -> Tensor:
        """[R, H, h] queries, [R, G, h] keys and values → [R, H * h]; writes the cache first."""
        kernels = native_kernels("attention", q.dtype, q.device)
        if kernels is not None and self.head_dim <= MAX_HEAD_DIM:
            batch = self.paged(meta, cache)
            return batch.attend(kernels.name, q, k, v, cache, self.window)
        flat, plan = (-1, self.head_dim), self._plans(meta, cache.block_size)
        keys, values = cache.key.view(flat), cache.value.view(flat)
        keys.index_copy_(0, plan.written_rows, k[: meta.num_tokens].reshape(flat))
        values.index_copy_(0, plan.written_rows, v[: meta.num_tokens].reshape(flat))
        outputs = [self._attend(q, cache, group) for group in plan.groups]
        out = q.new_zeros(meta.num_rows, self.num_heads * self.head_dim)
        if outputs:
            out[: meta.num_tokens] = torch.cat(outputs).index_select(0, plan.order).to(q.dtype)
        return out

    def paged(self, meta: BatchMeta, cache: KVCache) -> PagedBatch:
        """The batch as the kernel reads it."""
        return self._batches(meta, cache.block_size)

    def _attend(self, q: Tensor, cache: KVCache, group: _TileGroup) -> Tensor:
        """One group of tiles: → [n * Q, H * h] float32."""
        num_tiles, num_splits, _, tile_rows, _ = group.hidden.shape
        kv_heads, head_dim = self.num_kv_heads, self.head_dim
        key_rows = self._cache_rows(group.key_slots, cache.block_size).transpose(1, 2).flatten()
        tiles = self._query_tiles(q, group.query_rows)
        tiles = tiles[:, None].expand(-1, num_splits, -1, -1, -1)
        scores = torch.bmm(
            tiles.reshape(-1, tile_rows, head_dim),
            self._gather(cache.key, key_rows).transpose(1, 2),
        )
        scores = scores.view(num_tiles, num_splits, kv_heads, tile_rows, SPLIT)
        scores.mul_(head_dim**-0.5).masked_fill_(group.hidden, float("-inf"))
        scores.sub_(scores.amax(dim=(1, 4), keepdim=True)).exp_()
        partial = torch.bmm(
            scores.view(-1, tile_rows, SPLIT), self._gather(cache.value, key_rows)
        ).view(num_tiles, num_splits, kv_heads, tile_rows, head_dim)
        masses = scores.sum(-1, keepdim=True)
        total = torch.zeros_like(partial[:, 0])
        mass = torch.zeros_like(masses[:, 0])
        for split in range(num_splits):
            total.add_(partial[:, split])
            mass.add_(masses[:, split])
        return self._untile(total.div_(mass))

    def _query_tiles(self, q: Tensor, query_rows: Tensor) -> Tensor:
        """[R, H, h] → [n, G, M, h] float32: a tile's rows are (query, head of the group)."""
        num_tiles, queries = query_rows.shape
        picked = q.index_select(0, query_rows.flatten()).float()
        picked = picked.view(num_tiles, queries, self.num_kv_heads, self._heads_per_kv, -1)
        used = queries * self._heads_per_kv
        tiles = picked.new_zeros(num_tiles, self.num_kv_heads, self._tile_rows, self.head_dim)
        tiles[:, :, :used] = picked.transpose(1, 2).reshape(
            num_tiles, self.num_kv_heads, used, self.head_dim
        )
        return tiles

    def _untile(self, tiles: Tensor) -> Tensor:
        """[n, G, M, h] → [n * Q, H * h]."""
        num_tiles = tiles.shape[0]
        used = self._queries_per_tile * self._heads_per_kv
        rows = tiles[:, :, :used].reshape(
            num_tiles, self.num_kv_heads, self._queries_per_tile, self._heads_per_kv, self.head_dim
        )
        return rows.transpose(1, 2).reshape(-1, self.num_heads * self.head_dim)

    def _gather(self, cached: Tensor, rows: Tensor) -> Tensor:
        """Rows of a cache → [U * G, SPLIT, h] float32."""
        picked = cached.view(-1, self.head_dim).index_select(0, rows)
        return picked.view(-1, SPLIT, self.head_dim).float()

    def _cache_rows(self, slots: Tensor, block_size: int) -> Tensor:
        """[...] slots → [..., G] rows of a cache [blocks * G * block_size, h]."""
        heads = torch.arange(self.num_kv_heads, device=slots.device)
        blocks = (slots // block_size)[..., None] * self.num_kv_heads + heads
        return blocks * block_size + (slots % block_size)[..., None]

    def _plan(self, meta: BatchMeta, block_size: int) -> _Plan:
        """Cut the batch into tiles and group tiles that need a similar number of splits."""
        device = meta.positions.device
        rows, owners, places = [], [], []
        num_tiles, width = 0, self._queries_per_tile
        for seq, (first, last) in enumerate(
            zip(meta.query_starts, meta.query_starts[1:], strict=False)
        ):
            tiles = -(-(last - first) // width)
            rows.append(torch.arange(first, first + tiles * width).clamp_(max=last - 1))
            owners.extend([seq] * tiles)
            places.append(torch.arange(last - first) + num_tiles * width)
            num_tiles += tiles
        if not num_tiles:
            return _Plan((), *[torch.zeros(0, dtype=torch.int64, device=device)] * 2)
        tile_rows = torch.cat(rows).view(-1, width)
        tile_positions = meta.positions.cpu()[tile_rows]
        lowest = torch.zeros(num_tiles, dtype=torch.int64)
        if self.window is not None:
            lowest = (tile_positions[:, 0] - self.window + 1).clamp_(min=0)
        first_split = lowest // SPLIT
        counts = tile_positions[:, -1] // SPLIT - first_split + 1
        by_count = torch.argsort(counts, stable=True)
        groups = []
        for members in self._group(counts[by_count].tolist()):
            picked = by_count[members]
            tables = meta.block_tables[torch.tensor(owners)[picked].to(device)]
            bounds = lowest[picked], first_split[picked], int(counts[picked[-1]])
            groups.append(
                self._tile_group(
                    tile_rows[picked], tile_positions[picked], bounds, tables, block_size
                )
            )
        rank = torch.empty_like(by_count)
        rank[by_count] = torch.arange(num_tiles)
        natural = torch.cat(places)
        order = rank[natural // width] * width + natural % width
        written = self._cache_rows(meta.slot_mapping, block_size).flatten()
        return _Plan(tuple(groups), order.to(device), written)

    def _group(self, counts: list[int]) -> list[slice]:
        """Cut tiles, sorted by their number of splits, into groups of bounded memory."""
        per_split = SPLIT * self.num_kv_heads * self.head_dim
        groups, start = [], 0
        for end in range(1, len(counts) + 1):
            full = end < len(counts) and (
                (end + 1 - start) * counts[end] * per_split > _GROUP_ELEMENTS
                # Padding tiles to twice their splits would cost more than another call.
                or counts[end] > 2 * counts[start]
            )
            if full or end == len(counts):
                groups.append(slice(start, end))
                start = end
        return groups

    def _tile_group(
        self,
        query_rows: Tensor,
        query_positions: Tensor,
        bounds: tuple[Tensor, Tensor, int],
        tables: Tensor,
        block_size: int,
    ) -> _TileGroup:
        device = tables.device
        lowest, first_split, num_splits = bounds
        keys = first_split[:, None] * SPLIT + torch.arange(num_splits * SPLIT)
        last = query_positions[:, -1:]
        # A hidden key's weight is exactly 0, but 0 times an unwritten NaN is not: look elsewhere.
        visible = torch.minimum(torch.maximum(keys, lowest[:, None]), last).to(device)
        slots = torch.gather(tables, 1, visible // block_size) * block_size + visible % block_size
        row_positions = query_positions.repeat_interleave(self._heads_per_kv, dim=1)
        spare = self._tile_rows - row_positions.shape[1]
        row_positions = torch.cat([row_positions, last.expand(-1, spare)], dim=1)
        key_grid = keys.view(-1, num_splits, 1, 1, SPLIT)
        query_grid = row_positions.view(-1, 1, 1, self._tile_rows, 1)
        hidden = key_grid > query_grid
        if self.window is not None:
            hidden |= key_grid <= query_grid - self.window
        return _TileGroup(query_rows.to(device), slots.view(-1, SPLIT), hidden.to(device))
