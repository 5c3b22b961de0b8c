"""What it costs that no bit depends on the batch: our kernels against the fastest of each product.

The other side may choose, for every number of rows and shape, between the kernels as they are,
those of the other variants and PyTorch's own product, whichever was fastest when it was tried.
Attention, scan and norms are the same on both sides.

    python -m benchmarks.invariance_cost FOLDER... --batches 1 8 32
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contestants import Engine, Timed
from benchmarks.engine import decode_rate, load_line, prompts_of
from models.interface import ExpertWeights
from models.kernels.native import NativeKernels, native_kernels
from models.kernels.variants import supported_variants

_TRIES = 3
Way = Callable[[], Tensor]


class Fastest:
    """Remembers which way was fastest for each kind of call."""

    def __init__(self) -> None:
        self._seconds: dict[object, list[list[float]]] = {}
        self._chosen: dict[object, int] = {}

    def __call__(self, kind: object, ways: Sequence[Way]) -> Tensor:
        """Run the fastest way; the first calls of a kind, with weights not in a cache, try all."""
        if kind in self._chosen:
            return ways[self._chosen[kind]]()
        seconds = self._seconds.setdefault(kind, [[] for _ in ways])
        way = min(range(len(ways)), key=lambda i: len(seconds[i]))
        begin = time.perf_counter()
        out = ways[way]()
        seconds[way].append(time.perf_counter() - begin)
        if all(len(each) == _TRIES for each in seconds):
            medians = [statistics.median(each) for each in seconds]
            self._chosen[kind] = medians.index(min(medians))
        return out


@contextmanager
def free_order(fastest: Fastest) -> Iterator[None]:
    """Products in whatever order is fastest for their shape."""
    variants = [NativeKernels(variant) for variant in supported_variants()]
    linear, experts = NativeKernels.linear, NativeKernels.experts

    def any_linear(self: NativeKernels, x: Tensor, weight: Tensor, *extra: Tensor | None) -> Tensor:
        ways = [partial(linear, kernels, x, weight, *extra) for kernels in variants]
        if weight.dtype == x.dtype:
            ways.append(partial(F.linear, x, weight, extra[0] if extra else None))
        return fastest(("linear", len(x), weight.shape, weight.dtype), ways)

    def any_experts(
        self: NativeKernels, x: Tensor, groups: Sequence[tuple[ExpertWeights, int]]
    ) -> Tensor:
        ways = [partial(experts, kernels, x, groups) for kernels in variants]
        if groups and groups[0][0].gate.dtype == x.dtype:
            ways.append(partial(plain_experts, x, groups))
        # Calls of about as many rows for about as many experts are of a kind.
        return fastest(("experts", len(x), sum(count > 0 for _, count in groups)), ways)

    with (
        patch.object(NativeKernels, "linear", any_linear),
        patch.object(NativeKernels, "experts", any_experts),
    ):
        yield


def plain_experts(x: Tensor, groups: Sequence[tuple[ExpertWeights, int]]) -> Tensor:
    """PyTorch's own products, an expert at a time."""
    parts = x.split([count for _, count in groups])
    outputs = []
    for part, (w, _) in zip(parts, groups, strict=True):
        hidden = F.silu(F.linear(part, w.gate)) * F.linear(part, w.up)
        outputs.append(F.linear(hidden, w.down))
    return torch.cat(outputs)


def compare(folder: Path, args: argparse.Namespace) -> None:
    """One line for each batch: tokens per second of both sides and what is lost."""
    engine = Engine(folder, max(args.batches))
    for batch in args.batches:
        prompts = prompts_of(batch, args.prompt)
        fastest = Fastest()
        runs: dict[str, list[Timed]] = {"ours": [], "free": []}
        with free_order(fastest):
            engine.run(prompts, args.tokens)  # tries every way
        engine.run(prompts, args.tokens)
        for turn in range(args.rounds):
            for side in ("ours", "free") if turn % 2 else ("free", "ours"):
                if side == "ours":
                    runs[side].append(engine.run(prompts, args.tokens))
                else:
                    with free_order(fastest):
                        runs[side].append(engine.run(prompts, args.tokens))
        _print(folder.name, batch, args.prompt, runs)


def _print(name: str, batch: int, prompt: int, runs: dict[str, list[Timed]]) -> None:
    def prefill(side: str) -> float:
        return batch * prompt / statistics.median(run.prefill for run in runs[side])

    rates: dict[str, Any] = {
        "prefill": (prefill("ours"), prefill("free")),
        "decode": (decode_rate(runs["ours"]), decode_rate(runs["free"])),
    }
    for phase, (ours, free) in rates.items():
        print(f"{name:12} {batch:3} {phase:8} {ours:8.1f} {free:8.1f} {1 - ours / free:7.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    assert native_kernels("linear", torch.bfloat16, torch.device("cpu")), "no native kernels here"
    print(load_line())
    print(f"{'model':12} seq {'phase':8} {'ours':>8} {'free':>8}  cost   (tokens/s)")
    for folder in args.folders:
        compare(folder, args)


if __name__ == "__main__":
    main()
