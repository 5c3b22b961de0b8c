"""Matrix products whose rows do not know how many rows there are.

The native kernels have one order for any number of rows. BLAS picks another summation order when
that number changes (one row against two, a full panel against a remainder), so without them every
product here is made of calls with one fixed number of rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels.native import native_kernels

_CPU = torch.device("cpu")

_ROW_TILES = {torch.float32: 8, torch.bfloat16: 16, torch.float16: 16}

_MIN_OUTPUTS = 4

# Elements of an int8 weight that are converted at once: enough to hide the cost of a call, few
# enough to stay in the second-level cache. Part of the order of sums, so the same everywhere.
_INT8_BLOCKS = {torch.float32: 1 << 18, torch.bfloat16: 1 << 20}


def row_tile(dtype: torch.dtype, device: torch.device = _CPU) -> int:
    """A matrix product takes a multiple of so many rows; KeyError for a dtype not served."""
    tile = _ROW_TILES[dtype]
    return tile if native_kernels("linear", dtype, device) is None else 1


def padded_rows(num_rows: int, dtype: torch.dtype, device: torch.device = _CPU) -> int:
    """The smallest multiple of the row tile that holds `num_rows`."""
    tile = row_tile(dtype, device)
    return -(-num_rows // tile) * tile


def pad_rows(x: Tensor) -> Tensor:
    """[n, D] → [padded_rows(n), D] with zero rows behind; `x` itself when it already fits."""
    missing = padded_rows(x.shape[0], x.dtype, x.device) - x.shape[0]
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def project(x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    """`linear` with the parameter `name`, its `_bias` and its int8 `_scale` where there are any."""
    return linear(x, weights[name], weights.get(f"{name}_bias"), weights.get(f"{name}_scale"))


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """x·weightᵀ + bias: [R, D] x [N, D] → [R, N], R a multiple of the row tile.

    An int8 `weight` comes with the float32 `scale` [N] of its rows.
    """
    native = native_kernels("linear", x.dtype, x.device)
    if native is not None:
        return native.linear(x, weight, bias, scale)
    return _tiled_linear(x, weight, bias, scale)


def _tiled_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    if scale is not None:
        return _int8_linear(x, weight, bias, scale)
    tile, rows = _ROW_TILES[x.dtype], x.shape[0]
    assert rows % tile == 0, f"{rows} rows are no multiple of the tile of {tile}"
    if weight.shape[0] < _MIN_OUTPUTS:
        # With fewer columns BLAS takes a path whose sums depend on the row's place in the tile.
        outputs = weight.shape[0]
        missing = _MIN_OUTPUTS - outputs
        wide = F.pad(weight, (0, 0, 0, missing))
        wide_bias = None if bias is None else F.pad(bias, (0, missing))
        return _tiled_linear(x, wide, wide_bias)[:, :outputs].contiguous()
    x = x.contiguous()
    if rows <= tile:
        return F.linear(x, weight, bias)
    # One call per tile, not one bmm: with several threads a single-tile bmm is split differently
    # from a many-tile one, and in bfloat16 bmm copies the weight once per tile.
    parts = x.view(rows // tile, tile, -1).unbind()
    return torch.cat([F.linear(part, weight, bias) for part in parts])


def _int8_linear(x: Tensor, values: Tensor, bias: Tensor | None, scale: Tensor) -> Tensor:
    """(x·valuesᵀ)·scale + bias: int8 is exact in every dtype, so only products are rounded.

    A block of rows of `values` is converted at a time and used for all rows of x; the weight
    never exists in full precision.
    """
    # Unscaled sums leave float16's range; float32 holds them.
    working = torch.float32 if x.dtype == torch.float16 else x.dtype
    outputs, width = values.shape
    num_blocks = -(-outputs * width // _INT8_BLOCKS[working])
    blocks = torch.split(values, -(-outputs // num_blocks))
    # One buffer for all: fresh memory for each block would cost more than the product.
    buffer = torch.empty(blocks[0].shape, dtype=working, device=values.device)
    wide = x.to(working)
    parts = [_tiled_linear(wide, buffer[: len(block)].copy_(block)) for block in blocks]
    sums = torch.cat(parts, dim=1)
    products = sums.float().mul_(scale)
    if bias is not None:
        products.add_(bias)
    return products.to(x.dtype)
