"""Native products beside `F.linear` and PyTorch's fixed row tiles, with cold weights.

.venv/bin/python -m benchmarks.kernels --dtype bfloat16 --threads 1 --shapes 1024x1600 2048x4096
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels.choice import TORCH, resolve_kernels
from models.kernels.native import native_kernels, use_kernels
from models.layers.rowwise import linear, pad_rows
from shards.quantization import quantize_rows

# More than any cache that is likely to be this process's own.
_COLD_BYTES = 1 << 30


def microseconds(call: Callable[[Tensor], object], weights: list[Tensor], repeats: int) -> float:
    """The best of `repeats` calls, each with the weight that was not used for longest."""
    best = float("inf")
    for i in range(repeats):
        begin = time.perf_counter()
        call(weights[i % len(weights)])
        best = min(best, time.perf_counter() - begin)
    return best * 1e6


def tiled(x: Tensor, weight: Tensor) -> Tensor:
    """The product without native kernels."""
    use_kernels(TORCH)
    return linear(pad_rows(x), weight)[: x.shape[0]]


def compare(shape: tuple[int, int], dtype: torch.dtype, rows: int) -> None:
    """One line: microseconds of each, and how fast the native ones read and multiply."""
    width, outputs = shape
    count = max(2, _COLD_BYTES // (width * outputs * dtype.itemsize))
    repeats = 2 * count if rows <= 64 else max(5, count // 8)
    weight = torch.randn(outputs, width).to(dtype)
    weights = [weight.clone() for _ in range(count)]
    x = torch.randn(rows, width).to(dtype)
    plain = microseconds(lambda w: F.linear(x, w), weights, repeats)
    in_tiles = microseconds(lambda w: tiled(x, w), weights, min(repeats, 40))
    use_kernels("native")
    native = native_kernels("linear", dtype, x.device)
    assert native is not None
    ours = microseconds(lambda w: native.linear(x, w), weights, repeats)
    values, scale = quantize_rows(weight)
    del weights
    int8 = [values.clone() for _ in range(count)]
    small = microseconds(lambda w: native.linear(x, w, None, scale), int8, repeats)
    read = weight.nbytes / ours / 1e3
    flops = 2 * rows * width * outputs / ours / 1e3
    print(
        f"{width:5}x{outputs:<5} {rows:5} {plain:9.0f} {in_tiles:10.0f} {ours:8.0f}"
        f" {read:6.1f} {flops:8.0f} {small:8.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--shapes", nargs="+", default=["1024x1600", "2048x4096", "4096x2048"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 64, 512])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    kernels = resolve_kernels("native")
    print(f"{args.dtype}, {args.threads} threads, kernels {kernels}; microseconds")
    print("      shape  rows  F.linear  row tiles   native   GB/s  GFLOP/s     int8")
    for shape in args.shapes:
        width, outputs = (int(size) for size in shape.split("x"))
        for rows in args.rows:
            compare((width, outputs), getattr(torch, args.dtype), rows)


if __name__ == "__main__":
    main()
