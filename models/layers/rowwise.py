"""Matrix products whose rows do not know how many rows there are.

BLAS picks another summation order when the number of rows changes (one row against two, a full
panel against a remainder), so every product here is made of calls with one fixed number of rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_ROW_TILES = {torch.float32: 8, torch.bfloat16: 16, torch.float16: 16}

_MIN_OUTPUTS = 4


def row_tile(dtype: torch.dtype) -> int:
    """Rows of every matrix product in `dtype`; KeyError for a dtype that cannot be served."""
    return _ROW_TILES[dtype]


def padded_rows(num_rows: int, dtype: torch.dtype) -> int:
    """The smallest multiple of the row tile that holds `num_rows`."""
    tile = row_tile(dtype)
    return -(-num_rows // tile) * tile


def pad_rows(x: Tensor) -> Tensor:
    """[n, D] → [padded_rows(n), D] with zero rows behind; `x` itself when it already fits."""
    missing = padded_rows(x.shape[0], x.dtype) - x.shape[0]
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x·weightᵀ + bias, tile by tile: [R, D] x [N, D] → [R, N], R a multiple of the row tile."""
    tile, rows = row_tile(x.dtype), x.shape[0]
    assert rows % tile == 0, f"{rows} rows are no multiple of the tile of {tile}"
    if weight.shape[0] < _MIN_OUTPUTS:
        # With fewer columns BLAS takes a path whose sums depend on the row's place in the tile.
        outputs = weight.shape[0]
        missing = _MIN_OUTPUTS - outputs
        wide = F.pad(weight, (0, 0, 0, missing))
        return linear(x, wide, None if bias is None else F.pad(bias, (0, missing)))[:, :outputs]
    x = x.contiguous()
    if rows <= tile:
        return F.linear(x, weight, bias)
    # One call per tile, not one bmm: with several threads a single-tile bmm is split differently
    # from a many-tile one, and in bfloat16 bmm copies the weight once per tile.
    parts = x.view(rows // tile, tile, -1).unbind()
    return torch.cat([F.linear(part, weight, bias) for part in parts])
